"""Types of command-line flags."""
import argparse


def at_least(minimum: int):
    """An argparse type: an integer that is not less than `minimum`."""
    def integer(text: str) -> int:
        if int(text) < minimum:
            raise argparse.ArgumentTypeError(f"{text} is less than {minimum}")
        return int(text)

    return integer
