from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.checkpoint.inspection import checkpoint_command
from qwen3next_train.checkpoint.manifest import config_hash
from qwen3next_train.errors import ConfigError, ExitCode, StorageError
from tests.unit.checkpoint.support import manager, rewrite_manifest, save


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (1, 2):
        save(manager(tmp_path / "checkpoints"), step)
    return tmp_path


def _rows(capsys: pytest.CaptureFixture[str]) -> list[list[str]]:
    return [re.split(r"\s{2,}", line.strip()) for line in capsys.readouterr().out.splitlines()]


def test_list_shows_each_checkpoint_newest_first(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_command("list", run_dir) == ExitCode.FINISHED
    heading, newest, oldest = _rows(capsys)
    assert heading == ["step", "size", "written by", "saved at (UTC)", "state"]
    assert [newest[0], oldest[0]] == ["2", "1"]
    assert re.fullmatch(r"\d+\.\d\d KiB", newest[1])
    assert newest[2] == "1 rank, ep 1, zero 1"
    assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", newest[3])
    assert newest[4] == "complete"


def test_list_names_the_ranks_that_shared_a_row(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def share(fields: dict[str, Any]) -> None:
        fields["config"]["parallel"] = {"context_parallel_size": 2, "tensor_parallel_size": 4}
        fields["config_xxh3_128"] = config_hash(fields["config"])

    rewrite_manifest(run_dir / "checkpoints" / "step_00000002" / "MANIFEST.json", share)
    assert checkpoint_command("list", run_dir) == ExitCode.FINISHED
    _, newest, oldest = _rows(capsys)
    assert newest[2] == "1 rank, ep 1, cp 2, tp 4, zero 1"
    assert oldest[2] == "1 rank, ep 1, zero 1"


def test_only_verify_reads_every_byte(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = run_dir / "checkpoints" / "step_00000001" / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert checkpoint_command("list", run_dir) == ExitCode.FINISHED
    capsys.readouterr()
    assert checkpoint_command("verify", run_dir) == ExitCode.DATA
    _, newest, oldest, summary = _rows(capsys)
    assert newest[4] == "verified"
    assert oldest[4] == "damaged: rank_00000.safetensors does not match its hash"
    assert summary == ["1 of 2 checkpoints cannot be used"]


def test_damage_that_sizes_show_is_seen_by_list(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_dir / "checkpoints" / "step_00000002" / "MANIFEST.json").unlink()
    rewrite_manifest(
        run_dir / "checkpoints" / "step_00000001" / "MANIFEST.json", lambda fields: fields.update(format_version=7)
    )
    assert checkpoint_command("list", run_dir) == ExitCode.DATA
    _, newest, oldest, _ = _rows(capsys)
    assert newest == ["2", "-", "-", "-", "damaged: MANIFEST.json is missing"]
    assert oldest[4].startswith("unreadable: written by a newer version (checkpoint format 7")


def test_one_moved_aside_is_named(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = run_dir / "checkpoints"
    (directory / "step_00000002").rename(directory / ".replaced-step_00000002-0a1b2c3d")
    assert checkpoint_command("verify", run_dir) == ExitCode.FINISHED
    assert _rows(capsys)[1][4] == "verified (moved aside as .replaced-step_00000002-0a1b2c3d)"


def test_no_checkpoints_no_directory_and_no_permission(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert checkpoint_command("list", tmp_path) == ExitCode.FINISHED
    assert capsys.readouterr().out == f"no checkpoints in {tmp_path / 'checkpoints'}\n"
    with pytest.raises(ConfigError, match="absent is not a directory"):
        checkpoint_command("list", tmp_path / "absent")
    (tmp_path / "checkpoints").write_text("")
    with pytest.raises(StorageError, match="checkpoints: Not a directory"):
        checkpoint_command("verify", tmp_path)
