"""A copy of one rank's training state in host memory, from which it is written while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch

from qwen3next_train.engine.base import Fragment, FragmentKind

_ALIGNMENT = 64
"""Bytes: a line of a processor's cache, and a multiple of every element."""
_HOST_REGISTER_PORTABLE = 1


def snapshot_bytes(fragments: Sequence[Fragment]) -> int:
    """Size of the buffer that takes these fragments, every tensor in its own dtype."""
    return sum(_aligned(tensor.nbytes) for fragment in fragments for tensor in fragment.tensors.values())


class SnapshotBuffer:
    """Host memory for one state, which every save fills again.

    For a GPU it is pinned: copies to it run beside kernels, at the full speed of the bus. It is registered with CUDA
    and not taken from torch's pool of pinned memory, which rounds every block up to a power of two.

    Args:
        num_bytes: of :func:`snapshot_bytes`.
        device: where the model is.

    Raises:
        RuntimeError: there is no such memory, or it cannot be pinned.
    """

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._memory = torch.empty(num_bytes, dtype=torch.uint8)
        self._is_pinned = False
        if device.type == "cuda" and num_bytes:
            # Touched by many threads first: CUDA would have the kernel make the pages one by one.
            self._memory.zero_()
            error = int(
                torch.cuda.cudart().cudaHostRegister(self._memory.data_ptr(), num_bytes, _HOST_REGISTER_PORTABLE)
            )
            if error:
                # CUDA keeps the error for whoever asks next, which would be a kernel of training.
                with suppress(RuntimeError):
                    torch.ones(1, device=device)
                raise RuntimeError(f"host memory cannot be pinned: cudaHostRegister returns {error}")
            self._is_pinned = True

    @property
    def num_bytes(self) -> int:
        """Its size."""
        return self._memory.numel()

    def close(self) -> None:
        """Unpin the memory, which is freed with the last tensor in it."""
        if self._is_pinned:
            self._is_pinned = False
            torch.cuda.cudart().cudaHostUnregister(self._memory.data_ptr())

    def copy(self, fragments: Sequence[Fragment]) -> list[Fragment]:
        """Copy fragments; those from a GPU are there when its current stream has come so far."""
        copies, offset = [], 0
        for fragment in fragments:
            tensors: dict[FragmentKind, torch.Tensor] = {}
            for kind, tensor in fragment.tensors.items():
                tensors[kind] = self._memory[offset : offset + tensor.nbytes].view(tensor.dtype)
                tensors[kind].copy_(tensor, non_blocking=True)
                offset += _aligned(tensor.nbytes)
            copies.append(Fragment(fragment.name, fragment.runs, tensors))
        return copies


class Snapshot:
    """The state between two updates, copied by another thread while the next forward and backward pass run.

    Made by the thread that trains, which calls :meth:`wait` before it changes the state.

    Args:
        fragments: this rank's share of the state.
        buffer: of at least :func:`snapshot_bytes`; what it holds is overwritten.
        device: where the model is.
    """

    def __init__(self, fragments: Sequence[Fragment], buffer: SnapshotBuffer, device: torch.device) -> None:
        self._fragments = fragments
        self._buffer = buffer
        self._device = device
        self._is_launched = threading.Event()
        # Of the state; once the copy is launched, of the copy.
        self._complete = torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None

    def take(self) -> Iterator[Fragment]:
        """The copy, when it is complete; to be called in the thread that writes it."""
        try:
            copies = self._copy()
        finally:
            self.release()
        yield from copies

    def release(self) -> None:
        """Let :meth:`wait` return also when nothing was copied."""
        self._is_launched.set()

    def wait(self) -> None:
        """Return when the host, and let the device's current stream go on when the device may change the state."""
        self._is_launched.wait()
        if self._complete is not None:
            torch.cuda.current_stream(self._device).wait_event(self._complete)

    def _copy(self) -> list[Fragment]:
        with torch.no_grad():
            if self._complete is None:
                return self._buffer.copy(self._fragments)
            torch.cuda.set_device(self._device)
            stream = torch.cuda.Stream(self._device)
            with torch.cuda.stream(stream):
                stream.wait_event(self._complete)
                copies = self._buffer.copy(self._fragments)
                self._complete = stream.record_event()
            self.release()
            self._complete.synchronize()
            return copies


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
