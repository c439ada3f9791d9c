"""Start the program as a user would, on a model and a corpus small enough for seconds."""

from __future__ import annotations

import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests import forked

REPOSITORY = Path(__file__).resolve().parents[2]

SMALL_MODEL = {
    "model.vocab_size": "4096",
    "model.hidden_size": "32",
    "model.num_hidden_layers": "2",
    "model.full_attention_interval": "2",
    "model.linear_num_key_heads": "1",
    "model.linear_num_value_heads": "2",
    "model.linear_key_head_dim": "16",
    "model.linear_value_head_dim": "16",
    "model.num_attention_heads": "2",
    "model.num_key_value_heads": "1",
    "model.head_dim": "16",
    "model.num_experts": "4",
    "model.num_experts_per_tok": "2",
    "model.moe_intermediate_size": "16",
    "model.shared_expert_intermediate_size": "16",
    "data.sequence_length": "64",
    "run.global_batch_size": "4",
    "run.micro_batch_size": "2",
    "schedule.warmup_steps": "2",
    "logging.wandb.mode": "disabled",
    "eval.interval": "0",
}
"""Overrides of ``qwen3next_tiny.yaml``: one GDN and one attention layer, MTP, two micro-batches."""

TWO_RANKS = {"run__steps": 20, "schedule__decay_steps": 20}
"""Overrides of runs that are compared with the fixture ``two_ranks``, long enough to be disturbed; one that is not may
have fewer steps."""

TIMING = ("perf/tflops_per_gpu", "perf/tokens_per_s", "perf/step_time_s", "perf/data_wait_s", "mem/peak_gib")
"""Metrics that depend on the clock or the allocator."""


def write_corpus(folder: Path) -> Path:
    """A folder of text documents of various lengths, down to a few bytes."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for index in range(40):
        lines = [
            f"def function_{index}_{line}(argument_{line % 7}):\n    return {line * index}\n" for line in range(index)
        ]
        (corpus / f"{index:02d}.txt").write_text("x\n" + "".join(lines))
    return corpus


def arguments(corpus: Path, run_dir: Path, **overrides: object) -> list[str]:
    """The command line after the program's name; overrides use ``__`` for the dot."""
    values = {**SMALL_MODEL, "data.sources": str(corpus), "run.dir": str(run_dir), "run.steps": "6"}
    values |= {key.replace("__", "."): str(value) for key, value in overrides.items()}
    return ["--config", "qwen3next_tiny.yaml", *(part for key, value in values.items() for part in (f"--{key}", value))]


def torchrun_arguments(form: str, args: list[str], *, num_processes: int) -> list[str]:
    """torchrun's command line for the program as a file, a script (--no-python) or a module."""
    console = str(Path(sys.executable).with_name("qwen3next-train"))
    target = {"file": ["qwen3next-train"], "script": ["--no-python", console], "module": ["-m", "qwen3next_train"]}
    return ["--standalone", f"--nproc-per-node={num_processes}", *target[form], *args]


def environment() -> dict[str, str]:
    """The test's environment without a launcher's leftovers; one thread per process, as torchrun sets."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in launcher} | {"OMP_NUM_THREADS": "1"}


class Forked:
    """The program in one process, which is forked and not started: the same from its first line on.

    Or torchrun, which starts its processes for real, Sphinx, or a script by its path. Attributes and methods are those
    of :class:`subprocess.Popen`.
    """

    def __init__(
        self,
        args: list[str],
        variables: Mapping[str, str] | None = None,
        *,
        program: str = "qwen3next-train",
        cwd: Path = REPOSITORY,
    ) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._outputs = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        variables = environment() | dict(variables or {})
        self._process = forked.start(_program, [program, *args], variables, self._outputs, cwd)

    @property
    def pid(self) -> int:
        """Process number."""
        assert self._process.pid is not None
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """Exit code, or minus the number of the signal; None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Signal the process."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for the end; stdout and stderr."""
        self._process.join(timeout)
        assert self.returncode is not None, f"still running after {timeout} s"
        stdout, stderr = (path.read_text() if path.exists() else "" for path in self._outputs)
        return stdout, stderr


def _program(argv: list[str], variables: Mapping[str, str], outputs: list[Path], cwd: Path) -> None:
    """What the console script of that name does, or the script, in a forked process."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(cwd)
    sys.argv = argv
    if argv[0] == "torchrun":
        from torch.distributed.run import main as torchrun

        torchrun()
    elif argv[0] == "sphinx":
        from sphinx.cmd.build import main as sphinx

        sys.exit(sphinx())
    elif argv[0].endswith(".py"):
        sys.path.insert(0, str(Path(argv[0]).parent))
        runpy.run_path(argv[0], run_name="__main__")
    else:
        from qwen3next_train.cli.main import main

        sys.exit(main())


def run_forked(
    args: list[str], cwd: Path = REPOSITORY, *, program: str = "qwen3next-train"
) -> subprocess.CompletedProcess[str]:
    """:func:`run` where the start of the process is not what is tested; or of another ``program``."""
    return _ended(args, Forked(args, program=program, cwd=cwd))


def run(
    form: str, args: list[str], *, num_processes: int = 1, variables: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """:func:`start` and wait for the end: return code, stdout and stderr."""
    return _ended(args, start(form, args, num_processes=num_processes, variables=variables))


def start(
    form: str, args: list[str], *, num_processes: int = 1, variables: Mapping[str, str] | None = None
) -> subprocess.Popen[str] | Forked:
    """Start the program in one of its launch forms, with more environment variables, to be signalled.

    Args:
        form: ``console``, the console script; ``file``, ``script`` or ``module``, by torchrun.
        args: behind the program's name.
        num_processes: that torchrun starts.
        variables: of the environment.
    """
    if form != "console":
        return Forked(torchrun_arguments(form, args, num_processes=num_processes), variables, program="torchrun")
    return subprocess.Popen(
        [str(Path(sys.executable).with_name("qwen3next-train")), *args],
        cwd=REPOSITORY,
        env=environment() | dict(variables or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def _ended(args: list[str], process: subprocess.Popen[str] | Forked) -> subprocess.CompletedProcess[str]:
    try:
        stdout, stderr = process.communicate(timeout=280)
    except BaseException:
        process.kill()
        raise
    assert process.returncode is not None
    return subprocess.CompletedProcess(args, process.returncode, stdout, stderr)


def start_ranks(args_of_rank: list[list[str]], *, program: str = "qwen3next-train") -> list[Forked]:
    """Fork one process per argument list, as the ranks of one run on this machine."""
    count, port = len(args_of_rank), free_port()
    return [
        Forked(
            args,
            {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            program=program,
        )
        for rank, args in enumerate(args_of_rank)
    ]


def exit_codes(processes: Sequence[Forked]) -> list[int | None]:
    """How they ended, when all have."""
    for process in processes:
        process.communicate(timeout=200)
    return [process.returncode for process in processes]


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait_until(condition: Callable[[], bool], what: str, *, timeout_s: float = 150.0, poll_s: float = 0.02) -> None:
    """Wait, or fail and say for what."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"still waiting for {what}"
        time.sleep(poll_s)


def num_steps(run_dir: Path) -> int:
    """Rows of ``metrics.jsonl``; none before it exists."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.is_file() else 0


def workers_of(run_dir: Path) -> dict[int, int]:
    """Process numbers of the ranks that train in a directory, by rank."""
    workers = {}
    for pid in processes_of(run_dir):
        try:
            variables = Path(f"/proc/{pid}/environ").read_text().split("\0")
        except OSError:
            continue
        workers |= {int(each.removeprefix("RANK=")): pid for each in variables if each.startswith("RANK=")}
    return workers


def processes_of(run_dir: Path) -> list[int]:
    """Live processes with a run directory on their command line: launchers and ranks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().decode(errors="replace").split("\0")
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if str(run_dir) in words and state not in "ZX":
            found.append(int(path.name))
    return found


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """Rows of ``metrics.jsonl`` without those that depend on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMING} for row in rows]


def exit_record(run_dir: Path) -> dict[str, Any]:
    """Contents of ``exit.json``."""
    return json.loads((run_dir / "exit.json").read_text())  # type: ignore[no-any-return]
