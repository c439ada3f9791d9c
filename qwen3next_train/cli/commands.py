"""The subcommands: what each takes and whom it calls. Heavy imports happen only when one runs."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from qwen3next_train.cli.arguments import Option, Words
from qwen3next_train.config.faults import show, show_name
from qwen3next_train.config.load import LoadedConfig, load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.config.strict_yaml import plain_value
from qwen3next_train.errors import ConfigError

DEFAULT_GPU = "h100"
"""What ``plan`` assumes when no GPU is named."""

COMMON_OPTIONS = (
    Option("--config", "FILE", "YAML file, or the name of a shipped one; repeatable, later files win"),
    Option("--print-config", "", "print the resolved configuration as YAML and exit"),
    Option("--help", "", "print this text and exit"),
    Option("--version", "", "print the version and exit"),
)


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        name: the word on the command line.
        summary: one line.
        run: does it; returns the exit code.
        usage: what stands after the name in the usage line.
        options: its own options.
        max_words: how many positional words it takes.
    """

    name: str
    summary: str
    run: Callable[[Words], int]
    usage: str
    options: tuple[Option, ...] = ()
    max_words: int = 0


def load(words: Words) -> LoadedConfig:
    """The configuration a command line asks for."""
    files = [find_config(name) for name in words.options.get("--config", [])]
    return load_config(files, words.overrides)


def world_size(words: Words) -> int:
    """Processes the run will have: those asked for, or those a launcher started."""
    given = words.last("--nproc-per-node")
    if given is None:
        return int(os.environ.get("WORLD_SIZE", "1"))
    count = plain_value(given)
    if type(count) is not int or count < 1:
        raise ConfigError(f"--nproc-per-node: not a whole number > 0 (got {show(given)}); give the number of processes")
    if "WORLD_SIZE" in os.environ:
        raise ConfigError("--nproc-per-node: already started by a launcher; leave the option out, or torchrun")
    return count


def _train(words: Words) -> int:
    if not words.options.get("--config") and not any(name == "model.preset" for name, _ in words.overrides):
        raise ConfigError("--config: missing; name a YAML file, such as the shipped qwen3next_tiny.yaml (see --help)")
    loaded = load(words)
    if "--dry-run" in words.options:
        return _dry_run(loaded.config, world_size(words))
    loaded.check_world(world_size(words))
    if "--nproc-per-node" in words.options:
        from qwen3next_train.cli.launch import start_processes

        start_processes(world_size(words))
    from qwen3next_train.train.run import run_training

    return run_training(loaded.config)


def _dry_run(config: Config, num_processes: int) -> int:
    from qwen3next_train.planner.report import NO_GPU, plan_command

    gpu = NO_GPU if config.run.device == "cpu" else DEFAULT_GPU
    gpus = max(num_processes, config.parallel.expert_parallel_size)
    plan_command(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None, as_json=False)
    from qwen3next_train.train.dry_run import dry_run

    return dry_run(config)


def _plan(words: Words) -> int:
    gpus = _number(words, "--gpus", whole=True)
    mfu = _number(words, "--mfu", at_most=1.0)
    tokens = _number(words, "--tokens")
    config = load(words).config
    from qwen3next_train.planner.report import plan_command

    gpu = words.last("--gpu") or DEFAULT_GPU
    num_gpus = config.parallel.expert_parallel_size if gpus is None else int(gpus)
    return plan_command(config, gpus=num_gpus, gpu=gpu, mfu=mfu, tokens=tokens, as_json="--json" in words.options)


def _tokenize(words: Words) -> int:
    output = words.last("--output")
    if output == "":
        raise ConfigError("--output: not a file name (got ''); give the prefix of the .bin and .idx files")
    config = load(words).config
    from qwen3next_train.data.prepare import tokenize

    return tokenize(config, None if output is None else Path(output))


def _checkpoint(words: Words) -> int:
    if not words.positional or words.positional[0] not in ("list", "verify"):
        got = show(words.positional[0]) if words.positional else "nothing"
        raise ConfigError(f"checkpoint: which action? (got {got}); give list or verify")
    action: Literal["list", "verify"] = "list" if words.positional[0] == "list" else "verify"
    folders = words.positional[1:]
    run_dir = Path(folders[0]) if folders else Path(load(words).config.run.dir)
    from qwen3next_train.checkpoint.inspection import checkpoint_command

    return checkpoint_command(action, run_dir)


def _number(words: Words, name: str, *, whole: bool = False, at_most: float = math.inf) -> float | None:
    """A positive number given to an option, or None when it is absent."""
    text = words.last(name)
    if text is None:
        return None
    value = plain_value(text)
    wanted = "whole number > 0" if whole else "number > 0" + (f" and <= {at_most:g}" if at_most < math.inf else "")
    is_number = type(value) is int or (type(value) is float and not whole)
    # The comparison also refuses a value that is not a number at all (.nan).
    if not is_number or not 0 < float(value or 0) <= at_most or math.isinf(float(value or 0)):
        raise ConfigError(f"{show_name(name)}: not a {wanted} (got {show(text)}); give a {wanted}")
    return float(value or 0)


TRAIN = Command(
    "train",
    "train, or go on from the newest complete checkpoint of run.dir (the default)",
    _train,
    "--config FILE [--section.key VALUE ...]",
    (
        Option("--dry-run", "", "build everything without allocating it, print plan and first batch, and exit"),
        Option("--nproc-per-node", "N", "start N processes on this machine through torchrun"),
    ),
)
COMMANDS = {
    command.name: command
    for command in (
        TRAIN,
        Command(
            "plan",
            "parameters, FLOPs, memory, time and checkpoint size; needs no GPU",
            _plan,
            "--config FILE [--gpus N] [--gpu NAME] [--mfu X] [--tokens N] [--json]",
            (
                Option(
                    "--gpus",
                    "N",
                    "number of GPUs (default: parallel.expert_parallel_size, the fewest that can train it)",
                ),
                Option("--gpu", "NAME", f"kind of GPU (default {DEFAULT_GPU})"),
                Option("--mfu", "X", "model FLOPs utilisation to assume, between 0 and 1"),
                Option("--tokens", "N", "tokens to train on (default: those of run.steps)"),
                Option("--json", "", "print JSON"),
            ),
        ),
        Command(
            "tokenize",
            "tokenise data.sources into Megatron-LM's .bin/.idx files",
            _tokenize,
            "--config FILE [--data.sources NAME] [--output PREFIX]",
            (Option("--output", "PREFIX", "write PREFIX.bin and PREFIX.idx (default: the cache)"),),
        ),
        Command(
            "checkpoint",
            "list or verify the checkpoints of a run",
            _checkpoint,
            "list|verify [RUN_DIR] [--config FILE]",
            max_words=2,
        ),
    )
}
OPTIONS = {
    option.name: option
    for option in (*COMMON_OPTIONS, *(option for command in COMMANDS.values() for option in command.options))
}
