"""What a wrong start costs: one line, the contract's exit code, nothing half-written."""

import json
from pathlib import Path

import pytest

from tests.integration.launching import arguments, run_forked, write_corpus

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


def _refusal(args: list[str]) -> tuple[int, list[str]]:
    done = run_forked(args)
    assert done.stdout == ""
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize(
    ("overrides", "code", "text"),
    [
        ({"optimizer__learning_rate": "1"}, 2, "--optimizer.learning_rate: unknown key"),
        ({"run__steps": "many"}, 2, "--run.steps: "),
        (
            {"model__linear_num_value_heads": "3", "model__linear_num_key_heads": "2"},
            2,
            "model.linear_num_value_heads 3",
        ),
        (
            {"parallel__expert_parallel_size": "2"},
            2,
            "parallel.expert_parallel_size: 2 does not divide the world size 1",
        ),
        (
            {"parallel__zero_stage": "3", "parallel__offload_optimizer": "cpu"},
            2,
            "parallel.offload_optimizer cpu clips by a wrong gradient norm with parallel.zero_stage 3",
        ),
        ({"data__sources": "missing/corpus.txt"}, 65, "missing/corpus.txt: no such file"),
        ({"run__dir": "README.md/run"}, 74, "README.md/run cannot be created or written"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_start_is_one_line_and_the_contract_s_code(
    tmp_path: Path, corpus: Path, overrides: dict[str, str], code: int, text: str
) -> None:
    found, lines = _refusal(arguments(corpus, tmp_path / "run", **overrides))
    assert found == code, lines
    assert len(lines) == 1, lines
    assert text in lines[0]
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(("content", "text"), [("", "no documents"), ("a few words", "a row needs 65")])
def test_a_corpus_that_fills_no_row_is_refused(tmp_path: Path, content: str, text: str) -> None:
    source = tmp_path / "corpus.txt"
    source.write_text(content)
    code, lines = _refusal(arguments(source, tmp_path / "run"))
    assert (code, len(lines)) == (65, 1), lines
    assert text in lines[0]


def test_a_directory_of_another_configuration_is_refused_and_left_as_it_is(tmp_path: Path, corpus: Path) -> None:
    run_dir = tmp_path / "run"
    assert run_forked(arguments(corpus, run_dir, run__steps=2)).returncode == 0
    before = (run_dir / "metrics.jsonl").read_bytes(), (run_dir / "config.yaml").read_bytes()
    code, lines = _refusal(arguments(corpus, run_dir, run__steps=2, run__seed=7))
    assert (code, len(lines)) == (2, 1)
    assert lines[0].startswith("run.seed: was 1234, now 7: ")
    assert ((run_dir / "metrics.jsonl").read_bytes(), (run_dir / "config.yaml").read_bytes()) == before
    assert json.loads((run_dir / "exit.json").read_text())["code"] == 2
