"""The model against transformers' implementation, which shares no code with it, and against the written definition."""

from __future__ import annotations

import pytest

from tests.architecture.tree import ROOT
from tests.unit.model.huggingface_parity import ParityResult, compare, largest
from tests.unit.model.parity_cases import NUM_CASES, ParityCase, random_cases

TOLERANCE = 1e-5
FLOAT64_TOLERANCE = 1e-8

EVERYDAY = {
    "small hybrid": ParityCase({}),
    "four layers, value dim < key dim": ParityCase(
        {
            "num_hidden_layers": 4,
            "layer_types": ["linear_attention"] * 3 + ["full_attention"],
            "linear_key_head_dim": 24,
            "linear_value_head_dim": 10,
            "linear_conv_kernel_dim": 3,
            "partial_rotary_factor": 0.5,
            "rope_theta": 1e4,
        },
        length=65,
        seed=2,
    ),
    "plain top-k, tied": ParityCase(
        {"norm_topk_prob": False, "tie_word_embeddings": True, "num_experts_per_tok": 3}, num_rows=3, seed=3
    ),
}
RANDOM = random_cases()


@pytest.fixture(scope="module")
def all_results() -> list[ParityResult]:
    """In one process, since transformers takes longer to import than most cases."""
    return compare([*EVERYDAY.values(), *RANDOM])


@pytest.fixture
def results(all_results: list[ParityResult]) -> list[ParityResult]:
    """Of the random configurations."""
    return all_results[len(EVERYDAY) :]


@pytest.mark.slow
@pytest.mark.parametrize("case", list(EVERYDAY))
def test_logits_loss_and_every_gradient_equal_transformers(all_results: list[ParityResult], case: str) -> None:
    check(all_results[list(EVERYDAY).index(case)])


@pytest.mark.slow
@pytest.mark.parametrize("index", range(NUM_CASES))
def test_random_configurations_equal_transformers(results: list[ParityResult], index: int) -> None:
    check(results[index])


@pytest.mark.slow
def test_at_ordinary_decay_our_rounding_is_the_smaller(results: list[ParityResult]) -> None:
    """In fp32 and with decays of 1 to 16, gradients of A_log and dt_bias are small differences of large terms."""
    ours, theirs = ([largest(rounding)[1] for rounding in roundings] for roundings in _roundings(results))
    for case, our, their in zip(RANDOM, ours, theirs, strict=True):
        if case.length > 30 and "linear_attention" in case.changes["layer_types"]:
            assert our < their, case
    assert max(ours) < 1e-3
    assert 5 * max(ours) < max(theirs)


def test_random_configurations_cover_what_they_should() -> None:
    changes = [case.changes for case in RANDOM]
    ratios = {change["linear_num_value_heads"] / change["linear_num_key_heads"] for change in changes}
    assert ratios == {1, 2, 4}
    assert {case.length for case in RANDOM} >= {1, 63, 64, 65, 1000}
    assert {case.pattern for case in RANDOM} == {"one full", "alternate", "every 4th", "all full", "all linear"}
    assert {change["num_experts_per_tok"] for change in changes} == {1, 2, 3, 4}
    assert {change["partial_rotary_factor"] for change in changes} == {0.25, 0.5, 0.75, 1.0}
    for flag in ("norm_topk_prob", "tie_word_embeddings"):
        assert {change[flag] for change in changes} == {True, False}
    assert all(change["linear_key_head_dim"] != change["linear_value_head_dim"] for change in changes)


def test_the_table_in_the_documents_is_of_these_configurations() -> None:
    """After a change of the cases: ``python scripts/goldens/parity_table.py > docs/parity.md``."""
    rows = (ROOT / "docs" / "parity.md").read_text(encoding="utf-8").splitlines()
    lengths = [line.split("|")[3].split("x")[1].strip() for line in rows if line.startswith("| r")]
    assert lengths == [str(case.length) for case in RANDOM]


def check(result: ParityResult) -> None:
    """1e-5 in fp32 with slow decays; 1e-8 in float64 with ordinary ones, also against the model written out."""
    assert len(result.fp32) > 10
    for errors, tolerance in (
        (result.fp32, TOLERANCE),
        (result.float64, FLOAT64_TOLERANCE),
        (result.written, FLOAT64_TOLERANCE),
    ):
        name, error = largest(errors)
        assert error <= tolerance, f"{name}: {error:.2e}"
    for rounding in (result.our_rounding, result.their_rounding):
        assert rounding["logits"] <= TOLERANCE
        assert rounding["loss"] <= TOLERANCE


def _roundings(results: list[ParityResult]) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    return [result.our_rounding for result in results], [result.their_rounding for result in results]
