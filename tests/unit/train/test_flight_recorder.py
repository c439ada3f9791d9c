"""Where the last collectives go, and what the environment has to say about it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qwen3next_train.train.flight_recorder import recorded_collectives, write_collectives, written_dumps

VARIABLES = (
    *("TORCH_FR_DUMP_TEMP_FILE", "TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_DUMP_ON_TIMEOUT"),
    *("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "TORCH_NCCL_TRACE_BUFFER_SIZE"),
)


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def variables() -> dict[str, str]:
    return {name: os.environ[name] for name in VARIABLES if name in os.environ}


def test_torch_is_told_to_record_and_where_to_write(tmp_path: Path) -> None:
    (tmp_path / "flight_recorder_rank_3").touch()
    with recorded_collectives(tmp_path, 0):
        assert variables() == {
            "TORCH_FR_DUMP_TEMP_FILE": f"{tmp_path}/flight_recorder_rank_",
            "TORCH_FR_BUFFER_SIZE": "2000",
            "TORCH_NCCL_DUMP_ON_TIMEOUT": "1",
        }
        # Of an earlier attempt.
        assert written_dumps(tmp_path) == ""
    assert variables() == {}


def test_what_the_environment_says_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = {
        "TORCH_NCCL_DEBUG_INFO_TEMP_FILE": "/elsewhere/rank_",
        "TORCH_NCCL_TRACE_BUFFER_SIZE": "7",
        "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    }
    for name, value in said.items():
        monkeypatch.setenv(name, value)
    with recorded_collectives(tmp_path, 0):
        assert variables() == said
    assert variables() == said


def test_a_rank_writes_its_own_unless_the_watchdog_has(tmp_path: Path) -> None:
    path = write_collectives(tmp_path, 1)
    assert path == tmp_path / "flight_recorder_rank_1"
    # A pickle, as torch's own tool reads it.
    assert path.read_bytes()[:1] == b"\x80"
    (tmp_path / "flight_recorder_rank_0").write_bytes(b"by the watchdog")
    write_collectives(tmp_path, 0)
    assert (tmp_path / "flight_recorder_rank_0").read_bytes() == b"by the watchdog"
    assert written_dumps(tmp_path) == f"; last collectives of 2 ranks: {tmp_path}/flight_recorder_rank_*"


def test_where_nothing_can_be_written_nothing_is_named(tmp_path: Path) -> None:
    assert write_collectives(tmp_path / "absent", 0) is None
