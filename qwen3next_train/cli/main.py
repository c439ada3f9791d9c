"""Entry point: runs a command line, returns its exit code. Nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qwen3next_train import __version__
from qwen3next_train.cli.arguments import Arguments, parse_arguments
from qwen3next_train.cli.commands import COMMANDS, OPTIONS, TRAIN, Command, load
from qwen3next_train.cli.help_text import help_text
from qwen3next_train.config.describe import to_yaml
from qwen3next_train.config.error_lines import nearest, show
from qwen3next_train.errors import ConfigError, ExitCode, StorageError, TrainError
from qwen3next_train.log import get_logger

_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line.

    Args:
        argv: arguments after the program's name; None takes ``sys.argv``.

    Returns:
        The exit code (``errors.ExitCode``, or 130 after Ctrl-C outside of training).
    """
    try:
        code = _run(sys.argv[1:] if argv is None else list(argv))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of our output left (`... | head`): nothing to report, and nobody to report it to.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FINISHED
    except TrainError as error:
        _report(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except Exception:  # noqa: BLE001 - the boundary: a bug keeps its traceback and gets its exit code
        get_logger().exception("internal failure; please report it with the lines below")
        return ExitCode.INTERNAL
    return code


def _run(argv: list[str]) -> int:
    # Help and version answer even when the rest of the line is wrong.
    if "--version" in argv:
        return _print(f"qwen3next-train {__version__}\n")
    if "--help" in argv or "-h" in argv:
        return _print(help_text(argv))
    args = parse_arguments(argv, OPTIONS)
    command = _take_command(args)
    if "--print-config" in args.options:
        return _print(to_yaml(load(args).config))
    return command.run(args)


def _take_command(args: Arguments) -> Command:
    """The subcommand; its name is taken out of ``args.positional``.

    Raises:
        ConfigError: on an unexpected argument, or an option or configuration key of another subcommand.
    """
    command = TRAIN
    if args.positional and args.positional[0] in COMMANDS:
        command = COMMANDS[args.positional.pop(0)]
    if len(args.positional) > command.max_positional:
        extra = args.positional[command.max_positional]
        hint = f"did you mean {nearest(extra, COMMANDS)}?"
        if extra.endswith((".yaml", ".yml")):
            hint = "name a configuration with --config"
        raise ConfigError(
            f"qwen3next-train: unexpected argument {show(extra)}; {hint} --help lists subcommands and sections"
        )
    own = {option.name for option in command.all_options}
    for name in args.options:
        if name not in own:
            owners = [each.name for each in COMMANDS.values() if name in {option.name for option in each.all_options}]
            raise ConfigError(f"{name}: not an option of {command.name}; it belongs to {', '.join(owners)}")
    command.check_keys(args)
    return command


def _print(text: str) -> int:
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        raise StorageError(f"standard output: cannot be written ({error.strerror}); free some space") from error
    return ExitCode.FINISHED


def _report(error: TrainError) -> None:
    """Print a foreseen failure; of a wrong configuration, which all ranks see alike, one line per node is enough."""
    rank, local_rank = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "")
    if isinstance(error, ConfigError) and rank != "0" and local_rank != "0":
        return
    prefix = "" if rank == "0" else f"[rank {rank}] "
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in str(error).splitlines()))
