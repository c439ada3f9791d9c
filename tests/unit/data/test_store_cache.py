from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from qwen3next_train.data.store_cache import default_cache_dir, get_or_build
from qwen3next_train.data.store_meta import entry_name
from qwen3next_train.data.store_writer import StoreWriter
from qwen3next_train.errors import DataError, StorageError


def build(directory: Path) -> float:
    for part, length in (("train", 100), ("validation", 10)):
        with StoreWriter(directory / part, np.dtype("<u2")) as writer:
            writer.append(np.arange(length))
            entry = entry_name("key", part, 2)
            writer.finish(source="s", tokenizer_fingerprint="t", num_bytes=length, entry=entry)
    return 1.5


def refuse(directory: Path) -> float:
    raise AssertionError("built although it was there")


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; return its wait status."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1]


def test_builds_once(tmp_path: Path) -> None:
    first = get_or_build(tmp_path / "new" / "cache", "key", "label", build)
    assert (first.train.num_tokens, first.build_s) == (100, 1.5)
    again = get_or_build(tmp_path / "new" / "cache", "key", "label", refuse)
    assert again.validation is not None
    assert (again.validation.num_tokens, again.build_s) == (10, None)


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    """Whatever the moment, the entry is absent or whole, and the next process needs no help."""
    for fatal in range(1, 120):
        cache = tmp_path / str(fatal)

        def die_at_operation(cache: Path = cache, fatal: int = fatal) -> None:
            count = 0

            def counted(function):  # type: ignore[no-untyped-def]
                def call(*args, **kwargs):  # type: ignore[no-untyped-def]
                    nonlocal count
                    count += 1
                    if count == fatal:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return function(*args, **kwargs)

                return call

            for owner, name in (
                (os, "fsync"),
                (os, "rename"),
                (os, "open"),
                (tempfile, "mkdtemp"),
                (Path, "open"),
                (Path, "mkdir"),
                (Path, "unlink"),
            ):
                setattr(owner, name, counted(getattr(owner, name)))
            get_or_build(cache, "key", "label", build)

        status = in_child(die_at_operation)
        if (cache / "key").exists():
            whole = get_or_build(cache, "key", "label", refuse)
            assert whole.validation is not None
            assert (whole.train.num_tokens, whole.validation.num_tokens) == (100, 10)
        assert get_or_build(cache, "key", "label", build).train.num_tokens == 100
        leftovers = [path.name for path in cache.iterdir() if path.name.startswith(".key-")]
        assert leftovers == []
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0
            assert fatal > 15, "the test met too few operations"
            return
    raise AssertionError("more operations than expected")


def test_leftovers_of_killed_builders_are_removed_by_the_next_one(tmp_path: Path) -> None:
    def die(directory: Path) -> float:
        (directory / "train.bin").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
        return 0.0

    def try_to_build() -> None:
        get_or_build(tmp_path, "key", "label", die)

    in_child(try_to_build)
    assert len(list(tmp_path.glob(".key-*"))) == 1
    get_or_build(tmp_path, "key", "label", build)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.lock", "key"]


def test_old_leftovers_of_other_keys_are_removed_unless_somebody_builds_there(tmp_path: Path) -> None:
    a_day_ago = time.time() - 25 * 3600
    keys = {name: digit * 32 for name, digit in (("abandoned", "a"), ("young", "b"), ("built", "c"), ("no lock", "d"))}
    foreign = tmp_path / ".my-settings"
    staged = {name: tmp_path / f".{key}-x1_y2z3w" for name, key in keys.items()}
    for path in (*staged.values(), foreign):
        (path / "fresh").mkdir(parents=True)
        if path != staged["young"]:
            for each in (path / "fresh", path):
                os.utime(each, (a_day_ago, a_day_ago))
    for name in ("abandoned", "young", "built"):
        (tmp_path / f".{keys[name]}.lock").touch()
    with (tmp_path / f".{keys['built']}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        get_or_build(tmp_path, "key", "label", build)
    assert {name for name, path in staged.items() if path.exists()} == {"young", "built", "no lock"}
    assert foreign.exists()


def test_what_a_process_killed_after_publishing_left_goes_with_the_next_start(tmp_path: Path) -> None:
    get_or_build(tmp_path, "key", "label", build)
    key = "e" * 32
    for name in ("key", key):
        (tmp_path / f".{name}.lock").touch()
        (tmp_path / f".{name}-partial" / "damaged").mkdir(parents=True)
    get_or_build(tmp_path, "key", "label", refuse)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [f".{key}-partial", "key"]
    shutil.rmtree(tmp_path / "key")
    with (tmp_path / f".{key}.lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        get_or_build(tmp_path, "key", "label", build)
    assert (tmp_path / f".{key}-partial").exists()
    shutil.rmtree(tmp_path / "key")
    get_or_build(tmp_path, "key", "label", build)
    assert not (tmp_path / f".{key}-partial").exists()


def test_without_locks_nobody_is_disturbed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    partial = tmp_path / ".key-partial" / "fresh"
    partial.mkdir(parents=True)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    for build_it in (build, refuse):
        assert get_or_build(tmp_path, "key", "label", build_it).train.num_tokens == 100
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key-partial", ".key.lock", "key"]


def test_concurrent_processes_build_once(tmp_path: Path) -> None:
    def slow(directory: Path) -> float:
        with (tmp_path / "builds").open("a") as file:
            file.write("x")
        time.sleep(0.3)
        return build(directory)

    children = []
    for _ in range(4):
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if get_or_build(tmp_path / "cache", "key", "label", slow).train.num_tokens == 100 else 2)
            finally:
                os._exit(1)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0, 0]
    assert (tmp_path / "builds").read_text() == "x"


@pytest.mark.parametrize(
    "name",
    [f"{part}.{suffix}" for part in ("train", "validation") for suffix in ("bin", "idx", "meta.json", "hashes")],
)
@pytest.mark.parametrize("size", [None, 0, 9])
def test_damaged_entry_is_built_again(tmp_path: Path, name: str, size: int | None) -> None:
    get_or_build(tmp_path, "key", "label", build)
    damaged = tmp_path / "key" / name
    if size is None:
        damaged.unlink()
    else:
        os.truncate(damaged, size)
    assert get_or_build(tmp_path, "key", "label", build).build_s == 1.5
    assert get_or_build(tmp_path, "key", "label", refuse).build_s is None
    assert sorted(path.name for path in tmp_path.iterdir()) == [".key.lock", "key"]


def test_failing_build_leaves_nothing(tmp_path: Path) -> None:
    def fail(directory: Path) -> float:
        (directory / "train.bin").write_bytes(b"half")
        raise DataError("broken line")

    with pytest.raises(DataError, match="broken line"):
        get_or_build(tmp_path, "key", "label", fail)
    assert [path.name for path in tmp_path.iterdir()] == [".key.lock"]


def test_cache_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/cache: cannot write \(Not a directory\); .*data\.cache_dir"):
        get_or_build(tmp_path / "file" / "cache", "key", "label", build)


def test_default_follows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert default_cache_dir() == Path("/somewhere/qwen3next_train")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", "/home/ada")
    assert default_cache_dir() == Path("/home/ada/.cache/qwen3next_train")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert default_cache_dir() == Path("/home/ada/.cache/qwen3next_train")


@pytest.mark.parametrize("home", ["", "relative", "/no/utf/\udcff"])
def test_no_home_folder(monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", home)
    with pytest.raises(StorageError, match=r"^data\.cache_dir: no home folder for its default \(HOME is '"):
        default_cache_dir()


def flip_bits(path: Path) -> None:
    """One bit of every 32nd token."""
    raw = bytearray(path.read_bytes())
    for at in range(0, len(raw), 64):
        raw[at] ^= 1
    path.write_bytes(raw)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def swap_parts(path: Path) -> None:
    """The files of the held-out part in place of the training part's."""
    for suffix in ("bin", "idx", "meta.json", "hashes"):
        shutil.copy(path.with_name(f"validation.{suffix}"), path.with_name(f"train.{suffix}"))


def drop_held_out(path: Path) -> None:
    for suffix in ("bin", "idx", "meta.json", "hashes"):
        path.with_name(f"validation.{suffix}").unlink()


@pytest.mark.parametrize("damage", [flip_bits, zero, fifo, swap_parts, drop_held_out])
@pytest.mark.parametrize("suffix", ["bin", "meta.json"])
def test_damage_that_sizes_do_not_tell_is_built_again(
    tmp_path: Path, damage: Callable[[Path], None], suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    get_or_build(tmp_path, "key", "label", build)
    damage(tmp_path / "key" / f"train.{suffix}")
    again = get_or_build(tmp_path, "key", "label", build)
    assert again.validation is not None
    assert (again.build_s, again.train.read(0, 100).tolist(), again.validation.num_tokens) == (1.5, [*range(100)], 10)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("tokenizing again, the cache is damaged: ")
    assert "run the same command" not in line


def test_damage_met_while_training_is_an_error_and_built_again_by_the_next_start(tmp_path: Path) -> None:
    get_or_build(tmp_path, "key", "label", build)
    unchecked = get_or_build(tmp_path, "key", "label", refuse, lambda store: None)
    flip_bits(tmp_path / "key" / "train.bin")
    with pytest.raises(DataError, match=r"train\.bin: bytes 0 to 199: expected xxh3 .*run the same command again"):
        unchecked.train.read(10, 20)
    assert get_or_build(tmp_path, "key", "label", build, lambda store: None).build_s == 1.5
    assert get_or_build(tmp_path, "key", "label", refuse).build_s is None


@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("operation", ["open", "pread", "stat", "lstat"])
def test_an_entry_that_cannot_be_read_now_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, operation: str
) -> None:
    get_or_build(tmp_path, "key", "label", build)
    before = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    where, real = (os, getattr(os, operation)) if operation in ("open", "pread") else (Path, getattr(Path, operation))

    def fail(path: Path | str | int, *arguments: object, **names: object) -> object:
        if isinstance(path, int) or "key" in Path(path).parts:
            raise OSError(code, os.strerror(code))
        return real(path, *arguments, **names)

    with monkeypatch.context() as patch:
        patch.setattr(where, operation, fail)
        with pytest.raises(StorageError, match=r"may be intact|cannot read at byte"):
            get_or_build(tmp_path, "key", "label", refuse)
    after = {path: path.stat() for path in sorted(tmp_path.rglob("*"))}
    assert {path: stat.st_mtime_ns for path, stat in after.items()} == {p: s.st_mtime_ns for p, s in before.items()}
    assert get_or_build(tmp_path, "key", "label", refuse).train.num_tokens == 100
