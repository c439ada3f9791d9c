"""What a run says of a disk on which its checkpoints do not fit."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.train.disk_check import small_disk, warn_of_small_disk

CONFIG = load_config([find_config("qwen3next_80b_8xh200.yaml")], []).config
NEEDED = 12 * 81_324_862_720


def test_a_checkpoint_of_twelve_bytes_a_parameter_has_to_fit() -> None:
    assert small_disk(CONFIG, NEEDED) is None
    assert small_disk(CONFIG, NEEDED - 1) is not None
    line = small_disk(CONFIG, 235 * 2**30)
    assert line == (
        "a checkpoint takes 908.88 GiB, 235.00 GiB are free: the save at the end will fail; "
        "free space or set run.dir to a larger disk"
    )
    periodic = CONFIG.model_copy(update={"checkpoint": CONFIG.checkpoint.model_copy(update={"interval": 7})})
    assert "the save of step 7 will fail" in str(small_disk(periodic, 0))


def test_the_disk_of_a_folder_that_does_not_exist_yet_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Path] = []

    def disk_usage(path: Path) -> SimpleNamespace:
        asked.append(path)
        return SimpleNamespace(free=10**9)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    folder = tmp_path / "run" / "checkpoints"
    warn_of_small_disk(CONFIG, folder)
    assert asked == [tmp_path]
    assert f"{folder}: a checkpoint takes 908.88 GiB" in capsys.readouterr().err
