"""An attempt that is killed before each of its file operations."""

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import LocalFilesystem
from qwen3next_train.config.describe import to_yaml
from qwen3next_train.config.schema import Config, RunConfig
from qwen3next_train.errors import ExitCode
from qwen3next_train.train.run_directory import RunDirectory
from tests.unit.train.run_directories import exit_of, names, opened, record


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
