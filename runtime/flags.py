"""Types of command-line flags, and passing flags on."""

import argparse
import math
from collections.abc import Iterable


def at_least(minimum: int):
    """An argparse type: an integer that is not less than `minimum`."""

    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return integer


def probability(text: str) -> float:
    """An argparse type: a number from 0 to 1."""
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return float(text)


def finite(text: str) -> float:
    """An argparse type: a number that is neither infinite nor NaN."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text} is not finite")
    return float(text)


def flags_named(names: Iterable[str], args: argparse.Namespace) -> dict:
    """The flags with these names, {name: value}: arguments of a class to be constructed.

    Lists become tuples. Flags without a value (None) are left out.
    """
    values = {name: getattr(args, name, None) for name in names}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in values.items()
        if value is not None
    }
