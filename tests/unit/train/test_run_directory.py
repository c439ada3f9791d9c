import errno
import fcntl
import io
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import ClassVar

import pytest

from qwen3next_train.checkpoint.filesystem import LocalFilesystem
from qwen3next_train.config.describe import ConfigChanges, compare_configs, to_yaml
from qwen3next_train.config.schema import Config, ParallelConfig, RunConfig
from qwen3next_train.errors import ConfigError, ExitCode, StorageError
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.run_directory import RunDirectory, record_end
from qwen3next_train.versions import software_versions

CONFIG = Config(run=RunConfig(steps=7))


def opened(path: Path) -> RunDirectory:
    run_dir = RunDirectory(path, rank=0)
    run_dir.open()
    return run_dir


def record(
    run_dir: RunDirectory,
    *,
    wandb_id: str = "abcd1234",
    command: tuple[str, ...] = ("qwen3next-train",),
    step: int = 0,
) -> None:
    run_dir.record_attempt(
        CONFIG,
        layout={"world_size": 1},
        workload={"parameters": {"total": 5}},
        wandb_id=wandb_id,
        command=command,
        step=step,
    )


def names(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir())


def exit_of(path: Path) -> dict:
    return json.loads((path / "exit.json").read_text())


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDirectory(Path("runs/a"), rank=0)
    monkeypatch.chdir("/")
    run_dir.open()
    assert run_dir.path == tmp_path / "runs" / "a"
    assert run_dir.metrics_path == run_dir.path / "metrics.jsonl"
    assert run_dir.log_path == run_dir.path / "log.txt"
    assert run_dir.checkpoints_path == run_dir.path / "checkpoints"
    assert names(run_dir.path) == [".lock"]
    run_dir.close()


def test_configuration_and_information(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "0123456789secret")
    run_dir = opened(tmp_path)
    record(run_dir, command=("qwen3next-train", "--x", "0123456789secret", "--api-key=abc"))
    assert (tmp_path / "config.yaml").read_text() == to_yaml(CONFIG)
    info = run_dir.read_info()
    assert info == json.loads((tmp_path / "run.json").read_text())
    assert set(info) == {
        *("wandb_id", "versions", "git_revision", "layout", "parameters", "attempts", "checkpoint_step")
    }
    assert info["parameters"] == {"total": 5}
    assert info["wandb_id"] == "abcd1234"
    assert info["layout"] == {"world_size": 1}
    assert info["versions"] == software_versions()
    [attempt] = info["attempts"]
    assert attempt["command"] == ["qwen3next-train", "--x", "***", "--api-key=***"]
    assert attempt["host"] == socket.gethostname()
    assert (attempt["first_step"], attempt["logging_interval"], info["checkpoint_step"]) == (0, 1, None)
    assert datetime.fromisoformat(attempt["started_at"]).tzinfo is not None
    run_dir.close()
    everything = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "0123456789secret" not in everything
    assert os.environ["PATH"] not in everything


def test_attempts_add_up(tmp_path):
    for number in range(3):
        run_dir = opened(tmp_path)
        assert len(run_dir.read_info().get("attempts", [])) == number
        record(run_dir)
        run_dir.close()
    starts = [attempt["started_at"] for attempt in RunDirectory(tmp_path, rank=1).read_info()["attempts"]]
    assert starts == sorted(starts)
    assert len(starts) == 3


def test_saves_are_noted(tmp_path):
    run_dir = opened(tmp_path)
    record(run_dir, step=4)
    noted = [run_dir.read_info()["checkpoint_step"]]
    for step in (5, 6):
        run_dir.record_save(step)
        noted.append(json.loads((tmp_path / "run.json").read_text())["checkpoint_step"])
    assert noted == [4, 5, 6]
    run_dir.close()


def test_a_save_that_cannot_be_noted_is_a_warning(tmp_path, capsys):
    run_dir = opened(tmp_path)
    record(run_dir)
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    run_dir.record_save(5)
    assert "run.json: cannot be written" in capsys.readouterr().err
    run_dir.close()


DAMAGED = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "zeros": "\0" * 100,
    "deep lists": "[" * 100_000,
    "deep but valid": '{"attempts": [' + "[" * 900 + "]" * 900 + "]}",
    "deep mappings": '{"a":' * 900 + "1" + "}" * 900,
    "not UTF-8": b"\xff\xfe{}",
    "a number too long to read": '{"attempts": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_information_is_written_anew(tmp_path, capsys, text):
    opened(tmp_path).close()
    (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    run_dir = opened(tmp_path)
    record(run_dir)
    assert len(json.loads((tmp_path / "run.json").read_text())["attempts"]) == 1
    assert capsys.readouterr().err.count("run.json: ") == 1
    run_dir.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is a special file, not a regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link, not a regular file"),
        (
            lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**11),
            "has 100000000000 bytes, more than",
        ),
    ],
)
def test_what_is_no_small_file_is_not_read(tmp_path, capsys, make, reason):
    opened(tmp_path).close()
    make(tmp_path / "run.json")
    run_dir = opened(tmp_path)
    record(run_dir)
    assert reason in capsys.readouterr().err
    assert len(json.loads((tmp_path / "run.json").read_text())["attempts"]) == 1
    run_dir.close()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("run.json", lambda run_dir: run_dir.read_info()),
        ("config.yaml", lambda run_dir: run_dir.read_config()),
        ("metrics.jsonl", lambda run_dir: run_dir.last_logged_step()),
    ],
)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, file, read, code):
    run_dir = opened(tmp_path)
    record(run_dir)
    run_dir.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    real_open = io.open

    def refuse(path, *rest, **more):
        if str(path) == str(tmp_path / file):
            raise OSError(code, os.strerror(code), str(path))
        return (real_open if rest and isinstance(rest[0], str) else os_open)(path, *rest, **more)

    os_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    with pytest.raises(StorageError, match=rf"{file}: cannot be read \({os.strerror(code)}\); make it readable"):
        read(RunDirectory(tmp_path, rank=0))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("a file"), "not a directory"),
        (lambda path: path.symlink_to("/nowhere/at/all"), "not a directory"),
    ],
)
def test_unusable_directory_is_one_line(tmp_path, make, reason):
    path = tmp_path / "run"
    make(path)
    with pytest.raises(StorageError, match=rf"^run\.dir: {path} cannot be created or written \(.*({reason})") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 74


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be created or written"):
        RunDirectory(tmp_path / "file" / "run", rank=1).open()


def test_planted_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    path = tmp_path / "run"
    opened(path).close()
    for name in ("config.yaml", "run.json", "exit.json"):
        (path / name).symlink_to(outside)
    run_dir = opened(path)
    record(run_dir)
    run_dir.finish(ExitCode.FINISHED, "finished")
    run_dir.close()
    assert not any((path / name).is_symlink() for name in ("config.yaml", "run.json", "exit.json"))
    (path / ".lock").unlink()
    (path / ".lock").symlink_to(outside)
    with pytest.raises(StorageError, match=r"\.lock: Too many levels of symbolic links"):
        opened(path)
    assert outside.read_text() == "precious"


HOLDER = """
import sys, time
from pathlib import Path
from qwen3next_train.errors import ConfigError
from qwen3next_train.train.run_directory import RunDirectory

run_dir = RunDirectory(Path(sys.argv[1]), rank=0)
try:
    run_dir.open()
except ConfigError as error:
    print("refused", error, flush=True)
else:
    print("holds", flush=True)
    sys.stdin.readline()
"""


def start_holder(path: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


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


def test_ranks_record_before_and_after_the_attempt_has_a_name(tmp_path, monkeypatch):
    class Broadcast(SingleProcess):
        names: ClassVar[list[str]] = []

        def broadcast_json(self, value):
            self.names.append(value)
            return self.names[0]

    monkeypatch.setenv("MASTER_PORT", "29500")
    for is_named in (False, True):
        ranks = [opened(tmp_path), RunDirectory(tmp_path, rank=1)]
        if is_named:
            for each in ranks:
                each.name_attempt(Broadcast())
        assert ranks[1].finish(ExitCode.DATA, "cut")
        assert not ranks[0].finish(ExitCode.DATA, "cut"), "said once"
        assert exit_of(tmp_path)["rank"] == 1
        ranks[0].close()
    assert len(set(Broadcast.names)) == 2


def test_refusal_before_any_process_replaces_the_old_end(tmp_path):
    run_dir = opened(tmp_path)
    run_dir.finish(ExitCode.FINISHED, "finished")
    run_dir.close()
    record_end(tmp_path, ConfigError("too many processes"))
    assert (exit_of(tmp_path)["code"], exit_of(tmp_path)["reason"]) == (2, "too many processes")
    (tmp_path / "file").write_text("")
    record_end(tmp_path / "file" / "run", ConfigError("too many processes"))
    opened(tmp_path).close()


def recorded_configuration(path: Path, text: str) -> dict | None:
    (path / "config.yaml").write_text(text)
    return RunDirectory(path, rank=0).read_config()


def test_configuration_of_the_attempt_before(tmp_path, capsys):
    assert recorded_configuration(tmp_path, to_yaml(CONFIG)) is None, "no step was logged"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    recorded = recorded_configuration(tmp_path, to_yaml(CONFIG))
    assert compare_configs(recorded, CONFIG).trajectory == compare_configs(recorded, CONFIG).shape == ()
    other = recorded_configuration(tmp_path, to_yaml(Config(run=RunConfig(steps=7, seed=5))))
    assert [change.key for change in compare_configs(other, CONFIG).trajectory] == ["run.seed"]
    removed = recorded_configuration(tmp_path, to_yaml(CONFIG).replace("run:\n", "run:\n  removed_key: 3\n", 1))
    assert [change.key for change in compare_configs(removed, CONFIG).harmless] == ["run.removed_key"]
    assert capsys.readouterr().err == ""


def test_configuration_of_an_earlier_version_resumes_without_a_difference(tmp_path):
    config = Config(run=CONFIG.run, parallel=ParallelConfig(recompute=["norms", "gdn_prologue"]))
    text = (
        to_yaml(config).replace("gdn_prologue", "conv_gates").replace("kernels:\n", "kernels:\n  causal_conv1d: fla\n")
    )
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    recorded = recorded_configuration(tmp_path, text)
    assert compare_configs(recorded, config) == ConfigChanges((), (), ())
    # What the old file says is still compared, under its new name.
    (change,) = compare_configs(recorded, Config(run=CONFIG.run)).harmless
    assert (change.key, change.old, change.new) == ("parallel.recompute", ["norms", "gdn_prologue"], [])


@pytest.mark.parametrize("text", ["", "\0", "run: [", "- a", "run:\n  seed: 5\n", to_yaml(CONFIG)[:200]])
def test_damaged_configuration_does_not_stop_a_resume(tmp_path, capsys, text):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert recorded_configuration(tmp_path, text) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/config.yaml: ")
    assert line.endswith("; only the checkpoint's own copy is compared")


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


def test_success_is_for_rank_0_to_say(tmp_path):
    run_dir = opened(tmp_path)
    RunDirectory(tmp_path, rank=1).finish(ExitCode.FINISHED, "finished")
    assert not (tmp_path / "exit.json").exists()
    run_dir.close()
    run_dir.finish(ExitCode.FINISHED, "finished", step=10)
    outcome = exit_of(tmp_path)
    assert datetime.fromisoformat(outcome.pop("time")).tzinfo is not None
    assert outcome == {"code": 0, "reason": "finished", "rank": 0, "step": 10}
    assert names(tmp_path) == [".lock", "exit.json"]


def test_first_failing_rank_is_heard(tmp_path):
    run_dir = opened(tmp_path)
    RunDirectory(tmp_path, rank=3).finish(ExitCode.DATA, "corpus.bin: cut\nshort")
    run_dir.finish(ExitCode.PEER_LOST, "lost rank 3")
    outcome = exit_of(tmp_path)
    assert (outcome["code"], outcome["reason"], outcome["rank"], outcome["step"]) == (
        65,
        "corpus.bin: cut short",
        3,
        None,
    )


def test_a_stop_is_said_by_rank_0_whoever_records_it(tmp_path):
    run_dir = opened(tmp_path)
    RunDirectory(tmp_path, rank=1).finish(ExitCode.STOPPED, "stopped")
    assert run_dir.finish(ExitCode.STOPPED, "stopped")
    assert not RunDirectory(tmp_path, rank=2).finish(ExitCode.STOPPED, "stopped")


def test_new_attempt_forgets_the_old_end(tmp_path):
    run_dir = opened(tmp_path)
    run_dir.finish(ExitCode.DIVERGED, "nan")
    run_dir.close()
    for name in (".staged-0-1-run.json", ".staged-31-7-exit.json", ".staged-x", ".staged-0-1-notes"):
        (tmp_path / name).write_text("half")
    opened(tmp_path).close()
    assert names(tmp_path) == [".lock", ".staged-0-1-notes", ".staged-x"], "somebody's own files stay"


def test_an_untouched_directory_is_the_same(tmp_path):
    run_dir = opened(tmp_path)
    run_dir.require_same()
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    run_dir.require_same()
    assert names(tmp_path) == [".lock", "checkpoints", "notes.txt"]
    run_dir.close()


LOST = {
    "deleted": (shutil.rmtree, "No such file or directory"),
    "renamed": (lambda path: path.rename(path.with_name("elsewhere")), "No such file or directory"),
    "replaced": (lambda path: (path.rename(path.with_name("elsewhere")), path.mkdir()), "another directory is in its"),
    "replaced by a file": (lambda path: (shutil.rmtree(path), path.write_text("")), "another directory is in its"),
    "parent deleted": (lambda path: shutil.rmtree(path.parent), "No such file or directory"),
    "parent replaced by a file": (
        lambda path: (shutil.rmtree(path.parent), path.parent.write_text("")),
        "Not a directory",
    ),
    "checkpoints behind a link that leads nowhere": (
        lambda path: (path / "checkpoints").symlink_to("/nowhere/at/all"),
        "checkpoints: No such file or directory",
    ),
}


@pytest.mark.parametrize(
    ("gone", "is_lost"),
    [
        ((), False),
        ((".lock",), False),
        (("run.json",), False),
        (("config.yaml",), False),
        (("metrics.jsonl", "checkpoints"), False),
        ((".lock", "run.json"), True),
        (("config.yaml", "run.json"), True),
        ((".lock", "config.yaml", "run.json", "metrics.jsonl", "checkpoints"), True),
    ],
)
def test_a_directory_whose_files_are_being_deleted_counts_as_deleted(tmp_path, gone, is_lost):
    run_dir = opened(tmp_path)
    record(run_dir)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "metrics.jsonl").write_text("")
    run_dir.require_same()
    for name in gone:
        path = tmp_path / name
        path.rmdir() if path.is_dir() else path.unlink()
    if is_lost:
        with pytest.raises(StorageError, match=r"under the run \(it has been emptied: .* are gone\)"):
            run_dir.require_same()
    else:
        run_dir.require_same()
    run_dir.close()


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("lose", "reason"), LOST.values(), ids=LOST)
def test_a_directory_that_is_gone_is_missed_and_not_made_again(tmp_path, rank, lose, reason):
    path = tmp_path / "runs" / "run"
    holder = opened(path)
    run_dir = RunDirectory(path, rank=rank)
    if rank:
        run_dir.open()
    else:
        run_dir = holder
    lose(path)
    left = sorted(str(each) for each in tmp_path.rglob("*"))
    with pytest.raises(StorageError, match=f"run was deleted, renamed or unmounted under the run .*{reason}") as caught:
        run_dir.require_same()
    assert caught.value.exit_code == 74
    if "checkpoints" not in reason:
        assert run_dir.finish(ExitCode.STORAGE, "gone"), "recorded nowhere, so it is printed"
        assert sorted(str(each) for each in tmp_path.rglob("*")) == left
    holder.close()


def test_checkpoints_on_another_filesystem_than_before(tmp_path):
    path = tmp_path / "run"
    opened(path).close()
    (path / "checkpoints").mkdir()
    run_dir = opened(path)
    run_dir.require_same()
    (path / "checkpoints").rmdir()
    shared_memory = Path("/dev/shm")
    if shared_memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("needs two filesystems")
    (path / "checkpoints").symlink_to(shared_memory)
    with pytest.raises(StorageError, match="checkpoints is on another filesystem than before"):
        run_dir.require_same()
    run_dir.close()


def test_what_cannot_be_looked_up_at_the_moment_is_not_gone(tmp_path, monkeypatch):
    run_dir = opened(tmp_path)

    def fail(path, **options):
        raise OSError(errno.ETIMEDOUT, "Connection timed out", str(path))

    monkeypatch.setattr(Path, "stat", fail)
    run_dir.require_same()
    monkeypatch.undo()
    run_dir.close()


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


def test_reason_holds_no_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    opened(tmp_path).finish(ExitCode.INTERNAL, "bad key 0123456789abcdef")
    assert exit_of(tmp_path)["reason"] == "bad key ***"


def test_full_disk_at_the_end_does_not_raise(tmp_path, capsys):
    code = """
import resource, sys
from pathlib import Path
from qwen3next_train.errors import ExitCode
from qwen3next_train.train.run_directory import RunDirectory
run_dir = RunDirectory(Path(sys.argv[1]), rank=0)
run_dir.open()
resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))
run_dir.finish(ExitCode.STORAGE, "full")
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stderr == f"{tmp_path}/exit.json: cannot be written (File too large)\n"
    assert names(tmp_path) == [".lock"]


def test_filesystem_without_hard_links(tmp_path, monkeypatch):
    def refuse(source: Path, target: Path) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    run_dir = opened(tmp_path)
    run_dir.finish(ExitCode.DATA, "first")
    run_dir.finish(ExitCode.INTERNAL, "second")
    assert exit_of(tmp_path)["reason"] == "first"
    assert names(tmp_path) == [".lock", "exit.json"]


RACER = """
import os, sys
from pathlib import Path
from qwen3next_train.errors import ExitCode
from qwen3next_train.train.run_directory import RunDirectory

rank = int(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
RunDirectory(Path(sys.argv[1]), rank).finish(ExitCode.DATA, f"rank {rank}")
"""


def test_of_ranks_that_fail_together_one_is_heard(tmp_path, monkeypatch):
    monkeypatch.setenv("MASTER_PORT", "29500")
    opened(tmp_path)
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(4)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    for racer in racers:
        racer.communicate()
        assert racer.returncode == 0
    outcome = exit_of(tmp_path)
    assert outcome["reason"] == f"rank {outcome['rank']}"
    assert names(tmp_path) == [".lock", "exit.json"]


class _Dying:
    """Operations on files of which the one of a given number kills the process instead; counts them."""

    def __init__(self, crash_point: int) -> None:
        self.crash_point = crash_point
        self.calls = 0

    def __call__(self, operation):
        def wrapper(*args, **kwargs):
            self.calls += 1
            if self.calls == self.crash_point:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args, **kwargs)

        return wrapper


def attempt_that_dies(path: Path, crash_point: int) -> int:
    """A whole attempt in a child process; minus the signal that killed it, or the number of its operations."""
    child = os.fork()
    if child == 0:
        code = 255
        with suppress(BaseException):
            dying = _Dying(crash_point)
            for name in ("create", "write", "fsync", "rename", "fsync_dir", "unlink"):
                setattr(LocalFilesystem, name, dying(getattr(LocalFilesystem, name)))
            os.link, Path.unlink = dying(os.link), dying(Path.unlink)
            run_dir = RunDirectory(path, rank=0)
            run_dir.open()
            run_dir.record_attempt(
                Config(run=RunConfig(steps=8)), layout={}, workload={}, wandb_id="later", command=[], step=0
            )
            run_dir.finish(ExitCode.STOPPED, "stopped")
            code = dying.calls
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_killed_before_every_operation(tmp_path):
    end, crash_point = -signal.SIGKILL, 0
    while end == -signal.SIGKILL:
        crash_point += 1
        path = tmp_path / str(crash_point)
        run_dir = opened(path)
        record(run_dir)
        run_dir.finish(ExitCode.DIVERGED, "nan")
        run_dir.close()
        end = attempt_that_dies(path, crash_point)
        assert (path / "config.yaml").read_text() in [to_yaml(Config(run=RunConfig(steps=steps))) for steps in (7, 8)]
        assert json.loads((path / "run.json").read_text())["wandb_id"] in ("abcd1234", "later")
        assert not (path / "exit.json").exists() or exit_of(path)["code"] in (76, 75)
        opened(path).close()
        assert names(path) == [".lock", "config.yaml", "run.json"]
    assert 12 < crash_point == end + 1 < 255
