"""``eval.samples``: a run with them is the run without them, and a resume has every step's once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qwen3next_train.cli.main import main
from tests.integration.launching import (
    TIMING,
    Forked,
    arguments,
    exit_codes,
    metrics,
    run_forked,
    start_ranks,
    wait_until,
)

pytestmark = pytest.mark.slow

PROMPTS = ["def function_", "x\nreturn ", "Grüße"]
SAMPLES: dict[str, Any] = {
    "eval__samples__prompts": json.dumps(PROMPTS),
    "eval__samples__interval": 2,
    "eval__samples__max_new_tokens": 12,
    "eval__samples__temperature": 0.8,
    "eval__samples__top_p": 0.95,
}
SETTINGS: dict[str, Any] = {"run__steps": 7, "checkpoint__interval": 3, "checkpoint__keep": 9}


def samples(run_dir: Path) -> list[dict[str, Any]]:
    path = run_dir / "samples.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def weights(run_dir: Path) -> dict[str, bytes]:
    """What the checkpoints hold, manifests apart, which have the configuration in them."""
    files = (path for path in (run_dir / "checkpoints").rglob("*") if path.suffix == ".safetensors")
    return {str(path.relative_to(run_dir)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def plain(shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("plain") / "run"
    done = run_forked(arguments(shared_corpus, run_dir, **SETTINGS))
    assert done.returncode == 0, done.stderr
    return run_dir


@pytest.fixture(scope="module")
def sampled(shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    run_dir = tmp_path_factory.mktemp("sampled") / "run"
    done = run_forked(arguments(shared_corpus, run_dir, **SETTINGS, **SAMPLES))
    assert done.returncode == 0, done.stderr
    return run_dir, done.stderr


def test_the_run_is_that_without_samples_bit_for_bit(plain: Path, sampled: tuple[Path, str]) -> None:
    run_dir, _ = sampled
    assert metrics(run_dir) == metrics(plain)
    assert weights(run_dir) == weights(plain)
    assert len(weights(plain)) >= 3
    names = [set(json.loads((each / "metrics.jsonl").read_text().splitlines()[0])) for each in (run_dir, plain)]
    assert names[0] == names[1]
    assert set(TIMING) - {"mem/peak_gib"} <= names[0]
    assert samples(plain) == []


def test_samples_are_kept_and_said(sampled: tuple[Path, str]) -> None:
    run_dir, said = sampled
    rows = samples(run_dir)
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    for row in rows:
        assert [sample["prompt"] for sample in row["samples"]] == PROMPTS
        for number, sample in enumerate(row["samples"], start=1):
            assert list(sample) == ["prompt", "text", "tokens", "finish_reason"]
            assert sample["tokens"] == 12 or sample["finish_reason"] == "stop"
            line = f"sample {number} of step {row['step']}: {sample['prompt']!r} -> {sample['text'][:200]!r}"
            assert line in said
    assert len({json.dumps(row["samples"]) for row in rows}) == 4


def test_generate_finds_the_text_of_the_last_step(
    sampled: tuple[Path, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = sampled
    prompts = [f"--prompt={prompt}" for prompt in PROMPTS]
    words = ["--temperature=0.8", "--top-p=0.95", "--max-new-tokens=12", "--device=cpu", "--json"]
    capsys.readouterr()
    assert main(["generate", "--checkpoint", str(run_dir), *prompts, *words]) == 0
    found = [json.loads(line)["text"] for line in capsys.readouterr().out.splitlines()]
    assert found == [sample["text"] for sample in samples(run_dir)[-1]["samples"]]


def test_a_killed_run_goes_on_with_every_step_once(
    shared_corpus: Path, sampled: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir, **SETTINGS, **SAMPLES)
    process = Forked(args)
    # Behind the checkpoint of step 3: the row of step 4 is written again.
    wait_until(lambda: len(samples(run_dir)) >= 2, "the samples of step 4")
    process.kill()
    process.communicate(timeout=60)
    (run_dir / "samples.jsonl").open("a").write('{"step": 5, "sam')
    done = run_forked(args)
    assert done.returncode == 0, done.stderr
    assert samples(run_dir) == samples(sampled[0])
    assert metrics(run_dir) == metrics(sampled[0])


def test_going_back_keeps_the_later_samples_aside(
    shared_corpus: Path, sampled: tuple[Path, str], tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    done = run_forked(arguments(shared_corpus, run_dir, **SETTINGS, **SAMPLES))
    assert done.returncode == 0, done.stderr
    whole = (run_dir / "samples.jsonl").read_text()
    args = arguments(shared_corpus, run_dir, **SETTINGS)
    done = run_forked([*args, "--resume.from", "3"])
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in samples(run_dir)] == [2]
    assert (run_dir / "samples.jsonl.aside-1").read_text() == whole


def test_on_two_ranks(shared_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where each rank has half of every weight and half of the experts.

    That such a run goes on as without samples, to the bit, is what ``tests/distributed/test_samples.py`` shows.
    """
    layout = {"parallel__zero_stage": 3, "parallel__expert_parallel_size": 2}
    args = arguments(shared_corpus, tmp_path / "run", run__steps=3, **layout, **SAMPLES)
    assert exit_codes(start_ranks([args, args])) == [0, 0]
    assert [row["step"] for row in samples(tmp_path / "run")] == [2, 3]
    words = ["--checkpoint", str(tmp_path / "run"), "--prompt=x", "--max-new-tokens=2", "--device=cpu"]
    assert main(["generate", *words]) == 0
    assert capsys.readouterr().out.startswith("x")


def test_a_prompt_that_does_not_fit_is_refused_before_any_text_is_read(shared_corpus: Path, tmp_path: Path) -> None:
    changes = {"eval__samples__max_new_tokens": 58}
    done = run_forked(arguments(shared_corpus, tmp_path / "run", **SETTINGS, **(SAMPLES | changes)))
    assert (done.returncode, done.stderr) == (
        2,
        "eval.samples.prompts: prompt 3: 7 tokens and 58 new ones are more than data.sequence_length 64; "
        "give --eval.samples.max_new_tokens 57 or fewer, or a shorter prompt\n",
    )
