"""Says which files are both trained and validated on: a loss on them says nothing of text that is new to the model."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from qwen3next_train.config.error_lines import show_name
from qwen3next_train.data.sources import FileSource, StoreSource
from qwen3next_train.data.token_store import store_paths
from qwen3next_train.log import get_logger


def warn_of_seen_text(
    train: Sequence[FileSource | StoreSource], held_out: Mapping[str, Sequence[FileSource | StoreSource]]
) -> None:
    """Warn of each held-out source that has files of the training sources, links to them included.

    Not rejected, for such a loss may be what is wanted: it tells what was learned by heart.

    Args:
        train: the training sources.
        held_out: the others, by the setting that names them.
    """
    if not any(held_out.values()):
        return
    trained = {identity for source in train for identity, _ in _files_of(source)}
    for setting, sources in held_out.items():
        for source in sources:
            files = list(_files_of(source))
            seen = [path for identity, path in files if identity in trained]
            if seen:
                get_logger().warning(
                    "%s: %s: training reads %d of its %d files, too, such as %s: the loss is that of text the model "
                    "has seen",
                    setting,
                    source.label,
                    len(seen),
                    len(files),
                    show_name(str(seen[0])),
                )


def _files_of(source: FileSource | StoreSource) -> Iterator[tuple[tuple[int, int], Path]]:
    """Device and inode of each file, whatever path it is named by, and the path."""
    paths = [file.path for file in source.files] if isinstance(source, FileSource) else store_paths(source.prefix)[:1]
    for path in paths:
        # What cannot be read is said where it is read.
        with suppress(OSError):
            status = os.stat(path)
            yield (status.st_dev, status.st_ino), path
