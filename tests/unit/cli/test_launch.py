"""What --nproc-per-node starts."""

import json
import os
import signal
import sys
from pathlib import Path

import pytest
import torch.distributed.run
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

import qwen3next_train
from qwen3next_train.cli import launch
from qwen3next_train.errors import ConfigError


def test_torchrun_is_told_the_same_line():
    arguments = launch.launch_arguments(3, ["--config", "a.yaml", "--nproc-per-node", "3", "--lr=-1"])
    assert arguments == [
        *("--standalone", "--nproc-per-node", "3"),
        *("--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1,SIGUSR2"),
        *("-m", "qwen3next_train", "--config", "a.yaml", "--lr=-1"),
    ]


def test_environment_gives_workers_time_to_save_and_this_package():
    root = str(Path(qwen3next_train.__file__).parents[1])
    environment = launch.launch_environment({"PYTHONPATH": "/x"})
    assert environment["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "1800"
    assert environment["PYTHONPATH"].split(os.pathsep)[-1] == "/x"
    assert launch.launch_environment({}).get("PYTHONPATH", root).split(os.pathsep)[0] == root
    assert launch.launch_environment({"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "5"})["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] == "5"


def test_installed_packages_are_not_put_before_the_standard_library(monkeypatch):
    root = str(Path(qwen3next_train.__file__).parents[1])
    monkeypatch.setattr(launch.site, "getsitepackages", lambda: [root])
    assert "PYTHONPATH" not in launch.launch_environment({})


@pytest.fixture
def torchrun(monkeypatch):
    """Stand in for torchrun; ``end`` is what it raises, ``record`` what the workers leave in ``exit.json``."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in launch.SIGNALS}
    monkeypatch.setattr(sys, "argv", ["qwen3next-train", "--nproc-per-node=2", "--config", "a"])
    monkeypatch.setattr(os, "environ", os.environ.copy())

    def install(run_dir: Path, *, end: Exception | None, record: str | None):
        def main(arguments: list[str]) -> None:
            assert arguments[-4:] == ["-m", "qwen3next_train", "--config", "a"]
            assert os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]
            if record is not None:
                (run_dir / "exit.json").write_text(record)
            if end is not None:
                raise end

        monkeypatch.setattr(torch.distributed.run, "main", main)

    yield install
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


def failure(exitcode: int) -> ChildFailedError:
    return ChildFailedError("a", {1: ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file="<N/A>")})


def stop(number: int) -> SignalException:
    return SignalException("got signal", signal.Signals(number))


@pytest.mark.parametrize(
    ("end", "record", "code"),
    [
        (None, '{"code": 0}', 0),
        (stop(15), '{"code": 75}', 75),
        (failure(69), '{"code": 65}', 65),
        (failure(2), None, 2),
        (failure(-9), None, 137),
        (stop(10), None, 138),
        (failure(1), '{"code": 0}', 1),
        (failure(1), "{", 1),
        (failure(1), "[]", 1),
        (failure(1), '{"code": "75"}', 1),
    ],
)
def test_exit_code_is_the_recorded_one(tmp_path, torchrun, end, record, code):
    (tmp_path / "exit.json").write_text('{"code": 76}')
    torchrun(tmp_path, end=end, record=record)
    assert launch.run_processes(2, tmp_path, lambda: None) == code
    if end is not None:
        os.kill(os.getpid(), signal.SIGTERM)


def test_exit_code_without_a_run_directory(tmp_path, torchrun):
    torchrun(tmp_path, end=failure(74), record=None)
    assert launch.run_processes(2, tmp_path / "none", lambda: None) == 74


def test_refused_before_anything_is_started(tmp_path, torchrun):
    def refuse() -> None:
        raise ConfigError("three are too many")

    torchrun(tmp_path, end=AssertionError("started"), record=None)
    with pytest.raises(ConfigError, match="three"):
        launch.run_processes(3, tmp_path / "run", refuse)
    assert json.loads((tmp_path / "run" / "exit.json").read_text())["code"] == 2
