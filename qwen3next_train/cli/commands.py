"""The subcommands: what each takes and calls. Heavy imports happen only when one runs."""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import Literal, get_args

from qwen3next_train.cli.arguments import Arguments, Option
from qwen3next_train.cli.command import COMMON_OPTIONS, Command
from qwen3next_train.cli.option_values import (
    choice_of,
    finished_model,
    folder_of,
    number_of,
    path_of,
    require_one_of,
    require_one_process,
    text_of,
)
from qwen3next_train.cli.processes import LAUNCH_OPTIONS, processes_to_start, world_size
from qwen3next_train.config.bounds import MAX_TOP_K, TEMPERATURES, path_argument, text_argument
from qwen3next_train.config.error_lines import show
from qwen3next_train.config.load import LoadedConfig, load_config
from qwen3next_train.config.presets import find_config
from qwen3next_train.config.schema import Config
from qwen3next_train.config.validate import fewest_processes
from qwen3next_train.errors import ConfigError
from qwen3next_train.launcher import MAX_PROCESSES
from qwen3next_train.train.resume import parse_resume
from qwen3next_train.train.start import require_start

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

DEFAULT_NEW_TOKENS = 128
"""Of ``generate``."""

MAX_NEW_TOKENS = 1 << 24
"""As many as there are positions."""

JSON = Option("--json", "", "print JSON")
"""Shared by the subcommands whose output other programs read."""
CHECKPOINT = Option("--checkpoint", "DIR", "checkpoint, or a run directory: its newest intact one; RUN/best: its best")
HF = Option("--hf", "DIR", "Hugging Face folder: config.json and safetensors files")
DEVICE = Option("--device", "NAME", "auto, cpu or cuda (default auto: CUDA when present)")
TOKENIZER = Option("--tokenizer", "PATH", "tokenizer.json, a folder with one, or builtin:python-4k (default: its own)")
"""Shared by the subcommands that read finished weights."""


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
        require_start(resume, loaded.config)
        return _dry_run(loaded.config, world_size(args))
    num_processes = world_size(args)

    def check_world() -> None:
        loaded.check_world(num_processes)
        require_start(resume, loaded.config)

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
    gpus = number_of(args, "--gpus", whole=True, limits=(1, MAX_PROCESSES))
    mfu = number_of(args, "--mfu", at_most=1.0, limits=(1e-6, 1.0))
    tokens = number_of(args, "--tokens", limits=(1, 1e30))
    config = load(args).config
    from qwen3next_train.planner.report import plan_command

    gpu = args.last("--gpu")
    num_gpus = fewest_processes(config.parallel) if gpus is None else int(gpus)
    return plan_command(
        config,
        gpus=num_gpus,
        gpu=DEFAULT_GPU if gpu is None else gpu,
        mfu=mfu,
        tokens=tokens,
        as_json="--json" in args.options,
    )


def _tokenize(args: Arguments) -> int:
    output = args.last("--output")
    # Of the text: a path would lose a slash at its end, and what is meant to be in the folder would lie beside it.
    if output is not None and (os.path.basename(output) in ("", ".", "..") or re.fullmatch("~[^/]*", output)):
        raise ConfigError(f"--output: not a file name (got {show(output)}); give the prefix of the .bin and .idx files")
    config = load(args).config
    from qwen3next_train.data.tokenize_command import tokenize

    return tokenize(config, None if output is None else Path(path_argument(output, "--output")))


def _train_tokenizer(args: Arguments) -> int:
    require_one_process("train-tokenizer", args)
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


def _slurm_script(args: Arguments) -> int:
    nodes = number_of(args, "--nodes", whole=True, limits=(1, MAX_PROCESSES))
    gpus = number_of(args, "--gpus-per-node", whole=True, limits=(1, MAX_PROCESSES))
    loaded = load(args)
    # What sbatch is given may still change a layout that is not written here.
    if nodes is not None and gpus is not None and (args.overrides or "--config" in args.options):
        loaded.check_world(int(nodes * gpus))
    from qwen3next_train.cli.slurm_script import slurm_script, train_arguments

    output = path_of(args, "--output")
    return slurm_script(
        nodes=None if nodes is None else int(nodes),
        gpus_per_node=None if gpus is None else int(gpus),
        time=args.last("--time"),
        arguments=train_arguments(args),
        output=None if output is None else Path(output),
    )


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
    require_one_process("eval", args)
    checkpoint, hf = finished_model("eval", args)
    data = path_argument(text_of(args, "--data", "the file, token store or dataset to evaluate on"), "--data")
    device = choice_of(args, "--device", DEVICES) or "auto"
    precision = choice_of(args, "--precision", PRECISIONS)
    loaded = load(args)
    from qwen3next_train.train.evaluate import evaluate_command

    return evaluate_command(
        checkpoint=checkpoint,
        hf=hf,
        data=data,
        as_json="--json" in args.options,
        device=device,
        precision=precision,
        sequence_length=loaded.config.data.sequence_length if "data.sequence_length" in loaded.origins else None,
        tokenizer=path_of(args, "--tokenizer"),
        text_field=text_of(args, "--text-field", "a column or JSON field")
        if "--text-field" in args.options
        else "text",
    )


def _generate(args: Arguments) -> int:
    require_one_process("generate", args)
    checkpoint, hf = finished_model("generate", args)
    prompts, prompts_file = args.options.get("--prompt", []), path_of(args, "--prompts")
    require_one_of("generate", "prompts", {"--prompt": bool(prompts), "--prompts": prompts_file is not None})
    temperature = number_of(args, "--temperature", or_zero=True, limits=TEMPERATURES)
    top_p = number_of(args, "--top-p", at_most=1.0)
    top_k = number_of(args, "--top-k", whole=True, limits=(1, MAX_TOP_K))
    max_new_tokens = number_of(args, "--max-new-tokens", whole=True, limits=(1, MAX_NEW_TOKENS))
    draws = [name for name in ("--top-p", "--top-k") if name in args.options]
    if temperature == 0 and draws:
        raise ConfigError(
            f"--temperature: 0 takes the likeliest token, which leaves {draws[0]} nothing to choose from; leave one of "
            "the two out"
        )
    device = choice_of(args, "--device", DEVICES) or "auto"
    precision = choice_of(args, "--precision", PRECISIONS)
    seed = load(args).config.run.seed
    for prompt in prompts:
        text_argument(prompt, "--prompt")
    from qwen3next_train.generate.sampling import Sampling
    from qwen3next_train.train.generate import generate_command

    return generate_command(
        checkpoint=checkpoint,
        hf=hf,
        prompts=prompts,
        prompts_file=None if prompts_file is None else Path(prompts_file),
        sampling=Sampling(
            max_new_tokens=DEFAULT_NEW_TOKENS if max_new_tokens is None else int(max_new_tokens),
            temperature=float(bool(draws)) if temperature is None else temperature,
            top_p=top_p or 1.0,
            top_k=int(top_k or 0),
            seed=seed,
        ),
        as_json="--json" in args.options,
        device=device,
        precision=precision,
        tokenizer=path_of(args, "--tokenizer"),
    )


def _import_hf(args: Arguments) -> int:
    require_one_process("import-hf", args)
    source, output = folder_of(args, "--hf"), folder_of(args, "--output")
    loaded = load(args)
    from qwen3next_train.huggingface.import_folder import import_hf

    if "model.mtp_num_layers" not in loaded.origins:
        return import_hf(source, output)
    from qwen3next_train.model.init import initial_value

    # For MTP depths that are asked for and that the folder does not hold.
    draw = partial(initial_value, seed=loaded.config.run.seed)
    return import_hf(source, output, mtp_num_layers=loaded.config.model.mtp_num_layers, initial_value=draw)


def _export_hf(args: Arguments) -> int:
    require_one_process("export-hf", args)
    checkpoint, output = folder_of(args, "--checkpoint"), folder_of(args, "--output")
    dtype = choice_of(args, "--dtype", PRECISIONS) or "bf16"
    max_shard_bytes = number_of(args, "--max-shard-bytes", whole=True)
    from qwen3next_train.huggingface.export_folder import MAX_SHARD_BYTES, export_hf

    return export_hf(
        checkpoint,
        output,
        dtype=dtype,
        max_shard_bytes=MAX_SHARD_BYTES if max_shard_bytes is None else int(max_shard_bytes),
        tokenizer=path_of(args, "--tokenizer"),
    )


def _plot(args: Arguments) -> int:
    require_one_process("plot", args)
    if not args.positional:
        raise ConfigError("plot: which run? (got nothing); give the run.dir of a run, or several")
    if "--text" in args.options and "--html" in args.options:
        raise ConfigError("plot: --text and --html are two kinds of output; give one of the two")
    axis = choice_of(args, "--axis", AXES) or "steps"
    rate = choice_of(args, "--rate", RATES) or "tokens"
    smoothing = number_of(args, "--smooth", at_most=0.999) or 0.0
    from qwen3next_train.plots.command import plot_command

    output = path_of(args, "--output")
    return plot_command(
        [Path(path_argument(name, "RUN")) for name in args.positional],
        kind="text" if "--text" in args.options else "html" if "--html" in args.options else "pictures",
        axis=axis,
        rate=rate,
        smoothing=smoothing,
        output=None if output is None else Path(output),
    )


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
                HF,
                Option(
                    "--data",
                    "FILE",
                    "text, token store, or jsonl with text or input_ids, a document a line; or what data.sources takes",
                ),
                JSON,
                DEVICE,
                Option("--precision", "NAME", "bf16 or fp32 (default: bf16 on CUDA, fp32 on CPU)"),
                TOKENIZER,
                Option("--text-field", "NAME", "JSON field or column that holds the text (default text)"),
            ),
            keys=("data.sequence_length",),
        ),
        Command(
            "generate",
            "continue prompts with a checkpoint or a Hugging Face folder",
            _generate,
            "(--checkpoint DIR | --hf DIR) (--prompt TEXT ... | --prompts FILE) [--temperature T]",
            (
                CHECKPOINT,
                HF,
                Option("--prompt", "TEXT", "to go on from; repeatable; token ids where the model has no tokenizer"),
                Option("--prompts", "FILE", 'a prompt a line; in a .jsonl {"prompt": TEXT} a line'),
                Option("--max-new-tokens", "N", f"at most so many (default {DEFAULT_NEW_TOKENS})"),
                Option(
                    "--temperature",
                    "T",
                    "draw tokens, from logits divided by T; 0: take the likeliest (default 0, with --top-p or --top-k "
                    "1)",
                ),
                Option("--top-p", "P", "draw from the fewest tokens that have probability P together, at most 1"),
                Option("--top-k", "K", "draw from the K likeliest tokens"),
                JSON,
                DEVICE,
                Option("--precision", "NAME", "bf16 or fp32 (default: as it was trained, or as the folder says)"),
                TOKENIZER,
            ),
            keys=("run.seed",),
            details="It prints each prompt with what it goes on with. The end-of-document token ends it.",
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
            details="RUN_DIR/best is its best one (checkpoint.best) alone.",
        ),
        Command(
            "slurm-script",
            "print a batch file for Slurm that trains and requeues itself",
            _slurm_script,
            "[--nodes N] [--gpus-per-node N] [--time T] [--output FILE] [--config FILE]",
            (
                Option("--nodes", "N", "nodes to ask for"),
                Option("--gpus-per-node", "N", "GPUs of each, one process a GPU"),
                Option("--time", "T", "time limit as Slurm writes it, such as 12:00:00; the job goes on after it"),
                Option("--output", "FILE", "file to create (default: standard output)"),
            ),
            details="A configuration and keys given here become arguments of every start; sbatch FILE takes more.",
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
