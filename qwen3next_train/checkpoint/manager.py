"""Saving and finding checkpoints, agreed between all ranks.

A kill at any instant costs no more than the steps since the last completed save: a checkpoint appears under its
name by one rename, after every byte of it has been synced. A damaged checkpoint is detected before anything is
loaded, named and skipped, on all ranks together; if none is intact, the run stops instead of starting over.
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.checkpoint import publication
from qwen3next_train.checkpoint.agreement import StageFailed, run_together
from qwen3next_train.checkpoint.best import Rating, best_of, ranked, rating
from qwen3next_train.checkpoint.discovery import VerifyResult, verify
from qwen3next_train.checkpoint.filesystem import (
    LOCAL_FILESYSTEM,
    Filesystem,
    describe_os_error,
    format_bytes,
    remove_tree,
    wait_for_directory,
)
from qwen3next_train.checkpoint.fragments import FragmentIndex, FragmentReader, RankShare, write_rank_files
from qwen3next_train.checkpoint.manifest import FileEntry, Header, Manifest, encode_manifest, parse_manifest
from qwen3next_train.checkpoint.names import (
    BEST_NAME,
    MAX_STEP,
    CheckpointInfo,
    describe_missing_step,
    list_checkpoints,
    list_names,
    step_name,
)
from qwen3next_train.checkpoint.train_state import TrainState, restore_rng
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment
from qwen3next_train.errors import CheckpointError, ConfigError, StorageError
from qwen3next_train.log import get_logger
from qwen3next_train.parallel.control import ControlGroup, Json


@dataclass(frozen=True)
class SaveReport:
    """A completed save.

    Args:
        step: of the checkpoint.
        path: its directory.
        num_bytes: size of all files.
        duration_s: seconds the save took, deletions of old checkpoints not counted.
    """

    step: int
    path: Path
    num_bytes: int
    duration_s: float


@dataclass(frozen=True)
class VerifiedCheckpoint:
    """A checkpoint that all ranks together have verified.

    Args:
        step: of the checkpoint.
        path: its directory.
        manifest: what it holds.
    """

    step: int
    path: Path
    manifest: Manifest


@dataclass(frozen=True)
class Glance:
    """What a checkpoint says of itself, before its files are hashed.

    Args:
        path: its directory.
        config: the configuration it was written under.
        state: its progress.
        kinds: what it holds of every parameter.
    """

    path: Path
    config: dict[str, Any]
    state: TrainState
    kinds: tuple[str, ...]


class CheckpointManager:
    """The checkpoints of one run. Every method is collective: all ranks call it with the same arguments.

    Args:
        directory: ``RUN/checkpoints``, on a filesystem that all ranks share; created by the first save.
        control: the ranks.
        keep: newest intact checkpoints to keep, at least 1. Those that were saved while steps were being skipped
            (``TrainState.consecutive_skips``) do not count: the last good state is not among them.
        best: validation metric whose lowest value marks a checkpoint that is kept beside these; empty: none is.
        filesystem: where the files are.
        visibility_timeout_s: how long a rank waits to see a directory that rank 0 has created.
    """

    def __init__(
        self,
        directory: Path,
        *,
        control: ControlGroup,
        keep: int,
        best: str = "",
        filesystem: Filesystem = LOCAL_FILESYSTEM,
        visibility_timeout_s: float = 10.0,
    ) -> None:
        assert keep >= 1
        self._directory = directory
        self._control = control
        self._keep = keep
        self._best = best
        self._fs = filesystem
        self._visibility_timeout_s = visibility_timeout_s
        # By name, whether it counts for ``keep``; equal on all ranks because only agreed results are entered.
        self._counts: dict[str, bool] = {}
        # By name, by the metric ``best``; of rank 0, which reads them.
        self._ratings: dict[str, Rating | None] = {}

    def save(
        self,
        *,
        step: int,
        fragments: Iterable[Fragment],
        train_state: TrainState,
        rank_tensors: Mapping[str, torch.Tensor],
        header: Header,
    ) -> SaveReport:
        """Write and publish a checkpoint, then delete those that are no longer kept.

        Args:
            step: of the checkpoint; one that exists is replaced, without a moment in which neither exists.
            fragments: this rank's share of the training state.
            train_state: counters, the same on all ranks.
            rank_tensors: what only this rank needs again (its random generators).
            header: the run's description, the same on all ranks.

        Raises:
            StorageError: on every rank when any rank could not write; older checkpoints are untouched.
            DivergedError: on every rank when any fragment holds NaN or infinity; nothing has been written.
            PeerLostError: another rank failed in an unforeseen way (that rank raises its own exception).
        """
        assert 0 <= step <= MAX_STEP
        assert train_state.step == step
        assert header.layout.world_size == self._control.world_size
        started_at = time.monotonic()
        staging: str = self._control.broadcast_json(publication.staging_name(step))
        num_bytes = 0
        try:
            share, sizes = run_together(self._control, lambda: _collect(fragments, rank_tensors))
            num_bytes = sum(sizes)
            self._on_rank_0(lambda: self._create_staging(staging, num_bytes))
            _, shares = run_together(self._control, lambda: self._write(staging, share, header))
            self._on_rank_0(lambda: self._publish(staging, step, header, train_state, shares))
        except StageFailed as failed:
            self._counts.pop(step_name(step), None)
            self._ratings.pop(step_name(step), None)
            raise self._abandon(staging, step, num_bytes, failed) from failed
        self._counts[step_name(step)] = train_state.consecutive_skips == 0
        self._ratings[step_name(step)] = rating(train_state, self._best)
        duration_s = time.monotonic() - started_at
        path = self._directory / step_name(step)
        get_logger().info(
            "checkpoint: step %d saved, %s in %.1f s: %s", step, format_bytes(num_bytes), duration_s, path
        )
        self._clean_up(step)
        return SaveReport(step, path, num_bytes, duration_s)

    def find_latest(self) -> VerifiedCheckpoint | None:
        """The newest intact checkpoint, the same on every rank; None when there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints and none is intact, or the newest is of a newer format.
            StorageError: the directory cannot be listed, or a checkpoint cannot be read: it may be intact, so the
                search does not go on to an older one.
        """
        damaged = []
        for checkpoint in self._list():
            result = self._verify(checkpoint)
            if result.manifest is not None and result.reason is None:
                return VerifiedCheckpoint(checkpoint.step, self._directory / checkpoint.name, result.manifest)
            if result.newer:
                raise CheckpointError(f"{self._directory / checkpoint.name}: {result.reason}")
            get_logger().warning("checkpoint: %s is damaged and skipped: %s", checkpoint.name, result.reason)
            damaged.append(f"{checkpoint.name}: {result.reason}")
        if damaged:
            raise CheckpointError(
                f"{self._directory}: no intact checkpoint: {'; '.join(damaged)}; "
                "restore one, or choose another run.dir to start over"
            )
        return None

    def newest_step(self) -> int | None:
        """The newest checkpoint's step as its name says, damaged or not; None when there is no checkpoint at all.

        Raises:
            StorageError: the directory cannot be listed.
        """
        return next((checkpoint.step for checkpoint in self._list()), None)

    def glance(self, checkpoint: CheckpointInfo | None = None) -> Glance | None:
        """A checkpoint as its manifest describes it; None without one, or where that is not whole.

        Args:
            checkpoint: which one; None: the newest.

        Raises:
            StorageError: the directory cannot be listed.
        """
        named = checkpoint or next(iter(self._list()), None)
        if named is None:
            return None

        def read() -> Json:
            result = verify(self._fs, self._directory, named, hashes=False)
            if result.reason is not None or (manifest := result.manifest) is None:
                return None
            return {"config": manifest.config, "state": asdict(manifest.train_state), "kinds": manifest.kinds}

        found = self._on_rank_0(read)
        if found is None:
            return None
        path = self._directory / named.name
        return Glance(path, found["config"], TrainState(**found["state"]), tuple(found["kinds"]))

    def find_step(self, step: int) -> VerifiedCheckpoint:
        """The checkpoint of a step, verified.

        Raises:
            ConfigError: there is none.
            CheckpointError: it is damaged or of a newer format.
            StorageError: the directory cannot be listed, or the checkpoint cannot be read.
        """
        known = self._list()
        named = next((checkpoint for checkpoint in known if checkpoint.step == step), None)
        if named is None:
            raise ConfigError(f"--resume.from: {describe_missing_step(self._directory, step, known)}")
        return self.find(named)

    def find_last_good(self) -> int | None:
        """Step of the newest intact checkpoint that was not saved while steps were being skipped, None without one.

        Raises:
            StorageError: the directory cannot be listed, or a checkpoint cannot be read.
        """
        published = (checkpoint for checkpoint in self._list() if checkpoint.published)
        return next((each.step for each in published if self._is_counted(each)), None)

    def name_best(self) -> CheckpointInfo:
        """The checkpoint that the run's ``checkpoint.best`` calls the best; the same on every rank.

        Raises:
            ConfigError: the run names no metric, or no checkpoint has a value of it.
            StorageError: the directory cannot be listed.
        """
        known = self._list()

        def step_of_best() -> Json:
            best = best_of(self._fs, self._directory, known)
            return None if best is None else best.checkpoint.step

        step = self._on_rank_0(step_of_best)
        if step is None:
            raise ConfigError(
                f"{self._directory / BEST_NAME}: no checkpoint is the best: the run had no "
                "checkpoint.best, or no validation at a saved step; name a checkpoint by its step"
            )
        return next(checkpoint for checkpoint in known if checkpoint.step == step and checkpoint.published)

    def find(self, checkpoint: CheckpointInfo) -> VerifiedCheckpoint:
        """One checkpoint, verified; the same on every rank.

        Raises:
            CheckpointError: it is damaged or of a newer format.
            StorageError: it cannot be read.
        """
        result = self._verify(checkpoint)
        path = self._directory / checkpoint.name
        if result.manifest is None or result.reason is not None:
            raise CheckpointError(f"{path}: {result.reason}")
        return VerifiedCheckpoint(checkpoint.step, path, result.manifest)

    def restore_rng(self, found: VerifiedCheckpoint, reader: FragmentReader) -> bool:
        """Put this rank's random generators where they were, if the checkpoint was written by as many ranks.

        Returns:
            Whether it was; otherwise the generators are left as they are and the log says so.
        """
        written_by = found.manifest.layout.world_size
        if written_by != self._control.world_size:
            get_logger().info(
                "checkpoint: written by %d ranks, resumed by %d: random generators start afresh",
                written_by,
                self._control.world_size,
            )
            return False
        restore_rng(reader.rank_tensors(self._control.rank))
        return True

    def _on_rank_0(self, action: Callable[[], Json]) -> Json:
        """Rank 0's result of ``action`` on every rank; the others wait, and fail if it fails."""
        return run_together(self._control, lambda: (None, action() if self._control.rank == 0 else None))[1][0]

    def remove_unfinished(self) -> None:
        """Remove what a killed save or deletion has left, which may fill the disk; rank 0 does, as far as it can."""
        if self._control.rank == 0:
            self._best_effort(lambda: publication.remove_unfinished(self._fs, self._directory))

    def _create_staging(self, staging: str, num_bytes: int) -> None:
        self.remove_unfinished()
        publication.create_staging(self._fs, self._directory, staging)
        free = self._free_bytes()
        if free is not None and free < num_bytes:
            # Or it would be found out by filling the disk, for minutes, with metrics and logs on it too.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _write(self, staging: str, share: RankShare, header: Header) -> tuple[None, Json]:
        directory = self._directory / staging
        wait_for_directory(self._fs, directory, timeout_s=self._visibility_timeout_s)
        entries = write_rank_files(self._fs, directory, share, rank=self._control.rank, parameters=header.parameters)
        return None, {"entries": [entry.model_dump() for entry in entries], "kinds": list(share.kinds)}

    def _publish(self, staging: str, step: int, header: Header, train_state: TrainState, shares: list[Json]) -> None:
        raw = encode_manifest(
            step=step,
            header=header,
            train_state=train_state,
            kinds=[kind for kind in FRAGMENT_KINDS if all(kind in share["kinds"] for share in shares)],
            files=[FileEntry.model_validate(entry) for share in shares for entry in share["entries"]],
        )
        FragmentIndex(parse_manifest(raw, step=step)).check_tiling()
        publication.publish(self._fs, self._directory, staging, step, raw)

    def _abandon(self, staging: str, step: int, num_bytes: int, failed: StageFailed) -> Exception:
        """Clean up after a failed save and return what to raise on this rank."""

        def clean() -> Json:
            self._best_effort(lambda: remove_tree(self._fs, self._directory / staging))
            return self._free_bytes()

        free = self._on_rank_0(clean)
        space = f"; needed {format_bytes(num_bytes)}, available {'unknown' if free is None else format_bytes(free)}"
        return failed.to_error(f"{self._directory}: checkpoint of step {step} not saved", space=space)

    def _free_bytes(self) -> int | None:
        try:
            return self._fs.free_bytes(self._directory)
        except OSError:
            return None

    def _best_effort(self, action: Callable[[], None]) -> None:
        """For what the next save can make good: a failure is logged, never raised."""
        try:
            action()
        except OSError as error:
            get_logger().warning("checkpoint: could not tidy up %s: %s", self._directory, describe_os_error(error))

    def _list(self) -> list[CheckpointInfo]:
        try:
            return list_checkpoints(self._on_rank_0(lambda: list_names(self._fs, self._directory)))
        except StageFailed as failed:
            raise failed.to_error(f"{self._directory}: checkpoints cannot be listed") from failed

    def _verify(self, checkpoint: CheckpointInfo) -> VerifyResult:
        """Each rank checks its share; the result is the same on all ranks.

        Raises:
            StorageError: on every rank, when any rank could not read its share.
        """
        started_at = time.monotonic()
        own = verify(
            self._fs,
            self._directory,
            checkpoint,
            rank=self._control.rank,
            world_size=self._control.world_size,
            timeout_s=self._visibility_timeout_s if self._control.rank else 0.0,
        )
        digest = own.manifest.self_xxh3_128 if own.manifest else ""
        replies = self._control.gather_json(
            {"reason": own.reason, "newer": own.newer, "unreadable": own.unreadable, "digest": digest}
        )
        for rank, reply in enumerate(replies):
            if reply["unreadable"]:
                raise StorageError(
                    f"{self._directory / checkpoint.name}: rank {rank} cannot read it ({reply['reason']}); it may be "
                    "intact, so nothing is changed: make it readable and run the same line again"
                )
        reason: str | None = next((reply["reason"] for reply in replies if reply["reason"]), None)
        if reason is None and len({reply["digest"] for reply in replies}) > 1:
            reason = "the ranks see different manifests"
        self._counts[checkpoint.name] = False
        if reason is None and own.manifest is not None:
            self._counts[checkpoint.name] = own.manifest.train_state.consecutive_skips == 0
            size, duration_s = format_bytes(own.manifest.num_bytes), time.monotonic() - started_at
            get_logger().info("checkpoint: %s verified, %s in %.1f s", checkpoint.name, size, duration_s)
        return VerifyResult(reason, own.manifest, newer=any(reply["newer"] for reply in replies))

    def _clean_up(self, step: int) -> None:
        """After a publication: hints, leftovers, retention. Nothing here can fail the save."""
        if self._control.rank == 0:
            self._best_effort(lambda: publication.write_latest_hint(self._fs, self._directory, step))
            self._best_effort(lambda: publication.remove_leftovers(self._fs, self._directory))
        try:
            best = self._find_best(step) if self._best else None
            stale = [name for name in self._stale_checkpoints(step) if best is None or name != best.name]
        except StorageError as error:
            get_logger().warning("%s", error)
            return
        if self._control.rank == 0:
            best_step = None if best is None else best.step
            self._best_effort(lambda: publication.write_best_hint(self._fs, self._directory, best_step))
            self._best_effort(lambda: publication.delete(self._fs, self._directory, stale))

    def _find_best(self, step: int) -> CheckpointInfo | None:
        """The checkpoint up to ``step`` with the lowest value of ``checkpoint.best``, of those that count."""
        known = [checkpoint for checkpoint in self._list() if checkpoint.published and checkpoint.step <= step]

        def rank_them() -> Json:
            rated = ranked(self._fs, self._directory, known, self._best, self._ratings)
            return [each.checkpoint.step for each in rated]

        steps: list[int] = self._on_rank_0(rank_them)
        by_step = {checkpoint.step: checkpoint for checkpoint in known}
        return next((by_step[step] for step in steps if self._is_counted(by_step[step])), None)

    def _stale_checkpoints(self, step: int) -> list[str]:
        """Published checkpoints that are no longer among the ``keep`` newest that count, up to ``step``.

        Those of an earlier process are verified once before they count, so that a damaged one never pushes out
        an intact one; one that does not count goes when it has become old. Steps after ``step`` (left by a run
        that went further before it had to fall back) are neither counted nor deleted.
        """
        older = [checkpoint for checkpoint in self._list() if checkpoint.published and checkpoint.step < step]
        num_kept = int(self._counts[step_name(step)])
        stale = []
        for position, checkpoint in enumerate(older):
            if num_kept == self._keep:
                stale += [checkpoint.name for checkpoint in older[position:]]
                break
            if num_kept + len(older) - position <= self._keep:
                break
            num_kept += self._is_counted(checkpoint)
        return stale

    def _is_counted(self, checkpoint: CheckpointInfo) -> bool:
        if checkpoint.name not in self._counts:
            self._verify(checkpoint)
        return self._counts[checkpoint.name]


def _collect(fragments: Iterable[Fragment], rank_tensors: Mapping[str, torch.Tensor]) -> tuple[RankShare, Json]:
    share = RankShare.collect(fragments, rank_tensors)
    return share, share.num_bytes
