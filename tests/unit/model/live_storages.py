"""Bytes of the tensors that are alive, however they are held."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveStorages(TorchDispatchMode):
    """Remembers every storage that an operation inside returns, without keeping it alive.

    ``peak_bytes`` is the most that was alive after any operation since it was last set to 0, if ``watch_peak``.
    """

    def __init__(self, *, watch_peak: bool = False) -> None:
        super().__init__()
        self._seen: dict[int, tuple[StorageWeakRef, int]] = {}
        self._watch_peak = watch_peak
        self.peak_bytes = 0

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Collection[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self._seen.setdefault(storage._cdata, (StorageWeakRef(storage), storage.nbytes()))
        if self._watch_peak:
            self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return result

    def live_bytes(self, *, without: Collection[torch.Tensor] = ()) -> int:
        """Bytes that are alive now, the storages of ``without`` left out."""
        self._seen = {key: entry for key, entry in self._seen.items() if not entry[0].expired()}
        left_out = {tensor.untyped_storage()._cdata for tensor in without}
        return sum(num_bytes for key, (_, num_bytes) in self._seen.items() if key not in left_out)
