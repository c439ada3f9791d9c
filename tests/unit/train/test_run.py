"""What an attempt records of its end, without training anything."""

import json
import resource
import sys
import types
from contextlib import contextmanager

import pytest
from torch.distributed import DistStoreError

from qwen3next_train.config.schema import Config, RunConfig
from qwen3next_train.errors import ConfigError, DataError, PeerLostError
from qwen3next_train.parallel import process_groups
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.parallel.rank_check import RankInfo
from qwen3next_train.train import run as run_module
from qwen3next_train.train.run import run_training


class Stop:
    """Stands in for ``StopRequest``, which would leave this process deaf to signals."""

    def __init__(self, record_early_stop):
        self.record_early_stop = record_early_stop

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def conclude(self):
        pass


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Run an attempt whose building and training is a function; return code and ``exit.json``."""

    rank_infos: list[RankInfo] = []

    @contextmanager
    def alone(device, *, fingerprint, peer_timeout_s):
        assert (fingerprint.settings["run.steps"], peer_timeout_s) == ("9", 900)
        yield types.SimpleNamespace(control=SingleProcess(), rank_infos=rank_infos or [RankInfo.this_process()])

    monkeypatch.setattr(run_module, "StopRequest", Stop)
    monkeypatch.setattr(process_groups, "process_context", alone)

    def execute(*, first_step=0, train=lambda run: None, build=None, check_world=lambda: None, others=()):
        state = types.SimpleNamespace(step=first_step, lowest=None)
        run = types.SimpleNamespace(state=state)
        for name, content in (
            ("build", {"build_run": build or (lambda *args: run)}),
            ("loop", {"train": train}),
        ):
            stand_in = types.ModuleType(name)
            vars(stand_in).update(content)
            monkeypatch.setitem(sys.modules, f"qwen3next_train.train.{name}", stand_in)
        config = Config(run=RunConfig(dir=str(tmp_path), steps=9, device="cpu"))
        rank_infos.extend([RankInfo.this_process(), RankInfo(*others)] if others else [])
        code = run_training(config, check_world)
        return code, json.loads((tmp_path / "exit.json").read_text())

    return execute


def stops_at(step):
    def train(run):
        run.state.step = step
        return "SIGUSR1"

    return train


def fails_at(step, error):
    def train(run):
        run.state.step = step
        raise error

    return train


LOST = "Connection closed by peer [127.0.0.1]:4"
GLOO = (
    f"[/a/b/pair.cc:5] {LOST}. This is typically caused by a remote worker crashing. "
    "Check the logs of the remote worker before reporting an error. GLHF! x"
)
TORN_DOWN = "Application timeout caused pair closure"
TO_GO_ON = "run the same line to go on"


@pytest.mark.parametrize(
    ("first_step", "train", "code", "reason", "step"),
    [
        (0, stops_at(4), 75, f"stopped on SIGUSR1 after step 4; {TO_GO_ON}", 4),
        (4, stops_at(4), 75, f"stopped on SIGUSR1 before the first step; {TO_GO_ON}", 4),
        (0, stops_at(0), 75, f"stopped on SIGUSR1 before the first step; {TO_GO_ON}", 0),
        (9, lambda run: None, 0, "finished at step 9", 9),
        (0, fails_at(3, DataError("cut")), 65, "cut", 3),
        (0, fails_at(3, RuntimeError(GLOO)), 69, f"rank 0: lost another rank: {LOST}", 3),
        (0, fails_at(3, DistStoreError("wait timeout")), 69, "rank 0: lost another rank: wait timeout", 3),
        # Of a collective that another one's failure has torn down before it was waited for.
        (0, fails_at(3, RuntimeError(TORN_DOWN)), 69, f"rank 0: lost another rank: {TORN_DOWN}", 3),
    ],
)
def test_end_is_recorded_with_the_last_step(attempt, tmp_path, first_step, train, code, reason, step):
    returned, record = attempt(first_step=first_step, train=train)
    collectives = tmp_path / "flight_recorder_rank_0"
    assert collectives.exists() == (code == 69)
    reason += f"; its last collectives: {collectives}" if code == 69 else ""
    assert (returned, record["code"], record["reason"], record["step"]) == (code, code, reason, step)


@pytest.mark.parametrize(
    "error",
    [
        OSError(24, "Too many open files", "/data/x"),
        RuntimeError("[enforce fail at /a/gloo/loop.cc:48] rv != -1. -1 vs -1. pipe: Too many open files"),
    ],
)
def test_a_limit_of_the_environment_is_one_line(attempt, capsys, error):
    returned, record = attempt(train=fails_at(3, error))
    assert (returned, record["code"]) == (74, 74)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert record["reason"].endswith(f": too many open files; raise the limit, ulimit -n, which is {limit}")
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "begin"),
    [
        (MemoryError(), 71, "out of memory on the host; add layer to parallel.recompute, "),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"), 71, "out of memory"),
        (
            RuntimeError("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'"),
            71,
            "out of memory on the GPU",
        ),
        (OSError(2, "No usable temporary directory found in ['/x']"), 74, "TMPDIR: no usable temporary directory"),
        (OSError(30, "Read-only file system", "/home/x"), 74, "/home/x: Read-only file system (OSError); "),
    ],
)
def test_what_the_machine_lacks_is_one_line(attempt, capsys, error, code, begin):
    returned, record = attempt(train=fails_at(3, error))
    assert (returned, record["code"], record["reason"][: len(begin)]) == (code, code, begin)
    assert capsys.readouterr().err == record["reason"] + "\n"


def test_dead_rank_is_named(attempt, tmp_path):
    own = RankInfo.this_process()
    # The largest number there can be, and not in use.
    dead = 2**22
    code, record = attempt(train=fails_at(3, RuntimeError(GLOO)), others=(own.host, own.pid_namespace, dead))
    assert code == 69
    collectives = f"its last collectives: {tmp_path}/flight_recorder_rank_0"
    assert record["reason"] == f"rank 0: rank 1 (process {dead} on {own.host}) has died: {LOST}; {collectives}"


def test_a_rank_lost_before_it_is_known_where_the_others_live(attempt, monkeypatch):
    @contextmanager
    def fails(device, *, fingerprint, peer_timeout_s):
        raise RuntimeError(GLOO)
        yield

    monkeypatch.setattr(process_groups, "process_context", fails)
    code, record = attempt()
    assert (code, record["code"], record["step"]) == (69, 69, None)
    assert record["reason"].startswith(f"rank 0: lost another rank: {LOST}")


def test_failure_before_there_is_a_state(attempt):
    def build(*args):
        raise PeerLostError(
            "rank 0: another rank was lost or cannot be reached, while the process groups were formed: Gloo "
            "connectFullMesh failed with [/x/tcp/pair.cc:152] timed out connecting: SO_ERROR: Connection refused; "
            "run the same line again"
        )

    code, record = attempt(build=build)
    assert (code, record["step"]) == (69, None)
    assert record["reason"] == (
        "rank 0: another rank was lost or cannot be reached, while the process groups were formed: Gloo "
        "connectFullMesh failed with timed out connecting: SO_ERROR: Connection refused; run the same line again"
    )


def test_wrong_world_is_recorded(attempt, tmp_path):
    def refuse():
        raise ConfigError("world size 3")

    attempt()
    code, record = attempt(check_world=refuse)
    assert (code, record["code"], record["reason"]) == (2, 2, "world size 3")


def test_a_variable_of_wandb_is_rejected_before_anything_is_built(attempt, capsys, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "onlin")
    code, record = attempt(build=lambda *args: pytest.fail("built"))
    assert (code, record["code"], record["step"]) == (2, 2, None)
    assert record["reason"].startswith("WANDB_MODE: not a mode (got 'onlin'); ")
    assert capsys.readouterr().err == record["reason"] + "\n"


def test_early_stop_is_recorded(attempt):
    def build(config, context, run_dir, stop, stack, resume):
        stop.record_early_stop("SIGTERM")
        raise DataError("too late to be heard")

    _, record = attempt(build=build)
    assert record["code"] == 75
    assert record["reason"] == "stopped on SIGTERM before the first step; run the same line to go on"
