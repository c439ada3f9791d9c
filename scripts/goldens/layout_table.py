"""Curves and parameters at every layout against one rank's: ``python scripts/goldens/layout_table.py``.

Writes ``docs/layouts.md`` and, with ``--golden``, the table of losses the tests compare with. About half an hour on
two cores. The runs and the comparison are the tests' own (``tests/distributed/layout_matrix.py``).
"""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

# The tests are not installed with the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.distributed.layout_matrix import (
    BOUND,
    GOLDEN_LOSSES,
    GOLDEN_METRICS,
    METRIC_BOUND,
    NARROWEST,
    TABLE_STEPS,
    Difference,
    Layout,
    all_layouts,
    covering,
    difference,
    kind_of_row,
    references,
)
from tests.distributed.layouts import Outcome, train_all
from tests.integration.launching import REPOSITORY

_PAGE = """\
# The same curve at every layout

The tiny model at half its width and an eighth of its vocabulary (fp32, CPU, z-loss on, aux loss of scope `sequence`,
MTP, clipping active) trained for {steps} steps of the same global batches at every layout, against one rank with four
micro-batches. Written by `scripts/goldens/layout_table.py` on {date} with torch {torch} and DeepSpeed {deepspeed}.
`tests/distributed/test_layout_matrix.py` runs eight steps of a part of it, every pair of two settings included.

* The rows are such that no routing decision of the one-rank run is narrower than {narrowest:g} in logits. The choice of
  the best experts jumps where two are level; with rows that come closer, some layout takes one decision the other way,
  and an expert's weights then differ by up to 1e-3.
* **metrics**: largest relative difference at any step of {metrics}.
  Bound: {metric_bound:g}.
* **parameters**: largest `|a - b| / |a|` (norms) of a parameter after the last step. Bound: {bound:g}.
* **CP**, **TP**, **EP**: slices of a row, ranks that divide the mixers' heads and share a slice, and ranks that share
  the experts. Of sizes of CP above 1 with TP 1 a set of layouts in which every pair of two settings occurs.

| ranks | CP | TP | EP | ZeRO | accumulation | rows | metrics | | parameters | |
|--:|--:|--:|--:|--:|--:|---|--:|---|--:|---|
{rows}

Losses of the one-rank run, packed rows:

| step | {metric_heads} |
|--:|{rules}
{losses}
"""


def main() -> None:
    """Run everything, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--golden", action="store_true", help="record the one-rank losses for the tests")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        expected = _train(references(TABLE_STEPS), Path(folder))
        by_kind = {kind_of_row(layout): outcome for layout, outcome in expected.items()}
        rows = []
        for world_size in (1, 2, 4):
            found = _train(_layouts(world_size), Path(folder))
            rows += [_row(layout, difference(by_kind[kind_of_row(layout)], found[layout])) for layout in found]
    if options.golden:
        golden = {
            kind: [{name: step[name] for name in GOLDEN_METRICS} for step in run.metrics]
            for kind, run in by_kind.items()
        }
        GOLDEN_LOSSES.write_text(json.dumps(golden, indent=1) + "\n")
    (REPOSITORY / "docs" / "layouts.md").write_text(_page(rows, by_kind["packed"]))


def _layouts(world_size: int) -> list[Layout]:
    """Those of the table: all with whole rows or divided heads, and a covering set of those whose rows are only cut."""
    layouts = all_layouts(world_size, TABLE_STEPS)
    cut = [layout for layout in layouts if layout.context_parallel_size > 1 and layout.tensor_parallel_size == 1]
    return [layout for layout in layouts if layout not in cut] + covering(cut)


def _train(layouts: list[Layout], folder: Path) -> dict[Layout, Outcome]:
    world_size = layouts[0].world_size
    print(f"{len(layouts)} runs on {world_size} ranks", file=sys.stderr)
    name = tempfile.mkdtemp(dir=folder)
    jobs = [layout.job for layout in layouts]
    return dict(zip(layouts, train_all(jobs, Path(name) / "runs", num_processes=world_size, timeout=3600), strict=True))


def _row(layout: Layout, far: Difference) -> str:
    of_row = (layout.context_parallel_size, layout.tensor_parallel_size)
    settings = (layout.world_size, *of_row, layout.expert_parallel_size, layout.zero_stage, layout.accumulation)
    cells = [*settings, kind_of_row(layout), f"{far.metric:.1e}", f"`{far.metric_name}`"]
    return "| " + " | ".join(map(str, [*cells, f"{far.parameter:.1e}", f"`{far.parameter_name}`"])) + " |"


def _page(rows: list[str], run: Outcome) -> str:
    losses = [
        "| " + " | ".join([str(number), *(f"{step[name]:.6f}" for name in GOLDEN_METRICS)]) + " |"
        for number, step in enumerate(run.metrics, start=1)
    ]
    return _PAGE.format(
        steps=TABLE_STEPS,
        date=datetime.date.today(),
        torch=version("torch"),
        deepspeed=version("deepspeed"),
        metrics=", ".join(f"`{name}`" for name in GOLDEN_METRICS),
        bound=BOUND,
        metric_bound=METRIC_BOUND,
        narrowest=NARROWEST,
        rows="\n".join(rows),
        metric_heads=" | ".join(f"`{name}`" for name in GOLDEN_METRICS),
        rules="--:|" * len(GOLDEN_METRICS),
        losses="\n".join(losses),
    )


if __name__ == "__main__":
    main()
