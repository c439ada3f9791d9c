"""Saves that are written by a thread while training goes on, one at a time.

The thread of every rank goes through the same stages as a save that training waits for, and agrees on them with the
other ranks' threads over a process group of their own: collectives of two threads in one group could be paired
differently on two ranks. What a save came to is taken up by the thread that trains, at a step's end and on all ranks at
the same one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from qwen3next_train.checkpoint.filesystem import format_bytes
from qwen3next_train.checkpoint.manager import CheckpointManager, SaveReport
from qwen3next_train.checkpoint.manifest import Header
from qwen3next_train.checkpoint.snapshot import Snapshot, SnapshotBuffer, snapshot_bytes
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.engine.base import Fragment
from qwen3next_train.errors import TrainError
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup


class BackgroundSaver:
    """Writes checkpoints beside training.

    Args:
        checkpoints: over a group of its own, in which nothing else happens while a save is in flight.
        control: the ranks, as the thread that trains speaks with them.
        device: where the model is.
        enabled: ``checkpoint.async_save``.
        has_room: whether so many bytes of host memory may be taken by each process of this host.
    """

    def __init__(
        self,
        checkpoints: CheckpointManager,
        *,
        control: ControlGroup,
        device: torch.device,
        enabled: bool,
        has_room: Callable[[int], bool],
    ) -> None:
        self._checkpoints = checkpoints
        self._control = control
        self._device = device
        self._enabled = enabled
        self._has_room = has_room
        self._buffer: SnapshotBuffer | None = None
        self._save: _Save | None = None
        self._has_said_why_not = False

    @property
    def step(self) -> int | None:
        """Step of the save in flight, the same on all ranks; None without one."""
        return None if self._save is None else self._save.step

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is still at it."""
        return self._save is not None and self._save.is_alive()

    def start(
        self,
        *,
        step: int,
        fragments: Sequence[Fragment],
        train_state: TrainState,
        rank_tensors: Mapping[str, torch.Tensor],
        header: Header,
    ) -> bool:
        """Begin what :meth:`CheckpointManager.save` does, with the same arguments; collective. None may be in flight.

        Until :meth:`wait_for_copy` has returned, nothing may change the state.

        Returns:
            Whether it has begun; if not, training has to wait for this save.
        """
        assert self._save is None
        if not self._enabled:
            return False
        buffer = self._reserve(snapshot_bytes(fragments))
        if buffer is None:
            return False
        snapshot = Snapshot(fragments, buffer, self._device)

        def write() -> SaveReport:
            return self._checkpoints.save(
                step=step,
                fragments=snapshot.take(),
                train_state=train_state,
                rank_tensors=rank_tensors,
                header=header,
            )

        self._save = _Save(step, snapshot, write)
        self._save.start()
        return True

    def wait_for_copy(self) -> None:
        """To be called before the state is changed."""
        if self._save is not None:
            self._save.snapshot.wait()

    def finish(self) -> SaveReport | None:
        """Wait for the save in flight; None without one.

        Raises:
            TrainError: as of :meth:`CheckpointManager.save`.
        """
        save, self._save = self._save, None
        if save is None:
            return None
        save.join()
        if save.error is not None:
            raise save.error
        return save.report

    def conclude(self) -> SaveReport | None:
        """Wait for the save in flight where training ends in an error of its own, which other ranks may not share.

        Returns:
            The save if it was in flight and has succeeded; of one that has not, the log says why unless a lost rank is.
        """
        step = self.step
        try:
            return self.finish()
        except TrainError as error:
            get_logger().warning("%s", error)
        except Exception as error:  # noqa: BLE001 - the error that ends training is the one to report
            get_logger().warning("checkpoint: step %s not saved (%s)", step, type(error).__name__)
        return None

    def close(self) -> None:
        """Give the memory back; nothing is in flight any more."""
        assert self._save is None
        if self._buffer is not None:
            self._buffer.close()
            self._buffer = None

    def _reserve(self, num_bytes: int) -> SnapshotBuffer | None:
        """A buffer on every rank, or None on all."""
        if self._control.all_true(self._buffer is not None and self._buffer.num_bytes >= num_bytes):
            return self._buffer
        self.close()
        started_at = time.monotonic()
        # All have looked before the first one takes any.
        if self._control.all_true(self._has_room(num_bytes)):
            try:
                self._buffer = SnapshotBuffer(num_bytes, self._device)
            except (MemoryError, RuntimeError) as error:
                get_logger().warning("checkpoint: %s", " ".join(str(error).split()))
            if self._control.all_true(self._buffer is not None):
                pinned = "pinned " if self._device.type == "cuda" else ""
                get_logger().info(
                    "checkpoint: saves go on beside training, from %s of %shost memory a process (taken in %.1f s)",
                    format_bytes(num_bytes),
                    pinned,
                    time.monotonic() - started_at,
                )
                return self._buffer
            self.close()
        if not self._has_said_why_not:
            self._has_said_why_not = True
            get_logger().warning(
                "checkpoint.async_save: %s of host memory for each process are not free; "
                "training waits for its saves, until there is room",
                format_bytes(num_bytes),
            )
        return None


class _Save(threading.Thread):
    """One save in flight.

    Args:
        step: of the checkpoint.
        snapshot: what is written.
        write: does it, and returns or raises what :meth:`BackgroundSaver.finish` does.
    """

    def __init__(self, step: int, snapshot: Snapshot, write: Callable[[], SaveReport]) -> None:
        super().__init__(name=f"checkpoint of step {step}", daemon=True)
        self.step = step
        self.snapshot = snapshot
        self.report: SaveReport | None = None
        self.error: BaseException | None = None
        self._write = write

    def run(self) -> None:
        """In the thread."""
        try:
            self.report = self._write()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self.error = error
        finally:
            self.snapshot.release()
