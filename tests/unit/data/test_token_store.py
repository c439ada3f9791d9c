from __future__ import annotations

import errno
import json
import os
import shutil
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data.store_index import HEADER
from qwen3next_train.data.store_meta import StoreMeta
from qwen3next_train.data.token_store import DocumentRange, TokenStore, store_paths, token_dtype
from qwen3next_train.errors import DataError, StorageError
from tests.unit.data.corpus import counting_store, everything, write_megatron, write_store

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
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
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
    with pytest.raises(DataError, match=r"store\..*: missing; .* store.bin with store.idx beside it"):
        TokenStore(tmp_path / "store")


def test_store_without_documents_is_refused(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", [], [0], code=8, dtype="<u2")
    with pytest.raises(DataError, match="store is empty"):
        TokenStore(tmp_path / "store")


def test_store_of_empty_documents_opens_with_no_tokens(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", [[], []], [0, 1, 2], code=8, dtype="<u2")
    assert TokenStore(tmp_path / "store").num_tokens == 0


def test_file_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
    store = TokenStore(tmp_path / "store")
    os.truncate(tmp_path / "store.bin", 10)
    assert store.read(0, 5).tolist() == [5, 6, 7, 0, 8]
    with pytest.raises(DataError, match="expected 4 bytes at 8, found 2; the file was cut"):
        store.read(4, 6)


@pytest.fixture(scope="module")
def many_documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prefix of a store whose index is larger than what is kept of it in memory."""
    prefix = tmp_path_factory.mktemp("many") / "store"
    counting_store(prefix, [1] * 100_000)
    return prefix


def test_index_cut_after_opening_is_an_error_not_a_crash(tmp_path: Path, many_documents: Path) -> None:
    shutil.copytree(many_documents.parent, tmp_path, dirs_exist_ok=True)
    store = TokenStore(tmp_path / "store")
    os.truncate(tmp_path / "store.idx", 600_000)
    with pytest.raises(DataError, match=r"store\.idx: expected 65536 bytes at 589824, found 10176; the file was cut"):
        store.document_start(19_000)


BLOCK = 1 << 16
NUM_TOKENS = 3 * BLOCK // 4 + 100


def store_of_four_blocks(prefix: Path) -> TokenStore:
    """Three blocks of int32 tokens and a short one."""
    return counting_store(prefix, [1000] * (NUM_TOKENS // 1000) + [NUM_TOKENS % 1000])


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_flipped_bit_is_found_at_the_row_that_holds_it_and_by_the_whole_check(tmp_path: Path, block: int) -> None:
    store = store_of_four_blocks(tmp_path / "store")
    store.check()
    at = block * BLOCK + 17
    flip_bit(tmp_path / "store.bin", at)
    where = rf"store\.bin: bytes {block * BLOCK} to {min((block + 1) * BLOCK, 4 * NUM_TOKENS) - 1}: expected xxh3"
    with pytest.raises(DataError, match=where):
        TokenStore(tmp_path / "store").check()
    opened = TokenStore(tmp_path / "store")
    with pytest.raises(DataError, match=f"{where}.*restore the store or tokenize again"):
        opened.read(at // 4, at // 4 + 1)
    other = (block + 1) % 4 * BLOCK // 4
    assert opened.read(other, other + 50).tolist() == list(range(other, other + 50))


def test_rows_across_blocks_are_whole(tmp_path: Path) -> None:
    store = store_of_four_blocks(tmp_path / "store")
    for start, stop in ((0, NUM_TOKENS), (BLOCK // 4 - 3, BLOCK // 4 + 3), (100, 2 * BLOCK // 4 + 1), (7, 7)):
        assert store.read(start, stop).tolist() == list(range(start, stop))


def flip_bit(path: Path, at: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[at] ^= 4
    path.write_bytes(raw)


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.json", ".hashes"])
def test_no_flipped_bit_of_any_file_passes(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    path = tmp_path / f"store{suffix}"
    intact = path.read_bytes()
    for at in range(len(intact)):
        path.write_bytes(intact)
        flip_bit(path, at)
        with pytest.raises(DataError, match=rf"^{tmp_path}/store\."):
            TokenStore(tmp_path / "store").check()


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.json", ".hashes"])
def test_files_of_another_store_of_the_same_size_do_not_pass(tmp_path: Path, suffix: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    write_store(tmp_path / "other", [[1, 6, 7, 8], [9, 0], [1, 2, 3, 4, 5]])
    if suffix == ".idx":
        write_store(tmp_path / "other", [[5, 6], [7, 0, 8, 0], [9, 10, 11, 12, 0]])
    if suffix == ".meta.json":
        (tmp_path / "other.meta.json").write_bytes(
            (tmp_path / "store.meta.json").read_bytes().replace(b"test", b"best")
        )
    (tmp_path / f"store{suffix}").write_bytes((tmp_path / f"other{suffix}").read_bytes())
    with pytest.raises(DataError):
        TokenStore(tmp_path / "store").check()


def test_stores_of_other_programs_are_read_without_hashes_and_that_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
    for _ in range(2):
        TokenStore(tmp_path / "store").check()
    assert capsys.readouterr().err.count("a store without hashes") == 1


def test_our_earlier_stores_without_hashes_are_read(tmp_path: Path) -> None:
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
    meta = {"source": "s", "tokenizer_fingerprint": "f", "num_documents": 3, "num_tokens": 11, "num_bytes": None}
    store_paths(tmp_path / "store").meta.write_text(json.dumps(meta))
    assert TokenStore(tmp_path / "store").meta() == StoreMeta("s", "f", 3, 11, None)


@pytest.mark.parametrize("missing", ["meta", "hashes"])
def test_one_side_file_without_the_other_is_damage(tmp_path: Path, missing: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    getattr(store_paths(tmp_path / "store"), missing).unlink()
    with pytest.raises(DataError, match="missing"):
        TokenStore(tmp_path / "store")


def meta_with(**changes: object) -> str:
    meta = {"source": "s", "tokenizer_fingerprint": "f", "num_documents": 3, "num_tokens": 11, "num_bytes": 1}
    return json.dumps(meta | changes)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not a store's meta file"),
        ("[]", "expected a JSON object, found list"),
        ("null", "expected a JSON object, found NoneType"),
        ("[" * 30_000, "not a store's meta file"),
        ('{"surprise": 1}', "unknown field 'surprise'"),
        ('{"source": "s"}', "missing 4 required"),
        (meta_with(num_tokens=12), "the store has"),
        (meta_with(num_tokens="x"), "num_tokens: expected int, found str"),
        (meta_with(num_tokens=True), "num_tokens: expected int, found bool"),
        (meta_with(num_tokens=11.0), "num_tokens: expected int, found float"),
        (meta_with(num_documents=-3), "num_documents: expected >= 0, found -3"),
        (meta_with(tokenizer_fingerprint={"a": []}), "tokenizer_fingerprint: expected str, found dict"),
        (meta_with(source=None), "source: expected str, found NoneType"),
        (meta_with(has_hashes=True), r"store\.hashes: missing"),
        ('{"num_tokens": ' + "9" * 5000 + "}", "not a store's meta file"),
        (" " * 70_000, "larger than 65536 bytes"),
    ],
)
def test_bad_meta_file(tmp_path: Path, content: str, message: str) -> None:
    write_megatron(tmp_path / "store", DOCUMENTS, [0, 1, 2, 3], code=8, dtype="<u2")
    store_paths(tmp_path / "store").meta.write_text(content)
    with pytest.raises(DataError, match=rf"{message}.*; restore the store or tokenize again$"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".meta.json", ".hashes"])
@pytest.mark.parametrize("kind", ["fifo", "directory", "socket", "loop"])
def test_what_is_no_regular_file_is_said_and_not_waited_for(tmp_path: Path, suffix: str, kind: str) -> None:
    write_store(tmp_path / "store", DOCUMENTS)
    path = tmp_path / f"store{suffix}"
    path.unlink()
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    else:
        path.symlink_to(path)
    remedy = "restore the store or tokenize again"
    with pytest.raises(DataError, match=rf"store\{suffix}: cannot be read \(.+\); put the file there; {remedy}$"):
        TokenStore(tmp_path / "store")


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_a_store_that_cannot_be_read_now_is_no_damaged_one(
    many_documents: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store = TokenStore(many_documents)

    def fail(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    real = os.open
    for suffix in (".bin", ".idx", ".meta.json", ".hashes"):
        with monkeypatch.context() as patch:
            patch.setattr(os, "open", lambda path, *a, s=suffix: fail() if str(path).endswith(s) else real(path, *a))
            with pytest.raises(StorageError, match=rf"store\{suffix}: cannot be read \({os.strerror(code)}"):
                TokenStore(many_documents)
    monkeypatch.setattr(os, "pread", fail)
    for work in (lambda: store.read(0, 5), store.check, lambda: store.document_start(19_000)):
        with pytest.raises(StorageError, match=rf"cannot read at byte \d+ \({os.strerror(code)}"):
            work()


def test_a_forgotten_store_closes_its_files(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    store = write_store(tmp_path / "store", DOCUMENTS)
    assert store.read(0, 2).tolist() == [5, 6]
    assert len(os.listdir("/proc/self/fd")) == before + 2
    del store
    assert len(os.listdir("/proc/self/fd")) == before
