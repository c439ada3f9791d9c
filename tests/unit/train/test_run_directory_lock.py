"""One run at a time in a directory."""

import errno
import fcntl
import json
import os
import signal
import socket
import stat
import subprocess
import sys

import pytest

from qwen3next_train.errors import ConfigError, ExitCode, StorageError
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.run_directory import RunDirectory, record_end
from tests.unit.train.run_directories import HOLDER, exit_of, opened, start_holder


def test_second_run_in_the_directory_is_refused_and_leaves_no_trace(tmp_path):
    holder = start_holder(tmp_path)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    second = RunDirectory(tmp_path, rank=0)
    with pytest.raises(ConfigError) as caught:
        second.open()
    message = str(caught.value)
    assert message.startswith(f"run.dir: {tmp_path} is in use by process {holder.pid} on {socket.gethostname()} since ")
    assert message.endswith("; stop that run or choose another directory")
    assert caught.value.exit_code == 2
    assert second.finish(ExitCode.USAGE, message), "recorded nowhere, so it is printed"
    assert RunDirectory(tmp_path, rank=1).finish(ExitCode.PEER_LOST, "lost rank 0")
    assert not RunDirectory(tmp_path, rank=1).finish(ExitCode.FINISHED, "finished")
    record_end(tmp_path, ConfigError("too many processes"))
    assert not (tmp_path / "exit.json").exists()
    holder.kill()
    holder.communicate()
    opened(tmp_path).close()


def test_second_run_launched_with_the_same_variables_leaves_no_trace(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    first = opened(tmp_path)
    second = RunDirectory(tmp_path, rank=0)
    with pytest.raises(ConfigError, match="is in use by process"):
        second.open()
    assert second.finish(ExitCode.USAGE, "in use")
    assert not (tmp_path / "exit.json").exists()
    first.name_attempt(SingleProcess())
    assert RunDirectory(tmp_path, rank=1).finish(ExitCode.STOPPED, "its second rank")
    assert not (tmp_path / "exit.json").exists()
    assert {"host", "pid", "since"} <= json.loads((tmp_path / ".lock").read_text()).keys()
    first.finish(ExitCode.STOPPED, "stopped")
    assert exit_of(tmp_path)["reason"] == "stopped"
    first.close()


def test_of_processes_that_race_one_gets_the_lock(tmp_path):
    racers = [start_holder(tmp_path / "run") for _ in range(4)]
    answers = [racer.stdout.readline().split(maxsplit=1)[0] for racer in racers]
    assert sorted(answers) == ["holds", "refused", "refused", "refused"]
    for racer in racers:
        racer.communicate("\n")


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    # The child says its number itself: by then it has given up what it inherited.
    code = HOLDER.replace(
        "    sys.stdin.readline()",
        "    import os\n"
        "    if os.fork() == 0:\n"
        "        print(os.getpid(), flush=True)\n"
        "        time.sleep(600)\n"
        "    time.sleep(600)",
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "holds\n"
    child = int(holder.stdout.readline())
    holder.kill()
    assert holder.wait() == -signal.SIGKILL
    try:
        opened(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_a_second_run_cannot_take_a_directory_whose_lock_file_was_deleted(tmp_path, capsys):
    holder = start_holder(tmp_path)
    assert holder.stdout.readline() == "holds\n"
    (tmp_path / ".lock").unlink()
    with pytest.raises(ConfigError, match="is in use by another process; stop that run"):
        opened(tmp_path)
    holder.kill()
    holder.communicate()
    run_dir = opened(tmp_path)
    (tmp_path / ".lock").unlink()
    run_dir.require_same()
    assert "made anew" in capsys.readouterr().err
    assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    run_dir.finish(ExitCode.FINISHED, "finished")
    assert exit_of(tmp_path)["code"] == 0
    run_dir.close()


def test_a_renamed_directory_stays_locked(tmp_path):
    holder = start_holder(tmp_path / "old")
    assert holder.stdout.readline() == "holds\n"
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(ConfigError, match=f"new is in use by process {holder.pid} on "):
        opened(tmp_path / "new")
    opened(tmp_path / "old").close()
    holder.communicate("\n")


@pytest.mark.parametrize("taken", [False, True])
def test_where_directories_cannot_be_locked_the_lock_file_is_watched(tmp_path, monkeypatch, taken):
    def as_on_nfs(descriptor, operation):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EBADF, "Bad file descriptor")
        return real_flock(descriptor, operation)

    real_flock = fcntl.flock
    monkeypatch.setattr(fcntl, "flock", as_on_nfs)
    first = opened(tmp_path)
    with pytest.raises(ConfigError, match="is in use by process"):
        opened(tmp_path)
    (tmp_path / ".lock").unlink()
    second = opened(tmp_path) if taken else None
    if second is None:
        first.require_same()
    else:
        with pytest.raises(StorageError, match=r"is in use by process .* \(its \.lock was deleted under this run\)"):
            first.require_same()
        second.close()
    first.close()
