"""The benchmark of curves: what a layout's name means, distances, and that curves of two ranks are trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.errors import ConfigError
from tests import forked
from tests.integration.launching import SMALL_MODEL, write_corpus

TINY = load_config([find_config("qwen3next_tiny.yaml")]).config
"""Sixteen rows a step, eight at most in a micro-batch."""


@pytest.mark.parametrize(
    ("name", "num_gpus", "rows", "sizes"),
    [
        ("1", 1, 8, {}),
        ("1xZ3", 1, 8, {"parallel.zero_stage": "3"}),
        ("1xMB1", 1, 1, {}),
        ("DP4", 4, 4, {}),
        ("EP4xZ2", 4, 4, {"parallel.expert_parallel_size": "4", "parallel.zero_stage": "2"}),
        ("EP2xDP2", 4, 4, {"parallel.expert_parallel_size": "2"}),
        ("CP4", 4, 8, {"parallel.context_parallel_size": "4"}),
        ("CP4xEP2", 4, 8, {"parallel.context_parallel_size": "4", "parallel.expert_parallel_size": "2"}),
        ("TP2xDP2", 4, 8, {"parallel.tensor_parallel_size": "2"}),
        ("TP2xEP4", 4, 8, {"parallel.tensor_parallel_size": "2", "parallel.expert_parallel_size": "4"}),
    ],
)
def test_a_name_says_ranks_and_settings(name: str, num_gpus: int, rows: int, sizes: dict[str, str]) -> None:
    from curve_training import Part

    part = Part.of(name, TINY)
    assert part.num_gpus == num_gpus
    assert dict(part.overrides) == {**sizes, "run.micro_batch_size": str(rows)}
    load_config([find_config("qwen3next_tiny.yaml")], list(part.overrides)).check_world(num_gpus)


def test_every_layout_fits_four_gpus_and_the_presets() -> None:
    from bench_curves import LAYOUTS
    from curve_training import Part

    parts = [Part.of(word, TINY) for name in LAYOUTS for word in name.split("+")]
    assert {part.num_gpus for part in parts} == {1, 2, 4}
    for config in ("qwen3next_tiny.yaml", "qwen3next_20m.yaml", "qwen3next_100m.yaml"):
        for part in parts:
            overrides = [("run.global_batch_size", "16"), ("data.sources", "text"), *part.overrides]
            load_config([find_config(config)], overrides).check_world(part.num_gpus)


@pytest.mark.parametrize("name", ["", "EP", "EP0", "PP2", "EP2xEP2", "2", "EP2,CP2"])
def test_what_is_no_layout_is_refused(name: str) -> None:
    from curve_training import Part

    with pytest.raises(ConfigError, match=f"^--layouts: '{name}' is no layout; join sizes by x: "):
        Part.of(name, TINY)


def test_a_batch_that_the_ranks_cannot_share_is_refused() -> None:
    from curve_training import Part

    with pytest.raises(ConfigError) as caught:
        Part.of("DP3", TINY)
    assert str(caught.value) == "--layouts: DP3: run.global_batch_size 16 is not divisible by its 3 ranks"


def test_distances_of_curves() -> None:
    from bench_curves import Distance

    expected = np.array([8.0, 4.0, 2.0])
    found = np.array([8.0, 4.5, 1.0])
    assert Distance.between(found, expected, relative=False) == Distance(1.0, 0.5)
    assert Distance.between(found, expected, relative=True) == Distance(0.5, 0.625 / 3)
    assert Distance.between(expected, expected, relative=False) == Distance(0.0, 0.0)
    assert math.isnan(Distance.between(found[:2], expected, relative=False).largest)
    assert math.isnan(Distance.between(np.array([8.0, np.nan, 2.0]), expected, relative=False).mean)


def test_what_a_log_says_of_checkpoints(tmp_path: Path) -> None:
    from bench_curves import checkpoint_times

    (tmp_path / "log.txt").write_text(
        "2026-11-28T01:13:50+0000 checkpoint: step 2 saved, 4.00 GiB in 8.0 s: /runs/a\n"
        "2026-11-28T01:13:50+0000 checkpoint: step_00000002 verified, 4.00 GiB in 2.0 s\n"
        "2026-11-28T01:13:50+0000 resumed from step 2: /runs/a/checkpoints/step_00000002, read in 4.0 s\n"
        "2026-11-28T01:13:50+0000 checkpoint: step 4 saved, 512 B in 0.0 s: /runs/a\n"
    )
    found = [(each["what"], each["bytes"], each["s"], each["gb_per_s"]) for each in checkpoint_times(tmp_path)]
    whole = 4 * 2**30
    assert found == [
        ("saved", whole, 8.0, whole / 8e9),
        ("verified", whole, 2.0, whole / 2e9),
        ("read", whole, 4.0, whole / 4e9),
        ("saved", 512, 0.0, None),
    ]


@pytest.mark.slow
def test_curves_of_two_ranks_are_one_rank_s(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forked, not started, but for the run below that fails."""
    import curve_training
    from bench_curves import main

    monkeypatch.setattr(curve_training, "multiprocessing", SimpleNamespace(get_context=lambda method: forked.CONTEXT))

    settings = {
        **SMALL_MODEL,
        "model.linear_num_key_heads": "2",
        "data.sources": str(write_corpus(tmp_path)),
    }
    overrides = [word for key, value in settings.items() for word in (f"--{key}", value)]
    options = ["--gpus", "2", "--steps", "4", "--seeds", "1234,7", "--dir", str(tmp_path)]
    options += ["--layouts", "1,DP4,EP2xZ2,EP2xZ2,1+TP2", "--output", str(tmp_path / "curves")]
    assert main([*options, *overrides]) == 0
    results = {each["name"]: each for each in json.loads((tmp_path / "curves.json").read_text())["results"]}
    # Four ranks are more than there are.
    assert list(results) == ["1", "EP2xZ2", "EP2xZ2 again", "1+TP2", "1 seed 7"]
    assert [each["num_gpus"] for each in results.values()] == [[1], [2], [2], [1, 2], [1]]
    assert [each["error"] for each in results.values()] == [""] * 5
    assert [len(each["loss/lm"]) for each in results.values()] == [4] * 5
    apart = {name: each["loss/lm/largest"] for name, each in results.items()}
    assert apart["1"] == 0
    assert max(apart["EP2xZ2"], apart["1+TP2"]) < 1e-5 < 1e-3 < apart["1 seed 7"]
    assert max(each["optim/grad_norm/largest"] for name, each in results.items() if "seed" not in name) < 1e-5
    assert results["EP2xZ2 again"]["equal"] == "yes"
    assert [each["what"] for each in results["1+TP2"]["checkpoints"]] == ["saved", "verified", "read", "saved"]
    picture = (tmp_path / "curves.svg").read_text()
    assert all(f'id="{name}"' in picture for name in results)
    assert main(["--draw", str(tmp_path / "curves.json"), "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again.svg").read_text() == picture
    assert "1+TP2: read" in capsys.readouterr().out
    assert not list(tmp_path.glob("bench_curves-*"))


@pytest.mark.slow
def test_a_failed_run_says_why_and_the_next_is_trained(tmp_path: Path) -> None:
    from curve_training import Part, Training, train_all

    words = {**SMALL_MODEL, "data.sources": str(write_corpus(tmp_path)), "schedule.warmup_steps": "0"}
    command = ["--config", "qwen3next_tiny.yaml", *(f"--{key}={value}" for key, value in words.items())]
    empty = tmp_path / "empty"
    empty.mkdir()
    parts = {"a": Part(1, (("data.sources", str(empty)),)), "b": Part(1, ())}
    trainings = [Training(name, 1, (part,), tmp_path / name) for name, part in parts.items()]
    done = list(train_all(trainings, command, steps=1, num_gpus=1, folder=tmp_path))
    assert done == trainings
    assert trainings[0].error.startswith(f"part 1 ended with 65: {empty}: no ")
    assert (trainings[1].error, trainings[1].done) == ("", 1)
