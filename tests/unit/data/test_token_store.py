from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data.token_store import HEADER, DocumentRange, TokenStore, store_paths, token_dtype
from qwen3next_train.errors import DataError
from tests.unit.data.corpus import everything, write_megatron, write_store

DOCUMENTS = [[5, 6, 7, 0], [8, 0], [9, 10, 11, 12, 0]]


def test_our_store_is_byte_for_byte_megatrons(tmp_path: Path) -> None:
    write_store(tmp_path / "ours", DOCUMENTS)
    write_megatron(tmp_path / "theirs", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


@pytest.mark.parametrize(("code", "dtype"), [(1, "u1"), (2, "i1"), (3, "<i2"), (4, "<i4"), (5, "<i8"), (8, "<u2")])
def test_reads_all_integer_dtypes(tmp_path: Path, code: int, dtype: str) -> None:
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=code, dtype=dtype)
    store = TokenStore(tmp_path / "store")
    assert (store.num_tokens, store.num_documents) == (11, 3)
    assert store.read(3, 8).tolist() == [0, 8, 0, 9, 10]
    assert store.meta() is None


def test_documents_of_several_sequences_and_empty_ones(tmp_path: Path) -> None:
    sequences = [[1, 2], [3], [], [4, 5, 6], [7]]
    write_megatron(tmp_path / "store", sequences, [0, 2, 2, 3, 5, 5], code=4, dtype="<i4")
    store = TokenStore(tmp_path / "store")
    assert [store.document_start(index) for index in range(6)] == [0, 3, 3, 3, 7, 7]
    documents = everything(store)
    assert documents.document_starts_between(0, 7).tolist() == [0, 3]
    assert documents.document_starts_between(1, 3).tolist() == []
    assert documents.document_starts_between(1, 8).tolist() == [3]
    tail = DocumentRange(store, range(3, 5))
    assert tail.num_tokens == 4
    assert tail.read(0, 4).tolist() == [4, 5, 6, 7]
    assert tail.document_starts_between(0, 4).tolist() == [0]


def test_starts_agree_with_a_linear_search(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 9, 200)
    store = write_store(tmp_path / "store", [[0] * length for length in lengths])
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    documents = DocumentRange(store, range(20, 190))
    base = starts[20]
    for _ in range(200):
        first, last = sorted(rng.integers(0, documents.num_tokens + 1, 2))
        inside = starts[20:190] - base
        expected = inside[(inside >= first) & (inside < last)]
        assert documents.document_starts_between(first, last).tolist() == expected.tolist()


def test_dtype_follows_megatron() -> None:
    assert token_dtype(65499) == np.uint16
    assert token_dtype(65500) == np.int32


Edit = Callable[[bytearray], bytes | bytearray]


def cut(size: int) -> Edit:
    return lambda raw: raw[:size]


def put(offset: int, layout: str, *values: int) -> Edit:
    def edit(raw: bytearray) -> bytearray:
        struct.pack_into(layout, raw, offset, *values)
        return raw

    return edit


LENGTHS, POINTERS, INDICES = HEADER.size, HEADER.size + 3 * 4, HEADER.size + 3 * 12
DAMAGES: list[tuple[str, str, Edit, str]] = [
    ("bin one byte short", ".bin", cut(-1), "not a multiple of 2"),
    ("bin one token short", ".bin", cut(-2), "expected 22 bytes"),
    ("bin one token long", ".bin", lambda raw: raw + b"\0\0", "found 24"),
    ("bin empty", ".bin", cut(0), "found 0"),
    ("idx empty", ".idx", cut(0), "header of 34 bytes, found 0"),
    ("idx header cut", ".idx", cut(20), "found 20 bytes"),
    ("idx tail cut", ".idx", cut(-1), "expected 102 bytes"),
    ("idx longer", ".idx", lambda raw: raw + b"\0" * 3, "found 105"),
    ("magic", ".idx", put(0, "<B", 0), "expected magic"),
    ("version", ".idx", put(9, "<Q", 2), "expected version 1, found 2"),
    ("dtype float", ".idx", put(17, "<B", 7), "integer dtype"),
    ("dtype unknown", ".idx", put(17, "<B", 200), "found 200"),
    ("dtype of other size", ".idx", put(17, "<B", 4), "not a multiple of 4"),
    ("sequence count huge", ".idx", put(18, "<Q", 2**64 - 1), "18446744073709551615 sequences"),
    ("sequence count zero", ".idx", put(18, "<Q", 0), "for 0 sequences"),
    ("document count huge", ".idx", put(26, "<Q", 2**63), "9223372036854775808 document indices"),
    ("length negative", ".idx", put(LENGTHS + 4, "<i", -2), "length of sequence 1: expected >= 0"),
    ("length wrong", ".idx", put(LENGTHS, "<i", 3), "pointer of sequence 1: expected 6, found 8"),
    ("pointers swapped", ".idx", put(POINTERS + 8, "<qq", 12, 8), "pointer of sequence 1: expected 8, found 12"),
    ("pointer negative", ".idx", put(POINTERS, "<q", -8), "pointer of sequence 0: expected 0, found -8"),
    ("indices start late", ".idx", put(INDICES, "<q", 1), "document index 0"),
    ("indices fall", ".idx", put(INDICES + 8, "<qq", 2, 1), "document index 2"),
    ("index negative", ".idx", put(INDICES + 8, "<q", -1), "document index 1"),
    ("last index too small", ".idx", put(INDICES + 24, "<q", 2), "last document index: expected 3, found 2"),
    ("last index too large", ".idx", put(INDICES + 24, "<q", 4), "last document index: expected 3, found 4"),
]


@pytest.mark.parametrize(("suffix", "edit", "message"), [case[1:] for case in DAMAGES], ids=[c[0] for c in DAMAGES])
def test_damage_is_one_line_that_names_the_file(tmp_path: Path, suffix: str, edit: Edit, message: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    path = tmp_path / f"store{suffix}"
    path.write_bytes(edit(bytearray(path.read_bytes())))
    with pytest.raises(DataError) as caught:
        TokenStore(tmp_path / "store")
    text = str(caught.value)
    assert message in text
    assert text.startswith(str(tmp_path / "store"))
    assert "\n" not in text


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    (tmp_path / f"store{suffix}").unlink()
    with pytest.raises(DataError, match=r"store.*No such file"):
        TokenStore(tmp_path / "store")


def test_store_without_documents_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", [], [0], code=8, dtype="<u2")
    with pytest.raises(DataError, match="store is empty"):
        TokenStore(tmp_path / "store")


def test_store_of_empty_documents_opens_with_no_tokens(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", [[], []], [0, 1, 2], code=8, dtype="<u2")
    assert TokenStore(tmp_path / "store").num_tokens == 0


def test_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", DOCUMENTS)
    with (tmp_path / "store.bin").open("r+b") as file:
        file.truncate(10)
    assert store.read(0, 5).tolist() == [5, 6, 7, 0, 8]
    with pytest.raises(DataError, match="expected 4 bytes at 8, found 2; the file was cut"):
        store.read(4, 6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"surprise": 1}', "cannot be read"),
        ('{"source":"s","tokenizer_fingerprint":"f","num_documents":3,"num_tokens":12,"num_bytes":1}', "the store has"),
        ('{"source":"s","tokenizer_fingerprint":"f","num_documents":3,"num_tokens":"x","num_bytes":1}', "counts"),
    ],
)
def test_bad_sidecar(tmp_path: Path, content: str, message: str) -> None:
    store = write_store(tmp_path / "store", DOCUMENTS)
    store_paths(tmp_path / "store")[2].write_text(content)
    with pytest.raises(DataError, match=message):
        store.meta()
