"""Whether code that fast/ replaces is still as it was when its replacement was written.

    if is_unchanged(ResidualNorm, "1f2e3d4c"): ...

Whoever edits plain code sees the edit take effect, on GPUs, too: its replacement is not used any
more. After editing the replacement as well, store the new digest, which the warning states.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable
from functools import cache


@cache
def is_unchanged(plain: type | Callable, digest: str) -> bool:
    """Whether the source of a class or function has this digest. If not, a warning says so."""
    found = digest_of(plain)
    if found != digest:
        warnings.warn(
            f"{plain.__qualname__} has been edited (digest {found}), so its faster replacement in "
            "fast/ is not used",
            stacklevel=2,
        )
    return found == digest


def digest_of(plain: type | Callable) -> str:
    """A digest of the source, comments included."""
    return hashlib.sha256(inspect.getsource(plain).encode()).hexdigest()[:8]
