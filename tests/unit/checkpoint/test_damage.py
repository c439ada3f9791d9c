"""Every file of a checkpoint, damaged in every way: detected, named, skipped, before anything is loaded."""

from __future__ import annotations

import errno
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.checkpoint.filesystem import LocalFilesystem
from qwen3next_train.checkpoint.manifest import config_hash
from qwen3next_train.errors import CheckpointError, ExitCode
from tests.unit.checkpoint.support import (
    ThreadControl,
    assert_holds,
    collected_log,
    failing,
    manager,
    names,
    on_ranks,
    rewrite_manifest,
    save,
    write_with_self_hash,
)

WORLD_SIZE = 2
FILES = ("MANIFEST.json", "rank_00000.safetensors", "rank_00001.safetensors")


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 1 and 2, written by two ranks."""
    directory = tmp_path / "checkpoints"

    def save_both(control: ThreadControl) -> None:
        mine = manager(directory, control=control)
        for step in (1, 2):
            save(mine, step, rank=control.rank, world_size=WORLD_SIZE)

    assert on_ranks(WORLD_SIZE, save_both) == [None, None]
    return directory


@pytest.fixture
def messages() -> Iterator[list[str]]:
    """What the package logs from here on."""
    with collected_log() as lines:
        yield lines


def _zero_page(path: Path) -> None:
    data = bytearray(path.read_bytes())
    start = len(data) // 2
    data[start : start + 4096] = bytes(len(data[start : start + 4096]))
    path.write_bytes(data)


def _swap_with_older(path: Path) -> None:
    path.write_bytes((path.parents[1] / "step_00000001" / path.name).read_bytes())


def _link(path: Path) -> None:
    path.rename(path.parents[2] / "elsewhere")
    path.symlink_to(path.parents[2] / "elsewhere")


def _replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut by one byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut to nothing": lambda path: path.write_bytes(b""),
    "one byte more": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "deleted": Path.unlink,
    "the older step's": _swap_with_older,
    "a link": _link,
    "a zeroed page": _zero_page,
    "a directory": _replace_by_directory,
    "a pipe": _replace_by_pipe,
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_named_and_the_older_checkpoint_taken(
    checkpoints: Path, messages: list[str], file: str, damage: str
) -> None:
    DAMAGES[damage](checkpoints / "step_00000002" / file)
    assert_holds(manager(checkpoints).find_latest(), 1)
    assert len(messages) == 1
    assert "step_00000002 is damaged and skipped: " in messages[0]
    assert file in messages[0]


@pytest.mark.parametrize("damaged", [FILES[1:], FILES[2:]], ids=["both files", "the second file"])
def test_threads_name_the_first_file_that_is_damaged(
    checkpoints: Path, messages: list[str], monkeypatch: pytest.MonkeyPatch, damaged: tuple[str, ...]
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 1)
    assert_holds(manager(checkpoints).find_latest(), 2)
    for file in damaged:
        _zero_page(checkpoints / "step_00000002" / file)
    messages.clear()
    assert_holds(manager(checkpoints).find_latest(), 1)
    assert messages[0].endswith(f"step_00000002 is damaged and skipped: {damaged[0]} does not match its hash")


def test_threads_do_not_read_on_behind_a_damaged_file(checkpoints: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 1)
    _zero_page(checkpoints / "step_00000002" / FILES[1])
    # As with one thread: what is behind it need not be readable.
    unreadable = failing("read", FILES[2], errno.EIO)
    assert_holds(manager(checkpoints, filesystem=unreadable).find_latest(), 1)


def test_a_long_file_is_not_read_to_its_end_beside_a_damaged_one(
    checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwen3next_train.checkpoint.threads.MIN_BYTES", 1)
    _zero_page(checkpoints / "step_00000002" / FILES[1])
    paths: dict[int, Path] = {}
    num_reads = 0

    class LongFile(LocalFilesystem):
        def open(self, path: Path) -> int:
            descriptor = super().open(path)
            paths[descriptor] = path
            return descriptor

        def read(self, descriptor: int, num_bytes: int) -> bytes:
            nonlocal num_reads
            if paths[descriptor] != checkpoints / "step_00000002" / FILES[2]:
                return super().read(descriptor, num_bytes)
            num_reads += 1
            return b"x" if num_reads < 2_000_000 else b""

    assert_holds(manager(checkpoints, filesystem=LongFile()).find_latest(), 1)
    assert num_reads < 2_000_000


def test_every_one_of_200_flipped_bits_is_detected(checkpoints: Path) -> None:
    choose = random.Random(0)
    for _ in range(200):
        path = checkpoints / "step_00000002" / choose.choice(FILES)
        original = path.read_bytes()
        damaged = bytearray(original)
        damaged[choose.randrange(len(damaged))] ^= 1 << choose.randrange(8)
        path.write_bytes(damaged)
        found = manager(checkpoints).find_latest()
        assert found is not None
        assert found.step == 1
        path.write_bytes(original)
    assert_holds(manager(checkpoints).find_latest(), 2)


def test_the_hint_stray_files_and_time_stamps_have_no_effect(checkpoints: Path) -> None:
    (checkpoints / "latest").unlink()
    (checkpoints / "latest").symlink_to("../../elsewhere")
    (checkpoints / "step_00000002" / "stray").write_text("x")
    (checkpoints / ".tmp-step_00000009-00000000").mkdir()
    (checkpoints / ".trash-step_00000009-00000000").mkdir()
    (checkpoints / "step_9").mkdir()
    (checkpoints / "step_000000009").mkdir()
    (checkpoints / "step_٠٠٠٠٠٠٠٩").mkdir()
    os.utime(checkpoints / "step_00000001", (2**31, 2**31))
    assert_holds(manager(checkpoints).find_latest(), 2)


def test_a_published_name_that_is_a_link_is_not_followed(checkpoints: Path) -> None:
    (checkpoints / "step_00000002").rename(checkpoints.parent / "elsewhere")
    (checkpoints / "step_00000002").symlink_to(checkpoints.parent / "elsewhere")
    assert_holds(manager(checkpoints).find_latest(), 1)


def test_only_damaged_checkpoints_stop_the_run_and_each_is_named(checkpoints: Path) -> None:
    (checkpoints / "step_00000001" / "rank_00001.safetensors").unlink()
    (checkpoints / "step_00000002" / "MANIFEST.json").unlink()
    before = names(checkpoints)
    with pytest.raises(CheckpointError) as caught:
        manager(checkpoints).find_latest()
    assert caught.value.exit_code == ExitCode.DATA
    assert "step_00000002: MANIFEST.json is missing; step_00000001: rank_00001.safetensors is missing" in str(
        caught.value
    )
    assert "\n" not in str(caught.value)
    assert names(checkpoints) == before


def test_a_directory_without_checkpoints_is_a_fresh_start(tmp_path: Path) -> None:
    assert manager(tmp_path / "absent").find_latest() is None
    (tmp_path / "empty" / ".tmp-step_00000001-00000000").mkdir(parents=True)
    assert manager(tmp_path / "empty").find_latest() is None


def _set(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        target: Any = fields
        for key in keys[:-1]:
            target = target[key]
        target[keys[-1]] = value

    return change


def _oversized_config(fields: dict[str, Any]) -> None:
    fields["config"] = {"a": ["x"] * 10, "deep": json.loads("[" * 400 + "]" * 400)}
    fields["config_xxh3_128"] = config_hash(fields["config"]) + "0"


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "a path out of the directory": (_set("files", 0, "name", value="../step_00000001/rank_00000.safetensors"), "name"),
    "an absolute path": (_set("files", 0, "name", value="/etc/hostname"), "name"),
    "a hidden name": (_set("files", 0, "name", value=".hidden"), "name"),
    "a name with a newline": (_set("files", 0, "name", value="rank_00000\n"), "name"),
    "a name with NUL": (_set("files", 0, "name", value="rank\0"), "name"),
    "a name of 5,000 letters": (_set("files", 0, "name", value="a" * 5000), "name"),
    "two files of one name": (_set("files", 1, "name", value="rank_00000.safetensors"), "listed twice"),
    "two files of one rank": (_set("files", 1, "rank", value=0), "a rank has two files"),
    "no files": (_set("files", value=[]), "files"),
    "a negative size": (_set("files", 0, "size", value=-1), "size"),
    "a size that is text": (_set("files", 0, "size", value="8"), "size"),
    "a size of 10^30": (_set("files", 0, "size", value=10**30), "size"),
    "NaN": (_set("config", "optimizer", "lr", value=float("nan")), "not a finite number"),
    "infinity": (_set("train_state", "flops_total", value=float("inf")), "not a finite number"),
    "a negative position": (_set("train_state", "consumed_samples", value=-1), "consumed_samples"),
    "a position that the next step would overflow": (
        _set("train_state", "consumed_samples", value=2**63 - 1),
        "a count of the train state is",
    ),
    "tokens without end": (_set("train_state", "consumed_tokens", value=2**62), "a count of the train state is"),
    "updates without end": (_set("train_state", "optimizer_step", value=2**63 - 1), "a count of the train state is"),
    "FLOPs without end": (_set("train_state", "flops_total", value=10**60), "flops_total"),
    "a wandb run that is a path": (_set("train_state", "wandb_id", value="../../x"), "wandb_id"),
    "a wandb run of 5,000 letters": (_set("train_state", "wandb_id", value="x" * 5000), "wandb_id"),
    "a truth value for a number": (_set("train_state", "optimizer_step", value=True), "optimizer_step"),
    "another step": (_set("step", value=3), "step"),
    "a train state of another step": (_set("train_state", "step", value=3), "train state of step 3"),
    "another configuration": (_set("config", "optimizer", "lr", value=0.5), "does not match its hash"),
    "a deep configuration": (_oversized_config, "config_xxh3_128"),
    "an unknown field": (_set("surprise", value=1), "surprise"),
    "a fragment outside its parameter": (_set("files", 0, "fragments", value=[0, 30, 9]), "outside its parameter"),
    "a fragment of no parameter": (_set("files", 0, "fragments", value=[9, 0, 1]), "outside its parameter"),
    "half a fragment": (_set("files", 0, "fragments", value=[0, 1]), "not triples"),
    "a negative shape": (_set("parameters", 0, "shape", value=[-7, 5]), "shape"),
    "a huge shape": (_set("parameters", 0, "shape", value=[2**40, 2**40]), "2^50"),
    "a parameter twice": (_set("parameters", 0, "name", value="norm.weight"), "listed twice"),
    "another format": (_set("format", value="pickle"), "format"),
    "an older format": (_set("format_version", value=0), "format_version"),
    "a date with an escape sequence": (_set("created_at", value="\u001b[2J"), "created_at"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_manifest_with_a_right_hash_is_refused(checkpoints: Path, messages: list[str], what: str) -> None:
    change, reason = HOSTILE[what]
    rewrite_manifest(checkpoints / "step_00000002" / "MANIFEST.json", change)
    assert_holds(manager(checkpoints).find_latest(), 1)
    assert len(messages) == 1
    assert reason in messages[0]
    assert messages[0].isprintable()


def test_a_checkpoint_of_a_newer_version_stops_the_run(checkpoints: Path) -> None:
    rewrite_manifest(checkpoints / "step_00000002" / "MANIFEST.json", _set("format_version", value=4))
    with pytest.raises(CheckpointError, match=r"step_00000002: written by a newer version \(checkpoint format 4"):
        manager(checkpoints).find_latest()


def test_a_directory_renamed_to_another_step_is_not_taken_for_it(checkpoints: Path) -> None:
    (checkpoints / "step_00000002").rename(checkpoints / "step_00000005")
    assert_holds(manager(checkpoints).find_latest(), 1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" * 100_000, "incomplete"),
        (b'{"a": ' + b"[" * 300_000 + b"]" * 300_000, "not valid JSON"),
        (b'{"a": [' + b"[]," * 500_000 + b"[]]", "has more than 400000 lists"),
        (b'{"step": 2, "step": 2', "a key stands twice"),
        (b'{"step": ' + b"9" * 100_000, "not valid JSON"),
        (b'{"step": "\xff"', "not valid JSON"),
        (b"[2", "not valid JSON"),
    ],
)
def test_a_manifest_that_is_no_manifest_is_refused(checkpoints: Path, content: bytes, reason: str) -> None:
    path = checkpoints / "step_00000002" / "MANIFEST.json"
    if reason == "incomplete":
        path.write_bytes(content)
    else:
        write_with_self_hash(path, content)
    (checkpoints / "step_00000001" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match=reason):
        manager(checkpoints).find_latest()


def test_a_huge_manifest_is_refused_without_reading_it(checkpoints: Path) -> None:
    path = checkpoints / "step_00000002" / "MANIFEST.json"
    with path.open("r+b") as file:
        file.truncate(10**10)
    (checkpoints / "step_00000001" / "MANIFEST.json").unlink()
    with pytest.raises(CheckpointError, match="has 10000000000 bytes, more than"):
        manager(checkpoints).find_latest()
