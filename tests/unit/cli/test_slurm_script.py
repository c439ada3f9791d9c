"""``slurm-script``: the shipped batch file, and the values that are put into it."""

from __future__ import annotations

import difflib
import os
import subprocess
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from tests.architecture.tree import ROOT

SHIPPED = (ROOT / "scripts" / "slurm" / "train.sbatch").read_text()


def changed_lines(text: str) -> list[str]:
    lines = difflib.ndiff(SHIPPED.splitlines(), text.splitlines())
    return [line[2:] for line in lines if line.startswith("+ ")]


def test_without_options_it_is_the_shipped_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["slurm-script"]) == 0
    assert capsys.readouterr().out == SHIPPED


def test_values_are_filled_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "job.sbatch"
    options = ["--nodes", "16", "--gpus-per-node=4", "--time", "2-00", "--output", str(output)]
    keys = ["--config", "qwen3next_80b.yaml", "--run.dir", "/shared/my runs/$x", "--lr", "1e-4", "--swiglu"]
    assert main(["slurm-script", *options, *keys]) == 0
    assert capsys.readouterr().out == f"{output}: submit it with  sbatch {output}\n"
    text = output.read_text()
    assert changed_lines(text) == [
        "#SBATCH --nodes=16",
        "#SBATCH --gpus-per-node=4",
        "#SBATCH --time=2-00",
        "TRAIN_ARGUMENTS=(--config=qwen3next_80b.yaml '--run.dir=/shared/my runs/$x' --lr=1e-4 --swiglu)",
    ]
    subprocess.run(["bash", "-n", str(output)], check=True)


def test_a_layout_that_the_job_cannot_have_is_refused_before_it_waits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "job.sbatch"
    job = ["slurm-script", "--output", str(output), "--config", "qwen3next_80b.yaml", "--nodes", "3"]
    assert main([*job, "--gpus-per-node", "8"]) == 2
    message = capsys.readouterr().err
    assert "parallel.expert_parallel_size: 16 does not divide the world size 24" in message
    assert not output.exists()
    # How many processes there will be is sbatch's to say.
    assert main(job) == 0


def test_filled_in_arguments_come_before_those_of_sbatch(tmp_path: Path) -> None:
    """The batch file itself, on a node where Slurm's commands and the program print what they are given."""
    job, programs = tmp_path / "job.sbatch", tmp_path / "bin"
    assert main(["slurm-script", "--run.dir", "a b", "--output", str(job)]) == 0
    programs.mkdir()
    for name, body in {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "echo node0",
        "squeue": "echo COMPLETING",
        "qwen3next-train": "printf '<%s>' \"$@\"",
    }.items():
        (programs / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (programs / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node0", "SLURM_NNODES": "1", "SLURM_NODEID": "0"}
    done = subprocess.run(
        ["bash", str(job), "--run.steps", "5"],
        cwd=tmp_path,
        env={"PATH": f"{programs}:{os.environ['PATH']}", **slurm},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "<--rdzv-endpoint><node0:20007><--run.dir=a b><--run.steps><5>" in done.stdout


@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--nodes=0"], "--nodes: not a whole number > 0 (got '0')"),
        (["--gpus-per-node=many"], "--gpus-per-node: not a whole number > 0 (got 'many')"),
        (["--time=tomorrow"], "--time: not a time limit of Slurm (got 'tomorrow'); give one such as 12:00:00 or 2-00"),
        (["--config=none.yaml"], "none.yaml: no such file"),
        (["--run.stepz=5"], "--run.stepz: unknown"),
        (["--output=taken"], "slurm-script: taken exists; remove it or choose another output"),
    ],
)
def test_faults_are_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: list[str],
    reason: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("mine")
    assert main(["slurm-script", *argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith(reason)
    assert Path("taken").read_text() == "mine"


@pytest.mark.parametrize("time", ["90", "90:30", "12:00:00", "2-00", "2-12:30", "2-12:30:00"])
def test_times_that_slurm_takes(capsys: pytest.CaptureFixture[str], time: str) -> None:
    assert main(["slurm-script", f"--time={time}"]) == 0
    assert f"#SBATCH --time={time}\n" in capsys.readouterr().out
