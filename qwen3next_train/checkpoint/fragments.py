"""A sharded checkpoint: fragments of logical tensors, written by every rank for itself, resharded when they are read.

A rank's file holds, for each fragment it owns, one flat fp32 tensor a kind under the key ``<parameter>/<offset of its
first element>/<kind>``, and the rank's own small tensors under ``rank/<name>``. A large share is spread over several
files, written side by side: filesystems let one write at a time into a file. Which file holds what stands in the
manifest, so finding the owners of a range costs no file access, however many ranks wrote the checkpoint.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, Filesystem, is_unreadable
from qwen3next_train.checkpoint.manifest import FileEntry, Manifest
from qwen3next_train.checkpoint.tensor_file import (
    FileRecord,
    StoredTensor,
    open_tensor_file,
    tensor_file_bytes,
    write_tensor_file,
)
from qwen3next_train.checkpoint.threads import by_threads, num_threads
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment, FragmentKind
from qwen3next_train.errors import CheckpointError, DivergedError, StorageError
from qwen3next_train.exhaustion import system_reason
from qwen3next_train.parameters import ParamSpec

MAX_OPEN_FILES = 128
_RANK_PREFIX = "rank/"
_MIN_FINITE_BYTES = 16 << 20
"""Worth a thread that looks whether they are finite: some milliseconds."""
S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class RankShare:
    """What one rank puts into a checkpoint, ready to be written.

    Args:
        fragments: the rank's fragments, none empty.
        own_tensors: what only this rank needs again.
        kinds: kinds of state present, the same for every fragment.
    """

    fragments: Sequence[Fragment]
    own_tensors: Sequence[StoredTensor]
    kinds: tuple[FragmentKind, ...]

    @classmethod
    def collect(cls, fragments: Iterable[Fragment], rank_tensors: Mapping[str, torch.Tensor]) -> RankShare:
        """List what is to be written, without copying any of it.

        Args:
            fragments: this rank's fragments; imported weights without moments have ``master`` alone. Other
                dtypes than fp32 are converted piece by piece while they are written.
            rank_tensors: this rank's own tensors, any shape and dtype.

        Raises:
            DivergedError: an element is NaN or infinite.
        """
        kept = [fragment for fragment in fragments if fragment.numel]
        kinds = tuple(kind for kind in FRAGMENT_KINDS if all(kind in fragment.tensors for fragment in kept))
        checked = [(fragment, kind) for fragment in kept for kind in kinds]
        for fragment, kind in checked:
            assert set(fragment.tensors) == set(kinds), f"{fragment.name}: fragments of different kinds"
            assert fragment.tensors[kind].shape == (fragment.numel,), f"{fragment.name}: {kind} is not flat"
        tensors = [fragment.tensors[kind] for fragment, kind in checked]
        threads = num_threads(sum(tensor.nbytes for tensor in tensors))
        finite = by_threads(_on_this_stream(is_finite, tensors), tensors, threads)
        for (fragment, kind), fine in zip(checked, finite, strict=True):
            if not fine:
                raise DivergedError(
                    f"{fragment.name}: {kind} is not finite in elements [{fragment.runs.start}, {fragment.runs.stop})"
                )
        own = [StoredTensor(_RANK_PREFIX + name, tensor, tensor.dtype) for name, tensor in rank_tensors.items()]
        return cls(kept, own, kinds)

    @property
    def tensors(self) -> list[StoredTensor]:
        """Everything that the rank stores."""
        stored = [
            StoredTensor(_key(fragment.name, fragment.runs.start, kind), fragment.tensors[kind], torch.float32)
            for fragment in self.fragments
            for kind in self.kinds
        ]
        return stored + list(self.own_tensors)

    @property
    def num_bytes(self) -> int:
        """Size of the files it makes."""
        return sum(tensor_file_bytes(part.tensors) for part in self.split())

    def split(self) -> list[RankShare]:
        """What goes into each file: whole fragments, spread evenly, the rank's own tensors in the first."""
        sizes = [fragment.numel for fragment in self.fragments]
        num_bytes = sum(sizes) * len(self.kinds) * torch.float32.itemsize
        num_parts = min(num_threads(num_bytes), max(1, len(sizes)))
        totals = [0] * num_parts
        parts: list[list[int]] = [[] for _ in totals]
        # The largest first, each to where there is least.
        for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
            least = totals.index(min(totals))
            totals[least] += sizes[index]
            parts[least].append(index)
        return [
            replace(
                self,
                fragments=[self.fragments[index] for index in sorted(part)],
                own_tensors=self.own_tensors if number == 0 else (),
            )
            for number, part in enumerate(parts)
        ]


def rank_file_name(rank: int, part: int) -> str:
    """Name of one of a rank's files."""
    return f"rank_{rank:05d}{f'_{part}' if part else ''}.safetensors"


def write_rank_files(
    fs: Filesystem, directory: Path, share: RankShare, *, rank: int, parameters: Sequence[ParamSpec]
) -> list[FileEntry]:
    """Write a rank's files and return their manifest entries.

    Raises:
        OSError: a file cannot be written; what was written stays for the caller to remove.
    """
    parts = share.split()
    index = {spec.name: position for position, spec in enumerate(parameters)}

    def write(part: int) -> FileEntry:
        record = write_tensor_file(fs, directory / rank_file_name(rank, part), parts[part].tensors)
        return _entry(record, rank, parts[part].fragments, index)

    tensors = [stored.tensor for stored in share.tensors]
    return list(by_threads(_on_this_stream(write, tensors), range(len(parts)), len(parts)))


def _on_this_stream(function: Callable[[T], S], tensors: Sequence[torch.Tensor]) -> Callable[[T], S]:
    """``function`` for other threads, on a GPU behind what computes ``tensors`` in this one."""
    device = next((tensor.device for tensor in tensors if tensor.device.type == "cuda"), None)
    stream = None if device is None else torch.cuda.current_stream(device)

    def on_stream(item: T) -> S:
        with torch.cuda.stream(stream):
            return function(item)

    return on_stream


def _entry(record: FileRecord, rank: int, fragments: Sequence[Fragment], index: Mapping[str, int]) -> FileEntry:
    triples: list[int] = []
    strided: list[int] = []
    for fragment in fragments:
        runs = fragment.runs
        if runs.count == 1:
            triples += (index[fragment.name], runs.start, runs.length)
        else:
            strided += (index[fragment.name], runs.start, runs.length, runs.count, runs.stride)
    return FileEntry(
        name=record.name,
        size=record.size,
        xxh3_128=record.xxh3_128,
        rank=rank,
        fragments=triples,
        strided_fragments=strided,
    )


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite; one pass, no temporary tensor."""
    if tensor.numel() == 0:
        return True
    # NaN propagates through aminmax, so both extremes are finite only when everything is.
    smallest, largest = torch.aminmax(tensor)
    return bool(torch.isfinite(smallest) & torch.isfinite(largest))


def _is_finite_by_threads(tensor: torch.Tensor) -> bool:
    """:func:`is_finite`; several threads also read what is mapped from a file side by side."""
    threads = num_threads(tensor.nbytes, least=_MIN_FINITE_BYTES)
    return all(by_threads(is_finite, tensor.tensor_split(threads), threads))


class FragmentIndex:
    """Which file holds which range of which parameter.

    Args:
        manifest: a checked manifest.
    """

    def __init__(self, manifest: Manifest) -> None:
        self.parameters = {entry.name: entry for entry in manifest.parameters}
        self._position = {entry.name: position for position, entry in enumerate(manifest.parameters)}
        rows = np.concatenate([_rows(number, file) for number, file in enumerate(manifest.files)])
        rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
        self._rows = rows[:, 1:]
        self._bounds = np.searchsorted(rows[:, 0], np.arange(len(manifest.parameters) + 1))

    def rows(self, name: str) -> npt.NDArray[np.int64]:
        """Runs of a parameter's fragments ``[F, 6]``, by offset.

        Each is offset, number of elements, index of the file, and of the tensor there: offset in its key, number of
        elements, and the first of this run.
        """
        position = self._position[name]
        return self._rows[self._bounds[position] : self._bounds[position + 1]]

    def overlapping(self, name: str, start: int, stop: int) -> list[tuple[int, int, int, int, int, int]]:
        """Of :meth:`rows`, those that share an element with ``[start, stop)``."""
        rows = self.rows(name)
        return [tuple(row) for row in rows[(rows[:, 0] < stop) & (rows[:, 0] + rows[:, 1] > start)].tolist()]

    def check_tiling(self) -> None:
        """Make sure that every element of every parameter is stored exactly once.

        Raises:
            RuntimeError: the engine's fragments overlap or leave a hole; such a checkpoint is not published.
        """
        for name, entry in self.parameters.items():
            rows = self.rows(name)
            starts, ends = rows[:, 0], rows[:, 0] + rows[:, 1]
            expected = np.concatenate([[0], ends])
            if not np.array_equal(np.append(starts, entry.numel), expected):
                raise RuntimeError(f"{name}: the ranks' fragments do not tile its {entry.numel} elements exactly once")


class FragmentReader:
    """Reads ranges of logical tensors from a verified checkpoint, whatever layout wrote it.

    Only the bytes asked for are touched: files are memory-mapped, at most :data:`MAX_OPEN_FILES` at a time.

    Args:
        directory: the checkpoint.
        manifest: its checked manifest.
        filesystem: where it lies.
    """

    def __init__(self, directory: Path, manifest: Manifest, *, filesystem: Filesystem = LOCAL_FILESYSTEM) -> None:
        self._directory = directory
        self._manifest = manifest
        self._fs = filesystem
        self._index = FragmentIndex(manifest)
        self._open_files: OrderedDict[int, safe_open] = OrderedDict()

    def check_parameters(self, parameters: Sequence[ParamSpec]) -> None:
        """Make sure that the checkpoint is of a model with exactly these parameters.

        Raises:
            CheckpointError: names a missing, surplus or misshaped parameter, and how many more there are.
        """
        wanted = {spec.name: list(spec.shape) for spec in parameters}
        stored = {name: entry.shape for name, entry in self._index.parameters.items()}
        differences = [f"{name} is missing" for name in wanted if name not in stored]
        differences += [f"{name} is not part of the model" for name in stored if name not in wanted]
        differences += [
            f"{name} has shape {stored[name]}, the model wants {shape}"
            for name, shape in wanted.items()
            if name in stored and stored[name] != shape
        ]
        if differences:
            more = f" (and {len(differences) - 1} more differences)" if len(differences) > 1 else ""
            raise CheckpointError(
                f"{self._directory}: checkpoint of another model: {differences[0]}{more}; "
                "use the model section of the run that wrote it"
            )

    def read(self, name: str, kind: FragmentKind, start: int, stop: int) -> torch.Tensor:
        """fp32 elements ``[start, stop)`` of the flattened logical tensor, on the host, to be read only.

        Moments of a checkpoint that holds weights alone are zero, as Adam starts them.

        Raises:
            CheckpointError: unknown parameter, elements that no file holds, a file that is missing or damaged, or
                elements that are not finite.
            StorageError: a file cannot be read now.
        """
        if name not in self._index.parameters:
            raise CheckpointError(f"{self._directory}: no parameter {name!a} in the checkpoint")
        numel = self._index.parameters[name].numel
        if not 0 <= start <= stop <= numel:
            raise ValueError(f"{name}: range [{start}, {stop}) of {numel} elements")
        if kind not in self._manifest.kinds:
            return torch.zeros(stop - start)
        done = start
        # By tensor of a file, so that each is read once whatever the number of runs: where a range goes, and its place
        # in the tensor.
        wanted: defaultdict[tuple[int, int, int], list[tuple[int, int, int]]] = defaultdict(list)
        for offset, length, file, key, stored, first in self._index.overlapping(name, start, stop):
            if offset > done:
                break
            end = min(offset + length, stop)
            if end > done:
                wanted[file, key, stored].append((done - start, end - start, first + done - offset))
                done = end
        if done < stop:
            raise CheckpointError(f"{self._directory}: {name}: no file holds {kind} from element {done} to {stop}")
        pieces = []
        for (file, key, stored), ranges in wanted.items():
            low = ranges[0][2]
            into, until, at = ranges[-1]
            pieces.append((self._slice(file, _key(name, key, kind), stored, low, at + until - into), ranges))
        result = _joined(pieces, stop - start)
        if not _is_finite_by_threads(result):
            raise CheckpointError(f"{self._directory}: {name}: {kind} is not finite in elements [{start}, {stop})")
        return result

    def rank_tensors(self, rank: int) -> dict[str, torch.Tensor]:
        """Copies of the tensors that a rank of the writing run kept for itself, by name.

        Raises:
            CheckpointError: no such rank, or its file cannot be read.
        """
        handles = [self._open(number) for number, file in enumerate(self._manifest.files) if file.rank == rank]
        if not handles:
            raise CheckpointError(f"{self._directory}: rank {rank} has no file in the checkpoint")
        return {
            key.removeprefix(_RANK_PREFIX): handle.get_tensor(key).clone()
            for handle in handles
            for key in handle.keys()  # noqa: SIM118 - not a dict
            if key.startswith(_RANK_PREFIX)
        }

    def _slice(self, file: int, key: str, length: int, start: int, stop: int) -> torch.Tensor:
        handle = self._open(file)
        try:
            view = handle.get_slice(key)
            if view.get_dtype() != "F32" or view.get_shape() != [length]:
                raise CheckpointError(f"{self._path(file)}: {key} is not fp32 of {length} elements")
            piece: torch.Tensor = view[start:stop]
        except SafetensorError as error:
            raise CheckpointError(f"{self._path(file)}: {key}: {error}") from error
        return piece

    def _open(self, file: int) -> safe_open:
        if file not in self._open_files:
            if len(self._open_files) == MAX_OPEN_FILES:
                self._open_files.popitem(last=False)
            self._open_files[file] = self._open_checked(self._path(file))
        self._open_files.move_to_end(file)
        return self._open_files[file]

    def _open_checked(self, path: Path) -> safe_open:
        try:
            return open_tensor_file(self._fs, path)
        except OSError as error:
            # The library says that there is no such file, without an error number, whatever is in the way.
            if is_unreadable(error):
                raise StorageError(f"{path}: cannot be read ({system_reason(error)})") from error
            raise CheckpointError(f"{path}: {error.strerror}") from error

    def _path(self, file: int) -> Path:
        return self._directory / self._manifest.files[file].name


def _joined(pieces: Sequence[tuple[torch.Tensor, list[tuple[int, int, int]]]], numel: int) -> torch.Tensor:
    """Elements of stored tensors, each with where its ranges go and their place in the tensor that begins with them."""
    if len(pieces) == 1 and len(pieces[0][1]) == 1:
        # The mapped file itself: a copy in memory of its own takes as long as reading it.
        return pieces[0][0]
    result = torch.empty(numel)
    for piece, ranges in pieces:
        low = ranges[0][2]
        for into, until, at in ranges:
            result[into:until] = piece[at - low : at - low + until - into]
    return result


def _rows(number: int, file: FileEntry) -> npt.NDArray[np.int64]:
    """Of one file: parameter, and what :meth:`FragmentIndex.rows` says of each run."""
    parameter, start, numel = np.array(file.fragments, dtype=np.int64).reshape(-1, 3).T
    whole = np.column_stack([parameter, start, numel, np.full_like(start, number), start, numel, np.zeros_like(start)])
    parts = [whole]
    quintuples = np.array(file.strided_fragments, dtype=np.int64).reshape(-1, 5).tolist()
    for of_parameter, first, length, count, stride in quintuples:
        run = np.arange(count)
        constant = (np.full_like(run, value) for value in (number, first, length * count))
        parts.append(
            np.column_stack(
                [
                    np.full_like(run, of_parameter),
                    first + run * stride,
                    np.full_like(run, length),
                    *constant,
                    run * length,
                ]
            )
        )
    return np.concatenate(parts)


def _key(name: str, offset: int, kind: FragmentKind) -> str:
    return f"{name}/{offset}/{kind}"
