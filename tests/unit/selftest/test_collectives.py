"""Collectives that compute wrongly are found; right ones between real processes are in ``test_doctor``."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.parallel.process_groups import ProcessContext
from qwen3next_train.selftest.collectives import all_reduce_check, all_to_all_check
from tests.unit.model.small_models import CPU


def context(*, rank: int = 1, world_size: int = 4) -> ProcessContext:
    return ProcessContext(
        rank, world_size, rank, world_size, CPU, SingleProcess(), SingleProcess(), SingleProcess(), ()
    )


@pytest.fixture(autouse=True)
def no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "get_backend", lambda: "fake")
    monkeypatch.setattr(dist, "barrier", lambda: None)


def test_right_sums_pass_with_a_bandwidth(monkeypatch: pytest.MonkeyPatch) -> None:
    # Ranks 0, 1, 2, 3 all hold the pattern plus their rank; ours is 1.
    monkeypatch.setattr(dist, "all_reduce", lambda total: total.sub_(1).mul_(4).add_(6))
    check = all_reduce_check(context())
    assert check.ok
    assert check.detail.startswith("all-reduce of 64 MiB over 4 ranks (fake): right, ")
    assert check.detail.endswith(" GB/s")


def test_one_wrong_sum_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def almost(total: torch.Tensor) -> None:
        total.sub_(1).mul_(4).add_(6)
        total[12345] += 1

    monkeypatch.setattr(dist, "all_reduce", almost)
    check = all_reduce_check(context())
    assert not check.ok
    assert "1 of 16,777,216 sums are wrong" in check.detail
    monkeypatch.setattr(dist, "all_reduce", lambda total: None)
    assert not all_reduce_check(context()).ok


def test_rows_that_do_not_arrive_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def lost(received: torch.Tensor, sent: torch.Tensor, counts_in: list[int], counts_out: list[int]) -> None:
        sizes.append((received.shape[0], sent.shape[0], counts_in, counts_out))

    monkeypatch.setattr(dist, "all_to_all_single", lost)
    check = all_to_all_check(context())
    assert not check.ok
    assert check.detail.startswith("7 of 7 rows arrived wrong; check the links")
    assert sizes == [(7, 8, [1, 4, 2, 0], [3, 4, 0, 1])]
