"""Checks of what is asked of a model: a clear error, instead of noise or an error from inside."""

import numpy as np
from torch import nn


def check_request(
    model: nn.Module, output_size: tuple[int, int] | None, top_k: int, is_first: bool = True
) -> None:
    """Raise an error unless inference can answer the request.

    RuntimeError if a module is in training mode (gates would be sampled, paths dropped); all
    modules are checked at the first frame of a video, later the model alone. ValueError unless
    top_k is a positive int and output_size is two of them or None.
    """
    for name, module in model.named_modules() if is_first else [("", model)]:
        if module.training:
            raise RuntimeError(
                f"{name or 'the model'} is in training mode: call model.eval() first"
            )
    if not is_positive(top_k):
        raise ValueError(f"top_k must be an int of at least 1, not {top_k!r}")
    if output_size is not None and not is_size(output_size):
        raise ValueError(
            f"output_size must be (height, width), two ints of at least 1, not {output_size!r}"
        )


def is_positive(number) -> bool:
    """Whether it is an int of at least 1."""
    is_int = isinstance(number, (int, np.integer)) and not isinstance(number, bool)
    return is_int and number >= 1


def is_size(pair) -> bool:
    """Whether it is a tuple or list of two ints of at least 1."""
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(map(is_positive, pair))
