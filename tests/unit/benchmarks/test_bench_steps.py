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
