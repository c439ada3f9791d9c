"""The run directory: its lock, who trained there with what, and how each attempt ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, describe_os_error, write_file
from qwen3next_train.config.describe import sections, to_yaml
from qwen3next_train.config.renamed import with_current_names
from qwen3next_train.config.schema import Config
from qwen3next_train.config.strict_yaml import read_yaml
from qwen3next_train.errors import ConfigError, ExitCode, StorageError, TrainError
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.versions import git_revision, software_versions

if TYPE_CHECKING:
    from qwen3next_train.parallel.control import ControlGroup

_LOCK_MODE = 0o640
_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS})
_NO_HARD_LINKS = frozenset({errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK})
# Equal on all ranks of an attempt, and different between attempts unless the port was chosen by hand.
_ATTEMPT_VARIABLES = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")


class RunDirectory:
    """``run.dir`` as one rank sees it.

    Files are replaced by rename, so that a reader, and whoever comes after a kill, sees the old or the new one.
    The environment is never written anywhere.

    Args:
        path: the directory; created by :meth:`open`.
        rank: this process. Rank 0 holds the lock and writes everything but ``exit.json``, which any rank may.
    """

    def __init__(self, path: Path, rank: int) -> None:
        self.path = path.absolute()
        self.rank = rank
        self._lock: int | None = None
        self._is_owner = False
        self._attempt = _launch_key()

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def log_path(self) -> Path:
        """What the console said."""
        return self.path / "log.txt"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of checkpoints."""
        return self.path / "checkpoints"

    def open(self) -> None:
        """Create the directory and, on rank 0, take its lock and forget how the attempt before ended.

        Rank 0 should do this before any rank can fail for a reason of its own, or that reason is forgotten too.

        Raises:
            StorageError: the directory cannot be created or written.
            ConfigError: another process trains in it.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                self._acquire_lock()
                self._remove_leftovers()
        except OSError as error:
            self.close()
            reason = "not a directory" if isinstance(error, FileExistsError) else describe_os_error(error)
            raise StorageError(
                f"run.dir: {self.path} cannot be created or written ({reason}); fix that or choose another directory"
            ) from error

    def name_attempt(self, control: ControlGroup) -> None:
        """Give the attempt a name of its own; to be called on all ranks, once they have found each other.

        Until then its name is how it was launched, which a second start that is about to be rejected can share.

        Raises:
            StorageError: the lock file cannot be written.
        """
        name = uuid.uuid4().hex
        if self._lock is not None:
            try:
                self._write_holder(self._lock, name)
            except OSError as error:
                raise StorageError(
                    f"run.dir: {self.path} cannot be written ({describe_os_error(error)}); "
                    "free space or fix permissions"
                ) from error
        self._attempt = control.broadcast_json(name)

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def record_attempt(
        self,
        config: Config,
        *,
        layout: Mapping[str, int],
        workload: Mapping[str, Any],
        wandb_id: str,
        command: Sequence[str],
    ) -> None:
        """Write ``config.yaml`` and ``run.json``; to be called on rank 0, once all checks of the attempt have passed.

        Args:
            config: the resolved configuration.
            layout: the world: number of processes, parallel sizes, threads.
            workload: size of the model and FLOPs of a step, as ``plan --json`` names them.
            wandb_id: the wandb run of all attempts.
            command: the command line; secrets in it are masked.

        Raises:
            StorageError: they cannot be written.
        """
        info = {
            "wandb_id": wandb_id,
            "versions": software_versions(),
            "git_revision": git_revision(),
            "layout": dict(layout),
            **workload,
            "attempts": [
                *self._earlier_attempts(),
                {"started_at": _now(), "host": socket.gethostname(), "command": Redactor(os.environ).argv(command)},
            ],
        }
        try:
            self._replace("config.yaml", to_yaml(config).encode())
            self._replace("run.json", _to_json(info))
        except OSError as error:
            raise StorageError(
                f"run.dir: {self.path} cannot be written ({describe_os_error(error)}); free space or fix permissions"
            ) from error

    def read_info(self) -> dict[str, Any]:
        """The content of ``run.json``; empty when there is none or it is damaged."""
        try:
            info = json.loads((self.path / "run.json").read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            get_logger().warning("%s: unreadable (%s); it is written anew", self.path / "run.json", error)
            return {}
        return info if isinstance(info, dict) else {}

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the attempt before, None when none has logged a step here or the file is damaged.

        Keys are not checked, an earlier version may have had others; those it has renamed have their new names. A
        checkpoint has a copy of its own.
        """
        path = self.path / "config.yaml"
        if not path.is_file() or not self.metrics_path.is_file() or not self.metrics_path.stat().st_size:
            return None
        try:
            tree = read_yaml(path)
        except ConfigError as error:
            get_logger().warning("%s; only the checkpoint's own copy is compared", error)
            return None
        assert isinstance(tree, dict)
        lost = [name for name, _ in sections() if not isinstance(tree.get(name), dict)]
        if lost:
            get_logger().warning("%s: %s missing; only the checkpoint's own copy is compared", path, ", ".join(lost))
            return None
        return with_current_names(tree)

    def finish(self, code: ExitCode, reason: str, *, step: int | None = None) -> bool:
        """Record in ``exit.json`` how this attempt ended. If several ranks fail, the first one's reason is kept.

        Only rank 0 reports success. Never raises: there is already something to report. Writes nothing when the
        directory belongs to another attempt, such as the one whose lock ended this one.

        Args:
            code: the exit code.
            reason: one line.
            step: last finished step, if known.

        Returns:
            Whether this rank should print the reason: it is news, or it is a failure that is recorded nowhere.
        """
        if code == ExitCode.FINISHED and self.rank != 0:
            return False
        is_ours = self._is_owner if self.rank == 0 else self._read_lock().get("attempt") == self._attempt
        if not is_ours:
            return code != ExitCode.FINISHED
        line = " ".join(Redactor(os.environ).text(reason).split())
        outcome = {"code": int(code), "reason": line, "rank": self.rank, "step": step, "time": _now()}
        try:
            self._create("exit.json", _to_json(outcome))
        except FileExistsError:
            # Other ranks' loggers show failures only, so rank 0 says a stop whoever recorded it.
            return (code == ExitCode.STOPPED and self.rank == 0) or self._recorded_reason() != line
        except OSError as error:
            get_logger().error("%s: cannot be written (%s)", self.path / "exit.json", error.strerror or error)
        return True

    def _recorded_reason(self) -> str | None:
        try:
            recorded = json.loads((self.path / "exit.json").read_bytes())
        except (OSError, ValueError):
            return None
        return recorded.get("reason") if isinstance(recorded, dict) else None

    def _acquire_lock(self) -> None:
        path = self.path / ".lock"
        self._lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, _LOCK_MODE)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.close()
            raise ConfigError(self._in_use()) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            get_logger().warning(
                "run.dir: %s is on a filesystem without locks; a second run in it would not be noticed", self.path
            )
        os.register_at_fork(after_in_child=self.close)
        self._write_holder(self._lock, self._attempt)
        self._is_owner = True

    def _write_holder(self, lock: int, attempt: str) -> None:
        holder = {"attempt": attempt, "host": socket.gethostname(), "pid": os.getpid(), "since": _now()}
        os.ftruncate(lock, 0)
        os.pwrite(lock, _to_json(holder), 0)
        # Other nodes see it only when the server has it.
        os.fsync(lock)

    def _in_use(self) -> str:
        holder = self._read_lock()
        who = "another process"
        if {"host", "pid", "since"} <= holder.keys():
            who = f"process {holder['pid']} on {holder['host']} since {holder['since']}"
        return f"run.dir: {self.path} is in use by {who}; stop that run or choose another directory"

    def _read_lock(self) -> dict[str, Any]:
        try:
            holder = json.loads((self.path / ".lock").read_bytes())
        except (OSError, ValueError):
            return {}
        return holder if isinstance(holder, dict) else {}

    def _remove_leftovers(self) -> None:
        for path in [self.path / "exit.json", *self.path.glob(".staged-*")]:
            path.unlink(missing_ok=True)
        # An existing lock file says nothing about whether new files can be made here.
        self._replace(".writable", b"")
        (self.path / ".writable").unlink()

    def _earlier_attempts(self) -> list[Any]:
        attempts = self.read_info().get("attempts", [])
        return attempts if isinstance(attempts, list) else []

    def _stage(self, name: str, data: bytes) -> Path:
        staged = self.path / f".staged-{self.rank}-{os.getpid()}-{name}"
        staged.unlink(missing_ok=True)
        try:
            write_file(LOCAL_FILESYSTEM, staged, data)
        except OSError as error:
            staged.unlink(missing_ok=True)
            # Under the name people know.
            raise OSError(error.errno, error.strerror, str(self.path / name)) from error
        return staged

    def _replace(self, name: str, data: bytes) -> None:
        LOCAL_FILESYSTEM.rename(self._stage(name, data), self.path / name)
        LOCAL_FILESYSTEM.fsync_dir(self.path)

    def _create(self, name: str, data: bytes) -> None:
        """Publish a whole file unless there is one: the first wins.

        Raises:
            FileExistsError: there is one.
        """
        staged = self._stage(name, data)
        target = self.path / name
        try:
            # A hard link fails where a rename would replace.
            os.link(staged, target)
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS:
                raise
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
            staged.rename(target)
        finally:
            staged.unlink(missing_ok=True)
        LOCAL_FILESYSTEM.fsync_dir(self.path)


def record_end(path: Path, error: TrainError) -> None:
    """Record in ``exit.json`` of a run directory how an attempt ended when none of its processes can.

    The file's content is replaced. A directory that is in use or cannot be written is left alone.
    """
    run_dir = RunDirectory(path, rank=0)
    try:
        run_dir.open()
    except TrainError:
        return
    run_dir.finish(error.exit_code, str(error))
    run_dir.close()


def _launch_key() -> str:
    if "MASTER_PORT" not in os.environ:
        return f"{socket.gethostname()}:{os.getpid()}"
    return ":".join(os.environ.get(name, "") for name in _ATTEMPT_VARIABLES)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
