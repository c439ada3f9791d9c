"""``--resume.from`` against what is on the disk, before anything is prepared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.config.schema import Config, RunConfig
from qwen3next_train.errors import ConfigError
from qwen3next_train.train.resume import parse_resume
from qwen3next_train.train.start import require_start, start_record


def config_of(run_dir: Path, steps: int = 20) -> Config:
    return Config(run=RunConfig(steps=steps, dir=str(run_dir)))


def run_of(path: Path, *steps: int, started_from: Any = None) -> Path:
    """A run directory with names of checkpoints, which is all that is looked at."""
    for step in steps:
        (path / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)
        (path / "checkpoints" / f"step_{step:08d}" / "MANIFEST.json").touch()
    path.mkdir(exist_ok=True)
    attempts = [{"first_step": 0}] + ([] if started_from is None else [{"resume_from": started_from}])
    (path / "run.json").write_text(json.dumps({"attempts": attempts}))
    return path


def problem(run_dir: Path, start: str) -> str | None:
    try:
        require_start(parse_resume([], start), config_of(run_dir))
    except ConfigError as error:
        return str(error)
    return None


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two runs, ``run`` of steps 5 and 10 and ``other`` of step 7, one without checkpoints, a file, a link."""
    monkeypatch.chdir(tmp_path)
    run_of(tmp_path / "run", 5, 10)
    run_of(tmp_path / "other", 7)
    run_of(tmp_path / "new")
    (tmp_path / "file").write_text("x")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "run" / "checkpoints" / "best").write_text("step_00000005\n")
    (tmp_path / "other" / "checkpoints" / "best").write_text("step_00000007\n")
    return tmp_path


OWN = "name a run directory or one of its checkpoints, or a step of run.dir: 10, 5"
OTHERS = "name a run directory or one of its checkpoints"
NONE = "it has none at all; leave --resume.from out to start at step 0, or give the path of another run"


@pytest.mark.parametrize(
    ("run_dir", "start", "line"),
    [
        # What is there.
        *(("run", start, None) for start in ("5", "10", "00000005", "other", "./other/", "link", "run", "other/best")),
        *(("run", f"{folder}/step_00000005", None) for folder in ("run/checkpoints", "other/../run/checkpoints")),
        *(("new", start, None) for start in ("other", "other/checkpoints", "other/checkpoints/step_00000007", "run")),
        ("new", "other/checkpoints/best", None),
        # Steps.
        ("run", "7", "run/checkpoints has no checkpoint of step 7; give a step that it has: 10, 5"),
        ("run", "11", "run/checkpoints has no checkpoint of step 11; give a step that it has: 10, 5"),
        ("run", "99999999", "run/checkpoints has no checkpoint of step 99999999; give a step that it has: 10, 5"),
        (
            "run",
            "run/checkpoints/step_00000007",
            "run/checkpoints has no checkpoint of step 7; give a step that it has: 10, 5",
        ),
        ("new", "5", f"new/checkpoints has no checkpoint of step 5; {NONE}"),
        ("absent", "0", f"absent/checkpoints has no checkpoint of step 0; {NONE}"),
        # Paths.
        ("run", "missing", f"missing: no such directory; {OWN}"),
        ("run", "step_00000005", f"step_00000005: no such directory; {OWN}"),
        ("run", "-5", f"-5: no such directory; {OWN}"),
        ("run", "1e3", f"1e3: no such directory; {OWN}"),
        ("run", "100000000", f"100000000: no such directory; {OWN}"),
        ("run", "dangling", f"dangling: no such directory; {OWN}"),
        ("run", "file", f"file: not a directory; {OWN}"),
        ("run", "file/x", f"file/x: no such directory; {OWN}"),
        ("run", "new", f"new: no checkpoint in it; {OWN}"),
        ("run", "other/checkpoints/step_00000009", f"other/checkpoints/step_00000009: no such directory; {OWN}"),
        ("new", "missing", f"missing: no such directory; {OTHERS}"),
        ("new", "new", f"new: no checkpoint in it; {OTHERS}"),
        ("absent", "file", f"file: not a directory; {OTHERS}"),
        ("absent", "other/nothing/best", f"other/nothing/best: no such directory; {OTHERS}"),
        *(
            (
                "run",
                name,
                f"{name}: the best of run.dir may be another checkpoint at the next start; give its step, which "
                "`checkpoint list` marks",
            )
            for name in ("run/best", "run/checkpoints/best", "other/../run/best")
        ),
    ],
)
def test_what_is_asked_for_has_to_be_there(place: Path, run_dir: str, start: str, line: str | None) -> None:
    assert problem(Path(run_dir), start) == (None if line is None else f"--resume.from: {line}")


def test_what_an_earlier_attempt_has_acted_on_may_be_gone(place: Path) -> None:
    run = run_of(place / "forked", 12, started_from={"path": "gone"})
    assert problem(run, "gone") is None
    assert problem(run, "gone-too") is not None
    # Nothing to go on with instead.
    assert problem(run_of(place / "killed", started_from={"path": "gone"}), "gone") is not None
    back = place / "back"
    run_of(back, 9, started_from=start_record(4, config_of(back)))
    assert problem(back, "4") is None
    assert problem(back, "3") is not None
    with pytest.raises(ConfigError, match="has no checkpoint of step 4; give a step that it has: 9"):
        require_start(parse_resume([], "4"), config_of(back, steps=30))


def test_steps_of_a_long_run_are_listed_as_far_as_a_line_goes(place: Path) -> None:
    line = problem(run_of(place / "long", *range(1, 41)), "50")
    assert line is not None
    assert line.endswith(f"{', '.join(str(step) for step in range(40, 20, -1))} and 20 older ones")


@pytest.mark.parametrize("more", [["--dry-run"], ["--nproc-per-node", "2"]])
def test_the_command_refuses_before_it_works(place: Path, capsys: pytest.CaptureFixture[str], more: list[str]) -> None:
    words = ["--config", "qwen3next_tiny.yaml", "--run.dir", "run", "--resume.from", "missing", "--run.device", "cpu"]
    assert main([*words, *more]) == 2
    assert capsys.readouterr() == ("", f"--resume.from: missing: no such directory; {OWN}\n")
