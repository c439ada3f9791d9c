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

With ``--run.device cpu`` a process stands for a GPU. How the trainings are run is in ``curve_training.py``.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_command import count, run_main, scratch_folder
from curve_training import Part, Training, train_all

from qwen3next_train.cli.arguments import Option, parse_arguments
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
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
_LOGGED_TIMES = {
    "saved": re.compile(r"checkpoint: step \d+ saved, ([\d.]+) (\w+) in ([\d.]+) s"),
    "verified": re.compile(r"checkpoint: \S+ verified, ([\d.]+) (\w+) in ([\d.]+) s"),
    "read": re.compile(r"resumed from step \d+: .*, (?:()())read in ([\d.]+) s$"),
}
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


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
    with scratch_folder(args.last("--dir"), "bench_curves-") as scratch:
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
    run_main(main, __doc__, OPTIONS)
