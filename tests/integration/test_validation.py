"""A run with named sets that ends early: its rows, its best checkpoint by name, and the same on two ranks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.launching import (
    arguments,
    exit_codes,
    exit_record,
    metrics,
    run_forked,
    start_ranks,
    write_corpus,
)

pytestmark = pytest.mark.slow

SETS = ("numbers", "words")


def settings(corpus: Path, run_dir: Path, **overrides: object) -> list[str]:
    """A learning rate that makes the losses rise from some step on."""
    folder = corpus.parent
    sources = [{"source": str(corpus), "alias": "code"}, {"source": str(folder / "words.txt"), "weight": 0.5}]
    values = {
        "data__sources": json.dumps(sources),
        "data__validation_sets": json.dumps({name: str(folder / f"{name}.txt") for name in SETS}),
        "run__steps": 12,
        "run__precision": "fp32",
        "eval__interval": 1,
        "eval__rows": 6,
        "eval__patience": 2,
        "eval__patience_metric": "eval/numbers/loss",
        "checkpoint__interval": 1,
        "checkpoint__keep": 1,
        "checkpoint__best": "eval/numbers/bpb",
        "logging__loss_by": "[source, position]",
        "optimizer__lr": "5e-2",
        "schedule__kind": "constant",
    }
    return arguments(corpus, run_dir, **values | overrides)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    (folder / "numbers.txt").write_text("".join(f"{number * 7919 % 1000} " for number in range(3000)))
    (folder / "words.txt").write_text(
        "".join(f"the word after {number % 50} is another one\n" for number in range(400))
    )
    return write_corpus(folder)


@pytest.fixture(scope="module")
def ended(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run") / "run"
    done = run_forked(settings(corpus, run_dir))
    assert done.returncode == 0, done.stderr
    return run_dir


def test_it_ends_with_two_validations_that_are_no_better(corpus: Path, ended: Path) -> None:
    rows = metrics(ended)
    losses = [row["eval/numbers/loss"] for row in rows]
    best = losses.index(min(losses)) + 1
    assert len(losses) == best + 2 < 12
    assert exit_record(ended)["reason"] == (
        f"ended at step {best + 2}: 2 validations in a row without a new lowest eval/numbers/loss (eval.patience 2), "
        f"which was {min(losses):.4f} at step {best}"
    )
    for row in rows:
        assert {f"eval/{name}/{kind}" for name in SETS for kind in ("loss", "bpb")} | {"eval/loss"} <= row.keys()
        assert row["data/share_code"] + row["data/share_words.txt"] == 1
    assert {path.name for path in (ended / "checkpoints").iterdir()} == {
        *(f"step_{step:08d}" for step in (best, best + 2)),
        *("latest", "best"),
    }
    assert (ended / "checkpoints" / "best").read_text() == f"step_{best:08d}\n"
    again = run_forked(settings(corpus, ended))
    assert (again.returncode, len(metrics(ended))) == (0, len(rows))
    assert f"ended at step {best + 2}: 2 validations" in again.stderr


def test_the_best_is_exported_and_evaluated_by_its_name(corpus: Path, ended: Path, tmp_path: Path) -> None:
    listed = run_forked(["checkpoint", "list", str(ended)])
    (marked,) = [line for line in listed.stdout.splitlines() if ", best (eval/numbers/bpb " in line]
    step = int(marked.split()[0])
    assert step == int((ended / "checkpoints" / "best").read_text().removeprefix("step_"))
    exported = run_forked(["export-hf", "--checkpoint", str(ended / "best"), "--output", str(tmp_path / "hf")])
    assert exported.returncode == 0, exported.stderr
    by_step = ended / "checkpoints" / f"step_{step:08d}"
    other = run_forked(["export-hf", "--checkpoint", str(by_step), "--output", str(tmp_path / "other")])
    assert other.returncode == 0, other.stderr
    names = sorted(path.name for path in (tmp_path / "hf").glob("*.safetensors"))
    assert names
    assert all((tmp_path / "hf" / name).read_bytes() == (tmp_path / "other" / name).read_bytes() for name in names)


def test_the_summary_compares_losses_of_the_same_rows(corpus: Path, tmp_path: Path) -> None:
    # A rate at which the last step makes the loss higher, of one row and of six.
    for steps, rows, rate in ((2, 1, "1e-3"), (3, 6, "10")):
        args = settings(corpus, tmp_path, run__steps=steps, eval__rows=rows, optimizer__lr=rate, eval__patience=0)
        done = run_forked([*args, "--resume.accept", "optimizer.lr"])
        assert done.returncode == 0, done.stderr
    losses = [row["eval/numbers/loss"] for row in metrics(tmp_path)]
    assert losses[1] < losses[2], "or the summary is right whatever it compares"
    lines = [line.partition("eval numbers ")[2] for line in done.stderr.splitlines() if "eval numbers " in line]
    assert f"best {losses[2]:.4f} at step 3" in lines[-1]


@pytest.mark.dist
def test_two_ranks_log_what_one_does(corpus: Path, tmp_path: Path) -> None:
    """Within the 1e-6 by which layouts differ; two steps, before the large steps multiply it."""
    runs = {}
    for count in (1, 2):
        args = settings(corpus, tmp_path / str(count), run__steps=2, optimizer__lr="1e-3", eval__patience=0)
        if count == 1:
            assert run_forked(args).returncode == 0
        else:
            assert exit_codes(start_ranks([args] * count)) == [0, 0]
        runs[count] = metrics(tmp_path / str(count))
    for one, two in zip(runs[1], runs[2], strict=True):
        names = [name for name in one if name.startswith(("eval/", "loss/", "data/"))]
        assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)


def test_an_unknown_metric_is_one_line(corpus: Path, tmp_path: Path) -> None:
    done = run_forked(settings(corpus, tmp_path / "run", checkpoint__best="eval/number/loss"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "--checkpoint.best: checkpoint.best 'eval/number/loss' is no metric of this run's validation; choose "
        "one of eval/loss, eval/bpb, eval/numbers/loss, eval/numbers/bpb, eval/words/loss, eval/words/bpb\n"
    )
    assert not (tmp_path / "run").exists()
