from __future__ import annotations

import bz2
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from qwen3next_train.data import records
from qwen3next_train.data.formats import format_of
from qwen3next_train.data.records import Record, read_records
from qwen3next_train.errors import DataError


def read(path: Path, *, max_bytes: int = 1 << 30) -> list[Record]:
    file_format = format_of(path.name)
    assert file_format is not None
    return list(read_records(path, file_format, "text", max_bytes))


def texts(path: Path) -> list[Any]:
    return [record.fields["text"] for record in read(path)]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson"])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_objects_in_bounded_memory(
    tmp_path: Path, name: str, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_CHUNK_BYTES", 7)
    values = ["a", "ü😀" * 20, "", None, "x" * 300, 'q"\\']
    path = tmp_path / name
    text = json.dumps([{"id": n, "text": value} for n, value in enumerate(values)], indent=indent, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf\n " + text.encode() + b"\n")
    found = read(path)
    assert [record.fields for record in found] == [{"id": n, "text": value} for n, value in enumerate(values)]
    assert found[3].where == f"{path}:item 3"
    assert found[-1].position == path.stat().st_size or found[-1].position > path.stat().st_size - 20
    path.write_text("[ ]")
    assert read(path) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"}, {"text": "b"', r"a\.json:item 1: not a JSON object"),
        ('[{"text": "a"}', r"a\.json:item 1: not a JSON array: expected ',', got the file's end"),
        ('[{"text": "a"} {"text": "b"}]', r"a\.json:item 1: not a JSON array: expected ',', got '\{'"),
        ('[{"text": "a"},]', r"a\.json:item 1: not a JSON object"),
        ('[{"text": "a"}] x', r"a\.json: text after the array's end"),
        ('[{"text": "a"}]\n[{"text": "b"}]', r"a\.json: text after the array's end"),
        ('["a"]', r"a\.json:item 0: expected a JSON object, found str; write it as {\"text\": ...} or remove it"),
        ("[3]", r"a\.json:item 0: expected a JSON object, found int"),
        ("[[[[", r"a\.json:item 0: not a JSON object"),
        ("[" * 200_000, r"a\.json:item 0: not a JSON object \(nested too deeply\); repair or remove it"),
        (
            '[{"text": "a", "n": ' + "9" * 6000 + "}]",
            r"item 0: not a JSON object \(an integer of more than 4300 digits\)",
        ),
        ('[{"text": "a", "text": "b"}]', r"a\.json:item 0: 2 fields 'text'; rename all but one"),
        ('{"data": [\n{"text": "a"}]}', r"a\.json:1: not a JSON object"),
    ],
)
def test_broken_array_is_named(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "a.json"
    path.write_text(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_array_with_bad_bytes_and_too_long_an_element(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b'[{"text": "\xff"}]')
    with pytest.raises(DataError, match=r"a\.json:item 0: not UTF-8"):
        read(path)
    path.write_bytes(b'[{"text": "\xc3')
    with pytest.raises(DataError, match=r"a\.json:item 0: not (UTF-8|a JSON object)"):
        read(path)
    path.write_text(json.dumps([{"text": "x" * 5_000_000}]))
    with pytest.raises(DataError, match=r"a\.json:item 0: not a JSON object"):
        read(path, max_bytes=1000)


def test_csv_and_tsv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfid,text\r\n1,"a ""quoted""\r\nline, and more"\r\n\r\n2,NA\r\n3,\r\n4,\xc3\xbc')
    found = read(path)
    assert [record.fields["text"] for record in found] == ['a "quoted"\r\nline, and more', "NA", "", "ü"]
    assert [record.where for record in found] == [f"{path}:{line}" for line in (2, 5, 6, 7)]
    path = tmp_path / "a.TSV.gz"
    path.write_bytes(gzip.compress(b"text\tid\none, two\t1\n" + b"x" * 200_000 + b"\t2\n"))
    assert texts(path) == ["one, two", "x" * 200_000]
    (tmp_path / "empty.csv").write_bytes(b"")
    assert read(tmp_path / "empty.csv") == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,body\n1,x\n", r"a\.csv: no column 'text', found \['id', 'body'\]; set text_field"),
        (b"text,text\n1,x\n", r"a\.csv: 2 columns 'text'; rename all but one"),
        (b"id,text\n1,x\n2,y,z\n", r"a\.csv:3: 3 fields, the header has 2"),
        (b"id,text\n1\n", r"a\.csv:2: 1 fields, the header has 2"),
        (
            b'id,text\n1,"never closed\n2,y\n',
            r"a\.csv:3: not CSV, in the row that begins in line 2: a quote is not closed before the file's end; close",
        ),
        (b'id,text\n1,"a" b\n', r"a\.csv:2: not CSV: text behind a closing quote; double quotes that"),
        (b'id,text\n1,x\n2,"a\nb\nc" d\n', r"a\.csv:5: not CSV, in the row that begins in line 3: text behind a"),
        (b'id,"te\nxt', r"a\.csv:2: not CSV, in the row that begins in line 1: a quote is not closed"),
        (b"id,text\n1,\xff\n", r"a\.csv:2: not UTF-8 at byte 2 of the line"),
        (
            b"id,text\r1,x\r2,y\r",
            r"a\.csv:1: not CSV: a line ends with a bare carriage return; end lines with line feeds",
        ),
    ],
)
def test_broken_csv_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", ["gz", "zst", "xz", "bz2"])
@pytest.mark.parametrize("start", ['{"text": "', '[{"text": "'])
def test_damaged_compression_is_one_line(tmp_path: Path, suffix: str, start: str) -> None:
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}.get(
        suffix, lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True)
    )
    text = start + " ".join(str(number * 7919 % 10007) for number in range(30_000)) + '"}'
    raw = compress((text + ("]" if start[0] == "[" else "")).encode())
    path = tmp_path / f"a.json.{suffix}"
    path.write_bytes(raw)
    assert len(texts(path)) == 1
    # What pyarrow compresses with zstd has no checksum, so that only its structure can be wrong.
    overwritten = raw[:99] + b"\xff" * 60 + raw[159:] if suffix != "zst" else b"\xff" * 9 + raw[9:]
    for damaged in (raw[: len(raw) // 2], raw[:-3], b"plain text", overwritten):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"a\.json\.{suffix}:.*damaged (gzip|zstd|xz|bz2) file") as caught:
            read(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.csv", "a.jsonl", "a.json"])
def test_of_two_columns_of_a_name_none_is_taken(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    table = pyarrow.table([["a"], ["b"], ["c"]], names=["text", "id", "text"])
    if name == "a.parquet":
        pyarrow.parquet.write_table(table, path)
    elif name == "a.arrow":
        with pyarrow.ipc.new_file(path, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = {"a.csv": "text,id,text\na,b,c\n", "a.jsonl": '{"text": "a", "id": "b", "text": "c"}\n'}
        path.write_text(lines.get(name, f"[{lines['a.jsonl']}]"))
    with pytest.raises(DataError, match=rf"{name}(:1|:item 0)?: 2 (columns|fields) 'text'; rename all but one"):
        read(path)


@pytest.mark.parametrize("names", [["id", "body"], ["text", "text"]])
def test_a_table_without_rows_has_columns_all_the_same(tmp_path: Path, names: list[str]) -> None:
    table = pyarrow.table([pyarrow.array([], pyarrow.string())] * 2, names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with writer(str(tmp_path / name), table.schema) as sink:
            sink.write_table(table)
    for name in ("a.parquet", "file.arrow", "stream.arrow"):
        with pytest.raises(DataError, match=rf"{name}: (no column 'text', found|2 columns 'text';)"):
            read(tmp_path / name)


def test_the_same_name_further_inside_is_another_field(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "meta": {"text": 1, "text": 2}, "list": ["text", {"text": 3}]}\n')
    assert texts(path) == ["a"]


def test_a_long_integer_in_a_line_is_said_in_our_words(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a", "n": ' + "9" * 6000 + "}\n")
    with pytest.raises(
        DataError, match=r"a\.jsonl:1: not a JSON object \(an integer of more than 4300 digits\); repair"
    ):
        read(path)


def test_positions_reach_the_end_of_a_table(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": [str(n) for n in range(3000)]}), path)
    positions = [record.position for record in read(path)]
    assert positions == sorted(positions)
    assert positions[-1] == path.stat().st_size


@pytest.mark.parametrize("suffix", ["xz", "bz2"])
def test_all_members_of_a_compressed_file_are_read(tmp_path: Path, suffix: str) -> None:
    """As ``xz`` and ``bzip2`` do: members one after the other, padded with zeros."""
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    parts = [b"".join(b'{"text": "%d-%d"}\n' % (part, n) for n in range(5000)) for part in range(3)]
    path.write_bytes(compress(parts[0]) + b"\0" * 4 + compress(parts[1]) + compress(parts[2]) + b"\0" * (1 << 17))
    assert texts(path) == [f"{part}-{n}" for part in range(3) for n in range(5000)]


@pytest.mark.parametrize("suffix", ["xz", "bz2"])
@pytest.mark.parametrize("damaged", ["first byte", "garbage", "cut"])
def test_a_damaged_later_member_is_not_the_file_s_end(tmp_path: Path, suffix: str, damaged: str) -> None:
    compress = {"xz": lzma.compress, "bz2": bz2.compress}[suffix]
    path = tmp_path / f"a.jsonl.{suffix}"
    member = compress(b'{"text": "a"}\n')
    second = {"first byte": b"?" + member[1:], "garbage": b"garbage", "cut": member[:-5]}[damaged]
    path.write_bytes(member + second)
    with pytest.raises(DataError, match=rf"a\.jsonl\.{suffix}:.*damaged {suffix} file"):
        read(path)


def test_a_cut_arrow_file_is_damaged(tmp_path: Path) -> None:
    """Whose error has no number, as if the system had failed."""
    table = pyarrow.table({"text": [str(n) * 50 for n in range(200)]})
    whole, path = tmp_path / "whole.arrow", tmp_path / "cut.arrow"
    with pyarrow.ipc.new_stream(str(whole), table.schema) as writer:
        writer.write_table(table)
    path.write_bytes(whole.read_bytes()[:-600])
    assert len(read(whole)) == 200
    with pytest.raises(DataError, match=r"cut\.arrow: damaged arrow file at row 0"):
        read(path)


def test_white_space_before_json_may_be_long(tmp_path: Path) -> None:
    array, lines, broken = (tmp_path / name for name in ("array.json", "lines.jsonl", "broken.jsonl"))
    array.write_bytes(b"\xef\xbb\xbf" + b" " * 100_000 + b"\n" * 100_000 + b'[{"text": "a"}]')
    lines.write_bytes(b"\n" * 100_000 + b'  {"text": "a"}\n{"text": "b"}\n')
    broken.write_bytes(b"\n" * 100_000 + b"oops\n")
    assert texts(array) == ["a"]
    assert texts(lines) == ["a", "b"]
    with pytest.raises(DataError, match=r"broken\.jsonl:100001: not a JSON object"):
        read(broken)


@pytest.mark.parametrize("damaged", ["cut between batches", "two streams"])
def test_an_arrow_stream_ends_with_its_marker(tmp_path: Path, damaged: str) -> None:
    batch = pyarrow.record_batch({"text": ["a", "b"]})
    path = tmp_path / "a.arrow"
    sizes = []
    with path.open("wb") as file, pyarrow.ipc.new_stream(file, batch.schema) as writer:
        for _ in range(2):
            writer.write_batch(batch)
            sizes.append(file.tell())
    assert texts(path) == ["a", "b"] * 2
    whole = path.read_bytes()
    path.write_bytes({"cut between batches": whole[: sizes[0]], "two streams": whole * 2}[damaged])
    with pytest.raises(DataError, match=r"a\.arrow: damaged arrow file .*no end-of-stream marker at the file's end"):
        read(path)
