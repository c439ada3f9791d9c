"""Loss curves of one training at several layouts, their distances from one GPU's, and how far apart seeds are.

``python scripts/benchmarks/bench_curves.py --run.device cuda --run.precision bf16`` (``make bench-curves``) trains
:data:`LAYOUTS` as far as the machine has GPUs for them, each for ``--steps`` steps of the same global batches, and the
first layout once more with each of ``--seeds`` after the first. A seed changes the initial weights *and* the order of
the rows. The table gives the largest and the mean difference of a curve from that of the first layout and seed: of the
loss in nats per token, of the gradient norm relative to it. A layout named twice is trained twice; ``equal`` says
whether the second curve is the first one's bit for bit.

A layout is sizes joined by ``x``: EP ranks that share the experts, CP those that share the tokens of a row, TP those
that divide the mixers' heads, DP how often all that is repeated, Z the ZeRO stage (1), MB rows of a micro-batch; ``1``
is one GPU. Expert parallelism is over the ranks of the others: ``TP2xCP2xEP2`` has four. ``EP4+EP2xDP2`` trains half
of the steps at the first layout and resumes the rest at the second; what its checkpoint took is printed below.

Processes are started once for each set of GPUs and train one layout after the other in the program's own ``main``;
layouts that need fewer GPUs than there are run side by side. With ``--run.device cpu`` a process stands for a GPU.
"""

from __future__ import annotations

import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_command import count, run_main

from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError
from qwen3next_train.metrics.history import replace_file
from qwen3next_train.plots.figure import draw_figure, render
from qwen3next_train.plots.panels import Curve, DrawnPanel, Panel
from qwen3next_train.plots.runs import Floats, LoggedRun, read_runs
from qwen3next_train.versions import software_versions

LAYOUTS = (
    *("1", "1xZ2", "1xZ3", "1xMB1"),
    *("DP2", "EP2", "EP2xZ2", "EP2xZ3", "CP2", "TP2"),
    *("DP4", "DP4xZ2", "DP4xZ3", "EP2xDP2", "EP2xDP2xZ2", "EP2xDP2xZ3", "EP4", "EP4", "EP4xZ2", "EP4xZ3"),
    *("CP4", "TP2xCP2xEP2", "EP4+EP2xDP2"),
)
"""The first is what the others are compared with."""
METRICS = ("loss/lm", "optim/grad_norm")
OPTIONS = {
    option.name: option
    for option in (
        Option("--config", "FILE", "configuration (default qwen3next_tiny.yaml)"),
        Option("--layouts", "LIST", "such as 1,EP4,EP4xZ2,TP2xCP2,EP4+EP2xDP2; the others are compared with the first"),
        Option("--seeds", "LIST", "of the first layout; all others have the first seed (default 1234,1235,1236)"),
        Option("--steps", "N", "of each curve (default 50)"),
        Option("--gpus", "N", "how many to use (default: all)"),
        Option("--dir", "FOLDER", "where runs go, in a folder that is removed (default: of temporary files)"),
        Option("--output", "PREFIX", "write PREFIX.json, PREFIX.png and PREFIX.svg"),
        Option("--draw", "JSON", "train nothing: draw what was written where there is no matplotlib, to --output"),
    )
}
_SIZES = {
    "EP": "parallel.expert_parallel_size",
    "CP": "parallel.context_parallel_size",
    "TP": "parallel.tensor_parallel_size",
    "Z": "parallel.zero_stage",
    "MB": "run.micro_batch_size",
}
_PART = re.compile("(EP|CP|TP|DP|MB|Z)([1-9][0-9]*)")
_LOGGED_TIMES = {
    "saved": re.compile(r"checkpoint: step \d+ saved, ([\d.]+) (\w+) in ([\d.]+) s"),
    "verified": re.compile(r"checkpoint: \S+ verified, ([\d.]+) (\w+) in ([\d.]+) s"),
    "read": re.compile(r"resumed from step \d+: .*, (?:()())read in ([\d.]+) s$"),
}
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_LEAVING_S = 30.0
"""After one rank of a run has failed, the others get so long to say why."""


@dataclass(frozen=True)
class Part:
    """A layout that a curve, or a part of it, is trained at.

    Args:
        num_gpus: ranks.
        overrides: configuration keys and values.
    """

    num_gpus: int
    overrides: tuple[tuple[str, str], ...]

    @classmethod
    def of(cls, name: str, config: Config) -> Part:
        """Read a name.

        Args:
            name: without ``+``.
            config: global batch and the most rows of a micro-batch.

        Raises:
            ConfigError: it is none, or the global batch cannot be divided so.
        """
        found = [_PART.fullmatch(word) for word in name.split("x") if word != "1"]
        sizes = {match[1]: int(match[2]) for match in found if match}
        if None in found or len(sizes) < len(found):
            raise ConfigError(f"--layouts: {name!r} is no layout; join sizes by x: EP4, TP2xCP2xEP2, EP2xDP2xZ3, 1")
        slices = sizes.get("CP", 1) * sizes.get("TP", 1)
        num_gpus = max(slices, sizes.get("EP", 1)) * sizes.pop("DP", 1)
        rows, uneven = divmod(config.run.global_batch_size, num_gpus // slices)
        if uneven or not rows:
            batch = f"run.global_batch_size {config.run.global_batch_size}"
            raise ConfigError(f"--layouts: {name}: {batch} is not divisible by its {num_gpus // slices} ranks")
        sizes.setdefault("MB", max(size for size in range(1, rows + 1) if _fits(size, rows, config)))
        return cls(num_gpus, tuple((_SIZES[size], str(value)) for size, value in sizes.items()))


def _fits(size: int, rows: int, config: Config) -> bool:
    return rows % size == 0 and size <= config.run.micro_batch_size


@dataclass
class Training:
    """One curve.

    Args:
        name: of its run directory and in the picture.
        seed: of weights and data.
        parts: layouts, one after the other.
        directory: ``run.dir``.
        done: parts that have ended.
        wall_s: seconds of each of them.
        error: why it has no curve, or empty.
    """

    name: str
    seed: int
    parts: tuple[Part, ...]
    directory: Path
    done: int = 0
    wall_s: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def is_pending(self) -> bool:
        """Whether there is something to do."""
        return not self.error and self.done < len(self.parts)

    def arguments(self, command: Sequence[str], steps: int) -> list[str]:
        """The command line of the next part."""
        part = self.parts[self.done]
        # The last step of a part is saved in any case.
        last = steps * (self.done + 1) // len(self.parts)
        settings = {"run.dir": self.directory, "run.seed": self.seed, "run.steps": last, **dict(part.overrides)}
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        accepted = ["--resume.accept", "run.steps,run.micro_batch_size"] if self.done else []
        return [*command, *words, *accepted]

    def end(self, codes: Sequence[int | None], wall_s: float, log: Path) -> None:
        """Take note of how the ranks of a part have ended, and what they printed."""
        self.wall_s.append(wall_s)
        if any(codes):
            self.error = f"part {self.done + 1} ended with {', '.join(map(str, codes))}: {_reason(self.directory, log)}"
        else:
            self.done += 1
        if not self.is_pending:
            shutil.rmtree(self.directory / "checkpoints", ignore_errors=True)


def _reason(directory: Path, log: Path) -> str:
    try:
        return str(json.loads((directory / "exit.json").read_text(encoding="utf-8"))["reason"])
    except (OSError, ValueError, KeyError):
        return (log.read_text(encoding="utf-8", errors="replace").splitlines() or ["nothing printed"])[-1]


class Ranks:
    """The processes of some GPUs, which train one part of a curve after the other.

    Args:
        first: number of their first GPU.
        num_gpus: processes.
        log: file that takes what they print.
    """

    def __init__(self, first: int, num_gpus: int, log: Path) -> None:
        self.gpus = range(first, first + num_gpus)
        self.training: Training | None = None
        self._log = log
        self._processes: list[BaseProcess] = []
        self.connections: list[Connection] = []
        self._codes: dict[Connection, int | None] = {}
        self._started_at = self._failed_at = 0.0

    def begin(self, training: Training, arguments: Sequence[str]) -> None:
        """Have the next part of a curve trained."""
        self.prepare()
        self.training, self._codes, self._started_at = training, {}, time.monotonic()
        port = _free_port()
        for connection in self.connections:
            connection.send((port, list(arguments)))

    def prepare(self) -> None:
        """Start the processes, where they do not live, without waiting until they can be used."""
        if self._processes:
            return
        # Not forked: each is to see its own GPUs alone, and CUDA asks once.
        context = multiprocessing.get_context("spawn")
        known = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
        visible = ",".join(known[number] if known else str(number) for number in self.gpus)
        count = len(self.gpus)
        for rank in range(count):
            ours, theirs = context.Pipe()
            variables = {"CUDA_VISIBLE_DEVICES": visible, "RANK": rank, "LOCAL_RANK": rank}
            variables |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1"}
            texts = {name: str(value) for name, value in variables.items()}
            process = context.Process(target=_serve, args=(theirs, texts, str(self._log)))
            process.start()
            theirs.close()
            self._processes.append(process)
            self.connections.append(ours)

    def hear(self, connection: Connection) -> None:
        """Receive one rank's exit code."""
        try:
            self._codes[connection] = connection.recv()
        except (EOFError, OSError):
            self._codes[connection] = None
        if self._codes[connection] != 0 and not self._failed_at:
            self._failed_at = time.monotonic()

    @property
    def busy(self) -> list[Connection]:
        """Ranks whose exit code is still to come."""
        return [each for each in self.connections if each not in self._codes] if self.training else []

    def is_over(self) -> bool:
        """Whether the part has ended; its training then knows how, and these GPUs are free."""
        assert self.training is not None
        late = self._failed_at and time.monotonic() > self._failed_at + _LEAVING_S
        if self.busy and not late:
            return False
        codes = [self._codes.get(connection) for connection in self.connections]
        self.training.end(codes, time.monotonic() - self._started_at, self._log)
        # An engine leaves memory behind, as the process of a run that is resumed has not.
        if self._failed_at or self.training.is_pending:
            self.kill()
        self.training = None
        return True

    def kill(self) -> None:
        """End the processes; they would not heed a request after their first run."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for connection in self.connections:
            connection.close()
        self._processes, self.connections, self._failed_at = [], [], 0.0


def _serve(connection: Connection, variables: Mapping[str, str], log: str) -> None:
    """What a process of :class:`Ranks` does until the one that started it is gone."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(output, stream)
    os.environ.update(variables)
    # Ctrl-C is for the process that started this one, which ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from qwen3next_train.cli.main import main as program

    while True:
        try:
            port, arguments = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        os.environ["MASTER_PORT"] = str(port)
        code = program(arguments)
        # An engine refers to itself.
        gc.collect()
        torch.cuda.empty_cache()
        connection.send(code)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def train_all(
    trainings: Sequence[Training], command: Sequence[str], *, steps: int, num_gpus: int, folder: Path
) -> Iterator[Training]:
    """Train every curve, as many at a time as there are GPUs for; each is yielded when it has ended.

    Args:
        trainings: what to train; their ``done`` and ``error`` are kept up to date.
        command: arguments of the program that all share.
        steps: of each curve.
        num_gpus: how many there are; no part needs more.
        folder: for what the processes print.
    """
    sizes: dict[int, int] = {}
    for part in (part for training in trainings for part in training.parts):
        sizes[part.num_gpus] = sizes.get(part.num_gpus, 0) + 1
    blocks = [
        # Single ones from the last on, so that they leave room for pairs.
        Ranks(num_gpus - 1 - number if size == 1 else number * size, size, folder / f"{size}_gpus_{number}.log")
        for size, needed in sorted(sizes.items())
        for number in range(min(num_gpus // size, needed))
    ]
    try:
        for block in blocks:
            block.prepare()
        active: list[Ranks] = []
        while active or any(training.is_pending for training in trainings):
            taken = {gpu for block in active for gpu in block.gpus}
            waiting = [
                each for each in trainings if each.is_pending and all(each is not one.training for one in active)
            ]
            for block in blocks:
                fitting = [each for each in waiting if each.parts[each.done].num_gpus == len(block.gpus)]
                if fitting and taken.isdisjoint(block.gpus):
                    waiting.remove(fitting[0])
                    block.begin(fitting[0], fitting[0].arguments(command, steps))
                    taken.update(block.gpus)
                    active.append(block)
            owners = {connection: block for block in active for connection in block.busy}
            for connection in wait(list(owners), timeout=_LEAVING_S):
                assert isinstance(connection, Connection)
                owners[connection].hear(connection)
            for block in list(active):
                training = block.training
                assert training is not None
                if block.is_over():
                    active.remove(block)
                    if not training.is_pending:
                        yield training
    finally:
        for block in blocks:
            block.kill()


@dataclass(frozen=True)
class Distance:
    """How far a curve is from another one.

    Args:
        largest: at any step.
        mean: over steps.
    """

    largest: float
    mean: float

    @classmethod
    def between(cls, found: Floats, expected: Floats, *, relative: bool) -> Distance:
        """Of two curves of the same steps; NaN where one has a step that the other lacks or that is not finite."""
        if found.shape != expected.shape:
            return cls(float("nan"), float("nan"))
        differences = np.abs(found - expected) / (np.abs(expected) if relative else 1.0)
        return cls(float(differences.max()), float(differences.mean()))


HEADER = (
    f"{'layout':<20}{'GPUs':>5}{'seed':>7}{'last loss':>11}{'loss max':>11}{'mean':>10}{'gnorm max':>11}{'mean':>10}"
    f"{'equal':>8}{'s':>7}"
)


def format_training(training: Training, run: LoggedRun | None, reference: LoggedRun | None, equal: str) -> str:
    """One line of the table."""
    name = f"{training.name:<20}{max(part.num_gpus for part in training.parts):>5}{training.seed:>7}"
    if run is None:
        return f"{name}  {training.error or 'not trained'}"
    line = f"{name}{run.values[METRICS[0]][-1]:>11.4f}"
    for distance in distances(run, reference):
        line += f"{distance.largest:>11.1e}{distance.mean:>10.1e}"
    return f"{line}{equal:>8}{sum(training.wall_s):>7.1f}"


def distances(run: LoggedRun, reference: LoggedRun | None) -> list[Distance]:
    """Of loss and gradient norm, the latter relative."""
    if reference is None:
        return [Distance(float("nan"), float("nan")) for _ in METRICS]
    return [
        Distance.between(run.values[metric], reference.values[metric], relative=metric == METRICS[1])
        for metric in METRICS
    ]


def checkpoint_times(directory: Path) -> list[dict[str, Any]]:
    """What a run's log says of its checkpoints: bytes, seconds and their quotient, in the order they came."""
    found: list[dict[str, Any]] = []
    num_bytes = 0.0
    for line in (directory / "log.txt").read_text(encoding="utf-8").splitlines():
        for what, pattern in _LOGGED_TIMES.items():
            if (match := pattern.search(line)) is None:
                continue
            if match[1]:
                num_bytes = float(match[1]) * _UNITS[match[2]]
            seconds = float(match[3])
            rate = num_bytes / seconds / 1e9 if seconds else None
            found.append({"what": what, "bytes": num_bytes, "s": seconds, "gb_per_s": rate})
    return found


def draw(runs: Sequence[LoggedRun], output: Path) -> None:
    """Both metrics of all runs, and below each how far it is from the first run's; as PNG and SVG."""
    titles = ("next-token loss, nats per token", "gradient norm before clipping")
    panels = [
        DrawnPanel(Panel(title, metric), tuple(_curves(runs, metric, from_first=False)))
        for title, metric in zip(titles, METRICS, strict=True)
    ]
    panels += [
        DrawnPanel(Panel(f"{title}: |difference| from {runs[0].name}", metric, is_log=True), curves)
        for title, metric in zip(titles, METRICS, strict=True)
        if (curves := tuple(_curves(runs, metric, from_first=True)))
    ]
    figure = draw_figure(panels, [], runs, "steps")
    for kind in ("png", "svg"):
        replace_file(output.with_name(f"{output.name}.{kind}"), [render(figure, kind)], keep_old=False)


def _drawn_runs(results: Sequence[Mapping[str, Any]]) -> list[LoggedRun]:
    """The curves of a report, as far as they were trained."""
    runs = []
    for result in results:
        values = {metric: np.array(result[metric]) for metric in METRICS if metric in result}
        if values:
            steps = np.arange(1.0, 1 + len(values[METRICS[0]]))
            runs.append(LoggedRun(result["name"], Path(), steps, np.full_like(steps, np.nan), values, {}, ()))
    return runs


def _curves(runs: Sequence[LoggedRun], metric: str, *, from_first: bool) -> Iterator[Curve]:
    expected = runs[0].values[metric]
    for number, run in enumerate(runs):
        values = run.values[metric]
        if from_first:
            if values.shape != expected.shape:
                continue
            # A logarithmic axis has no zero.
            values = np.abs(values - expected)
            values = np.where(values > 0, values, np.nan)
        if np.isfinite(values).any():
            yield Curve(run.name, number, run.steps, values, None)


def main(argv: list[str]) -> int:
    """Train what the command line asks for and compare."""
    args = parse_arguments(argv, OPTIONS)
    output = None if (prefix := args.last("--output")) is None else Path(prefix)
    if (earlier := args.last("--draw")) is not None:
        if output is None:
            raise ConfigError("--draw: give the pictures a name with --output")
        draw(_drawn_runs(json.loads(Path(earlier).read_text(encoding="utf-8"))["results"]), output)
        return 0
    steps = count("--steps", args.last("--steps") or "50")
    seeds = [count("--seeds", text) for text in (args.last("--seeds") or "1234,1235,1236").split(",")]
    name = args.last("--config") or "qwen3next_tiny.yaml"
    given = dict(args.overrides)
    config = load_config([find_config(name)], args.overrides).config
    on_gpu = config.run.device != "cpu" and torch.cuda.is_available()
    num_gpus = count("--gpus", args.last("--gpus") or str(torch.cuda.device_count() if on_gpu else 1))
    settings = {
        "schedule.warmup_steps": str(min(config.schedule.warmup_steps, max(1, steps // 10))),
        "schedule.decay_steps": str(steps),
        "logging.interval": "1",
        "logging.wandb.mode": "disabled",
        "checkpoint.interval": "0",
        "eval.interval": "0",
        **given,
    }
    listed = [word for word in (args.last("--layouts") or ",".join(LAYOUTS)).split(",") if word]
    parts = {layout: tuple(Part.of(word, config) for word in layout.split("+")) for layout in listed}
    fitting = [layout for layout in listed if max(part.num_gpus for part in parts[layout]) <= num_gpus]
    if not fitting:
        raise ConfigError(f"--layouts: none of {', '.join(listed)} can be had with {num_gpus} GPUs")
    for part in itertools.chain.from_iterable(parts[layout] for layout in fitting):
        loaded = load_config([find_config(name)], [*settings.items(), ("run.steps", str(steps)), *part.overrides])
        loaded.check_world(part.num_gpus)
    command = ["--config", str(find_config(name))]
    command += [word for key, value in settings.items() for word in (f"--{key}", value)]
    print(", ".join(f"{name} {version}" for name, version in software_versions().items() if version))
    print(HEADER, flush=True)
    # What is asked for by SIGTERM, by timeout(1) for one, still gets a report.
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(dir=args.last("--dir"), prefix="bench_curves-") as scratch:
        folder = Path(scratch)
        trainings = list(_trainings(fitting, seeds, parts, folder))
        report = Report(trainings, folder, {"config": name, "steps": steps, "settings": settings})
        try:
            for training in train_all(trainings, command, steps=steps, num_gpus=num_gpus, folder=folder):
                print(report.line(training), flush=True)
        except KeyboardInterrupt:
            print("interrupted")
        report.conclude(output)
        return int(any(training.error or training.is_pending for training in trainings))


def _trainings(
    layouts: Sequence[str], seeds: Sequence[int], parts: Mapping[str, tuple[Part, ...]], folder: Path
) -> Iterator[Training]:
    numbers: dict[str, int] = {}
    for layout in layouts:
        numbers[layout] = number = numbers.get(layout, 0) + 1
        label = layout if number == 1 else f"{layout} again" if number == 2 else f"{layout} again {number}"
        yield Training(label, seeds[0], parts[layout], folder / label)
    for seed in seeds[1:]:
        label = f"{layouts[0]} seed {seed}"
        yield Training(label, seed, parts[layouts[0]], folder / label)


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


class Report:
    """What came of all trainings.

    Args:
        trainings: the first is what the others are compared with.
        folder: of their runs.
        heading: further fields of the JSON file.
    """

    def __init__(self, trainings: Sequence[Training], folder: Path, heading: Mapping[str, Any]) -> None:
        self._trainings = trainings
        self._folder = folder
        self._heading = heading

    def line(self, training: Training) -> str:
        """Of the table, as far as is known."""
        run, reference = self._run(training), self._run(self._trainings[0])
        return format_training(training, run, reference, self._equal(training, run))

    def conclude(self, output: Path | None) -> None:
        """Print what needs all curves; write the files.

        Args:
            output: prefix of their names; None for none.
        """
        print(f"\n{HEADER}")
        for training in self._trainings:
            print(self.line(training))
        results = [self._result(training) for training in self._trainings]
        for result in results:
            for each in result["checkpoints"]:
                rate = "" if each["gb_per_s"] is None else f", {each['gb_per_s']:.2f} GB/s"
                print(f"{result['name']}: {each['what']} {each['bytes'] / 1e9:.3f} GB in {each['s']:.1f} s{rate}")
        if output is None:
            return
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
        found = {
            "date": time.strftime("%Y-%m-%d"),
            "versions": software_versions(),
            "device": device,
            **self._heading,
            "results": results,
        }
        output.with_name(f"{output.name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        if importlib.util.find_spec("matplotlib") is None:
            print(f"matplotlib is not installed: no pictures; --draw {output.name}.json makes them elsewhere")
        elif runs := _drawn_runs(results):
            draw(runs, output)
        if any(training.error for training in self._trainings):
            logs = "".join(path.read_text(errors="replace")[-4000:] for path in sorted(self._folder.glob("*.log")))
            output.with_name(f"{output.name}.log").write_text(logs, encoding="utf-8")

    def _result(self, training: Training) -> dict[str, Any]:
        run, reference = self._run(training), self._run(self._trainings[0])
        result: dict[str, Any] = {
            "name": training.name,
            "seed": training.seed,
            "num_gpus": [part.num_gpus for part in training.parts],
            "overrides": [dict(part.overrides) for part in training.parts],
            "wall_s": training.wall_s,
            "error": training.error or ("" if run is not None else "not trained"),
            "checkpoints": [],
        }
        if run is not None:
            result |= {metric: run.values[metric].tolist() for metric in METRICS}
            result |= {"equal": self._equal(training, run)}
            for metric, distance in zip(METRICS, distances(run, reference), strict=True):
                result |= {f"{metric}/largest": distance.largest, f"{metric}/mean": distance.mean}
            if len(training.parts) > 1:
                result["checkpoints"] = checkpoint_times(training.directory)
        return result

    def _run(self, training: Training) -> LoggedRun | None:
        if training.error or training.is_pending:
            return None
        return read_runs([training.directory])[0]

    def _equal(self, training: Training, run: LoggedRun | None) -> str:
        """Whether the curve of a layout that is trained again is bit for bit the first one's; empty where it is not."""
        first, again, _ = training.name.partition(" again")
        if not again or run is None:
            return ""
        other = self._run(next(each for each in self._trainings if each.name == first))
        if other is None:
            return ""
        return "yes" if all(np.array_equal(run.values[metric], other.values[metric]) for metric in METRICS) else "no"


if __name__ == "__main__":
    run_main(main)
