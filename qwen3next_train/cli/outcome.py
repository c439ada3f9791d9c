"""Runs a command line and turns whatever happens into a line and an exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from qwen3next_train.cli.streams import failure_of, prepare_streams
from qwen3next_train.errors import ConfigError, ExitCode, OutOfMemory, StorageError, TrainError
from qwen3next_train.exhaustion import is_out_of_memory, memory_limit_hint
from qwen3next_train.launcher import speaks_for_node
from qwen3next_train.log import get_logger, rank_prefix

_INTERRUPTED = 130  # what a shell reports for a process that Ctrl-C ended


def run_command_line(argv: Sequence[str] | None) -> int:
    """Run one command line, see :func:`qwen3next_train.cli.main.main`."""
    prepare_streams()
    try:
        from qwen3next_train.cli.program import run_program

        code, output = run_program(sys.argv[1:] if argv is None else list(argv))
        if output and (failure := failure_of(sys.stdout)) and not isinstance(failure, BrokenPipeError):
            raise StorageError(f"standard output: cannot be written ({failure.strerror}); free some space")
    except TrainError as error:
        return _report(error)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return _INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the boundary: a bug keeps its traceback and gets its exit code
        if (known := _foreseen(error)) is not None:
            return _report(known)
        get_logger().exception("internal failure; please report it with the lines below")
        return ExitCode.INTERNAL
    return code


def _foreseen(error: Exception) -> TrainError | None:
    """What is known of an exception, where need be without the modules that there is no memory for."""
    try:
        from qwen3next_train.train.failures import foreseen

        return foreseen(error)
    except Exception:
        if is_out_of_memory(error):
            return OutOfMemory(
                f"out of memory: the program cannot be loaded; {memory_limit_hint()}close other programs"
            )
        raise


def _report(error: TrainError) -> int:
    """Print a foreseen failure; of a wrong configuration, which all ranks see alike, one line per node is enough."""
    if isinstance(error, ConfigError) and not speaks_for_node(os.environ):
        return error.exit_code
    prefix = rank_prefix()
    sys.stderr.write("".join(f"{prefix}{line}\n" for line in str(error).splitlines()))
    return error.exit_code
