"""Ranks that do not fit together are found out over the store alone; ranks that are gone are named."""

import os
import signal
import subprocess
import threading
import time
from datetime import timedelta

import pytest
import torch.distributed as dist

from qwen3next_train.errors import ConfigError, PeerLostError, TrainError
from qwen3next_train.parallel import rank_check
from qwen3next_train.parallel.rank_check import RankInfo, RunFingerprint, check_ranks, describe_lost

SAME = RunFingerprint({"torch": "2.13"}, {"run.seed": "7"})


def outcomes(fingerprints, *, devices=None, hosts=None, monkeypatch=None) -> list:
    """What each rank gets or is told, with a thread for each."""
    store, count = dist.HashStore(), len(fingerprints)
    hosts = hosts or ["n0"] * count
    monkeypatch.setattr(
        RankInfo,
        "this_process",
        classmethod(lambda cls: RankInfo(hosts[local.rank], 1, 100 + local.rank)),
        raising=True,
    )
    local, found = threading.local(), [None] * count

    def take_part(rank: int) -> None:
        local.rank = rank
        try:
            found[rank] = check_ranks(
                store,
                rank,
                count,
                device_type=(devices or ["cpu"] * count)[rank],
                fingerprint=fingerprints[rank],
                timeout=timedelta(seconds=20),
            )
        except TrainError as error:
            found[rank] = error

    threads = [threading.Thread(target=take_part, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_ranks_that_agree_hear_where_all_live(monkeypatch):
    rank_infos = tuple(RankInfo("n0", 1, 100 + rank) for rank in range(3))
    assert outcomes([SAME] * 3, monkeypatch=monkeypatch) == [rank_infos] * 3


@pytest.mark.parametrize(
    ("fingerprints", "devices", "hosts", "line"),
    [
        (
            [SAME, SAME, RunFingerprint({"torch": "2.11"}, {"run.seed": "8"})],
            None,
            None,
            # Other software explains other settings.
            "torch: not the same on all ranks: 2.13 on ranks 0-1, 2.11 on rank 2; "
            "install the same versions on every node",
        ),
        (
            [SAME, RunFingerprint(SAME.software, {"run.seed": "8", "optimizer.lr": "1"}), SAME, SAME],
            None,
            ["n0", "n0", "n1", "n1"],
            "run.seed: not the same on all ranks: 7 on ranks 0, 2-3, 8 on rank 1 (n0) (and 1 more); "
            "start every rank with the same configuration and options",
        ),
        (
            [SAME] * 4,
            ["cuda", "cuda", "cuda", "cpu"],
            ["n0", "n0", "n1", "n1"],
            "run.device: not the same on all ranks: cuda on ranks 0-2, cpu on rank 3 (n1); "
            "see what qwen3next-train doctor says on those nodes, or choose one with --run.device",
        ),
        (
            [RunFingerprint({}, {"data.sources": value}) for value in ("a", "b" * 60, "c", "d", "e")],
            None,
            None,
            f"data.sources: not the same on all ranks: a on rank 0, {'b' * 37}... on rank 1, c on rank 2 "
            "and 2 more values; start every rank with the same configuration and options",
        ),
        (
            [SAME, RunFingerprint(SAME.software, {})],
            None,
            None,
            "run.seed: not the same on all ranks: 7 on rank 0, nothing on rank 1; "
            "start every rank with the same configuration and options",
        ),
    ],
    ids=["software", "settings", "device", "many values", "missing"],
)
def test_every_rank_is_refused_with_the_same_line(monkeypatch, fingerprints, devices, hosts, line):
    found = outcomes(fingerprints, devices=devices, hosts=hosts, monkeypatch=monkeypatch)
    assert [(type(each), str(each)) for each in found] == [(ConfigError, line)] * len(fingerprints)


def test_one_process_asks_nobody():
    (member,) = check_ranks(None, 0, 1, device_type="cpu", fingerprint=SAME, timeout=timedelta(seconds=1))
    assert member.pid == os.getpid()


def test_missing_ranks_are_named():
    def call(rank: int, store: dist.Store) -> str:
        with pytest.raises(PeerLostError) as caught:
            check_ranks(store, rank, 4, device_type="cpu", fingerprint=SAME, timeout=timedelta(milliseconds=50))
        return str(caught.value)

    store = dist.HashStore()
    first, last = call(2, store), call(0, store)
    assert first.startswith("rank 2: no word from rank 0 within 0.05 s; check that every node has started")
    assert last.startswith("rank 0: ranks 1, 3 of 4 did not arrive within 0.05 s; check that every node has started")


@pytest.fixture
def child():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def ranks_with(pid: int, **other) -> list[RankInfo]:
    own = RankInfo.this_process()
    return [own, RankInfo(other.get("host", own.host), other.get("pid_namespace", own.pid_namespace), pid)]


@pytest.mark.parametrize(("number", "state"), [(signal.SIGKILL, "has died"), (signal.SIGSTOP, "is stopped")])
def test_lost_rank_of_this_machine_is_named(child, number, state):
    child.send_signal(number)
    rank_infos = ranks_with(child.pid)
    assert describe_lost(rank_infos, 0) == f"rank 1 (process {child.pid} on {rank_infos[0].host}) {state}"


def test_ended_process_is_lost_too(child):
    child.kill()
    child.wait()
    assert "has died" in describe_lost(ranks_with(child.pid), 0)


def test_nothing_is_said_of_ranks_that_live_or_are_elsewhere(child, monkeypatch):
    monkeypatch.setattr(rank_check, "_SETTLING_TIME_S", 0.05)
    assert describe_lost(ranks_with(child.pid), 0) is None
    child.kill()
    child.wait()
    monkeypatch.setattr(rank_check, "_SETTLING_TIME_S", 60.0)
    started_at = time.monotonic()
    assert describe_lost(ranks_with(child.pid, host="elsewhere"), 0) is None
    assert describe_lost(ranks_with(child.pid, pid_namespace=0), 0) is None
    # With nobody to look at there is nothing to wait for.
    assert time.monotonic() - started_at < 30
