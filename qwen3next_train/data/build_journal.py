"""How far a tokenisation has come: written beside the unfinished stores, read by the one that goes on after a kill."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from qwen3next_train.data.left_out import LeftOuts
from qwen3next_train.data.sealed_json import read_sealed, write_sealed
from qwen3next_train.data.store_writer import WrittenSoFar

JOURNAL_NAME = "journal.json"
_MAX_BYTES = 1 << 18


@dataclass(frozen=True)
class Place:
    """A position between two documents of a source.

    Args:
        file: index of the file.
        documents: documents of that file before the position.
        left_out: documents left out before that file, by reason; once the tokenisation has finished, all.
    """

    file: int
    documents: int
    left_out: LeftOuts


@dataclass(frozen=True)
class Journal:
    """State of an unfinished tokenisation.

    Args:
        place: up to where the source is in the stores.
        elapsed_s: seconds spent so far.
        finished: the stores are complete.
        stores: what is written of each part.
        num_bytes: UTF-8 bytes of each part, None where some documents came as token ids.
    """

    place: Place
    elapsed_s: float
    finished: bool
    stores: tuple[WrittenSoFar, ...]
    num_bytes: tuple[int | None, ...]

    def write(self, path: Path) -> None:
        """Replace the journal.

        Raises:
            OSError: when that fails.
        """
        write_sealed(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> Journal | None:
        """Read back what :meth:`write` wrote; None when there is no intact journal.

        Raises:
            StorageError: it cannot be read now.
        """
        value = read_sealed(path, max_bytes=_MAX_BYTES)
        try:
            return None if value is None else _JOURNAL.validate_python(value)
        except ValidationError:  # of another version
            return None


_JOURNAL = TypeAdapter(Journal)
