"""Rules that span settings. Every message says what, with which values, and what to change."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from functools import partial

from qwen3next_train.config.error_lines import show
from qwen3next_train.config.metric_names import name_problems, validation_problems
from qwen3next_train.config.rule_violation import RuleViolation
from qwen3next_train.config.schema import (
    Config,
    LayerType,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    ProfileConfig,
    SamplesConfig,
    ScheduleConfig,
)
from qwen3next_train.config.validate_layout import (
    bf16_gradient_violations,
    context_fits,
    context_violations,
    tensor_fits,
    tensor_violations,
)
from qwen3next_train.errors import ConfigError
from qwen3next_train.topology import what_divides

MAX_LAYERS = 10_000
MAX_SAMPLES = 64
"""Prompts of ``eval.samples``: what comes of them is one row of a file."""
MAX_BF16_BETA = 0.99
"""Slowest decay of a moment that bf16 can follow: 1 % a step is more than the 0.4 % that rounding may swallow."""

_MAX_COUNT = 2**63 - 1
_MAX_INDEX = 2**31 - 1
_RAMPUP = "schedule.rampup_batch_size"
_STEP_NUMBER = re.compile("[0-9]{1,18}")


def expand_interval(interval: int, num_layers: int) -> list[LayerType]:
    """Layer pattern of an interval N: layer i (from 0) is softmax attention iff (i + 1) % N == 0 (Megatron-LM)."""
    return ["linear_attention" if (index + 1) % interval else "full_attention" for index in range(num_layers)]


def rotary_dim(model: ModelConfig) -> int:
    """Leading dimensions of a head that RoPE rotates."""
    return int(model.partial_rotary_factor * model.head_dim)


def wsd_decay_steps(schedule: ScheduleConfig, run_steps: int) -> int:
    """Length of a wsd schedule's final decay."""
    return schedule.decay_steps or max(run_steps // 10, 1)


def validate(config: Config) -> list[RuleViolation]:
    """All broken rules of a configuration whose ``layer_types`` are resolved, whatever the world size."""
    return [
        *model_violations(config.model),
        *_run_violations(config),
        *_optimizer_violations(config.optimizer),
        *_schedule_violations(config),
        *_data_violations(config),
        *_profile_violations(config),
        *_samples_violations(config.eval.samples),
        *(RuleViolation(*problem) for problem in name_problems(config)),
        *(RuleViolation(*problem) for problem in validation_problems(config)),
    ]


def fewest_processes(parallel: ParallelConfig) -> int:
    """Processes that a layout takes at least."""
    return math.lcm(parallel.expert_parallel_size, parallel.context_parallel_size * parallel.tensor_parallel_size)


def profiled_steps(profile: ProfileConfig) -> range:
    """The steps that ``logging.profile.steps`` names, empty for none.

    Raises:
        ValueError: it names none in the form A-B or A.
    """
    if not profile.steps:
        return range(0)
    first, dash, last = profile.steps.partition("-")
    last = last if dash else first
    if not all(_STEP_NUMBER.fullmatch(number) for number in (first, last)):
        raise ValueError(profile.steps)
    return range(int(first), int(last) + 1)


def _profile_violations(config: Config) -> Iterator[RuleViolation]:
    profile, steps = config.logging.profile, config.run.steps
    key = "logging.profile.steps"
    if "steps" in profile.memory and not profile.steps:
        yield RuleViolation(
            ("logging.profile.memory", key),
            f'logging.profile.memory has "steps" but {key} is empty; name the steps, such as 10-12',
        )
    try:
        named = profiled_steps(profile)
    except ValueError:
        yield RuleViolation((key,), f"{key} is no range of steps (got {show(profile.steps)}); write 10-12, or 10")
        return
    if profile.steps and not (named and named[0] >= 1 and named[-1] <= steps):
        yield RuleViolation(
            (key, "run.steps"),
            f"{key} {profile.steps} is not within the run's steps, 1 to {steps}; choose steps among them",
        )


def _samples_violations(samples: SamplesConfig) -> Iterator[RuleViolation]:
    key = "eval.samples.prompts"
    if len(samples.prompts) > MAX_SAMPLES:
        yield RuleViolation((key,), f"{key} has {len(samples.prompts)} prompts; give at most {MAX_SAMPLES}")
    if "" in samples.prompts:
        yield RuleViolation((key,), f"{key} has an empty prompt, number {samples.prompts.index('') + 1}; give it text")
    draws = [name for name, is_set in (("top_p", samples.top_p < 1), ("top_k", samples.top_k > 0)) if is_set]
    if draws and not samples.temperature:
        yield RuleViolation(
            (f"eval.samples.{draws[0]}", "eval.samples.temperature"),
            f"eval.samples.{draws[0]} has nothing to choose from where eval.samples.temperature 0 takes the likeliest "
            "token; give a temperature above 0",
        )


def world_violations(config: Config, world_size: int) -> list[RuleViolation]:
    """Broken rules of running the configuration on ``world_size`` processes."""
    violations = []
    run, parallel = config.run, config.parallel
    sizes = {
        "expert": parallel.expert_parallel_size,
        "context": parallel.context_parallel_size,
        "tensor": parallel.tensor_parallel_size,
    }
    for name, size in sizes.items():
        if world_size % size:
            violations.append(
                RuleViolation(
                    (f"parallel.{name}_parallel_size",),
                    f"{size} does not divide the world size {world_size}; "
                    f"{what_divides(world_size, size, fits=partial(_fits, config, world_size, name))}",
                )
            )
    ranks_per_row = sizes["context"] * sizes["tensor"]
    shared = [name for name in ("context", "tensor") if sizes[name] > 1]
    product = " x ".join(f"parallel.{name}_parallel_size {sizes[name]}" for name in shared)
    if world_size % ranks_per_row:
        if not violations:
            violations.append(
                RuleViolation(
                    tuple(f"parallel.{name}_parallel_size" for name in shared),
                    f"{product} = {ranks_per_row} does not divide the world size {world_size}; for their product "
                    f"{what_divides(world_size, ranks_per_row, fits=partial(_row_is_shared_by, config))}",
                )
            )
        return violations
    rows = world_size // ranks_per_row * run.micro_batch_size
    with_rows = f"world size {world_size}"
    if shared:
        with_rows += f" / {product}" if len(shared) == 1 else f" / ({product})"
    if run.global_batch_size % rows:
        violations.append(
            RuleViolation(
                ("run.global_batch_size", "run.micro_batch_size"),
                f"run.global_batch_size {run.global_batch_size} is not a multiple of {with_rows} x "
                f"run.micro_batch_size {run.micro_batch_size} = {rows}; choose a multiple of {rows}, "
                "a smaller micro batch or another number of processes",
            )
        )
    elif run.global_batch_size < rows * parallel.micro_batches_in_flight:
        halve = "" if run.micro_batch_size % 2 else "halve run.micro_batch_size, "
        violations.append(
            RuleViolation(
                ("parallel.micro_batches_in_flight", "run.global_batch_size", "run.micro_batch_size"),
                f"{parallel.micro_batches_in_flight} needs as many micro-batches a step on each process, but "
                f"run.global_batch_size {run.global_batch_size} over {with_rows} and run.micro_batch_size "
                f"{run.micro_batch_size} gives 1; {halve}double run.global_batch_size, or set "
                "parallel.micro_batches_in_flight to 1",
            )
        )
    elif any(size % rows for size in config.schedule.rampup_batch_size[:2]):
        violations.append(
            RuleViolation(
                (_RAMPUP,),
                f"{_RAMPUP} {config.schedule.rampup_batch_size} begins with or adds rows that are not a multiple of "
                f"{with_rows} x run.micro_batch_size {run.micro_batch_size} = {rows}; choose multiples, a "
                "smaller micro batch or another number of processes",
            )
        )
    return violations


def _fits(config: Config, world_size: int, name: str, size: int) -> bool:
    """Whether model, rows and world go with ``parallel.<name>_parallel_size`` of ``size``, the others as they are."""
    model, row, parallel = config.model, config.data.sequence_length, config.parallel
    if name == "expert":
        return model.num_experts % size == 0
    sizes = {"context": parallel.context_parallel_size, "tensor": parallel.tensor_parallel_size} | {name: size}
    product = sizes["context"] * sizes["tensor"]
    if world_size % product and world_size % (product // size) == 0:
        return False
    fits_heads = tensor_fits(model, row, sizes["tensor"])
    return fits_heads and context_fits(model, row, sizes["context"], tensor=sizes["tensor"])


def _row_is_shared_by(config: Config, num_ranks: int) -> bool:
    """Whether so many ranks can share a row, by slices, heads or both."""
    model, row = config.model, config.data.sequence_length
    return any(
        tensor_fits(model, row, tensor) and context_fits(model, row, num_ranks // tensor, tensor=tensor)
        for tensor in range(1, num_ranks + 1)
        if num_ranks % tensor == 0
    )


def validate_for_world(config: Config, world_size: int) -> None:
    """Check the rules that need the number of processes.

    Raises:
        ConfigError: one line per broken rule.
    """
    violations = world_violations(config, world_size)
    if violations:
        raise ConfigError("\n".join(f"{violation.keys[0]}: {violation.message}" for violation in violations))


def layer_violations(model: ModelConfig) -> Iterator[RuleViolation]:
    """Broken rules of the layer pattern; checked before a pattern is expanded."""
    if model.num_hidden_layers > MAX_LAYERS:
        yield RuleViolation(
            ("model.num_hidden_layers",),
            f"model.num_hidden_layers {model.num_hidden_layers} is more than {MAX_LAYERS}; choose a smaller number",
        )
    elif model.layer_types and len(model.layer_types) != model.num_hidden_layers:
        yield RuleViolation(
            ("model.layer_types", "model.num_hidden_layers"),
            f"model.layer_types has {len(model.layer_types)} entries for model.num_hidden_layers "
            f"{model.num_hidden_layers}; give one per layer, or model.full_attention_interval instead",
        )


def model_violations(model: ModelConfig) -> Iterator[RuleViolation]:
    """Broken rules inside the model section."""
    yield from layer_violations(model)
    pairs = (
        ("num_attention_heads", "num_key_value_heads"),
        ("linear_num_value_heads", "linear_num_key_heads"),
    )
    values = model.model_dump(include={name for pair in pairs for name in pair})
    for heads, groups in pairs:
        if values[heads] % values[groups]:
            yield RuleViolation(
                (f"model.{heads}", f"model.{groups}"),
                f"model.{heads} {values[heads]} is not a multiple of model.{groups} {values[groups]}; "
                "change one of them",
            )
    rotated = rotary_dim(model)
    if rotated % 2 or rotated == 0:
        yield RuleViolation(
            ("model.partial_rotary_factor", "model.head_dim"),
            f"model.partial_rotary_factor {model.partial_rotary_factor} x model.head_dim {model.head_dim} rotates "
            f"{rotated} dimensions; RoPE rotates pairs, so make it an even number above 0",
        )
    if model.num_experts_per_tok > model.num_experts:
        yield RuleViolation(
            ("model.num_experts_per_tok", "model.num_experts"),
            f"model.num_experts_per_tok {model.num_experts_per_tok} is more than model.num_experts "
            f"{model.num_experts}; send each token to fewer experts",
        )
    if model.shared_expert_gate and not model.shared_expert_intermediate_size:
        yield RuleViolation(
            ("model.shared_expert_gate", "model.shared_expert_intermediate_size"),
            "model.shared_expert_gate true needs a shared expert but model.shared_expert_intermediate_size is 0; "
            "give a width, or set model.shared_expert_gate to false",
        )


def _run_violations(config: Config) -> Iterator[RuleViolation]:
    run, model, parallel = config.run, config.model, config.parallel
    if run.global_batch_size % run.micro_batch_size:
        yield RuleViolation(
            ("run.global_batch_size", "run.micro_batch_size"),
            f"run.global_batch_size {run.global_batch_size} is not a multiple of run.micro_batch_size "
            f"{run.micro_batch_size}; change one of them",
        )
    sequence_length = config.data.sequence_length
    num_tokens = run.steps * run.global_batch_size * sequence_length
    if num_tokens > _MAX_COUNT:
        yield RuleViolation(
            ("run.steps", "run.global_batch_size", "data.sequence_length"),
            f"run.steps {run.steps} x run.global_batch_size {run.global_batch_size} x data.sequence_length "
            f"{sequence_length} is more than the {_MAX_COUNT} tokens that 64 bits count; lower one of them",
        )
    copies = run.micro_batch_size * sequence_length * model.num_experts_per_tok
    if copies > _MAX_INDEX:
        yield RuleViolation(
            ("run.micro_batch_size", "data.sequence_length", "model.num_experts_per_tok"),
            f"run.micro_batch_size {run.micro_batch_size} x data.sequence_length {sequence_length} x "
            f"model.num_experts_per_tok {model.num_experts_per_tok} is more than the {_MAX_INDEX} rows that kernels "
            "count in 32 bits; lower run.micro_batch_size",
        )
    if model.num_experts % parallel.expert_parallel_size:
        yield RuleViolation(
            ("parallel.expert_parallel_size", "model.num_experts"),
            f"parallel.expert_parallel_size {parallel.expert_parallel_size} does not divide model.num_experts "
            f"{model.num_experts}; choose a divisor of both the experts and the world size",
        )
    yield from tensor_violations(config)
    yield from context_violations(config)
    if parallel.offload_optimizer == "cpu" and parallel.zero_stage == 3:
        # DeepSpeed 0.19.8: the norm of accumulated gradients comes out too small, and so does what it clips to.
        yield RuleViolation(
            ("parallel.offload_optimizer", "parallel.zero_stage"),
            "parallel.offload_optimizer cpu clips by a wrong gradient norm with parallel.zero_stage 3; set "
            "parallel.zero_stage to 1 or 2, or parallel.offload_optimizer to none",
        )
    if parallel.micro_batches_in_flight > 1 and parallel.zero_stage == 3:
        # DeepSpeed 0.19.8: a parameter's gradient may arrive once in a backward pass and bucket.
        yield RuleViolation(
            ("parallel.micro_batches_in_flight", "parallel.zero_stage"),
            f"parallel.micro_batches_in_flight {parallel.micro_batches_in_flight} does not go with parallel.zero_stage "
            "3; set parallel.zero_stage to 1 or 2, or parallel.micro_batches_in_flight to 1",
        )
    if parallel.gradient_dtype == "bf16":
        yield from bf16_gradient_violations(config)
    if not run.dir.strip():
        yield RuleViolation(("run.dir",), f"not a folder name (got {run.dir!a}); name a folder for the run's files")


def _optimizer_violations(optimizer: OptimizerConfig) -> Iterator[RuleViolation]:
    if optimizer.moments_dtype != "bf16":
        return
    for name, beta in (("beta1", optimizer.beta1), ("beta2", optimizer.beta2)):
        if beta > MAX_BF16_BETA:
            yield RuleViolation(
                (f"optimizer.{name}", "optimizer.moments_dtype"),
                f"optimizer.{name} {beta} changes a moment by less than bf16 can hold; with "
                f"optimizer.moments_dtype bf16 give at most {MAX_BF16_BETA}, or set optimizer.moments_dtype to fp32",
            )


def _schedule_violations(config: Config) -> Iterator[RuleViolation]:
    steps, schedule, peak = config.run.steps, config.schedule, config.optimizer.lr
    yield from _rampup_violations(config)
    if schedule.warmup_steps > steps:
        yield RuleViolation(
            ("schedule.warmup_steps", "run.steps"),
            f"schedule.warmup_steps {schedule.warmup_steps} is more than run.steps {steps}; "
            "lower schedule.warmup_steps",
        )
    if schedule.kind == "constant":
        return
    if schedule.min_lr > peak:
        yield RuleViolation(
            ("schedule.min_lr", "optimizer.lr"),
            f"schedule.min_lr {schedule.min_lr} is more than optimizer.lr {peak}; lower schedule.min_lr",
        )
    if schedule.kind == "wsd":
        decay = wsd_decay_steps(schedule, steps)
        if schedule.warmup_steps <= steps < schedule.warmup_steps + decay:
            yield RuleViolation(
                ("schedule.decay_steps", "schedule.warmup_steps", "run.steps"),
                f"schedule.warmup_steps {schedule.warmup_steps} + schedule.decay_steps {decay} is more than run.steps "
                f"{steps}; shorten the warm-up or the decay",
            )
    elif 0 < schedule.decay_steps < schedule.warmup_steps:
        yield RuleViolation(
            ("schedule.decay_steps", "schedule.warmup_steps"),
            f"schedule.decay_steps {schedule.decay_steps} ends the decay before schedule.warmup_steps "
            f"{schedule.warmup_steps}; it counts from step 0, warm-up included",
        )


def _rampup_violations(config: Config) -> Iterator[RuleViolation]:
    rampup, final = config.schedule.rampup_batch_size, config.run.global_batch_size
    if not rampup:
        return
    keys = (_RAMPUP, "run.global_batch_size")
    if len(rampup) != 3:
        yield RuleViolation(
            keys[:1], f"{_RAMPUP} has {len(rampup)} numbers (got {rampup}); give three: START, INCREMENT and SAMPLES"
        )
        return
    start, increment, _ = rampup
    if start >= final or (final - start) % increment:
        yield RuleViolation(
            keys,
            f"{_RAMPUP} {rampup} does not lead to run.global_batch_size {final}: from {start} in steps of {increment}; "
            f"choose a START below {final} and an INCREMENT that divides the difference",
        )
    elif start % config.run.micro_batch_size or increment % config.run.micro_batch_size:
        yield RuleViolation(
            (*keys, "run.micro_batch_size"),
            f"{_RAMPUP} {rampup} begins with or adds what is not a multiple of run.micro_batch_size "
            f"{config.run.micro_batch_size}; change one of them",
        )


def _data_violations(config: Config) -> Iterator[RuleViolation]:
    data, model = config.data, config.model
    if data.sequence_length > model.max_position_embeddings:
        yield RuleViolation(
            ("data.sequence_length", "model.max_position_embeddings"),
            f"data.sequence_length {data.sequence_length} is more than model.max_position_embeddings "
            f"{model.max_position_embeddings}; shorten the rows or raise the limit",
        )
    if data.sequence_length <= model.mtp_num_layers:
        yield RuleViolation(
            ("data.sequence_length", "model.mtp_num_layers"),
            f"data.sequence_length {data.sequence_length} leaves no target for model.mtp_num_layers "
            f"{model.mtp_num_layers}; make rows longer than the MTP depth",
        )
    for key, sources in (
        ("data.sources", data.sources),
        ("data.validation_sources", data.validation_sources),
        *(("data.validation_sets", sources) for sources in data.validation_sets.values()),
    ):
        if any(not source.source.strip() for source in sources):
            yield RuleViolation(
                (key,), "a source without a name (got ''); name a file, a data set or builtin:python-stdlib"
            )
    if not data.tokenizer.strip():
        yield RuleViolation(
            ("data.tokenizer",), "no tokenizer (got ''); name a tokenizer.json, a folder or builtin:python-4k"
        )
