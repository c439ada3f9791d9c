"""The ``slurm-script`` subcommand: ``scripts/slurm/train.sbatch`` of this installation, filled in."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, describe_os_error, write_file
from qwen3next_train.cli.arguments import Arguments
from qwen3next_train.config import megatron
from qwen3next_train.config.error_lines import show
from qwen3next_train.config.presets import shipped_file
from qwen3next_train.errors import ConfigError, ExitCode, StorageError

_TIME = re.compile(r"\d+|\d+:\d\d(:\d\d)?|\d+-\d+(:\d\d){0,2}")
"""Minutes, minutes:seconds, hours:minutes:seconds, days-hours and so on (``man sbatch``)."""


def train_arguments(args: Arguments) -> list[str]:
    """The words of a command line that give it files and keys, as they are written."""
    words = [f"--config={name}" for name in args.options.get("--config", [])]
    for name, text in args.overrides:
        argument = megatron.find(f"--{name}")
        words.append(f"--{name}" if argument is not None and argument.is_switch else f"--{name}={text}")
    return words


def slurm_script(
    *,
    nodes: int | None,
    gpus_per_node: int | None,
    time: str | None,
    arguments: Sequence[str],
    output: Path | None,
) -> int:
    """Print or write the batch file.

    Args:
        nodes: nodes to ask for; None leaves the file's own number, as for the two that follow.
        gpus_per_node: GPUs of each.
        time: time limit in one of Slurm's spellings.
        arguments: of every start.
        output: file to create; None: standard output.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: the time is none, ``output`` exists, or the installation lacks the file.
        StorageError: ``output`` cannot be written.
    """
    if time is not None and not _TIME.fullmatch(time):
        raise ConfigError(f"--time: not a time limit of Slurm (got {show(time)}); give one such as 12:00:00 or 2-00")
    text = shipped_file("qwen3next_train.slurm", "scripts/slurm/train.sbatch").read_text(encoding="utf-8")
    for option, value in (("nodes", nodes), ("gpus-per-node", gpus_per_node), ("time", time)):
        if value is not None:
            text = _with_line(text, f"#SBATCH --{option}=", str(value))
    if arguments:
        text = _with_line(text, "TRAIN_ARGUMENTS=", f"({shlex.join(arguments)})")
    if output is None:
        sys.stdout.write(text)
        return ExitCode.FINISHED
    try:
        write_file(LOCAL_FILESYSTEM, output, text.encode())
    except FileExistsError:
        raise ConfigError(f"slurm-script: {output} exists; remove it or choose another output") from None
    except OSError as error:
        with suppress(OSError):
            output.unlink(missing_ok=True)
        raise StorageError(
            f"slurm-script: {output}: cannot be written ({describe_os_error(error)}); choose another output"
        ) from error
    print(f"{output}: submit it with  sbatch {shlex.quote(str(output))}")
    return ExitCode.FINISHED


def _with_line(text: str, start: str, value: str) -> str:
    """The file with another value in the one line that begins so."""
    lines = text.splitlines()
    (index,) = (index for index, line in enumerate(lines) if line.startswith(start))
    lines[index] = start + value
    return "\n".join([*lines, ""])
