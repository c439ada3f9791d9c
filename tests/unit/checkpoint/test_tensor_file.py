from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from safetensors.torch import load_file

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.checkpoint.tensor_file import (
    StoredTensor,
    open_tensor_file,
    tensor_file_bytes,
    write_tensor_file,
)
from qwen3next_train.errors import CheckpointError
from tests.unit.checkpoint.support import HookedFilesystem


def _stored(**tensors: torch.Tensor) -> list[StoredTensor]:
    return [StoredTensor(name, tensor, tensor.dtype) for name, tensor in tensors.items()]


def test_the_library_reads_what_we_write_in_every_dtype_and_shape(tmp_path: Path) -> None:
    tensors = {
        "u8": torch.arange(3, dtype=torch.uint8),
        "bf16": torch.linspace(-3, 3, 7).to(torch.bfloat16),
        "f32": torch.randn(2, 3, 4),
        "f64": torch.tensor(1.5, dtype=torch.float64),
        "i64": torch.tensor([-(2**40)]),
        "flag": torch.tensor([True, False]),
        "empty": torch.empty(0, 4),
        "transposed": torch.arange(6.0).reshape(2, 3).t(),
    }
    record = write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x.safetensors", _stored(**tensors))
    data = (tmp_path / "x.safetensors").read_bytes()
    assert (record.name, record.size, record.xxh3_128) == ("x.safetensors", len(data), xxhash.xxh3_128_hexdigest(data))
    assert tensor_file_bytes(_stored(**tensors)) == len(data)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].equal(tensor)
        assert loaded[name].data_ptr() % tensor.element_size() == 0


def test_conversion_happens_while_writing(tmp_path: Path) -> None:
    halves = torch.tensor([1.0, -2.5], dtype=torch.bfloat16)
    zeros = torch.zeros(1).expand(5)
    stored = [StoredTensor("w", halves, torch.float32), StoredTensor("m", zeros, torch.float32)]
    write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x", stored)
    loaded = load_file(tmp_path / "x")
    assert loaded["w"].dtype == torch.float32
    assert loaded["w"].tolist() == [1.0, -2.5]
    assert loaded["m"].tolist() == [0.0] * 5


def test_a_long_tensor_is_written_piece_by_piece(tmp_path: Path) -> None:
    long = torch.arange(20_000_000, dtype=torch.int64).to(torch.float32)
    pieces: list[int] = []
    filesystem = HookedFilesystem(lambda name, arguments: pieces.append(len(arguments[1])) if name == "write" else None)
    write_tensor_file(filesystem, tmp_path / "x", _stored(long=long))
    assert pieces[1:] == [16 << 20] * 4 + [80_000_000 - (64 << 20)]
    assert open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x").get_slice("long")[16_777_210:16_777_214].tolist() == [
        16_777_210.0,
        16_777_211.0,
        16_777_212.0,
        16_777_213.0,
    ]


def test_pieces_that_are_converted_share_memory_and_keep_their_values(tmp_path: Path) -> None:
    # Five pieces of fp32 from bf16, between tensors that go out as they lie.
    long = torch.arange(20_000_000, dtype=torch.int32).remainder_(251).to(torch.bfloat16)
    first, last = torch.arange(7.0), torch.arange(5.0).flip(0)
    stored = [StoredTensor(name, x, torch.float32) for name, x in (("a", first), ("long", long), ("z", last[::2]))]
    addresses: list[int] = []

    def note(name: str, arguments: tuple[Any, ...]) -> None:
        if name == "write" and len(arguments[1]) > 1_000_000:
            addresses.append(np.frombuffer(arguments[1], dtype=np.uint8).ctypes.data)

    record = write_tensor_file(HookedFilesystem(note), tmp_path / "x", stored)
    assert len(addresses) == 5
    assert len(set(addresses)) == 1
    loaded = load_file(tmp_path / "x")
    assert loaded["long"].equal(long.float())
    assert (loaded["a"].tolist(), loaded["z"].tolist()) == ([0, 1, 2, 3, 4, 5, 6], [4, 2, 0])
    assert record.xxh3_128 == xxhash.xxh3_128_hexdigest((tmp_path / "x").read_bytes())


def test_nothing_is_overwritten_and_no_link_followed(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "dangling").symlink_to(tmp_path / "elsewhere")
    for name in ("there", "link", "dangling"):
        with pytest.raises(FileExistsError):
            write_tensor_file(LOCAL_FILESYSTEM, tmp_path / name, _stored(x=torch.ones(1)))
    assert (tmp_path / "there").read_text() == "precious"
    assert not (tmp_path / "elsewhere").exists()


def test_files_are_not_readable_by_others(tmp_path: Path) -> None:
    write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x", _stored(x=torch.ones(1)))
    assert (tmp_path / "x").stat().st_mode & 0o137 == 0


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "header length 0 does not fit a file of 0 bytes"),
        (b"\x10\0\0", "does not fit"),
        (struct.pack("<Q", 10 * 2**30) + b"{}", "header length 10737418240 does not fit"),
        (struct.pack("<Q", 2**64 - 1) + b"{}", "does not fit"),
        (struct.pack("<Q", 2) + b"xx", "not a safetensors file"),
        (
            struct.pack("<Q", 64) + b'{"x":{"dtype":"F32","shape":[-4],"data_offsets":[0,16]}}'.ljust(64) + bytes(16),
            "not a safetensors file",
        ),
        (
            struct.pack("<Q", 64) + b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,99]}}'.ljust(64) + bytes(16),
            "not a safetensors file",
        ),
    ],
)
def test_an_impossible_header_is_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError, match=reason):
        open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x")


def test_a_header_over_the_limit_is_refused_however_long_the_file(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as file:
        file.write(struct.pack("<Q", 10**9))
        file.truncate(2 * 10**9)
    with pytest.raises(CheckpointError, match="header length 1000000000 does not fit"):
        open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x")


def test_a_pickle_is_not_a_tensor_file(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    payload = b"cposix\nsystem\n(S'touch " + str(canary).encode() + b"'\ntR."
    (tmp_path / "x").write_bytes(payload)
    with pytest.raises(CheckpointError):
        open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x")
    assert not canary.exists()


def test_links_and_missing_files_are_refused(tmp_path: Path) -> None:
    write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "x", _stored(x=torch.ones(1)))
    (tmp_path / "link").symlink_to(tmp_path / "x")
    with pytest.raises(CheckpointError, match="symbolic link, not a regular file"):
        open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "link")
    with pytest.raises(CheckpointError, match="missing"):
        open_tensor_file(LOCAL_FILESYSTEM, tmp_path / "y")


@pytest.mark.gpu
def test_tensors_on_a_gpu_are_written_like_those_on_the_host(tmp_path: Path) -> None:
    tensor = torch.arange(20_000_000, dtype=torch.float32)
    on_host = write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "a", _stored(x=tensor))
    on_gpu = write_tensor_file(LOCAL_FILESYSTEM, tmp_path / "b", _stored(x=tensor.cuda()))
    assert on_gpu.xxh3_128 == on_host.xxh3_128
