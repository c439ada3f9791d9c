from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data import store_writer
from qwen3next_train.data.store_meta import StoreMeta
from qwen3next_train.data.store_writer import StoreWriter, staging_directory, storage_errors
from qwen3next_train.data.token_store import TokenStore
from qwen3next_train.errors import DataError, StorageError
from tests.unit.data.corpus import write_store


def test_round_trip_over_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_writer, "_CHUNK", 7)
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 4096, rng.integers(1, 20)).tolist() for _ in range(50)]
    store = write_store(tmp_path / "store", documents)
    assert store.read(0, store.num_tokens).tolist() == [token for document in documents for token in document]
    starts = np.cumsum([0, *map(len, documents)]).tolist()
    assert [store.document_start(index) for index in range(51)] == starts
    assert store.meta() == StoreMeta("test", "none", 50, starts[-1], None, entry="", has_hashes=True)
    names = ["store.bin", "store.hashes", "store.idx", "store.meta.json"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_large_vocabularies_take_four_bytes(tmp_path: Path) -> None:
    store = write_store(tmp_path / "store", [[151_935, 65_500, 0]], vocab_size=151_936)
    assert (store.dtype, store.read(0, 3).tolist()) == (np.int32, [151_935, 65_500, 0])


def test_unfinished_store_cannot_be_read(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "store", np.dtype("<u2")) as writer:
        writer.append(np.arange(5))
    with pytest.raises(DataError, match=r"store\.idx: missing"):
        TokenStore(tmp_path / "store")


def test_staging_directory_goes_away_even_on_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), staging_directory(tmp_path, "stage-") as staged:
        (staged / "folder" / "file").write_text(str((staged / "file").write_text("x")))
    assert list(tmp_path.iterdir()) == []


def test_storage_errors_are_one_line(tmp_path: Path) -> None:
    with (
        pytest.raises(StorageError, match=r"x/y: cannot write \(No such file or directory\); go away"),
        storage_errors(tmp_path, "go away"),
    ):
        (tmp_path / "x" / "y").write_text("")


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.errors import TrainError
from tests.unit.data.corpus import make_config
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), -1))
try:
    prepare_stores(make_config(Path(sys.argv[1]), [{"source": sys.argv[2]}]))
except TrainError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize("limit", [0, 300, 5000])
def test_full_disk_leaves_nothing_behind(tmp_path: Path, limit: int) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(f'{{"text": "document {n} {"word " * 50}"}}\n' for n in range(300)))
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "cache"), str(corpus), str(limit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 74, done.stderr
    assert "cannot write (File too large: raise the limit, ulimit -f, which is " in done.stdout
    assert done.stdout.count("\n") == 1
    left = [path.name for path in (tmp_path / "cache").iterdir() if path.name != "digests"]
    assert [name for name in left if not name.endswith(".lock")] == []
