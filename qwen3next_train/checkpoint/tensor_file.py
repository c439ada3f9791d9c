"""Files in the safetensors format: written by streaming, read through the ``safetensors`` library.

The library's own writer neither hashes while it writes nor bounds memory (it wants every tensor on the host at
once) nor syncs nor refuses to overwrite, so the forty lines of writing are ours. Format:
https://huggingface.co/docs/safetensors/index#format - eight bytes of header length, a JSON header padded with
spaces, then the tensors' raw little-endian bytes without gaps. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash
from safetensors import SafetensorError, safe_open

from qwen3next_train.checkpoint.filesystem import Filesystem, created_file
from qwen3next_train.errors import CheckpointError

MAX_HEADER_BYTES = 64 << 20
"""Longest header that is read; the largest we write (one rank, all experts apart) is below half of it."""

_CHUNK_BYTES = 16 << 20
_LENGTH_BYTES = 8
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.int64: "I64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor to write.

    Args:
        name: key in the file.
        tensor: any device, shape and stride.
        dtype: dtype in the file; the tensor is converted piece by piece when it has another.
    """

    name: str
    tensor: torch.Tensor
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.dtype.itemsize


@dataclass(frozen=True)
class FileRecord:
    """What identifies a written file.

    Args:
        name: name inside the checkpoint directory.
        size: bytes.
        xxh3_128: hash of the content, 32 hexadecimal digits.
    """

    name: str
    size: int
    xxh3_128: str


def write_tensor_file(fs: Filesystem, path: Path, tensors: Sequence[StoredTensor]) -> FileRecord:
    """Create ``path`` with ``tensors``, hashed while written and synced.

    At most 16 MiB of one tensor are copied to the host at a time.

    Raises:
        OSError: the file exists or cannot be written; what was written stays for the caller to remove.
    """
    ordered = _in_file_order(tensors)
    header = _header(ordered)
    digest = xxhash.xxh3_128(header)
    size = len(header)
    staging = _Staging()
    with created_file(fs, path) as descriptor:
        fs.write(descriptor, header)
        for stored in ordered:
            for chunk in _host_chunks(stored, staging):
                digest.update(chunk)
                fs.write(descriptor, chunk)
                size += len(chunk)
    return FileRecord(path.name, size, digest.hexdigest())


def tensor_file_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Size of the file that :func:`write_tensor_file` would write."""
    return len(_header(_in_file_order(tensors))) + sum(stored.num_bytes for stored in tensors)


def open_tensor_file(fs: Filesystem, path: Path) -> safe_open:
    """Open a file for lazy reading (memory-mapped) after checking that its header is sane.

    Raises:
        CheckpointError: not a regular file, an impossible header length, or not the format.
        OSError: the file cannot be read.
    """
    entry = fs.entry(path)
    if entry is None or entry.kind != "file":
        raise CheckpointError(f"{path}: {'missing' if entry is None else entry.kind}, not a regular file")
    descriptor = fs.open(path)
    try:
        prefix = fs.read(descriptor, _LENGTH_BYTES)
    finally:
        fs.close(descriptor)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, entry.size - _LENGTH_BYTES):
        raise CheckpointError(f"{path}: header length {length} does not fit a file of {entry.size} bytes")
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error


def _in_file_order(tensors: Sequence[StoredTensor]) -> list[StoredTensor]:
    # Larger elements first: with no gaps allowed, this keeps every tensor aligned to its element size.
    return sorted(tensors, key=lambda stored: -stored.dtype.itemsize)


def _header(ordered: Sequence[StoredTensor]) -> bytes:
    # The format is little-endian and we write memory as it lies.
    assert sys.byteorder == "little"
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for stored in ordered:
        end = offset + stored.num_bytes
        entries[stored.name] = {
            "dtype": _DTYPE_NAMES[stored.dtype],
            "shape": list(stored.tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    assert len(entries) == len(ordered) + 1, "two tensors of one name"
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _LENGTH_BYTES)
    assert len(text) <= MAX_HEADER_BYTES, f"{len(ordered)} tensors are too many for one file"
    return struct.pack("<Q", len(text)) + text


class _Staging:
    """Host memory for one chunk, which the next one overwrites.

    Memory of its own for every chunk would cost three times what is left then: the system has to make every page anew,
    and CUDA copies to memory that is not pinned through memory that is.
    """

    def __init__(self) -> None:
        self._memory: torch.Tensor | None = None

    def copy(self, chunk: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """``chunk`` on the host in ``dtype``, until the next call."""
        if self._memory is None:
            self._memory = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=chunk.device.type == "cuda")
        return self._memory[: chunk.numel() * dtype.itemsize].view(dtype).copy_(chunk)


def _host_chunks(stored: StoredTensor, staging: _Staging) -> Iterator[memoryview]:
    """The tensor's bytes, piece by piece; each piece is valid until the next."""
    flat = stored.tensor.detach().reshape(-1)
    step = _CHUNK_BYTES // stored.dtype.itemsize
    for start in range(0, flat.numel(), step):
        chunk = flat[start : start + step]
        if chunk.device.type != "cpu" or chunk.dtype != stored.dtype or not chunk.is_contiguous():
            chunk = staging.copy(chunk, stored.dtype)
        # numpy has no bfloat16, so the bytes go out as bytes.
        yield chunk.view(torch.uint8).numpy().data
