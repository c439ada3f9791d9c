"""The options that say how many processes there are, and where."""

import pytest

from qwen3next_train.cli.arguments import parse_arguments
from qwen3next_train.cli.commands import OPTIONS
from qwen3next_train.cli.processes import Processes, processes_to_start, world_size
from qwen3next_train.errors import ConfigError


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def words(line: str):
    return parse_arguments(line.split(), OPTIONS)


@pytest.mark.parametrize(
    ("line", "expected", "world"),
    [
        ("", None, 1),
        ("--nproc-per-node 4", Processes(4), 4),
        ("--nproc-per-node 4 --nnodes 3 --node-rank 2 --rdzv-endpoint n0:29500", Processes(4, 3, 2, "n0:29500"), 12),
        ("--nproc-per-node 4 --nnodes 2 --node-rank 0 --rdzv-endpoint [::1]:1", Processes(4, 2, 0, "[::1]:1"), 8),
        # As a Slurm job of one node gives it.
        ("--nproc-per-node 4 --nnodes 1 --node-rank 0 --rdzv-endpoint n0:29500", Processes(4), 4),
    ],
)
def test_processes_and_world_size(line, expected, world):
    assert processes_to_start(words(line)) == expected
    assert world_size(words(line)) == world


def test_world_size_of_a_launcher(monkeypatch):
    given = {"WORLD_SIZE": "6", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert world_size(words("")) == 6


TWO = "--nproc-per-node 1 --nnodes 2"


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("--nnodes 2", "--nnodes: only together with --nproc-per-node"),
        ("--nproc-per-node 1025", "--nproc-per-node: not a whole number <= 1024 (got '1025')"),
        ("--nproc-per-node 1 --nnodes 1000001", "--nnodes: not a whole number <= 1000000 (got '1000001')"),
        (f"{TWO} --node-rank 1 --rdzv-endpoint a:{'9' * 5000}", "--rdzv-endpoint: not HOST:PORT (got 'a:9999"),
        # As an unset variable of a shell leaves it; one process would be started in place of many.
        ("--nproc-per-node=", "--nproc-per-node: not a whole number > 0 (got '')"),
        ("--nproc-per-node 1 --nnodes=", "--nnodes: not a whole number > 0 (got '')"),
        (f"{TWO} --node-rank= --rdzv-endpoint a:1", "--node-rank: not a whole number >= 0 (got '')"),
        ("--nproc-per-node 8.0", "--nproc-per-node: not written as a whole number (got '8.0'); write 8"),
        ("--nproc-per-node 1.5", "--nproc-per-node: not a whole number > 0 (got '1.5')"),
        ("--nproc-per-node 1 --nnodes 0", "--nnodes: not a whole number > 0 (got '0')"),
        ("--nproc-per-node 1 --nnodes 1:2", "--nnodes: not a whole number > 0 (got '1:2')"),
        (TWO, "--node-rank: missing with --nnodes 2; give which of the nodes this is"),
        (f"{TWO} --node-rank 1", "--rdzv-endpoint: missing with --nnodes 2; give node 0 and a free port on it"),
        (f"{TWO} --node-rank -1 --rdzv-endpoint a:1", "--node-rank: not a whole number >= 0 (got '-1')"),
        (f"{TWO} --node-rank 2 --rdzv-endpoint a:1", "--node-rank: 2 of 2 nodes; give 0 to 1"),
        *(
            (f"{TWO} --node-rank 1 --rdzv-endpoint {wrong}", f"--rdzv-endpoint: not HOST:PORT (got '{wrong}')")
            for wrong in ("n0", ":29500", "n0:", "n0:http", "n0:0", "n0:65536")
        ),
    ],
)
def test_what_does_not_go_together_is_refused(line, text):
    with pytest.raises(ConfigError) as caught:
        processes_to_start(words(line))
    assert text in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
