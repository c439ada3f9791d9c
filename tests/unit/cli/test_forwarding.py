"""Signals to a launcher: for its processes when it has some, for itself before."""

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from qwen3next_train.cli.forwarding import child_processes

LAUNCHER = """
    import signal, subprocess, sys, time
    from qwen3next_train.cli.forwarding import SignalForwarding

    def early(name):
        print("early", name, flush=True)
        return 75

    if "nohup" in sys.argv:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with SignalForwarding(early) as forwarding:
        print("ready", flush=True)
        if "alone" in sys.argv:
            time.sleep(60)
        worker = subprocess.Popen([sys.executable, "-c", '''if True:
            import signal
            signals = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}
            # Blocked and waited for: one that comes between a handler and a pause would be slept over.
            signal.pthread_sigmask(signal.SIG_BLOCK, signals)
            print("worker ready", flush=True)
            for _ in range(2):
                print("worker", signal.sigwait(signals).name, flush=True)
            raise SystemExit(75)'''])
        code = worker.wait()
        requested = forwarding.requested
    signal.raise_signal(signal.SIGTERM)
    print("end", code, requested, flush=True)
"""


class Launcher:
    def __init__(self, *words: str) -> None:
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        code = textwrap.dedent(LAUNCHER)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        )

    def line(self) -> str:
        return self.process.stdout.readline().strip()


@pytest.fixture
def start() -> Iterator:
    started: list[Launcher] = []

    def launch(*words: str) -> Launcher:
        started.append(Launcher(*words))
        return started[-1]

    yield launch
    for each in started:
        with suppress(ProcessLookupError):
            os.killpg(each.process.pid, signal.SIGKILL)
        each.process.communicate()


def test_workers_get_each_signal_and_the_launcher_stays(start):
    launcher = start()
    assert (launcher.line(), launcher.line()) == ("ready", "worker ready")
    launcher.process.send_signal(signal.SIGUSR1)
    assert launcher.line() == "worker SIGUSR1"
    # An echo or an impatient second one is the workers' to judge.
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.line() == "worker SIGTERM"
    # The launcher is deaf by then, so its code stays.
    assert launcher.line() == "end 75 SIGUSR1"
    assert launcher.process.wait(30) == 0


def test_without_workers_the_launcher_ends_at_once(start):
    launcher = start("alone")
    assert launcher.line() == "ready"
    launcher.process.send_signal(signal.SIGUSR1)
    assert launcher.process.wait(30) == 75
    assert launcher.line() == "early SIGUSR1"


def test_ignored_hangup_stays_ignored(start):
    launcher = start("nohup")
    assert (launcher.line(), launcher.line()) == ("ready", "worker ready")
    launcher.process.send_signal(signal.SIGHUP)
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.line() == "worker SIGTERM"


def test_children_are_those_that_live():
    # The server that other tests fork processes from stays.
    others = child_processes()
    with subprocess.Popen(["sleep", "60"]) as child:
        assert sorted(child_processes()) == sorted([*others, child.pid])
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert child_processes() == others
