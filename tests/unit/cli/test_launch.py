"""What --nproc-per-node starts."""

import os
import sys
from pathlib import Path

import qwen3next_train
from qwen3next_train.cli import launch


def test_command_is_torchrun_over_the_same_line():
    command = launch.launch_command(3, ["--config", "a.yaml", "--nproc-per-node", "3", "--lr=-1"])
    assert command == [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3"),
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


def test_process_is_replaced(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execvpe", lambda *args: calls.append(args))
    monkeypatch.setattr(sys, "argv", ["qwen3next-train", "--nproc-per-node=2", "--config", "a"])
    launch.start_processes(2)
    ((program, command, environment),) = calls
    assert program == sys.executable
    assert command[-4:] == ["-m", "qwen3next_train", "--config", "a"]
    assert environment["PATH"] == os.environ["PATH"]
