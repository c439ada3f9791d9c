"""Weights & Biases: wandb runs in a process of its own, so that it can neither stop nor stall training.

Inside the training process, wandb 0.31 would hold the interpreter during its import, replace ``sys.excepthook``,
refuse an offline run after a failed online one ("run ID is in use"), and wait at exit for as long as its server
hangs. So this module is two halves that talk JSON lines over pipes: :class:`WandbSink` (queue, time limits,
fallback; never imports wandb) and ``_serve``, which ``python -m`` runs in the child. The child lives on for a
moment when training is killed, so that the last steps are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shlex
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from qwen3next_train.config.schema import WandbConfig
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.json_child import JsonChild, LineReader
from qwen3next_train.metrics.redaction import Redactor
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.metrics.sinks import Record
from qwen3next_train.metrics.wandb_settings import DECIDED, Mode, init_timeout_s, page_settings, resolve_mode

_POLL_S = 0.2
_GRACE_S = 5.0
_MAX_STARTS = 3
_SAMPLES = "samples"
_MAX_REASON_LENGTH = 300


@dataclass(frozen=True)
class WandbLimits:
    """How long wandb may take and how much may wait for it.

    Args:
        init_s: for ``wandb.init`` to reach the server.
        start_s: for the child to be ready, the offline fallback included; then it is replaced.
        finish_s: for the upload at the end.
        close_s: for everything at the end.
        queue_size: records that wait; further ones are dropped and counted.
    """

    init_s: float = 10.0
    start_s: float = 20.0
    finish_s: float = 20.0
    close_s: float = 40.0
    queue_size: int = 10_000


_DEFAULT_LIMITS = WandbLimits()


class WandbSink:
    """Sends records to a wandb run under the names of ``metrics.jsonl``; for rank 0 only.

    Returns at once: wandb starts in the background while records wait. Without a key or a network the run is kept
    offline, said in one line with the command that uploads it.

    Args:
        config: section ``logging.wandb``.
        run_dir: run directory; wandb's files go to ``run_dir/wandb``, or to that folder of ``WANDB_DIR``.
        run_config: what the run's page shows as its configuration; secrets are masked.
        run_id: the run's id, the same at every resume (:func:`wandb_settings.new_run_id`).
        resumed: an earlier attempt used this id, so offline there may be several directories to upload.
        limits: time and queue limits; ``WANDB_INIT_TIMEOUT`` holds for ``wandb.init``.

    Raises:
        ConfigError: a variable makes no sense.
    """

    def __init__(
        self,
        config: WandbConfig,
        run_dir: Path,
        run_config: dict[str, Any],
        run_id: str,
        resumed: bool,
        *,
        limits: WandbLimits = _DEFAULT_LIMITS,
    ) -> None:
        run_dir = run_dir.absolute()
        init_s = init_timeout_s(os.environ) or limits.init_s
        self._limits = limits = replace(limits, init_s=init_s, start_s=limits.start_s + max(0, init_s - limits.init_s))
        folder = Path(os.environ.get("WANDB_DIR") or run_dir).absolute()
        self._wandb_dir = folder / "wandb"
        self._resumed = resumed
        self._settings: dict[str, Any] = {
            **page_settings(config, run_dir.name, os.environ),
            "id": run_id,
            "dir": str(folder),
            "config": Redactor(os.environ).json(run_config),
            "init_s": limits.init_s,
            # Its own limit comes first: then it says how far it got.
            "finish_s": 0.8 * limits.finish_s,
            "train_pid": os.getpid(),
        }
        self._queue: queue.Queue[dict[str, Any]] = queue.Queue(limits.queue_size)
        self._num_dropped = 0
        self._failed = False
        self._closing = threading.Event()
        self._abandoned = threading.Event()
        self._child: JsonChild | None = None
        self._to_upload: list[str] = []
        self._directory = ""
        mode = resolve_mode(config.mode, os.environ)
        self._alive = mode != "disabled"
        self._thread = threading.Thread(target=self._run, args=(mode,), name="wandb", daemon=True)
        if self._alive:
            self._thread.start()

    def log(self, record: Record) -> None:
        """Queue one logged step; never waits, never raises."""
        if not self._alive:
            return
        try:
            self._queue.put_nowait(dict(record))
        except queue.Full:
            self._num_dropped += 1

    def note(self, step: int, changed: str) -> None:
        """Queue a row that says what a resume has changed, under ``resume/changed``; never waits, never raises."""
        if self._alive:
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait({"step": step, "resume/changed": changed})

    def log_samples(self, step: int, samples: Sequence[Sample]) -> None:
        """Queue a table of samples; never waits, never raises."""
        if self._alive:
            columns = [field.name for field in fields(Sample)]
            table = {"columns": columns, "data": [[getattr(sample, name) for name in columns] for sample in samples]}
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait({"step": step, _SAMPLES: table})

    def close(self, *, failed: bool = False) -> None:
        """Send what waits and finish the run, within ``limits.close_s`` seconds.

        Args:
            failed: mark the run as failed on its page.
        """
        self._failed = failed
        self._closing.set()
        if self._thread.ident is None:
            return
        self._thread.join(self._limits.close_s)
        if self._thread.is_alive():
            get_logger().warning("wandb: not finished after %.0f s, stopped", self._limits.close_s)
            self._abandoned.set()
            if self._child is not None:
                self._child.kill()
            self._thread.join(_GRACE_S)
        self._alive = False
        num_lost = self._num_dropped + self._queue.qsize()
        if num_lost:
            get_logger().warning("wandb: %d records were not sent; metrics.jsonl has them", num_lost)
        if self._to_upload:
            get_logger().info("wandb: to upload this run: %s", self._sync_command())

    def _run(self, mode: Mode) -> None:
        """The background thread: starts the child and feeds it; starts it again when it dies."""
        try:
            for _ in range(_MAX_STARTS):
                if not self._start(mode) or self._feed():
                    return
        except (OSError, ValueError) as error:
            self._give_up(str(error))

    def _start(self, mode: Mode) -> bool:
        """Start a child and wait until its run is open; an unresponsive one is replaced by an offline one."""
        reason = ""
        for attempt in dict.fromkeys((mode, "offline")):
            self._child = self._open_child({**self._settings, "mode": attempt})
            if self._abandoned.is_set():
                self._child.close()
                return False
            reply = self._child.receive(self._limits.start_s)
            if "ready" in reply:
                self._announce(reply, reason)
                return True
            reason = reply.get("failed") or self._child.fate(f"no answer within {self._limits.start_s:.0f} s")
            self._child.close()
            if "failed" in reply or self._abandoned.is_set():
                break
        self._give_up(reason)
        return False

    def _feed(self) -> bool:
        """Send records until the sink is closed; returns False when the child died before."""
        assert self._child is not None
        while True:
            try:
                message: dict[str, Any] = {"log": self._queue.get(timeout=_POLL_S)}
            except queue.Empty:
                if not self._closing.is_set():
                    continue
                message = {"finish": int(self._failed)}
            try:
                self._child.send(message)
            except OSError:
                lost = self._child.receive(0).get("lost") or self._child.fate("stopped reading")
                get_logger().warning("wandb: connection lost (%s); training goes on", lost)
                self._child.close()
                return self._abandoned.is_set()
            if "finish" in message:
                reply = self._child.receive(self._limits.finish_s)
                if "finished" not in reply and not self._abandoned.is_set():
                    reason = reply.get("lost") or self._child.fate("no answer")
                    get_logger().warning("wandb: upload not complete (%s)", reason)
                    self._to_upload = self._to_upload or [self._directory]
                self._child.close()
                return True

    def _open_child(self, settings: dict[str, Any]) -> JsonChild:
        self._wandb_dir.mkdir(exist_ok=True)
        child = JsonChild("qwen3next_train.metrics.wandb_sink", self._wandb_dir / "process.log", DECIDED)
        with contextlib.suppress(BrokenPipeError):
            child.send(settings)
        return child

    def _announce(self, reply: dict[str, str], reason: str) -> None:
        self._directory = reply["directory"]
        if reply["ready"] == "online":
            get_logger().info("wandb: %s", reply["url"])
            return
        self._to_upload.append(self._directory)
        reason = reason or reply["reason"]
        get_logger().info(
            "wandb: offline%s; to upload this run later: %s", f" ({reason})" if reason else "", self._sync_command()
        )

    def _give_up(self, reason: str) -> None:
        self._alive = False
        get_logger().warning("wandb: off (%s); training goes on", Redactor(os.environ).text(_one_line(reason)))

    def _sync_command(self) -> str:
        """The command that uploads every offline directory of this run, earlier attempts' too."""
        directories = set(self._to_upload)
        if self._resumed:
            directories |= {str(path) for path in self._wandb_dir.glob(f"offline-run-*-{self._settings['id']}")}
        return shlex.join(["wandb", "sync", *sorted(directories)])


def _one_line(text: str) -> str:
    return " ".join(text.split())[:_MAX_REASON_LENGTH]


def _serve() -> None:
    """The child: opens the run, logs what arrives, finishes at the end of the pipe or when training is gone."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    parent = os.getppid()
    requests = LineReader(sys.stdin.fileno())
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    # Whatever wandb prints goes to the log, not into the pipe.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def reply(**message: str) -> None:
        with contextlib.suppress(BrokenPipeError):
            replies.write(json.dumps(message) + "\n")

    def messages() -> Iterator[dict[str, Any]]:
        while not requests.at_end:
            line = requests.read(_POLL_S)
            if line is not None:
                yield json.loads(line)
            elif os.getppid() != parent:
                return

    inbox = messages()
    settings = next(inbox)
    try:
        import wandb

        run, reason = _open_run(wandb, settings)
    except Exception as error:  # noqa: BLE001 - whatever wandb does, it is one line in the parent
        reply(failed=_one_line(f"{type(error).__name__}: {error}"))
        return
    reply(
        ready="offline" if run.offline else "online",
        directory=str(Path(run.dir).parent),
        url="" if run.offline else str(run.url),
        reason=reason,
    )
    exit_code = 1
    try:
        for message in inbox:
            if "finish" in message:
                exit_code = message["finish"]
                break
            row = message["log"]
            if _SAMPLES in row:
                row[_SAMPLES] = wandb.Table(**row[_SAMPLES])
            run.log(row)
        run.finish(exit_code=exit_code)
    except Exception as error:  # noqa: BLE001 - as above
        reply(lost=_one_line(f"{type(error).__name__}: {error}"))
        # Its exit handlers would wait for a service that is gone.
        os._exit(1)
    reply(finished="yes")


def _open_run(wandb: Any, settings: dict[str, Any]) -> tuple[Any, str]:
    """Open the run, offline when online fails; returns it and why online failed."""
    try:
        return _init(wandb, settings, settings["mode"]), ""
    except Exception as error:
        if settings["mode"] == "offline":
            raise
        reason = _one_line(str(error))
    # The failed attempt keeps the id occupied until its service ends.
    wandb.teardown()
    return _init(wandb, settings, "offline"), reason


def _init(wandb: Any, settings: dict[str, Any], mode: str) -> Any:
    run = wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        name=settings["name"],
        tags=settings["tags"],
        id=settings["id"],
        dir=settings["dir"],
        config=settings["config"],
        mode=mode,
        resume="allow",
        settings=wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            # A remote's URL may hold a token; the revision is in the configuration.
            disable_git=True,
            init_timeout=settings["init_s"],
            finish_timeout=settings["finish_s"],
            finish_timeout_raises=True,
            # System metrics are those of training, not of this process.
            x_stats_pid=settings["train_pid"],
        ),
    )
    # A resumed run would keep the values it had.
    run.config.update(settings["config"], allow_val_change=True)
    # Our own step axis: wandb's would drop the steps that a resumed run repeats.
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


if __name__ == "__main__":
    _serve()
