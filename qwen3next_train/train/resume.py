"""What a start may change: ``--resume.accept`` and ``--resume.from``, and the settings that differ.

They stand on the command line only. They belong to a start, not to the run: in a file they would let changes pass at
every later start too, and nobody would notice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3next_train.config.bounds import path_argument
from qwen3next_train.config.describe import Change, compare_configs, keys
from qwen3next_train.config.error_lines import meant, raise_errors, show, show_name, show_stored
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, DataError

ACCEPT, FROM = "--resume.accept", "--resume.from"

SOURCES = "data.sources"
_TOKENIZER = "data.tokenizer"
_SAME_TOKENS = frozenset((SOURCES, _TOKENIZER, "data.eos_token"))
"""Settings that say nothing of a run but where its tokens come from: the same tokens, the same run."""
_OTHER_TOKENS = _SAME_TOKENS | {"data.validation_fraction"}
"""Settings by which a source becomes another one."""


@dataclass(frozen=True)
class Resume:
    """How an attempt goes on.

    Args:
        accept: keys that may have another value than the checkpoint's.
        start: the checkpoint of ``run.dir`` to go back to, or one of another run that a new run goes on from; None for
            the newest of ``run.dir``.
    """

    accept: tuple[str, ...] = ()
    start: int | Path | None = None

    def settings(self) -> dict[str, Any]:
        """For the comparison between ranks, by option."""
        start = str(self.start) if isinstance(self.start, Path) else self.start
        return {ACCEPT: sorted(self.accept), FROM: start}


NEWEST = Resume()
"""Go on from the newest checkpoint, with the configuration it was written under."""


def parse_resume(accept: Sequence[str], start: str | None) -> Resume:
    """The options as a command line gives them.

    Args:
        accept: values of ``--resume.accept``: keys, with commas between.
        start: value of ``--resume.from``.

    Raises:
        ConfigError: one line per key that does not exist, or a path that cannot be one.
    """
    names = [name.strip() for text in accept for name in text.split(",")]
    raise_errors([f"{ACCEPT}: {_no_key(name)}" for name in names if name not in keys()])
    accepted = tuple(dict.fromkeys(names))
    if start is None:
        return Resume(accepted)
    if start.isascii() and start.isdigit() and len(start) <= 8:
        return Resume(accepted, int(start))
    if not start.strip():
        raise ConfigError(f"{FROM}: empty (got {show(start)}); give the step of a checkpoint of run.dir, or a path")
    return Resume(accepted, Path(path_argument(start, FROM)))


def _no_key(name: str) -> str:
    if not name:
        return "a key is empty (got ''); give keys with commas between, such as optimizer.lr,run.steps"
    return f"unknown key (got {show(name)}); {meant(name, keys())} --help all lists every key"


@dataclass(frozen=True)
class DataChange:
    """What the opened sources say of a change of data.

    Args:
        same_stream: the samples that follow are those the checkpoint's configuration gives.
        all_known: every source is one the run has had before.
        some_known: some source is, so its tokens are still those of the same tokenizer.
        old: digest of the training data of the checkpoint.
        new: digest of the training data now.
    """

    same_stream: bool
    all_known: bool
    some_known: bool
    old: str
    new: str


def accepted_changes(
    recorded: Mapping[str, Any],
    config: Config,
    resume: Resume,
    data: DataChange | None,
    *,
    step: int,
    place: Path,
) -> list[Change]:
    """What this start changes of the run's curve, all of it accepted; in the schema's order.

    Args:
        recorded: the configuration of the checkpoint, or of the attempt before where there is none.
        config: the resolved configuration asked for.
        resume: what may differ.
        data: None without a checkpoint.
        step: of the checkpoint, 0 without one.
        place: the run directory or checkpoint to name.

    Raises:
        ConfigError: one line per setting that may not differ.
        DataError: the text of a source is another under the same settings.
    """
    changes = compare_configs(recorded, config, step=step)
    same_stream = data is not None and data.same_stream
    decisive = [change for change in changes.trajectory if not (same_stream and change.key in _SAME_TOKENS)]
    lines = [_refused(change, place, "the checkpoint's tensors are of that shape") for change in changes.shape]
    accepted = []
    for change in decisive:
        if change.key == _TOKENIZER and data is not None and not data.some_known:
            lines.append(_refused(change, place, "the weights know the tokens of that tokenizer only"))
        elif change.key in resume.accept:
            accepted.append(change)
        else:
            lines.append(
                f"{change.key}: was {show_stored(change.old)}, now {show_stored(change.new)}: {place} belongs to "
                f"another configuration; go on with the change by {ACCEPT} {change.key}, or choose another run.dir"
            )
    raise_errors(lines)
    if data is not None and not data.all_known and not any(change.key in _OTHER_TOKENS for change in accepted):
        if SOURCES not in resume.accept:
            raise DataError(
                f"run.dir: {place}: the training data is not what the run started with; restore it, go on with what it "
                f"is now by {ACCEPT} {SOURCES}, or choose another run.dir"
            )
        accepted.append(Change(SOURCES, data.old, data.new))
    return accepted


def _refused(change: Change, place: Path, reason: str) -> str:
    return (
        f"{change.key}: was {show_stored(change.old)}, now {show_stored(change.new)}: {place} belongs to another "
        f"configuration, and this cannot change: {reason}; give {show_name(change.key)} its old value, or choose "
        "another run.dir"
    )
