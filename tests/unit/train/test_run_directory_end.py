"""How an attempt ended: ``exit.json``, written by the first of the ranks, and forgotten by the next attempt."""

import os
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import ClassVar

from qwen3next_train.errors import ConfigError, ExitCode
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.run_directory import RunDirectory, record_end
from tests.unit.train.run_directories import exit_of, names, opened


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
    assert (
        done.stderr
        == f"{tmp_path}/exit.json: cannot be written (File too large: raise the limit, ulimit -f, which is 0)\n"
    )
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
