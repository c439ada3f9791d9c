from __future__ import annotations

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from qwen3next_train.data import documents
from qwen3next_train.data.documents import Document, cut_document, read_documents
from qwen3next_train.data.folders import SourceFile
from qwen3next_train.data.left_out import LeftOut, LeftOuts
from qwen3next_train.data.sources import FileSource
from qwen3next_train.errors import DataError


def read(path: Path, *, field: str = "text", lenient: bool = False) -> tuple[list[Document], LeftOuts]:
    skipped: LeftOuts = {}
    source = FileSource(str(path), (SourceFile(path.name, path),), field, lenient)
    return list(read_documents(source, skipped)), skipped


def texts(path: Path) -> list[str]:
    return [document.text for document in read(path)[0]]


def test_text_file_is_one_document_kept_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo\x01\n")
    assert texts(path) == ["one\r\ntwo\x01\n"]


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match=r"a\.txt: not UTF-8 at byte 3"):
        read(path)
    assert read(path, lenient=True) == ([], {"not UTF-8": LeftOut(1, "a.txt")})


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
@pytest.mark.parametrize("text", ["some text", "слово слово"])
def test_utf16_without_a_mark_is_not_text(tmp_path: Path, encoding: str, text: str) -> None:
    """Which is UTF-8 as it stands, Cyrillic too, where only the spaces have a NUL."""
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    zero = text.encode(encoding).index(0)
    with pytest.raises(DataError, match=rf"a\.txt: not text, byte {zero} is NUL; convert the file if it is UTF-16"):
        read(path)
    assert read(path, lenient=True) == ([], {"binary files": LeftOut(1, "a.txt")})


def test_a_nul_far_inside_a_text_belongs_to_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    for num_bytes, is_text in ((7999, False), (8000, True)):
        path.write_bytes(b"x" * num_bytes + b"\0")
        found, skipped = read(path, lenient=True)
        assert (len(found), len(skipped)) == (int(is_text), int(not is_text))


def test_files_that_hold_no_document_are_counted(tmp_path: Path) -> None:
    for name, content in (("a.json", "[ ]"), ("b.csv", "id,text\n"), ("c.jsonl", "\n \n"), ("d.tsv", "")):
        (tmp_path / name).write_text(content)
        assert read(tmp_path / name) == ([], {"files without documents": LeftOut(1, name)})


def test_json_lines_with_bom_crlf_blank_lines_and_unicode(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "one"}\r\n\r\n  \n{"text": "\\u00fc\\ud83d\\ude00 \xc3\xa9"}\n{"text": ""}')
    found, skipped = read(path)
    assert [document.text for document in found] == ["one", "ü😀 é"]
    assert found[1].where == f"{path}:4"
    assert skipped == {"empty": LeftOut(1, "a.jsonl:5")}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "abc', "not a JSON object"),
        (b"not json", "not a JSON object"),
        (b"[1, 2]", "expected a JSON object, found list"),
        (b"null", "expected a JSON object, found NoneType"),
        (b'{"txt": "abc"}', r"no field 'text', found \['txt'\]; set text_field"),
        (b'{"text": ["a"]}', "expected a string, found list"),
        (b'{"text": 3}', "expected a string, found int"),
        (b'{"text": "a\\ud800b"}', "lone surrogate at character 1"),
        (b'{"text": "\xff"}', "not UTF-8 at byte 10"),
        (b"[" * 200_000, "not a JSON object"),
        (b'{"a": ' * 100_000, "not a JSON object"),
        (b'{"text": ' + b"9" * 10_000 + b"}", "not a JSON object"),
        (b'{"input_ids": "abc"}', "expected a list of integers"),
        (b'{"input_ids": [1, -1]}', "expected a list of integers"),
        (b'{"input_ids": [1, true]}', "expected a list of integers"),
        (b'{"input_ids": [1.0]}', "expected a list of integers"),
        (b'{"input_ids": [2147483648]}', "expected a list of integers"),
        (b"\x00\x01\x02", "not a JSON object"),
    ],
)
def test_broken_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)


def test_token_ids_are_taken_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"input_ids": [3, 1, 4]}\n{"input_ids": []}\n{"input_ids": [1], "text": "both"}\n')
    found, skipped = read(path)
    assert [(document.text, document.token_ids) for document in found] == [("", [3, 1, 4]), ("both", None)]
    assert skipped == {"empty": LeftOut(1, "a.jsonl:2")}


def test_gzip(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    raw = gzip.compress("".join(json.dumps({"text": f"line {n}"}) + "\n" for n in range(2000)).encode())
    path.write_bytes(raw)
    assert texts(path) == [f"line {n}" for n in range(2000)]
    path.write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: damaged gzip file"):
        read(path)
    path.write_bytes(raw[:200] + b"\xff" * 50 + raw[250:])
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:\d+: "):
        read(path)
    path.write_bytes(b'{"text": "plain"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl\.gz:1: damaged gzip file"):
        read(path)


def test_overlong_line_and_file_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "MAX_DOCUMENT_BYTES", 100)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n{"text": "' + "x" * 100 + '"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: line longer than 100 bytes"):
        read(path)
    path = tmp_path / "a.txt"
    path.write_text("x" * 101)
    with pytest.raises(DataError, match=r"a\.txt: longer than 100 bytes"):
        read(path)


def _table(values: list[str | None]) -> pyarrow.Table:
    return pyarrow.table({"id": list(range(len(values))), "text": values})


def test_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(_table([f"row {n}" for n in range(3000)]), path, row_group_size=700)
    found = read(path)[0]
    assert [document.text for document in found] == [f"row {n}" for n in range(3000)]
    assert found[2999].where == f"{path}:row 2999"


@pytest.mark.parametrize("writer", [pyarrow.ipc.new_file, pyarrow.ipc.new_stream])
def test_arrow_file_and_stream(tmp_path: Path, writer) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "a.arrow"
    table = _table(["a", "b", "c"])
    with writer(path, table.schema) as sink:
        sink.write_table(table, max_chunksize=2)
    assert texts(path) == ["a", "b", "c"]


def test_columns_with_faults(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(_table(["a"]), path)
    with pytest.raises(DataError, match=r"a\.parquet: no column 'body', found \['id', 'text'\]; set text_field"):
        read(path, field="body")
    broken = pyarrow.StringArray.from_buffers(
        1, pyarrow.py_buffer(b"\0\0\0\0\2\0\0\0"), pyarrow.py_buffer(b"\xff\xfe"), None
    )
    pyarrow.parquet.write_table(pyarrow.table({"text": broken}), path)
    with pytest.raises(DataError, match=r"a\.parquet:row 0: field 'text': not UTF-8"):
        read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
@pytest.mark.parametrize("content", [b"", b"garbage", b"PAR1" * 40, b"ARROW1\0\0" + b"\xff" * 100])
def test_damaged_tables_are_one_line(tmp_path: Path, suffix: str, content: bytes) -> None:
    path = tmp_path / f"a{suffix}"
    path.write_bytes(content)
    with pytest.raises(DataError) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


def test_cut_tables_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(_table([f"row {n}" for n in range(3000)]), path)
    raw = path.read_bytes()
    for size in (len(raw) - 1, len(raw) // 2, 10):
        path.write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"a\.parquet"):
            read(path)


def test_vanished_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.txt: cannot be read \(No such file"):
        read(tmp_path / "gone.txt")


def test_hold_out_share_and_stability() -> None:
    held_out = [Document("", "", "", None, str(n).encode()).is_held_out(0.1) for n in range(20_000)]
    assert 1850 < sum(held_out) < 2150
    assert not any(Document("", "", "", None, str(n).encode()).is_held_out(0.0) for n in range(1000))
    assert [n for n in range(60) if held_out[n]] == [3, 9, 16, 21, 38, 46]


@pytest.mark.parametrize(
    ("text", "fraction", "cut"),
    [
        ("a line\n" * 100, 0.1, 630),
        ("a line\n" * 100, 0.9, 70),
        # The last line before the cut is too far from the end; then no space, either.
        ("a line\n" + "word " * 100, 0.1, 452),
        ("a line\n" + "x" * 93, 0.1, 90),
        ("x\n", 0.5, 1),
        ("x\n", 0.02, None),
        ("x", 0.5, None),
    ],
)
def test_where_a_single_text_is_cut(text: str, fraction: float, cut: int | None) -> None:
    document = Document("a.txt", "a.txt", text, None, b"a.txt", 1000)
    train, *held_out = cut_document(document, fraction)
    if cut is None:
        assert (train, held_out) == (document, [])
        return
    assert (train.text, [part.text for part in held_out]) == (text[:cut], [text[cut:]])
    assert [part.is_held_out(fraction) for part in (train, *held_out)] == [False, True]
    assert [part.position for part in (train, *held_out)] == [1000 * cut // len(text), 1000]


def test_null_is_left_out_and_counted_in_every_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a"}\n{"input_ids": null}\n')
    pyarrow.parquet.write_table(_table(["a", None, None]), tmp_path / "a.parquet")
    for values in (pyarrow.array([None, "a", None]), pyarrow.array([None, "a", None]).dictionary_encode()):
        table = pyarrow.table({"text": values})
        with pyarrow.ipc.new_file(tmp_path / "a.arrow", table.schema) as sink:
            sink.write_table(table)
        for name in ("a.jsonl", "a.parquet", "a.arrow"):
            found, skipped = read(tmp_path / name)
            first = "a.jsonl:1" if name == "a.jsonl" else f"{name}:row {int(name == 'a.parquet')}"
            assert ([document.text for document in found], skipped) == (["a"], {"null": LeftOut(2, first)}), name
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.nulls(3)}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ([], {"null": LeftOut(3, "a.parquet:row 0")})


@pytest.mark.parametrize("dtype", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view()])
def test_bytes_are_text_where_they_are_utf8(tmp_path: Path, dtype: pyarrow.DataType) -> None:
    table = pyarrow.table({"text": pyarrow.array(["ü".encode(), b"\xff\xfe", None, b""], dtype)})
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", table.schema) as sink:
        sink.write_table(table)
    found, skipped = read(tmp_path / "a.arrow")
    assert [document.text for document in found] == ["ü"]
    reasons = ("not UTF-8", "null", "empty")
    assert skipped == {reason: LeftOut(1, f"a.arrow:row {row}") for row, reason in enumerate(reasons, start=1)}


def test_compressed_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "A.TXT.GZ"
    path.write_bytes(gzip.compress("ü\nsecond line".encode()))
    assert texts(path) == ["ü\nsecond line"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"A\.TXT\.GZ: damaged gzip file"):
        read(path)


def test_positions_go_on_from_file_to_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' * 3)
    (tmp_path / "b.txt").write_text("b" * 10)
    files = tuple(SourceFile(name, tmp_path / name) for name in ("a.jsonl", "b.txt"))
    found = list(read_documents(FileSource("x", files, "text", False), {}))
    assert [document.position for document in found][2:] == [42, 52]
