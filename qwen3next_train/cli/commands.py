"""The subcommands: what each takes and calls. Heavy imports happen only when one runs."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, TypeVar, get_args

from qwen3next_train.cli.arguments import Arguments, Option
from qwen3next_train.cli.option_values import folder_of
from qwen3next_train.cli.processes import LAUNCH_OPTIONS, processes_to_start, world_size
from qwen3next_train.config.bounds import path_argument
from qwen3next_train.config.error_lines import raise_errors, show, show_name
from qwen3next_train.config.load import LoadedConfig, load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.config.settings import from_command_line
from qwen3next_train.config.strict_yaml import plain_value
from qwen3next_train.config.validate import fewest_processes
from qwen3next_train.errors import ConfigError
from qwen3next_train.launcher import MAX_PROCESSES
from qwen3next_train.train.resume import parse_resume

ChoiceT = TypeVar("ChoiceT", bound=str)
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["bf16", "fp32"]
Axis = Literal["steps", "tokens"]
Rate = Literal["tokens", "flops"]
AXES: tuple[Axis, ...] = get_args(Axis)
RATES: tuple[Rate, ...] = get_args(Rate)
DEVICES: tuple[Device, ...] = get_args(Device)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

DEFAULT_GPU = "h100"
"""What ``plan`` assumes when no GPU is named."""

MAX_PLOTTED_RUNS = 100
"""In one picture; more lines than that are none that anyone tells apart."""

JSON = Option("--json", "", "print JSON")
"""Shared by the subcommands whose output other programs read."""
CHECKPOINT = Option("--checkpoint", "DIR", "checkpoint, or a run directory: its newest intact one")
TOKENIZER = Option("--tokenizer", "PATH", "tokenizer.json, a folder with one, or builtin:python-4k (default: its own)")
"""Shared by the subcommands that read finished weights."""

CONFIG_OPTIONS = (
    Option("--config", "FILE", "YAML file, or the name of a shipped one; repeatable, later files win"),
    Option("--print-config", "", "print the resolved configuration as YAML and exit"),
)
COMMON_OPTIONS = (
    *CONFIG_OPTIONS,
    Option("--help", "", "print this text and exit; --help SECTION prints the keys of a section"),
    Option("--version", "", "print the version and exit"),
)


@dataclass(frozen=True)
class Command:
    """One subcommand.

    Args:
        name: as on the command line.
        summary: one line of the program's help, no longer than fits beside the name.
        run: does it; returns the exit code.
        usage: what stands after the name in the usage line.
        options: its own options.
        max_positional: how many positional arguments it takes.
        keys: the configuration keys it reads; None for all of them, and for configuration files. What works on
            finished weights takes the rest from the weights.
        details: further sentences for its own help.
    """

    name: str
    summary: str
    run: Callable[[Arguments], int]
    usage: str
    options: tuple[Option, ...] = ()
    max_positional: int = 0
    keys: tuple[str, ...] | None = None
    details: str = ""

    @property
    def all_options(self) -> tuple[Option, ...]:
        """The options it shares with other subcommands, then its own."""
        shared = (option for option in COMMON_OPTIONS if self.keys is None or option not in CONFIG_OPTIONS)
        return (*shared, *self.options)

    def check_keys(self, args: Arguments) -> None:
        """Reject a configuration key that would have no effect.

        Raises:
            ConfigError: names the key and those that have one.
        """
        if self.keys is None:
            return
        given = from_command_line(args.overrides, 1)
        raise_errors(given.errors)
        for setting in given.settings:
            if setting.key not in self.keys:
                reads = f"of the configuration it reads {', '.join(self.keys)}" if self.keys else "it reads none"
                raise ConfigError(
                    f"{setting.origin.label(setting.key)}: not read by {self.name}; leave it out, {reads}"
                )


def load(args: Arguments) -> LoadedConfig:
    """The configuration a command line asks for."""
    files = [find_config(name) for name in args.options.get("--config", [])]
    return load_config(files, args.overrides)


def _train(args: Arguments) -> int:
    if not args.options.get("--config") and not any(name == "model.preset" for name, _ in args.overrides):
        raise ConfigError("--config: missing; name a YAML file, such as the shipped qwen3next_tiny.yaml (see --help)")
    resume = parse_resume(args.options.get("--resume.accept", []), args.last("--resume.from"))
    loaded = load(args)
    if "--dry-run" in args.options:
        return _dry_run(loaded.config, world_size(args))
    check_world = partial(loaded.check_world, world_size(args))
    if (processes := processes_to_start(args)) is not None:
        from qwen3next_train.cli.launch import run_processes

        return run_processes(processes, Path(loaded.config.run.dir), check_world)
    # Threads that spin for milliseconds while they wait make a run on shared cores up to ten times slower; read when
    # OpenMP loads.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    from qwen3next_train.train.run import run_training

    return run_training(loaded.config, check_world, resume)


def _dry_run(config: Config, num_processes: int) -> int:
    from qwen3next_train.planner.report import NO_GPU, plan_command

    gpu = NO_GPU if config.run.device == "cpu" else DEFAULT_GPU
    gpus = max(num_processes, fewest_processes(config.parallel))
    plan_command(config, gpus=gpus, gpu=gpu, mfu=None, tokens=None, as_json=False)
    from qwen3next_train.train.dry_run import dry_run

    return dry_run(config)


def _plan(args: Arguments) -> int:
    gpus = _number(args, "--gpus", whole=True, limits=(1, MAX_PROCESSES))
    mfu = _number(args, "--mfu", at_most=1.0, limits=(1e-6, 1.0))
    tokens = _number(args, "--tokens", limits=(1, 1e30))
    config = load(args).config
    from qwen3next_train.planner.report import plan_command

    gpu = args.last("--gpu") or DEFAULT_GPU
    num_gpus = fewest_processes(config.parallel) if gpus is None else int(gpus)
    return plan_command(config, gpus=num_gpus, gpu=gpu, mfu=mfu, tokens=tokens, as_json="--json" in args.options)


def _tokenize(args: Arguments) -> int:
    output = args.last("--output")
    # Of the text: a path would lose a slash at its end, and what is meant to be in the folder would lie beside it.
    if output is not None and (os.path.basename(output) in ("", ".", "..") or re.fullmatch("~[^/]*", output)):
        raise ConfigError(f"--output: not a file name (got {show(output)}); give the prefix of the .bin and .idx files")
    config = load(args).config
    from qwen3next_train.data.tokenize_command import tokenize

    return tokenize(config, None if output is None else Path(path_argument(output, "--output")))


def _train_tokenizer(args: Arguments) -> int:
    sources = args.last("--sources")
    if sources is not None and any(name == "data.sources" for name, _ in args.overrides):
        raise ConfigError("train-tokenizer: --sources and --data.sources say the same thing; give one of the two")
    loaded = load(Arguments(args.options, args.overrides + ([] if sources is None else [("data.sources", sources)])))
    # Their defaults belong to a model and a text of ours.
    for key, name, meaning in (
        ("data.sources", "--sources", "the text to train on"),
        ("model.vocab_size", "--vocab-size", "the number of tokens, such as 32768"),
    ):
        if key not in loaded.origins:
            raise ConfigError(f"{name}: missing; give {meaning}")
    output = folder_of(args, "--output")
    from qwen3next_train.huggingface.tokenizer_folder import train_tokenizer

    return train_tokenizer(loaded.config, output)


def _checkpoint(args: Arguments) -> int:
    if not args.positional or args.positional[0] not in ("list", "verify"):
        got = show(args.positional[0]) if args.positional else "nothing"
        raise ConfigError(f"checkpoint: which action? (got {got}); give list or verify")
    action: Literal["list", "verify"] = "list" if args.positional[0] == "list" else "verify"
    folders = args.positional[1:]
    run_dir = Path(path_argument(folders[0], "RUN_DIR") if folders else load(args).config.run.dir)
    from qwen3next_train.checkpoint.inspection import checkpoint_command

    return checkpoint_command(action, run_dir)


def _doctor(args: Arguments) -> int:
    config = load(args).config
    from qwen3next_train.selftest.doctor import doctor_command

    return doctor_command(config, as_json="--json" in args.options)


def _eval(args: Arguments) -> int:
    _require_one_process("eval", args)
    checkpoint, hf = args.last("--checkpoint"), args.last("--hf")
    if (checkpoint is None) == (hf is None):
        got = "neither" if hf is None else "both"
        raise ConfigError(f"eval: which model? (got {got} of --checkpoint and --hf); give one of the two")
    data = path_argument(_text(args, "--data", "the file, token store or dataset to evaluate on"), "--data")
    device = _choice(args, "--device", DEVICES) or "auto"
    precision = _choice(args, "--precision", PRECISIONS)
    loaded = load(args)
    from qwen3next_train.train.evaluate import evaluate_command

    return evaluate_command(
        checkpoint=None if checkpoint is None else _folder(args, "--checkpoint"),
        hf=None if hf is None else _folder(args, "--hf"),
        data=data,
        as_json="--json" in args.options,
        device=device,
        precision=precision,
        sequence_length=loaded.config.data.sequence_length if "data.sequence_length" in loaded.origins else None,
        tokenizer=_path(args, "--tokenizer"),
        text_field=args.last("--text-field") or "text",
    )


def _import_hf(args: Arguments) -> int:
    _require_one_process("import-hf", args)
    source, output = _folder(args, "--hf"), _folder(args, "--output")
    loaded = load(args)
    from qwen3next_train.huggingface.import_folder import import_hf

    if "model.mtp_num_layers" not in loaded.origins:
        return import_hf(source, output)
    from qwen3next_train.model.init import initial_value

    # For MTP depths that are asked for and that the folder does not hold.
    draw = partial(initial_value, seed=loaded.config.run.seed)
    return import_hf(source, output, mtp_num_layers=loaded.config.model.mtp_num_layers, initial_value=draw)


def _export_hf(args: Arguments) -> int:
    _require_one_process("export-hf", args)
    checkpoint, output = _folder(args, "--checkpoint"), _folder(args, "--output")
    dtype = _choice(args, "--dtype", PRECISIONS) or "bf16"
    max_shard_bytes = _number(args, "--max-shard-bytes", whole=True)
    from qwen3next_train.huggingface.export_folder import MAX_SHARD_BYTES, export_hf

    return export_hf(
        checkpoint,
        output,
        dtype=dtype,
        max_shard_bytes=MAX_SHARD_BYTES if max_shard_bytes is None else int(max_shard_bytes),
        tokenizer=_path(args, "--tokenizer"),
    )


def _plot(args: Arguments) -> int:
    _require_one_process("plot", args)
    if not args.positional:
        raise ConfigError("plot: which run? (got nothing); give the run.dir of a run, or several")
    if "--text" in args.options and "--html" in args.options:
        raise ConfigError("plot: --text and --html are two kinds of output; give one of the two")
    axis = _choice(args, "--axis", AXES) or "steps"
    rate = _choice(args, "--rate", RATES) or "tokens"
    smoothing = _number(args, "--smooth", at_most=0.999) or 0.0
    from qwen3next_train.plots.command import plot_command

    output = _path(args, "--output")
    return plot_command(
        [Path(path_argument(name, "RUN")) for name in args.positional],
        kind="text" if "--text" in args.options else "html" if "--html" in args.options else "pictures",
        axis=axis,
        rate=rate,
        smoothing=smoothing,
        output=None if output is None else Path(output),
    )


def _require_one_process(command: str, args: Arguments) -> None:
    count = world_size(args)
    if count > 1:
        raise ConfigError(f"{command}: started as {count} processes (WORLD_SIZE); it is one, start it without torchrun")


def _text(args: Arguments, name: str, meaning: str) -> str:
    """The value of an option that must be there."""
    text = args.last(name)
    if not text:
        raise ConfigError(f"{name}: {'missing' if text is None else 'empty'}; give {meaning}")
    return text


def _folder(args: Arguments, name: str) -> Path:
    return Path(path_argument(_text(args, name, "a folder"), name))


def _path(args: Arguments, name: str) -> str | None:
    """A file or name given to an option, or None when it is absent."""
    text = args.last(name)
    return None if text is None else path_argument(text, name)


def _choice(args: Arguments, name: str, choices: Sequence[ChoiceT]) -> ChoiceT | None:
    """One of the choices, or None when the option is absent."""
    text = args.last(name)
    chosen = next((choice for choice in choices if choice == text), None)
    if chosen is None and text is not None:
        raise ConfigError(f"{name}: not one of the choices (got {show(text)}); give one of {', '.join(choices)}")
    return chosen


def _number(
    args: Arguments,
    name: str,
    *,
    whole: bool = False,
    at_most: float = math.inf,
    limits: tuple[float, float] = (0, math.inf),
) -> float | None:
    """A positive number given to an option, or None when it is absent; beyond ``limits`` results make no sense."""
    text = args.last(name)
    if text is None:
        return None
    value = plain_value(text)
    wanted = "whole number > 0" if whole else "number > 0" + (f" and <= {at_most:g}" if at_most < math.inf else "")
    is_number = type(value) is int or (type(value) is float and not whole)
    # The comparison also rejects a value that is not a number at all (.nan).
    if not is_number or not 0 < float(value or 0) <= at_most or math.isinf(float(value or 0)):
        raise ConfigError(f"{show_name(name)}: not a {wanted} (got {show(text)}); give a {wanted}")
    least, most = limits
    if not least <= float(value or 0) <= most:
        raise ConfigError(f"{show_name(name)}: {text} is not between {least:g} and {most:g}; give another number")
    return float(value or 0)


TRAIN = Command(
    "train",
    "train, or go on from the newest checkpoint (the default)",
    _train,
    "--config FILE [--section.key VALUE ...]",
    (
        Option("--dry-run", "", "build everything without allocating it, print plan and first batch, and exit"),
        Option("--resume.accept", "KEY,KEY", "go on although these keys have other values than the checkpoint's"),
        Option(
            "--resume.from",
            "STEP|PATH",
            "go back to an older checkpoint of run.dir, or start a run from another one's with optimizer and step",
        ),
        *LAUNCH_OPTIONS,
    ),
    details="The newest complete checkpoint of run.dir counts; without one the run starts at step 0.",
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
                    "number of GPUs (default: the fewest that can train it, by expert and context parallelism)",
                ),
                Option("--gpu", "NAME", f"kind of GPU (default {DEFAULT_GPU})"),
                Option("--mfu", "X", "model FLOPs utilisation to assume (default: measured rates), between 0 and 1"),
                Option("--tokens", "N", "tokens to train on (default: those of run.steps)"),
                JSON,
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
            "train-tokenizer",
            "train a byte-level BPE tokenizer on text",
            _train_tokenizer,
            "--sources NAME --vocab-size N --output DIR",
            (
                Option("--sources", "NAME", "the text, as data.sources names it; weights are not read"),
                Option("--output", "DIR", "folder to create, for data.tokenizer"),
            ),
            details="--vocab-size is model.vocab_size: a configuration file may give it, and the sources.",
        ),
        Command(
            "eval",
            "loss and bits per byte of a checkpoint or a Hugging Face folder",
            _eval,
            "(--checkpoint DIR | --hf DIR) --data FILE [--json]",
            (
                CHECKPOINT,
                Option("--hf", "DIR", "Hugging Face folder: config.json and safetensors files"),
                Option(
                    "--data",
                    "FILE",
                    "text, token store, or jsonl with text or input_ids, a document a line; or what data.sources takes",
                ),
                JSON,
                Option("--device", "NAME", "auto, cpu or cuda (default auto: CUDA when present)"),
                Option("--precision", "NAME", "bf16 or fp32 (default: bf16 on CUDA, fp32 on CPU)"),
                TOKENIZER,
                Option("--text-field", "NAME", "JSON field or column that holds the text (default text)"),
            ),
            keys=("data.sequence_length",),
        ),
        Command(
            "import-hf",
            "turn a Hugging Face folder into a checkpoint",
            _import_hf,
            "--hf DIR --output DIR [--mtp-num-layers N]",
            (
                Option("--hf", "DIR", "folder with config.json and safetensors files, mtp.* included"),
                Option("--output", "DIR", "folder to create"),
            ),
            keys=("model.mtp_num_layers", "run.seed"),
            details="checkpoint.init_from and eval take what it writes.",
        ),
        Command(
            "export-hf",
            "turn a checkpoint into a Hugging Face folder",
            _export_hf,
            "--checkpoint DIR --output DIR [--dtype bf16|fp32]",
            (
                CHECKPOINT,
                Option("--output", "DIR", "folder to create"),
                Option("--dtype", "NAME", "of the weights: bf16 or fp32 (default bf16)"),
                Option("--max-shard-bytes", "N", "largest file (default 5000000000)"),
                TOKENIZER,
            ),
            keys=(),
            details="transformers and vLLM load what it writes.",
        ),
        Command(
            "plot",
            "curves of one or several runs as PNG and SVG, or as text",
            _plot,
            "RUN [RUN ...] [--text | --html] [--axis steps|tokens] [--smooth W] [--output PREFIX]",
            (
                Option("--text", "", "draw on the terminal; needs no library"),
                Option("--html", "", "write a report as one file, with attempts, versions and configuration"),
                Option("--axis", "NAME", "to the right: steps or tokens (default steps)"),
                Option("--rate", "NAME", "speed in tokens (a second) or flops (default tokens)"),
                Option("--smooth", "W", "weight of earlier values in a moving average, at most 0.999 (default none)"),
                Option(
                    "--output",
                    "PREFIX",
                    "write PREFIX.png and .svg, or .html (default: curves or report in RUN)",
                ),
            ),
            max_positional=MAX_PLOTTED_RUNS,
            keys=(),
            details="RUN is a run directory or its metrics.jsonl. A dashed line is a resume.",
        ),
        Command(
            "checkpoint",
            "list or verify the checkpoints of a run",
            _checkpoint,
            "list|verify [RUN_DIR] [--config FILE]",
            max_positional=2,
        ),
        Command(
            "doctor",
            "check this machine: versions, devices, kernels, collectives",
            _doctor,
            "[--config FILE] [--json]",
            (JSON,),
            details="One line a check; packing, cache and wandb are checked too.",
        ),
    )
}
OPTIONS = {
    option.name: option
    for option in (*COMMON_OPTIONS, *(option for command in COMMANDS.values() for option in command.options))
}
