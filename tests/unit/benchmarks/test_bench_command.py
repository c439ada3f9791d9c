"""What all benchmarks take from the command line alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwen3next_train.cli.arguments import Option
from qwen3next_train.errors import ConfigError


def test_a_folder_is_made_where_it_is_missing(tmp_path: Path) -> None:
    from bench_command import scratch_folder

    parent = tmp_path / "a" / "b"
    with scratch_folder(str(parent), "bench-") as folder:
        assert Path(folder).parent == parent
        assert Path(folder).name.startswith("bench-")
    assert list(parent.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    from bench_command import scratch_folder

    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"--dir: no folder can be made in {tmp_path / 'file'}: File exists"):
        scratch_folder(str(tmp_path / "file"), "bench-")


@pytest.mark.parametrize("word", ["--help", "-h"])
def test_help_is_the_scripts_text_and_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    from bench_command import run_main

    monkeypatch.setattr("sys.argv", ["bench.py", "--gpus", "2", word])
    options = {"--gpus": Option("--gpus", "N", "processes"), "--long": Option("--long", "", "long rows")}
    with pytest.raises(SystemExit) as ended:
        run_main(lambda argv: 1, "What it measures.", options)
    assert ended.value.code == 0
    assert capsys.readouterr().out == (
        "What it measures.\n"
        "Options, and any configuration key as --KEY VALUE:\n"
        "  --gpus N                  processes\n"
        "  --long                    long rows\n"
    )
