"""The run directory: whose it is, who trained there with what, and how each attempt ended."""

from __future__ import annotations

import errno
import json
import os
import socket
import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwen3next_train.checkpoint.filesystem import (
    LOCAL_FILESYSTEM,
    UnusableFileError,
    describe_os_error,
    is_unreadable,
    read_file,
)
from qwen3next_train.checkpoint.names import CHECKPOINTS_NAME
from qwen3next_train.config.describe import sections, to_yaml
from qwen3next_train.config.renamed import with_current_names
from qwen3next_train.config.schema import Config
from qwen3next_train.config.strict_yaml import read_yaml
from qwen3next_train.errors import ConfigError, ExitCode, StorageError, TrainError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.log import get_logger
from qwen3next_train.metrics import history
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.train.directory_lock import LOCK_NAME, DirectoryLock, read_holder, require_own
from qwen3next_train.train.run_files import MAX_EXIT_BYTES, WRITABLE_NAME, RunFiles
from qwen3next_train.train.run_info import RUN_INFO_NAME, read_info
from qwen3next_train.versions import git_revision, software_versions

if TYPE_CHECKING:
    from qwen3next_train.parallel.control import ControlGroup

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
        self._files = RunFiles(self.path, rank)
        self._lock: DirectoryLock | None = None
        self._is_owner = False
        # Device and number of the directory, and the device of its checkpoints, as they were found.
        self._identity: tuple[int, int] | None = None
        self._checkpoints_device: int | None = None
        self._info: dict[str, Any] | None = None
        # Files of which at most one may vanish without the directory counting as deleted.
        self._marks: tuple[str, ...] = ()
        self._attempt = _launch_key()

    @property
    def metrics_path(self) -> Path:
        """One JSON object per logged step."""
        return self.path / "metrics.jsonl"

    @property
    def samples_path(self) -> Path:
        """One JSON object per step at which text was sampled."""
        return self.path / "samples.jsonl"

    @property
    def log_path(self) -> Path:
        """What the console said."""
        return self.path / "log.txt"

    @property
    def checkpoints_path(self) -> Path:
        """The folder of checkpoints."""
        return self.path / CHECKPOINTS_NAME

    def open(self) -> None:
        """Create the directory and, on rank 0, take its lock and forget how the attempt before ended.

        Rank 0 should do this before any rank can fail for a reason of its own, or that reason is forgotten too.

        Raises:
            StorageError: the directory cannot be created or written.
            ConfigError: another process trains in it, or it has files that no run has written; nothing is touched.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self.rank == 0:
                require_own(self.path)
                self._lock = DirectoryLock(self.path, self._attempt)
                self._is_owner = True
                self._remove_leftovers()
            self._identity = _identity(self.path)
            self._checkpoints_device = self._device_of_checkpoints()
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
                self._lock.rename_attempt(name)
            except OSError as error:
                raise StorageError(
                    f"run.dir: {self.path} cannot be written ({describe_os_error(error)}); "
                    "free space or fix permissions"
                ) from error
        self._attempt = control.broadcast_json(name)

    def require_same(self) -> None:
        """Make sure that the path still names the directory that was opened, and that no other process has it.

        Raises:
            StorageError: it was deleted, renamed or unmounted, or another process has taken it.
        """
        try:
            if _identity(self.path) != self._identity:
                raise StorageError(self._gone("another directory is in its place"))
            device = self._device_of_checkpoints()
            if device is not None and self._checkpoints_device not in (None, device):
                raise StorageError(self._gone(f"{CHECKPOINTS_NAME} is on another filesystem than before"))
            if self._lock is not None:
                lost = [name for name in self._marks if not os.path.lexists(self.path / name)]
                if len(lost) > 1:
                    # Somebody has deleted it, or is about to, and only what this run writes keeps it there.
                    raise StorageError(self._gone(f"it has been emptied: {', '.join(lost)} are gone"))
                if device is None and self._checkpoints_device is not None:
                    get_logger().warning("run.dir: %s was deleted under the run", self.checkpoints_path)
                self._lock.keep()
            self._checkpoints_device = device
        except OSError as error:
            # What cannot be looked up at the moment is said by what is written next.
            if not is_unreadable(error) or error.errno == errno.ESTALE:
                raise StorageError(self._gone(describe_os_error(error))) from error

    def _gone(self, reason: str) -> str:
        return (
            f"run.dir: {self.path} was deleted, renamed or unmounted under the run ({reason}); nothing is written "
            "elsewhere: bring it back, or name its new place, and run the line again"
        )

    def _device_of_checkpoints(self) -> int | None:
        """None when there is no such folder yet, or none any more."""
        try:
            return self.checkpoints_path.stat().st_dev
        except FileNotFoundError:
            if self.checkpoints_path.is_symlink():
                raise
            return None

    def close(self) -> None:
        """Give the lock back."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def record_attempt(
        self,
        config: Config,
        *,
        layout: Mapping[str, int],
        workload: Mapping[str, Any],
        wandb_id: str,
        command: Sequence[str],
        step: int,
        forked: bool = False,
        start: Mapping[str, Any] | None = None,
        changes: Sequence[Mapping[str, Any]] = (),
        validation_rows: Mapping[str, str] | None = None,
    ) -> None:
        """Write ``config.yaml`` and ``run.json``; to be called on rank 0, once all checks of the attempt have passed.

        Args:
            config: the resolved configuration.
            layout: the world: number of processes, parallel sizes, threads.
            workload: size of the model and FLOPs of a step, as ``plan --json`` names them.
            wandb_id: the wandb run of all attempts.
            command: the command line; secrets in it are masked.
            step: of the checkpoint the attempt goes on from, 0 for a new run.
            forked: that checkpoint is another run's.
            start: where the attempt was told to start, if it did start there.
            changes: all changes that resumes of the run have made, this one's included.
            validation_rows: digests of the rows that are validated on, by the prefix of their metrics.

        Raises:
            StorageError: they cannot be written.
        """
        attempt = {
            "started_at": _now(),
            "host": socket.gethostname(),
            "command": Redactor(os.environ).argv(command),
            "first_step": step,
            "logging_interval": config.logging.interval,
            "validation_rows": dict(validation_rows or {}),
            **({} if start is None else {"resume_from": dict(start)}),
        }
        self._info = {
            "wandb_id": wandb_id,
            "versions": software_versions(),
            "git_revision": git_revision(),
            "layout": dict(layout),
            **workload,
            "checkpoint_step": None if forked else step or None,
            "changes": [dict(change) for change in changes],
            "attempts": [*self.read_info().get("attempts", []), attempt],
        }
        try:
            self._files.replace("config.yaml", to_yaml(config).encode())
            self._files.replace(RUN_INFO_NAME, _to_json(self._info))
            self._marks = (LOCK_NAME, "config.yaml", RUN_INFO_NAME)
        except OSError as error:
            raise StorageError(
                f"run.dir: {self.path} cannot be written ({describe_os_error(error)}); free space or fix permissions"
            ) from error

    def record_save(self, step: int) -> None:
        """Note in ``run.json`` that there is a checkpoint of ``step``; to be called on rank 0. Never raises."""
        assert self._info is not None
        self._info["checkpoint_step"] = step
        try:
            self._files.replace(RUN_INFO_NAME, _to_json(self._info))
        except OSError as error:
            get_logger().warning("%s: cannot be written (%s)", self.path / RUN_INFO_NAME, system_reason(error))

    def read_info(self) -> dict[str, Any]:
        """The fields of ``run.json`` (see :func:`run_info.read_info`); empty when there is none or it is damaged.

        Raises:
            StorageError: it cannot be read.
        """
        if self._info is None:
            path = self.path / RUN_INFO_NAME
            try:
                self._info = read_info(LOCAL_FILESYSTEM, path)
            except OSError as error:
                raise StorageError(f"{path}: cannot be read ({system_reason(error)}); make it readable") from error
        return self._info

    def last_logged_step(self) -> int:
        """The last step of which ``metrics.jsonl`` has a row, 0 for none.

        Raises:
            StorageError: it cannot be read.
        """
        try:
            return history.last_step(self.metrics_path)
        except OSError as error:
            raise StorageError(
                f"{self.metrics_path}: cannot be read ({system_reason(error)}); make it readable"
            ) from error

    def read_config(self) -> dict[str, Any] | None:
        """The configuration of the attempt before, None when none has logged a step here or the file is damaged.

        Keys are not checked, an earlier version may have had others; those it has renamed have their new names. A
        checkpoint has a copy of its own.

        Raises:
            StorageError: the file cannot be read.
        """
        path = self.path / "config.yaml"
        try:
            if not path.is_file() or not self.metrics_path.is_file() or not self.metrics_path.stat().st_size:
                return None
            path.open("rb").close()
        except OSError as error:
            raise StorageError(f"{path}: cannot be read ({system_reason(error)}); make it readable") from error
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
        if not self._belongs_to_attempt():
            return code != ExitCode.FINISHED
        line = " ".join(Redactor(os.environ).text(reason).split())
        outcome = {"code": int(code), "reason": line, "rank": self.rank, "step": step, "time": _now()}
        try:
            self._files.create("exit.json", _to_json(outcome))
        except FileExistsError:
            # Other ranks' loggers show failures only, so rank 0 says a stop whoever recorded it.
            return (code == ExitCode.STOPPED and self.rank == 0) or self._recorded_reason() != line
        except OSError as error:
            get_logger().error("%s: cannot be written (%s)", self.path / "exit.json", system_reason(error))
        return True

    def _recorded_reason(self) -> str | None:
        try:
            recorded = json.loads(read_file(LOCAL_FILESYSTEM, self.path / "exit.json", max_bytes=MAX_EXIT_BYTES))
        except (OSError, UnusableFileError, ValueError, RecursionError):
            return None
        return recorded.get("reason") if isinstance(recorded, dict) else None

    def _belongs_to_attempt(self) -> bool:
        if self.rank != 0:
            return read_holder(self.path).get("attempt") == self._attempt
        try:
            return self._is_owner and _identity(self.path) == self._identity
        except OSError:
            return False

    def _remove_leftovers(self) -> None:
        (self.path / "exit.json").unlink(missing_ok=True)
        self._files.remove_unfinished()
        # An existing lock file says nothing about whether new files can be made here.
        self._files.replace(WRITABLE_NAME, b"")
        (self.path / WRITABLE_NAME).unlink()


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


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _launch_key() -> str:
    if "MASTER_PORT" not in os.environ:
        return f"{socket.gethostname()}:{os.getpid()}"
    return ":".join(os.environ.get(name, "") for name in _ATTEMPT_VARIABLES)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _to_json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2).encode() + b"\n"
