"""Findings: how one reads, what a crash becomes, how ranks add up."""

from __future__ import annotations

from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.selftest.check import Check, merge_ranks, try_check


def test_a_line_says_ok_or_fail_then_name_and_detail() -> None:
    assert Check("cpu", True, "2 cores").line() == "ok   cpu                         2 cores"
    assert Check("cpu", False, "none; buy one").line() == "FAIL cpu                         none; buy one"


def test_a_check_that_breaks_off_is_a_failed_check_of_one_line() -> None:
    def broken() -> list[Check]:
        raise RuntimeError("  CUDA error: illegal access\nfor debugging consider ...")

    assert try_check("kernels", broken) == [Check("kernels", False, "RuntimeError: CUDA error: illegal access")]

    def refused() -> list[Check]:
        raise KernelUnavailable("kernels.gated_delta_rule: 'fla' needs CUDA; choose 'auto'")

    assert try_check("x", refused)[0].detail == "kernels.gated_delta_rule: 'fla' needs CUDA; choose 'auto'"

    def silent() -> list[Check]:
        raise AssertionError

    assert try_check("x", silent) == [Check("x", False, "AssertionError: no message")]


def test_ranks_are_good_together_and_the_first_bad_one_is_named() -> None:
    good, bad, worse = (
        Check("packing", True, "fine"),
        Check("packing", False, "leaks"),
        Check("packing", False, "burns"),
    )
    assert merge_ranks([[good], [good]]) == [good]
    assert merge_ranks([[good], [bad], [worse]]) == [Check("packing", False, "rank 1: leaks")]
    assert merge_ranks([[bad]]) == [bad]


def test_a_name_that_only_some_ranks_have_is_kept() -> None:
    wandb, crash = Check("wandb", True, "online"), Check("kernels", False, "RuntimeError: x")
    merged = merge_ranks([[wandb], [crash], []])
    assert merged == [wandb, Check("kernels", False, "rank 1: RuntimeError: x")]
