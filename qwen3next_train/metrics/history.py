"""``metrics.jsonl`` at the start of an attempt: what an earlier one logged, cut to where the run goes on."""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Literal

from qwen3next_train.errors import DataError
from qwen3next_train.files import NO_HARD_LINKS, sync_directory
from qwen3next_train.log import get_logger

Row = Mapping[str, Any]
Verdict = Literal["kept", "later", "damaged"]

FILE_MODE = 0o640
MAX_ROW_BYTES = 4 << 20
"""No row is as long as this."""

_NUM_SHOWN = 3
_MEND = "resume the run, which leaves damaged lines out, or remove the line"


def last_step(path: Path) -> int:
    """The last step of which ``metrics.jsonl`` has a row, 0 for none.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as source:
            return max((row["step"] for line in _lines(source) if (row := _row_of(line))), default=0)
    except FileNotFoundError:
        return 0


def read_rows(path: Path) -> list[Row]:
    """All rows of ``metrics.jsonl``, for who reads a run and changes nothing.

    A last line without an end is left out: it is being written, or a killed attempt has not finished it.

    Returns:
        Rows of ascending steps; every value is a number, or None for what was not finite.

    Raises:
        DataError: names the first line that is damaged.
        OSError: it cannot be read.
    """
    rows: list[Row] = []
    last = 0
    with os.fdopen(open_file(path, os.O_RDONLY), "rb") as source:
        for number, line in enumerate(_lines(source), start=1):
            if not line.endswith(b"\n") and len(line) < MAX_ROW_BYTES:
                break
            row = _row_of(line)
            if not row or any(type(value) not in (int, float, type(None)) for value in row.values()):
                raise DataError(f"{path}: line {number} is damaged (got {ascii(line[:40])[2:-1]}); {_MEND}")
            if row["step"] <= last:
                raise DataError(f"{path}: line {number} is of step {row['step']}, after one of step {last}; {_MEND}")
            last = row["step"]
            rows.append(row)
    return rows


def cut_rows(
    path: Path,
    resume_step: int,
    due: Sequence[range] = (),
    on_kept: Callable[[Row], None] | None = None,
) -> None:
    """Keep the usable rows up to ``resume_step``, in order and once each; replaces the file atomically.

    Rows that are due and lost are said by their steps. When lines among those to keep are damaged, the old file is
    kept aside.

    Args:
        path: the file; nothing happens when there is none and nothing is due.
        resume_step: step of the checkpoint the run goes on from, 0 for a new run.
        due: the steps that must have been logged, up to ``resume_step``.
        on_kept: called with every row that is kept, in order.

    Raises:
        OSError: it cannot be read or replaced.
    """
    last_due = max((steps[-1] for steps in due), default=resume_step)
    path.with_name(_staged_name(path)).unlink(missing_ok=True)
    steps: list[int] = []
    try:
        with os.fdopen(open_file(path, os.O_RDONLY), "rb") as source:
            counts = {"kept": 0, "later": 0, "damaged": 0}
            size = 0
            for verdict, line, row in _judged(source, resume_step, last_due):
                counts[verdict] += 1
                if verdict == "kept":
                    size += len(line)
                    steps.append(row["step"])
                    if on_kept is not None:
                        on_kept(row)
            if size < os.fstat(source.fileno()).st_size:
                source.seek(0)
                kept = (line for verdict, line, _ in _judged(source, resume_step, last_due) if verdict == "kept")
                aside = replace_file(path, kept, keep_old=counts["damaged"] > 0)
                if aside is not None:
                    text = "%s: damaged lines: %d, left out; the old file is kept as %s"
                    get_logger().warning(text, path, counts["damaged"], aside.name)
                if counts["later"]:
                    get_logger().info("%s: rows after step %d removed", path, resume_step)
    except FileNotFoundError:
        pass
    _say_missing(path, steps, due, resume_step)


def open_file(path: Path, flags: int) -> int:
    """Open a regular file; following no link and waiting for nobody.

    Raises:
        OSError: it cannot be opened, or is something else.
    """
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, FILE_MODE)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def replace_file(path: Path, lines: Iterable[bytes], *, keep_old: bool) -> Path | None:
    """Give a file new content by one rename.

    Args:
        path: the file.
        lines: the content.
        keep_old: leave the old file beside it, under a name with a number.

    Returns:
        Where the old file is kept, if it is.

    Raises:
        OSError: it cannot be written; what was written of it is removed then.
    """
    staged = path.with_name(_staged_name(path))
    staged.unlink(missing_ok=True)
    with _removed_on_failure(staged):
        with os.fdopen(open_file(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as target:
            target.writelines(lines)
            target.flush()
            os.fsync(target.fileno())
        aside = _second_name(path, "damaged") if keep_old else None
        staged.rename(path)
    sync_directory(path.parent)
    return aside


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[None]:
    """Remove a file that could not be finished: on a full disk it would take the last of the space."""
    try:
        yield
    except BaseException:
        with suppress(OSError):
            path.unlink(missing_ok=True)
        raise


def content(descriptor: int, size: int) -> Iterator[bytes]:
    """The first ``size`` bytes of an open file, in pieces, wherever its position is."""
    done = 0
    while done < size and (piece := os.pread(descriptor, min(MAX_ROW_BYTES, size - done), done)):
        yield piece
        done += len(piece)


def _staged_name(path: Path) -> str:
    return f".{path.name}.tmp"


def keep_aside(path: Path, step: int) -> Path | None:
    """Keep the file as it is under another name when it has rows after ``step``; None when it has none.

    Raises:
        OSError: it cannot be read or kept.
    """
    return _second_name(path, "aside") if last_step(path) > step else None


def _second_name(path: Path, why: str) -> Path:
    """A second name for the old file, the first that is free."""
    number = 1
    while True:
        aside = path.with_name(f"{path.name}.{why}-{number}")
        try:
            os.link(path, aside)
        except FileExistsError:
            number += 1
        except OSError as error:
            if error.errno not in NO_HARD_LINKS:
                raise
            with _removed_on_failure(aside):
                shutil.copyfile(path, aside)
            return aside
        else:
            return aside


def _lines(source: BinaryIO) -> Iterator[bytes]:
    # No row is as long as this; a line without an end must not fill the memory.
    return iter(lambda: source.readline(MAX_ROW_BYTES), b"")


def _judged(source: BinaryIO, resume_step: int, last_due: int) -> Iterator[tuple[Verdict, bytes, Row]]:
    """Every line, its verdict and its row; ``later`` is what a dead attempt wrote after the checkpoint, torn or not."""
    last = 0
    for line in _lines(source):
        row = _row_of(line)
        step = row.get("step", 0)
        if last < step <= resume_step:
            last = step
            yield "kept", line, row
        elif last >= last_due or step > resume_step:
            yield "later", line, row
        else:
            yield "damaged", line, row


def _row_of(line: bytes) -> Row:
    """A row with a usable step, empty for a line that is torn or damaged."""
    if not line.endswith(b"\n"):
        return {}
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    step = row.get("step") if isinstance(row, dict) else None
    return row if type(step) is int and 0 < step < 2**63 else {}


def _say_missing(path: Path, steps: Sequence[int], due: Sequence[range], resume_step: int) -> None:
    present = set(steps)
    num_missing = 0
    gaps: list[tuple[int, int]] = []
    in_gap = False
    for step in chain(*due):
        if step in present:
            in_gap = False
            continue
        first = gaps.pop()[0] if in_gap else step
        gaps.append((first, step))
        in_gap = True
        num_missing += 1
    if not gaps:
        return
    texts = [str(first) if first == last else f"{first} to {last}" for first, last in gaps[:_NUM_SHOWN]]
    more = f" and {len(gaps) - _NUM_SHOWN} more gaps" if len(gaps) > _NUM_SHOWN else ""
    get_logger().warning(
        "%s: rows lost: %d (steps %s%s); the run goes on from step %d without them",
        path,
        num_missing,
        ", ".join(texts),
        more,
        resume_step,
    )
