"""The ``plot`` subcommand."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qwen3next_train.errors import ConfigError, ExitCode, StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.history import replace_file
from qwen3next_train.plots.html import html_report
from qwen3next_train.plots.panels import BalanceMap, DrawnPanel, Rate, balance_maps, draw_panels
from qwen3next_train.plots.runs import Axis, LoggedRun, read_runs
from qwen3next_train.plots.text import text_map, text_panel

Kind = Literal["pictures", "text", "html"]

_NO_LIBRARY = "matplotlib is not installed; pip install 'qwen3next-train[matplotlib]'"


def plot_command(
    paths: Sequence[Path], *, kind: Kind, axis: Axis, rate: Rate, smoothing: float, output: Path | None
) -> int:
    """Draw runs over each other.

    Args:
        paths: run directories, or their ``metrics.jsonl``.
        kind: ``pictures`` are ``OUTPUT.png`` and ``OUTPUT.svg``, ``html`` a report, ``OUTPUT.html``; ``text`` goes to
            standard output. Without matplotlib a terminal gets text instead of pictures.
        axis: what is to the right.
        rate: what speed is counted in.
        smoothing: weight of what came before, 0 for none.
        output: prefix of the files, with or without one of their suffixes; None: ``curves`` in the first run's folder.

    Returns:
        The exit code.

    Raises:
        ConfigError: there is no such run, it has logged nothing, or matplotlib is missing.
        DataError: a row is damaged.
        StorageError: a file cannot be read or written.
    """
    runs = read_runs(paths)
    panels = list(draw_panels(runs, axis=axis, rate=rate, smoothing=smoothing))
    maps = list(balance_maps(runs, axis))
    if not panels:
        raise ConfigError(f"{paths[0]}: no metric that is plotted has a finite value; look into the rows")
    if kind != "text" and importlib.util.find_spec("matplotlib") is None:
        if kind == "html" or not sys.stdout.isatty():
            raise ConfigError(f"plot: {_NO_LIBRARY}, or draw text with --text")
        get_logger().info("plot: %s for pictures", _NO_LIBRARY)
        kind = "text"
    if kind == "text":
        _print(runs, panels, maps, axis)
    else:
        _write(runs, panels, maps, axis, kind, output)
    return ExitCode.FINISHED


def _write_file(path: Path, content: bytes) -> None:
    """Make or replace one file, by one rename.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        replace_file(path, [content], keep_old=False)
    except OSError as error:
        raise StorageError(
            f"{path}: cannot be written ({system_reason(error)}); name another place with --output"
        ) from error


def _print(runs: Sequence[LoggedRun], panels: Sequence[DrawnPanel], maps: Sequence[BalanceMap], axis: Axis) -> None:
    width = shutil.get_terminal_size().columns
    resumes = [place for run in runs for place in run.resumes_along(axis)]
    parts = [text_panel(drawn, axis=axis, width=width, resumes=resumes) for drawn in panels]
    parts += [text_map(balance, axis=axis, width=width) for balance in maps]
    print("\n\n".join("\n".join(lines) for lines in parts))


def _write(
    runs: Sequence[LoggedRun],
    panels: Sequence[DrawnPanel],
    maps: Sequence[BalanceMap],
    axis: Axis,
    kind: Kind,
    output: Path | None,
) -> None:
    from qwen3next_train.plots.figure import draw_figure, render

    figure = draw_figure(panels, maps, runs, axis)
    svg = render(figure, "svg")
    contents = {"html": html_report(runs, svg)} if kind == "html" else {"png": render(figure, "png"), "svg": svg}
    prefix = runs[0].folder / ("report" if kind == "html" else "curves") if output is None else output
    if prefix.suffix in (".html", ".png", ".svg"):
        prefix = prefix.with_suffix("")
    for suffix, content in contents.items():
        path = prefix.with_name(f"{prefix.name}.{suffix}")
        _write_file(path, content)
        print(path)
