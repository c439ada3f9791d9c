"""Numbers on their way from the device to the host, which waits for them alone."""

from __future__ import annotations

import torch


class HostCopy:
    """A copy of ``values`` that the device makes when its work so far is done, and not when all is done that follows.

    Whoever reads a tensor directly (``float``, ``.cpu()``) waits for everything that was launched until then.

    Args:
        values: any shape and dtype; may be changed afterwards.
    """

    def __init__(self, values: torch.Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
            self._done = torch.cuda.current_stream(values.device).record_event()
        else:
            self._values = values.clone()

    def read(self) -> torch.Tensor:
        """The values, on the host."""
        if self._done is not None:
            self._done.synchronize()
        return self._values
