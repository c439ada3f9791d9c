import os
import signal
import subprocess
import sys
import time

import pytest

from qwen3next_train.train.signals import StopRequest

LOOP = """
import os, sys, threading, time
from qwen3next_train.train.signals import StopRequest

with StopRequest(print) as stop:
    stop.defer()
    print("ready", flush=True)
    while stop.requested is None:
        time.sleep(0.01)
    print(stop.requested, flush=True)
    time.sleep(float(sys.argv[1]))
print("left", flush=True)
sys.exit(75)
"""


def start(source: str, *arguments: str, **options) -> subprocess.Popen:
    child = subprocess.Popen(
        [sys.executable, "-c", source, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    return child


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_is_a_request(name):
    child = start(LOOP, "0")
    child.send_signal(signal.Signals[name])
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, f"{name}\nleft\n")
    assert err == f"{name} received: saving at the end of this step and stopping; the same command continues the run\n"


EARLY = """
import ctypes, sys, threading, time
from qwen3next_train.train.signals import StopRequest

being_ended = threading.Event()

def record(name):
    being_ended.set()
    # Left in the buffer.
    print("recorded", name)
    time.sleep(float(sys.argv[1]))

with StopRequest(record) as stop:
    mutex = ctypes.create_string_buffer(64)
    libc = ctypes.CDLL(None)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    if sys.argv[2] == "stuck":
        libc.pthread_mutex_lock(mutex)
    else:
        being_ended.wait()
        stop.defer()
        stop.conclude()
        sys.exit(1)
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_before_there_is_something_to_save_a_signal_ends_a_process_stuck_in_c(name):
    child = start(EARLY, "0", "stuck")
    time.sleep(0.1)
    child.send_signal(signal.Signals[name])
    out, err = child.communicate(timeout=60)
    assert child.returncode == 75
    assert out == f"recorded {name}\n"
    assert err == f"{name} received: nothing to save yet, stopping\n"


def test_a_process_that_is_being_ended_does_not_go_on():
    child = start(EARLY, "0.5", "running")
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out.count("recorded")) == (75, 1)


CONCLUDED = """
import os, signal, sys, time
from qwen3next_train.train.signals import StopRequest

with StopRequest(print) as stop:
    if sys.argv[1] == "trained":
        stop.defer()
    stop.conclude()
    os.kill(os.getpid(), signal.SIGTERM)
    print("ready", flush=True)
    time.sleep(1.2)
os.kill(os.getpid(), signal.SIGTERM)
time.sleep(0.2)
sys.exit(75)
"""


@pytest.mark.slow
@pytest.mark.parametrize("before", ["trained", "refused"])
def test_once_the_outcome_is_known_no_signal_changes_the_exit_code(before):
    child = start(CONCLUDED, before)
    for _ in range(16):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.1)
    assert child.communicate(timeout=60) == ("", "")
    assert child.returncode == 75


def test_only_rank_0_speaks():
    child = start(LOOP, "0", env={**os.environ, "RANK": "3"})
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=60) == ("SIGTERM\nleft\n", "")


@pytest.mark.slow
def test_echoes_within_a_second_are_one_request():
    child = start(LOOP, "2")
    for _ in range(5):
        child.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, "SIGTERM\nleft\n")
    assert err.count("received") == 1


@pytest.mark.parametrize(("first", "second"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGINT"), ("SIGTERM", "SIGINT")])
def test_second_signal_ends_at_once(first, second):
    child = start(LOOP, "600")
    child.send_signal(signal.Signals[first])
    assert child.stdout is not None
    assert child.stdout.readline() == f"{first}\n"
    time.sleep(1.2)
    child.send_signal(signal.Signals[second])
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (-signal.Signals[second], "")


@pytest.mark.slow
def test_warning_signal_then_sigterm_does_not_end_the_save():
    child = start(LOOP, "2.5")
    child.send_signal(signal.SIGUSR1)
    time.sleep(1.2)
    child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, "SIGUSR1\nleft\n")


STUCK = """
import ctypes
from qwen3next_train.train.signals import StopRequest

with StopRequest(print) as stop:
    stop.defer()
    libc = ctypes.CDLL(None)
    mutex = ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    print("ready", flush=True)
    # Waits for itself, inside C and for ever: no bytecode runs any more.
    libc.pthread_mutex_lock(mutex)
"""


@pytest.mark.slow
def test_second_signal_ends_a_process_stuck_in_c():
    child = start(STUCK)
    child.send_signal(signal.SIGTERM)
    time.sleep(1.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM
    assert err.startswith("SIGTERM received")


def test_signals_that_were_ignored_at_the_start_stay_ignored():
    child = start(LOOP, "0", preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    child.send_signal(signal.SIGHUP)
    time.sleep(0.3)
    assert child.poll() is None
    child.send_signal(signal.SIGTERM)
    assert child.communicate(timeout=60)[0] == "SIGTERM\nleft\n"


LAST_MOMENT = """
import os, signal
from qwen3next_train.train.signals import StopRequest

for _ in range(200):
    with StopRequest(print) as stop:
        stop.defer()
        os.kill(os.getpid(), signal.SIGUSR1)
"""


def test_a_signal_at_the_last_moment_is_announced():
    done = subprocess.run([sys.executable, "-c", LAST_MOMENT], capture_output=True, text=True, check=True)
    assert done.stderr.count("SIGUSR1 received") == 200


def test_leaving_restores_what_was_there():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
    with StopRequest(print) as stop:
        stop.defer()
        assert stop.requested is None
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested == "SIGUSR1"
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.requested == "SIGUSR1", "the first one is named"
    after = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)]
    assert after == before
    assert signal.set_wakeup_fd(-1) == -1
    with StopRequest(print) as again:
        assert again.requested is None


FORK = """
import os, signal, sys, time

# Registered before StopRequest's, so it runs before it: holds the moment between the fork and the reset open.
os.register_at_fork(after_in_child=lambda: time.sleep(float(sys.argv[1])))
from qwen3next_train.train.signals import StopRequest

with StopRequest(print) as stop:
    stop.defer()
    child = os.fork()
    if child == 0:
        time.sleep(20)
        os._exit(0)
    print("ready", flush=True)
    time.sleep(float(sys.argv[2]))
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    time.sleep(0.3)
    print(os.WIFSIGNALED(status) and os.WTERMSIG(status), stop.requested, flush=True)
    os.kill(os.getpid(), signal.SIGUSR1)
    print(stop.requested, flush=True)
"""


@pytest.mark.parametrize(("reset_after_s", "signal_after_s"), [("0.8", "0.2"), ("0", "0.5")])
def test_signals_of_a_forked_child_are_its_own(reset_after_s, signal_after_s):
    out, err = start(FORK, reset_after_s, signal_after_s).communicate(timeout=60)
    assert out == f"{int(signal.SIGTERM)} None\nSIGUSR1\n"
    assert err.count("received") == 1


def test_a_fork_leaves_no_signal_blocked():
    with StopRequest(print):
        child = os.fork()
        if child == 0:
            os._exit(len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


AGENT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdout=subprocess.PIPE, text=True)
child.stdout.readline()
print("ready", flush=True)
print(child.pid, flush=True)
time.sleep(600)
"""

WORKER = """
import os, sys, time
from qwen3next_train.train.signals import StopRequest, die_with_parent

with StopRequest(print) as stop:
    stop.defer()
    die_with_parent()
    print("ready", flush=True)
    while stop.requested is None:
        time.sleep(0.01)
    with open(os.environ["TRACE"], "w") as file:
        file.write(stop.requested)
"""


def test_worker_of_a_killed_agent_is_asked_to_stop(tmp_path):
    trace = tmp_path / "trace"
    environ = {**os.environ, "TORCHELASTIC_RUN_ID": "run", "TRACE": str(trace)}
    agent = start(AGENT, WORKER, env=environ)
    agent.kill()
    agent.communicate()
    while not (trace.exists() and trace.read_text()):
        time.sleep(0.02)
    assert trace.read_text() == "SIGTERM"


def test_without_torchrun_a_worker_outlives_its_parent(tmp_path):
    environ = {name: value for name, value in os.environ.items() if name != "TORCHELASTIC_RUN_ID"}
    agent = start(AGENT, WORKER, env={**environ, "TRACE": str(tmp_path / "trace")})
    assert agent.stdout is not None
    worker = int(agent.stdout.readline())
    agent.kill()
    agent.wait()
    time.sleep(0.3)
    os.kill(worker, 0)
    assert not (tmp_path / "trace").exists()
    os.kill(worker, signal.SIGKILL)
    agent.communicate()


HELD = """
import sys, time
from qwen3next_train.train import held_signals

held_signals.hold_stop_signals()
print("ready", flush=True)
sys.stdin.read()
if sys.argv[1] == "drop":
    held_signals.drop_held_signals()
    sys.exit(2)
from qwen3next_train.train import signals
with signals.StopRequest(lambda name: print("recorded", name)) as stop:
    held_signals.release_stop_signals()
    signal.pause()
"""


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"])
def test_a_signal_before_there_is_a_handler_waits_for_it(name):
    child = start(HELD, "release", stdin=subprocess.PIPE)
    child.send_signal(signal.Signals[name])
    out, _ = child.communicate(timeout=60)
    assert (child.returncode, out) == (75, f"recorded {name}\n")


def test_a_signal_after_the_outcome_is_known_is_forgotten():
    child = start(HELD, "drop", stdin=subprocess.PIPE)
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 2
