"""What --nproc-per-node starts, and what it makes of the end."""

import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed.run
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import qwen3next_train
from qwen3next_train.cli import launch
from qwen3next_train.cli.processes import Processes
from qwen3next_train.errors import ConfigError
from qwen3next_train.train.directory_lock import DirectoryLock


def test_torchrun_is_told_the_same_line():
    arguments = launch.launch_arguments(
        Processes(3), ["--config", "a.yaml", "--nproc-per-node", "3", "--nnodes=1", "--lr=-1"]
    )
    assert arguments == [
        *("--standalone", "--nproc-per-node", "3", "--signals-to-handle", "SIGQUIT"),
        *("-m", "qwen3next_train", "--config", "a.yaml", "--lr=-1"),
    ]


def test_several_nodes_meet_in_the_order_of_their_numbers():
    line = ["--nnodes", "2", "--node-rank=1", "--rdzv-endpoint", "a:29", "--nproc-per-node", "8", "--config", "b"]
    assert launch.launch_arguments(Processes(8, 2, 1, "a:29"), line) == [
        *("--nnodes", "2", "--node-rank", "1", "--rdzv-backend", "static", "--rdzv-endpoint", "a:29"),
        *("--nproc-per-node", "8", "--signals-to-handle", "SIGQUIT", "-m", "qwen3next_train", "--config", "b"),
    ]


def test_workers_find_this_package():
    root = str(Path(qwen3next_train.__file__).parents[1])
    environment = launch.launch_environment({"PYTHONPATH": "/x"})
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/x"
    assert launch.launch_environment({}).get("PYTHONPATH", root).split(os.pathsep)[0] == root


def test_installed_packages_are_not_put_before_the_standard_library(monkeypatch):
    root = str(Path(qwen3next_train.__file__).parents[1])
    monkeypatch.setattr(launch.site, "getsitepackages", lambda: [root])
    assert "PYTHONPATH" not in launch.launch_environment({})


class Forwarding:
    """Stands in for ``SignalForwarding``, which would leave this process deaf to signals."""

    requested = None

    def __init__(self, conclude_early):
        self.conclude_early = conclude_early

    def __enter__(self):
        Forwarding.entered = self
        return self

    def __exit__(self, *error):
        pass


@pytest.fixture
def torchrun(monkeypatch):
    """Stand in for torchrun; ``end`` is what it raises, ``record`` what the workers leave in ``exit.json``."""
    monkeypatch.setattr(sys, "argv", ["qwen3next-train", "--nproc-per-node=2", "--config", "a"])
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def install(run_dir: Path, *, end: Exception | None, record: str | None, signalled: str | None = None):
        def main(arguments: list[str]) -> None:
            assert arguments[-4:] == ["-m", "qwen3next_train", "--config", "a"]
            if record is not None:
                DirectoryLock(run_dir, "a worker").close()
                (run_dir / "exit.json").write_text(record)
            if end is not None:
                raise end

        monkeypatch.setattr(torch.distributed.run, "main", main)
        monkeypatch.setattr(launch, "SignalForwarding", type("", (Forwarding,), {"requested": signalled}))

    return install


def failures(*exitcodes: int) -> ChildFailedError:
    found = {
        rank: ProcessFailure(local_rank=rank, pid=40 + rank, exitcode=code, error_file="<N/A>")
        for rank, code in enumerate(exitcodes)
    }
    for failure in found.values():
        failure.timestamp = 100
    return ChildFailedError("a", found)


@pytest.mark.parametrize(
    ("end", "record", "signalled", "code"),
    [
        (None, '{"code": 0}', None, 0),
        (None, '{"code": 0}', "SIGTERM", 0),
        (failures(75), '{"code": 75}', "SIGTERM", 75),
        # The signal came to another node, or to a worker.
        (failures(75), '{"code": 75}', None, 75),
        # Workers that were signalled before they could take care of it.
        (failures(-10), None, "SIGUSR1", 75),
        (failures(69), '{"code": 65}', None, 65),
        (failures(70), '{"code": 70}', "SIGTERM", 70),
        (failures(2), None, None, 2),
        # torchrun's SIGTERM reached the other one before it handled it.
        (failures(2, -15), None, None, 2),
        (failures(69, -9), '{"code": 69}', None, 69),
        (failures(-9), None, None, 69),
        # torchrun's SIGTERM to the survivors is not a request to stop.
        (failures(75, -9), '{"code": 75}', None, 69),
        (SignalException("got signal", signal.SIGQUIT), None, None, 75),
        (DistNetworkError("timed out"), None, None, 69),
        (failures(1), '{"code": 0}', None, 1),
        (failures(1), "{", None, 1),
        (failures(1), "[]", None, 1),
        (failures(1), '{"code": "75"}', None, 1),
    ],
)
def test_exit_code_is_that_of_the_cause(tmp_path, torchrun, end, record, signalled, code):
    (tmp_path / "exit.json").write_text('{"code": 76}')
    torchrun(tmp_path, end=end, record=record, signalled=signalled)
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == code


@pytest.mark.parametrize(
    ("end", "record", "reason"),
    [
        (failures(-15, -9), None, "rank 0 (process 40) was killed by SIGTERM; "),
        (failures(75, -9), '{"code": 75}', "rank 1 (process 41) was killed by SIGKILL, as the kernel does when "),
        (DistNetworkError("no\nroute"), None, "--rdzv-endpoint: the nodes did not find each other (no route); "),
    ],
)
def test_what_no_worker_could_say_is_recorded(tmp_path, torchrun, capsys, end, record, reason):
    if record is None and "SIGTERM" in reason:
        end.failures[0].timestamp = 99
    torchrun(tmp_path, end=end, record=record)
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == 69
    outcome = json.loads((tmp_path / "exit.json").read_text())
    assert outcome["code"] == 69
    assert outcome["reason"].startswith(reason)
    assert capsys.readouterr().err == outcome["reason"] + "\n"


def test_collectives_that_the_watchdog_has_written_are_named(tmp_path, torchrun, capsys):
    for rank in (0, 1):
        (tmp_path / f"flight_recorder_rank_{rank}").touch()
    torchrun(tmp_path, end=failures(-6, -15), record=None)
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == 69
    reason = capsys.readouterr().err
    assert reason.startswith("rank 0 (process 40) was killed by SIGABRT, as NCCL does ")
    assert reason.endswith(f"; last collectives of 2 ranks: {tmp_path}/flight_recorder_rank_*\n")


@pytest.mark.parametrize(
    ("end", "code", "reason"),
    [
        (FileNotFoundError(2, "No usable temporary directory found in ['/x']"), 74, "TMPDIR: no usable temporary "),
        (MemoryError(), 71, "out of memory on the host; "),
    ],
)
def test_what_torchrun_lacks_is_recorded(tmp_path, torchrun, capsys, end, code, reason):
    torchrun(tmp_path, end=end, record=None)
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == code
    outcome = json.loads((tmp_path / "exit.json").read_text())
    assert (outcome["code"], outcome["reason"][: len(reason)]) == (code, reason)
    assert capsys.readouterr().err == outcome["reason"] + "\n"


def test_a_worker_that_the_kernel_killed_for_want_of_memory(tmp_path, torchrun, monkeypatch):
    kills = iter([3, 4])
    monkeypatch.setattr(launch, "num_oom_kills", lambda: next(kills))
    torchrun(tmp_path, end=failures(-9, 69), record=None)
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == 71
    reason = json.loads((tmp_path / "exit.json").read_text())["reason"]
    assert reason.startswith("rank 0 (process 40) was killed by the kernel: out of memory on the host; ")


def test_stop_before_the_workers_could_notice_is_recorded(tmp_path, torchrun):
    torchrun(tmp_path, end=failures(-15, -15), record=None, signalled="SIGTERM")
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == 75
    outcome = json.loads((tmp_path / "exit.json").read_text())
    assert (outcome["code"], outcome["reason"]) == (
        75,
        "stopped on SIGTERM before the first step; run the same line to go on",
    )


@pytest.mark.parametrize(
    ("record", "code", "reason"),
    [
        # Another node has refused what this one still waits for.
        ('{"code": 2, "reason": "no"}', 2, "no"),
        ('{"code": 76}', 75, "stopped on SIGUSR1 before the first step; run the same line to go on"),
    ],
)
def test_stop_before_the_start_ends_with_what_is_known(tmp_path, torchrun, record, code, reason):
    (tmp_path / "exit.json").write_text('{"code": 76}')
    torchrun(tmp_path, end=None, record=record)
    launch.run_processes(Processes(2), tmp_path, lambda: None)
    assert Forwarding.entered.conclude_early("SIGUSR1") == code
    assert json.loads((tmp_path / "exit.json").read_text())["reason"] == reason


@pytest.mark.parametrize(
    "make",
    [
        os.mkfifo,
        Path.mkdir,
        lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**11),
        lambda path: path.write_text("[" * 100_000),
    ],
)
def test_an_end_that_cannot_be_read_says_nothing(tmp_path, torchrun, make):
    torchrun(tmp_path, end=failures(74), record=None)
    make(tmp_path / "exit.json")
    assert launch.run_processes(Processes(2), tmp_path, lambda: None) == 74


def test_exit_code_without_a_run_directory(tmp_path, torchrun):
    torchrun(tmp_path, end=failures(74), record=None)
    assert launch.run_processes(Processes(2), tmp_path / "none", lambda: None) == 74


def test_refused_before_anything_is_started(tmp_path, torchrun):
    def refuse() -> None:
        raise ConfigError("three are too many")

    torchrun(tmp_path, end=AssertionError("started"), record=None)
    with pytest.raises(ConfigError, match="three"):
        launch.run_processes(Processes(3), tmp_path / "run", refuse)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2


@pytest.mark.parametrize(("error", "said"), [(DistNetworkError("recv"), False), (DistStoreError("timeout"), True)])
def test_the_end_of_the_store_at_the_exit_barrier_is_no_error(monkeypatch, caplog, error, said):
    """The node that keeps it leaves first; that a node has not come in five minutes is said."""
    from torch.distributed.elastic.agent.server import api as agent

    def fail(**_):
        raise error

    def end(_):
        monkeypatch.setattr(agent.store_util, "barrier", fail)
        waiting = SimpleNamespace(
            _worker_group=SimpleNamespace(state="SUCCEEDED", group_world_size=2), _exit_barrier_timeout=1, _store=None
        )
        agent.SimpleElasticAgent._exit_barrier(waiting)

    monkeypatch.setattr(torch.distributed.run, "main", end)
    assert launch._torchrun([], None) is None
    assert ("exit barrier" in caplog.text) == said
