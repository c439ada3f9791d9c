"""The benchmark of whole steps: its rows."""

from __future__ import annotations

import pytest

from tests.architecture.tree import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder is what Python puts first when it runs one of them."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))


def test_every_layout_holds_as_many_experts_a_rank_as_its_proxy_or_as_the_table_says() -> None:
    from bench_steps import all_rows

    experts = {row.name: row.config.model.num_experts for row in all_rows() if row.accumulation == 1}
    assert experts["slice4_e512/proxy/acc1"] == 128
    assert experts["slice4_e512/EP4xZ1/acc1"] == experts["slice4_e512/EP2xDP2xZ1/acc1"] == 512
    assert experts["ep8_proxy/EP4xZ3/acc1"] == 4 * experts["ep8_proxy/proxy/acc1"] == 256


def test_every_rank_has_the_micro_batches_of_the_row() -> None:
    from bench_steps import all_rows

    for row in all_rows():
        run = row.config.run
        assert run.global_batch_size == run.micro_batch_size * row.accumulation * row.num_gpus


@pytest.mark.parametrize(
    ("num_gpus", "expected"), [(4, ["32kxCP1", "64kxCP2", "128kxCP4"]), (2, ["32kxCP1", "64kxCP2"])]
)
def test_long_rows_are_as_many_tokens_a_gpu_along_the_diagonals(num_gpus: int, expected: list[str]) -> None:
    from bench_steps import long_rows

    tokens: dict[int, list[str]] = {}
    for row in long_rows(num_gpus):
        config = row.config
        slices = config.parallel.context_parallel_size
        assert config.run.global_batch_size == num_gpus // slices
        assert config.model.num_experts // config.parallel.expert_parallel_size == 64
        tokens.setdefault(config.data.sequence_length // slices, []).append(row.label)
    assert tokens[32 * 1024] == expected
    assert max(tokens) == 64 * 1024
