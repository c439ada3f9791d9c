"""Run directories of the tests of this package, one held by another process among them."""

import json
import subprocess
import sys
from pathlib import Path

from qwen3next_train.config.schema import Config, RunConfig
from qwen3next_train.train.run_directory import RunDirectory

CONFIG = Config(run=RunConfig(steps=7))


def opened(path: Path) -> RunDirectory:
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    return run_dir


def record(
    run_dir: RunDirectory,
    *,
    wandb_id: str = "abcd1234",
    command: tuple[str, ...] = ("qwen3next-train",),
    step: int = 0,
) -> None:
    run_dir.record_attempt(
        CONFIG,
        layout={"world_size": 1},
        workload={"parameters": {"total": 5}},
        wandb_id=wandb_id,
        command=command,
        step=step,
    )


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def exit_of(path: Path) -> dict:
    return json.loads((path / "exit.json").read_text())


HOLDER = """
import sys, time
from pathlib import Path
from qwen3next_train.errors import ConfigError
from qwen3next_train.train.run_directory import RunDirectory

run_dir = RunDirectory(Path(sys.argv[1]), rank=0)
try:
    run_dir.open()
except ConfigError as error:
    print("refused", error, flush=True)
else:
    print("holds", flush=True)
    sys.stdin.readline()
"""


def start_holder(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
