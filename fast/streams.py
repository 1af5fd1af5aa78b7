"""Side streams: work that needs little of a GPU runs beside work that fills it.

    side = SideStream(device, priority=-1)

Source: torch.cuda.Stream, see "CUDA semantics" in the PyTorch docs.
"""

from functools import cache

import torch
from torch import Tensor


@cache
def get_stream(device: torch.device, *, priority: int) -> torch.cuda.Stream:
    """The side stream of a priority (negative: scheduled before the default stream).

    There is one stream per priority, since libraries keep a workspace for each stream. (Keyword
    only: `cache` would take a positional priority for another key.)
    """
    return torch.cuda.Stream(device, priority=priority)


class SideStream:
    """A context whose kernels run on a CUDA stream beside the current one; no effect on a CPU.

    side = SideStream(device, priority=-1)
    side.wait()        # work on the side stream starts after all that is launched so far
    with side:
        y = f(x)       # keep x, and do not use y, before join()
    side.join()        # all that is launched from here on starts after the side stream's work
    """

    def __init__(self, device: torch.device, priority: int):
        self.device = device
        self.stream = get_stream(device, priority=priority) if device.type == "cuda" else None

    def wait(self) -> None:
        """Order later work on the side stream after the current stream's work so far."""
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def __enter__(self) -> None:
        if self.stream:
            self.context = torch.cuda.stream(self.stream)
            self.context.__enter__()

    def __exit__(self, *exception) -> None:
        if self.stream:
            self.context.__exit__(*exception)

    def join(self, *results: Tensor) -> None:
        """Order later work on the current stream after the side stream's work so far.

        results: tensors allocated on a side stream that never waits for the current one. Their
        memory is not reused before the current stream has read them.
        """
        if self.stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            for tensor in results:
                tensor.record_stream(current)
