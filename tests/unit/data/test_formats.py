from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow
import pytest

from qwen3next_train.data.formats import ByteStream, Compression, FileFormat, Format, format_of, suffix_of


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a.txt", FileFormat(Format.TEXT, None)),
        ("A.TXT.GZ", FileFormat(Format.TEXT, "gzip")),
        ("main.rs.xz", FileFormat(Format.TEXT, "xz")),
        ("a.ndjson", FileFormat(Format.JSON, None)),
        ("a.JsonLines", FileFormat(Format.JSON, None)),
        ("a.b.jsonl.zst", FileFormat(Format.JSON, "zstd")),
        ("a.json.bz2", FileFormat(Format.JSON, "bz2")),
        ("a.csv", FileFormat(Format.CSV, None)),
        ("a.tsv.gz", FileFormat(Format.TSV, "gzip")),
        ("a.Parquet", FileFormat(Format.PARQUET, None)),
        ("a.arrow", FileFormat(Format.ARROW, None)),
        ("a.parquet.gz", None),
        ("a.arrow.zst", None),
        ("a.pdf", None),
        ("a.gz", None),
        ("a.jsonl.lz4", None),
        ("a.txt.gz.gz", None),
        ("txt", None),
        (".txt", None),
        ("a.", None),
    ],
)
def test_the_name_tells_the_format(name: str, expected: FileFormat | None) -> None:
    assert format_of(name) == expected


def test_suffix_for_messages() -> None:
    assert [suffix_of(name) for name in ("a.b.PDF", "a.parquet.gz", "a.tar", "a", ".bashrc", "a.gz")] == [
        ".pdf",
        ".parquet.gz",
        ".tar",
        "",
        "",
        ".gz",
    ]


@pytest.mark.parametrize("compression", [None, "gzip", "zstd", "xz", "bz2"])
def test_streams_read_every_member_and_tell_where_they_are(tmp_path: Path, compression: Compression | None) -> None:
    compress = {
        None: bytes,
        "gzip": gzip.compress,
        "zstd": lambda raw: pyarrow.compress(raw, codec="zstd", asbytes=True),
        "xz": lzma.compress,
        "bz2": bz2.compress,
    }[compression]
    lines = [b"line %d\n" % number for number in range(20_000)]
    stored = b"".join(compress(b"".join(lines[start : start + 10_000])) for start in (0, 10_000))
    path = tmp_path / "file"
    path.write_bytes(stored)
    with ByteStream(path, compression) as stream:
        assert stream.peek()[:6] == b"line 0"
        assert [stream.readline(100) for _ in range(10_001)] == lines[:10_001]
        assert 0 < stream.position <= len(stored)
        assert stream.read(4) == b"line"
        rest = stream.read(1 << 20)
        assert rest.endswith(lines[-1])
        assert (stream.read(1), stream.position) == (b"", len(stored))
