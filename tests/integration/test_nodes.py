"""Two launchers on one machine, as on two nodes, train as one launcher does."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    TWO_RANKS,
    Forked,
    arguments,
    exit_record,
    free_port,
    metrics,
    processes_of,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 6


def _torchrun(node: int, endpoint: str, args: list[str]) -> Forked:
    """As the documentation of torchrun has it: whoever comes first is rank 0."""
    meeting = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "nodes", "--rdzv-endpoint", endpoint]
    return Forked([*meeting, "--nproc-per-node=1", "-m", "qwen3next_train", *args], program="torchrun")


def _own(node: int, endpoint: str, args: list[str]) -> Forked:
    where = ["--nnodes", "2", "--node-rank", str(node), "--rdzv-endpoint", endpoint]
    return Forked(["--nproc-per-node", "1", *where, *args])


@pytest.mark.parametrize("launcher", [_torchrun, _own])
def test_two_launchers_give_the_metrics_of_one(
    tmp_path: Path, shared_corpus: Path, two_ranks: list[dict[str, Any]], launcher: Any
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir, **TWO_RANKS | {"run__steps": STEPS})
    endpoint = f"127.0.0.1:{free_port()}"
    # The second node first: nobody may count on an order.
    nodes = [launcher(node, endpoint, args) for node in (1, 0)]
    ends = [(*node.communicate(timeout=200), node.returncode) for node in nodes]
    assert [code for *_, code in ends] == [0, 0], ends
    assert metrics(run_dir) == two_ranks[:STEPS]
    assert exit_record(run_dir)["code"] == 0
    assert processes_of(run_dir) == []
    if launcher is _own:
        assert "finished at step" in ends[1][1]
        assert "Traceback" not in ends[0][1] + ends[1][1]
