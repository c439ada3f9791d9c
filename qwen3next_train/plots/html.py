"""A report of runs as one HTML file that fetches nothing: curves, how far each came, attempts, versions, settings."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, UnusableFileError, read_file
from qwen3next_train.metrics.step_line import format_si
from qwen3next_train.plots.runs import LoggedRun
from qwen3next_train.train.run_files import MAX_EXIT_BYTES
from qwen3next_train.train.run_info import ValidatedRows

_MAX_CONFIG_BYTES = 4 << 20
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1200px; padding: 0 1em; color: #222 }
svg { width: 100%; height: auto } pre { background: #f5f5f5; padding: 1em; overflow-x: auto }
table { border-collapse: collapse; margin: 0.5em 0 } th, td { border: 1px solid #ccc; padding: 0.2em 0.8em }
th { text-align: left; font-weight: 600 } td { font-variant-numeric: tabular-nums } summary { cursor: pointer }
"""


def html_report(runs: Sequence[LoggedRun], svg: bytes) -> bytes:
    """The report.

    Args:
        runs: what is reported on, in the order of their colours.
        svg: the picture of all of them, as a file's content.
    """
    title = escape(", ".join(run.name for run in runs))
    # The declaration and document type of a file have no place inside another.
    picture = svg[svg.index(b"<svg") :].decode()
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        # Whatever stands in a configuration: nothing is loaded and nothing runs.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
        'img-src data:">',
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
        f"<h1>{title}</h1>",
        f'<figure id="curves">{picture}</figure>',
        *(part for run in runs for part in _run(run)),
        "</body>\n</html>\n",
    ]
    return "\n".join(parts).encode()


def _run(run: LoggedRun) -> Iterable[str]:
    yield f"<section>\n<h2>{escape(run.name)}</h2>"
    yield _table(("", "value"), _summary(run))
    attempts = run.info.get("attempts", [])
    if attempts:
        yield "<h3>Attempts</h3>"
        yield _table(("started at", "host", "first step", "command"), map(_attempt, attempts))
    for heading, name in (("Versions", "versions"), ("Layout", "layout")):
        fields = run.info.get(name)
        if isinstance(fields, dict):
            yield f"<h3>{heading}</h3>"
            yield _table(("", "value"), ((key, "none" if value is None else value) for key, value in fields.items()))
    config = _read(run.folder / "config.yaml", _MAX_CONFIG_BYTES)
    if config:
        yield f"<details>\n<summary>Configuration</summary>\n<pre>{escape(config)}</pre>\n</details>"
    yield "</section>"


def _summary(run: LoggedRun) -> Iterable[tuple[str, str]]:
    yield "directory", str(run.folder.absolute())
    yield "steps", f"{int(run.steps[-1]):,}"
    yield "tokens", f"{int(run.tokens[-1]):,}" if np.isfinite(run.tokens[-1]) else "unknown"
    labels = {"loss/lm": "loss", "eval/loss": "validation loss", "eval/bpb": "bits per byte"}
    named = {metric: metric for metric in run.values if metric.startswith("eval/") and metric not in labels}
    rows = ValidatedRows(run.info.get("attempts", []))
    for metric, label in (labels | named).items():
        values = run.values.get(metric)
        finite = np.flatnonzero([] if values is None else np.isfinite(values))
        logged = [row for row in finite if rows.compares(metric, int(run.steps[row]))]
        if values is not None and logged:
            last, best = logged[-1], min(logged, key=values.__getitem__)
            at_last, at_best = int(run.steps[last]), int(run.steps[best])
            yield label, f"{values[last]:.4f} at step {at_last:,}, best {values[best]:.4f} at step {at_best:,}"
    flops = run.values.get("perf/flops_total")
    if flops is not None and np.isfinite(flops[-1]):
        yield "model FLOPs", f"{format_si(flops[-1])}FLOP"
    for label, path in (("parameters", ("parameters", "total")), ("active parameters", ("parameters", "active"))):
        number = _at(run.info, path)
        if isinstance(number, int):
            yield label, f"{number:,}"
    if run.resumed_at:
        yield "resumed at", ", ".join(f"step {step:,}" for step in run.resumed_at)
    yield "newest checkpoint", _text(run.info.get("checkpoint_step"), "step {}")
    yield "revision", _text(run.info.get("git_revision"), "{}")
    yield "end", _end(run)


def _attempt(attempt: Mapping[str, Any]) -> tuple[object, ...]:
    command = attempt.get("command")
    words = " ".join(map(str, command)) if isinstance(command, list) else ""
    return attempt.get("started_at", ""), attempt.get("host", ""), attempt.get("first_step", ""), words


def _end(run: LoggedRun) -> str:
    try:
        end = json.loads(_read(run.folder / "exit.json", MAX_EXIT_BYTES))
    except (ValueError, RecursionError):
        end = None
    return f"{end.get('reason')} ({end.get('code')})" if isinstance(end, dict) else "not yet, or not recorded"


def _read(path: Path, max_bytes: int) -> str:
    """A file's text; empty where there is none, or none that can be read."""
    try:
        return read_file(LOCAL_FILESYSTEM, path, max_bytes=max_bytes).decode(errors="replace")
    except (OSError, UnusableFileError):
        return ""


def _at(info: Mapping[str, Any], path: Sequence[str]) -> object:
    value: object = info
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _text(value: object, template: str) -> str:
    return "none" if value is None else template.format(value)


def _table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "\n".join(f"<tr>{''.join(f'<td>{escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows)
    return f"<table>\n<tr>{head}</tr>\n{body}\n</table>"
