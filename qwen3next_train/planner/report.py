"""The ``plan`` subcommand: a table for people, JSON for programs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from typing import Any, get_args

from qwen3next_train.accounting.hardware import DEVICES, Device, find_device
from qwen3next_train.accounting.layout import MAX_DENSE_RANKS, Layout
from qwen3next_train.accounting.memory import host_bytes_per_gpu
from qwen3next_train.config.batch_size import describe_rampup
from qwen3next_train.config.schema import Config, RecomputePart
from qwen3next_train.data.summary import planned_sets, planned_uses, set_lines, use_lines, uses_as_json, warn_of_epochs
from qwen3next_train.errors import ConfigError, ExitCode
from qwen3next_train.planner.layouts import (
    MAX_FASTEST,
    MOST_TIMES_THE_GPUS,
    TimedLayout,
    fits_device,
    most_gpus_tried,
)
from qwen3next_train.planner.plan import TIME_ERROR, Plan, make_plan
from qwen3next_train.planner.recompute import RecomputeView

NO_GPU = "cpu"
"""The GPU name of a plan without fit and times."""

RECOMPUTE_PARTS: tuple[RecomputePart, ...] = get_args(RecomputePart)

_LABEL_WIDTH = 13
_LINE_WIDTH = 118
_PROGRESS_S = 1.0


def plan_command(config: Config, *, gpus: int, gpu: str, mfu: float | None, tokens: float | None, as_json: bool) -> int:
    """Print the plan of a run on stdout.

    Args:
        config: resolved configuration.
        gpus: number of GPUs.
        gpu: a known GPU, or :data:`NO_GPU`.
        mfu: stated model FLOPs utilisation, or None.
        tokens: tokens to train on, or None for ``run.steps``.
        as_json: one JSON object instead of the table.

    Returns:
        The exit code; a layout that does not fit is an answer, not a failure.

    Raises:
        ConfigError: an unknown GPU, a number out of range, or a layout that training would reject.
    """
    if gpu != NO_GPU and find_device(gpu) is None:
        known = ", ".join(device.name for device in DEVICES)
        raise ConfigError(f"plan: --gpu: unknown GPU {gpu!r}; choose one of {known}, or {NO_GPU} for no device")
    progress = _Progress()
    plan = make_plan(config, gpus=gpus, gpu=gpu, mfu=mfu, tokens=tokens, progress=progress.show)
    progress.close()
    uses = planned_uses(config.model_copy(update={"run": config.run.model_copy(update={"steps": plan.num_steps})}))
    sets = planned_sets(config)
    if as_json:
        data = {"data": uses_as_json(uses), "validation_sets": sets}
        print(json.dumps(plan_as_json(plan) | data, indent=2))
    else:
        lines = use_lines(uses) + [f"WARNING {line}" for line in warn_of_epochs(uses)] if uses else ["no source named"]
        lines += set_lines(sets)
        print("\n".join([format_plan(plan), *(row for line in lines for row in _row("data", line))]))
    return ExitCode.FINISHED


class _Progress:
    """How many layouts have been looked at, on a line of a terminal's stderr once a second has passed."""

    def __init__(self) -> None:
        self._shown_at = time.monotonic()
        self._width = 0

    def show(self, num_done: int, num_all: int) -> None:
        """Called for every layout."""
        now = time.monotonic()
        if now - self._shown_at >= _PROGRESS_S and sys.stderr.isatty():
            line = f"plan: looked at {num_done:,} of {num_all:,} layouts"
            sys.stderr.write("\r" + line)
            sys.stderr.flush()
            self._shown_at, self._width = now, len(line)

    def close(self) -> None:
        """Wipe the line."""
        if self._width:
            sys.stderr.write("\r" + " " * self._width + "\r")
            sys.stderr.flush()


def plan_as_json(plan: Plan) -> dict[str, Any]:
    """The documented JSON object. Bytes and FLOPs are integers; unknown fit and times are null."""
    return {
        **plan.workload.as_json(),
        "memory_per_gpu": {
            **_memory_as_json(plan.memory_by_part, fits=plan.fits),
            "host_bytes": plan.host_bytes,
            "snapshot_bytes": plan.snapshot_bytes,
            "with_recompute": [
                {"recompute": list(view.recompute), **_memory_as_json(view.memory_by_part, fits=view.fits)}
                for view in plan.recompute
            ],
        },
        "checkpoint_bytes": plan.checkpoint_bytes,
        "step_time_s": plan.step_time_s,
        "step_time_by_part": None if plan.step is None else plan.step.by_part(),
        "days": plan.days,
        "fastest": [_fastest_as_json(plan, each) for each in plan.fastest],
    }


def _fastest_as_json(plan: Plan, timed: TimedLayout) -> dict[str, Any]:
    layout = timed.layout
    return {
        "expert_parallel_size": layout.expert_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "tensor_parallel_size": layout.tensor_parallel_size,
        "zero_stage": layout.zero_stage,
        "micro_batch_size": layout.micro_batch_size,
        "micro_batches_in_flight": layout.micro_batches_in_flight,
        "token_exchange": layout.token_exchange,
        "recompute": [part for part in RECOMPUTE_PARTS if part in layout.recompute],
        "step_time_s": timed.step.total_s,
        "flops_per_gpu": plan.workload.flops_per_step / (layout.world_size * timed.step.total_s),
        "memory_bytes": timed.memory_bytes,
    }


def _memory_as_json(by_part: dict[str, int], *, fits: bool | None) -> dict[str, Any]:
    return {"total_bytes": sum(by_part.values()), "by_part": by_part, "fits": fits}


def format_plan(plan: Plan) -> str:
    """The table for people, without a final newline."""
    parameters, rampup = plan.workload.parameters, describe_rampup(plan.config)
    lines = [
        *_row("parameters", f"{parameters.total:,}, active per token {parameters.active:,}"),
        *_row("", _parts(parameters.by_part)),
        *_row("FLOPs/token", _flops_line(plan)),
        *_row("", _shares(plan.workload.flops_by_part)),
        *_row("step", _step_line(plan)),
        *(_row("ramp-up", rampup) if rampup else ()),
        *_row("memory/GPU", _memory_line(plan)),
        *_row("", _memory_parts(plan)),
        *(_row("host/GPU", _host_line(plan)) if plan.host_bytes else ()),
        *_row("recompute", _recompute_line(plan)),
        *_row("time", _time_line(plan)),
        *(_row("step time", _step_parts(plan)) if plan.step is not None else ()),
        *_fastest_lines(plan),
        *_row("checkpoint", _checkpoint_line(plan)),
    ]
    if plan.fits is False:
        lines += _change_lines(plan)
    return "\n".join(lines)


def _row(label: str, text: str) -> list[str]:
    """One label and its text, wrapped between ``·`` separated items."""
    lines, current = [], ""
    for item in text.split(" · "):
        joined = f"{current} · {item}" if current else item
        if current and len(joined) > _LINE_WIDTH - _LABEL_WIDTH:
            lines.append(current)
            current = item
        else:
            current = joined
    lines.append(current)
    return [f"{label if not index else '':<{_LABEL_WIDTH}}{line}" for index, line in enumerate(lines)]


def _flops_line(plan: Plan) -> str:
    megatron = plan.workload.flops_megatron / plan.workload.num_tokens
    return (
        f"{_si(plan.workload.flops_per_token, 'FLOP')} at sequence length {plan.layout.sequence_length} "
        f"(Megatron-LM counts {_si(megatron, 'FLOP')})"
    )


def _step_line(plan: Plan) -> str:
    rows = plan.config.run.global_batch_size
    accumulation = plan.layout.num_micro_batches(rows)
    slices = f", of each 1/{plan.layout.ranks_per_row}" if plan.layout.ranks_per_row > 1 else ""
    return (
        f"{rows} x {plan.layout.sequence_length} = {_tokens(plan.workload.num_tokens)} = "
        f"{_si(plan.workload.flops_per_step, 'FLOP')}; per GPU {accumulation} x {plan.layout.micro_batch_size} rows"
        f"{slices}"
    )


def _memory_line(plan: Plan) -> str:
    start = f"{_layout(plan.layout)}: {_bytes(plan.memory_bytes)}"
    if plan.device is None:
        return f"{start}; no known device, fit not judged"
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    return f"{start} of {_bytes(plan.device.memory_bytes)} on {plan.device.name}: {verdict}"


def _memory_parts(plan: Plan) -> str:
    return " · ".join(f"{_words(part)} {_bytes(size)}" for part, size in plan.memory_by_part.items() if size)


def _checkpoint_line(plan: Plan) -> str:
    text = f"{_bytes(plan.checkpoint_bytes)} (fp32 master weights and both moments)"
    if plan.snapshot_bytes:
        text += f"; {_bytes(plan.snapshot_bytes)} of host memory for each GPU, to save beside training"
    return text


def _host_line(plan: Plan) -> str:
    return f"{_bytes(plan.host_bytes)} of host memory for each GPU's optimizer"


def _recompute_line(plan: Plan) -> str:
    now = f"{_parts_list(plan.layout.recompute)}; activations take {_bytes(_activations(plan.memory_by_part))}"
    return " · ".join((now, *map(_would_be, plan.recompute)))


def _would_be(view: RecomputeView) -> str:
    verdict = {True: ", fits", False: ", does not fit", None: ""}[view.fits]
    activations, total = _activations(view.memory_by_part), sum(view.memory_by_part.values())
    work = f", {view.extra_work:.0%} more work" if view.extra_work >= 0.005 else ""
    return f"{_parts_list(view.recompute)} would leave {_bytes(activations)}, in all {_bytes(total)}{verdict}{work}"


def _parts_list(recompute: Collection[RecomputePart]) -> str:
    """The value of ``parallel.recompute`` as it is written."""
    return f"[{', '.join(part for part in RECOMPUTE_PARTS if part in recompute)}]"


def _activations(memory_by_part: dict[str, int]) -> int:
    """What layers keep of a micro-batch, and what of one layer would exist again."""
    return sum(size for part, size in memory_by_part.items() if part.startswith(("activations_", "rebuilt_")))


def _time_line(plan: Plan) -> str:
    if plan.step_time_s is None or plan.days is None or plan.mfu is None:
        return "unknown without a known device"
    tokens = _tokens(plan.num_tokens)
    rate = _tflops(plan, plan.step_time_s)
    basis = "at the stated MFU" if plan.stated_mfu is not None else "by the table of rates"
    if plan.stated_mfu is None and plan.step_is_estimate:
        basis = "an estimate: rates of the h100, scaled"
    if plan.stated_mfu is None and plan.device is not None and plan.layout.world_size > plan.device.domain_size:
        basis += "; those between nodes are not measured"
    return (
        f"{plan.num_steps:,} steps, {tokens}: {plan.days:.3g} days on {plan.layout.world_size} {plan.gpu}, "
        f"{plan.step_time_s:.3g} s a step, {_tokens(plan.workload.num_tokens / plan.step_time_s)}/s · "
        f"{rate:.0f} TFLOP/s a GPU, {plan.mfu:.1%} MFU, {basis}"
    )


def _tflops(plan: Plan, step_s: float) -> float:
    """Model TFLOP/s of a GPU."""
    return plan.workload.flops_per_step / (plan.layout.world_size * step_s) / 1e12


def _step_parts(plan: Plan) -> str:
    assert plan.step is not None
    parts = [f"{part} {seconds:.3g} s" for part, seconds in plan.step.by_part().items() if seconds]
    return " · ".join([*parts, f"in all {plan.step.total_s:.3g} s"])


def _fastest_lines(plan: Plan) -> list[str]:
    """The fastest layouts that fit, and what other ZeRO stages would take."""
    if plan.device is None:
        return []
    if plan.recommended is None:
        terms = f"{'with' if plan.layout.offload_optimizer else 'without'} an offloaded optimizer"
        if plan.layout.gradient_dtype == "bf16":
            terms = f"with bf16 gradients and {terms}"
        return _row("fastest", f"no layout fits {plan.layout.world_size} {plan.gpu} {terms}")
    lines = [f"EP  CP  TP  ZeRO  micro-batch  in flight  exchange  s a step  TFLOP/s a GPU{'GB':>8}  recompute"]
    for each in plan.fastest:
        layout = each.layout
        lines.append(
            f"{layout.expert_parallel_size:>2}{layout.context_parallel_size:>4}{layout.tensor_parallel_size:>4}"
            f"{layout.zero_stage:>6}{layout.micro_batch_size:>13}{layout.micro_batches_in_flight:>11}"
            f"{_exchange(layout):>10}{each.step.total_s:>10.3g}{_tflops(plan, each.step.total_s):>15.0f}"
            f"{each.memory_bytes / 1e9:>8.1f}  {_parts_list(layout.recompute)}"
        )
    rows = [
        f"{label:<{_LABEL_WIDTH}}{line}" for label, line in zip(["fastest", *[""] * MAX_FASTEST], lines, strict=False)
    ]
    if any(each.layout.micro_batches_in_flight > 1 for each in plan.fastest):
        rows += _row("", "what two micro-batches in flight hide between nodes is expected, not measured")
    if any(
        each.layout.exchanges_densely and each.layout.expert_parallel_size > MAX_DENSE_RANKS for each in plan.fastest
    ):
        rows += _row(
            "",
            f"dense over more than {MAX_DENSE_RANKS} ranks goes by the rates of {MAX_DENSE_RANKS}, not measured; "
            "parallel.token_exchange auto stops there",
        )
    return rows + _row("ZeRO", _stages_line(plan, plan.recommended, plan.device))


def _exchange(layout: Layout) -> str:
    """Which tokens travel to other ranks' experts."""
    if layout.expert_parallel_size == 1:
        return "none"
    return "dense" if layout.exchanges_densely else "exact"


def _stages_line(plan: Plan, best: TimedLayout, device: Device) -> str:
    """Which stage and exchange to take, and what the others would take instead."""
    stage = best.layout.zero_stage
    costs = [
        f"stage {other.layout.zero_stage} {_compared(other.step.total_s, best)}"
        + ("" if fits_device(other.memory_bytes, device) else " and not fit")
        for other in plan.other_stages.values()
    ]
    if plan.exact_exchange_s is not None:
        costs.append(f"parallel.token_exchange exact {_compared(plan.exact_exchange_s, best)}")
    has_stage_1 = any(each.layout.zero_stage == 1 for each in plan.fastest)
    verdict = "stage 1 fits" if stage == 1 else f"stage 1 {'is slower' if has_stage_1 else 'does not fit'}"
    if best is not plan.fastest[0]:
        verdict += f" and is within {TIME_ERROR:.0%} of the fastest, the error of these times"
    shared = {"CP": best.layout.context_parallel_size, "TP": best.layout.tensor_parallel_size}
    sizes = [f"EP {best.layout.expert_parallel_size}", *(f"{name} {size}" for name, size in shared.items() if size > 1)]
    if best.layout.token_exchange != plan.layout.token_exchange:
        sizes.append(f"parallel.token_exchange {best.layout.token_exchange}")
    where = f"take stage {stage} with {' and '.join(sizes)}: {best.step.total_s:.3g} s a step"
    return f"{verdict} · {where} · the same layout would take under {', '.join(costs)}"


def _compared(seconds: float, best: TimedLayout) -> str:
    percent = round(100 * (seconds / best.step.total_s - 1))
    return f"{abs(percent)}% {'more' if percent > 0 else 'less'}" if percent else "as long"


def _change_lines(plan: Plan) -> list[str]:
    largest = max(plan.memory_by_part, key=lambda part: plan.memory_by_part[part])
    lines = _row("too large", f"most of all {_words(largest)}, {_bytes(plan.memory_by_part[largest])}")
    for index, layout in enumerate(plan.changes):
        text = _changed_settings(plan.layout, layout)
        if layout.offload_optimizer and not plan.layout.offload_optimizer:
            text += f" (takes {_bytes(host_bytes_per_gpu(plan.config.model, layout))} of host memory for each GPU)"
        lines += _row("" if index else "change to", text)
    if not plan.changes:
        lines += _row("change", _nothing_fits(plan))
    return lines


def _nothing_fits(plan: Plan) -> str:
    times = most_gpus_tried(plan.config, plan.layout) // plan.layout.world_size
    tried = f"neither {times} times the GPUs nor shorter rows" if times > 1 else "shorter rows included"
    if times == MOST_TIMES_THE_GPUS:
        return f"nothing tried fits, {tried}: choose a larger GPU"
    batch = plan.config.run.global_batch_size
    return (
        f"nothing tried fits, {tried}; run.global_batch_size {batch} does not divide over {2 * times} times the GPUs: "
        "choose a larger GPU or a larger batch"
    )


def _changed_settings(old: Layout, new: Layout) -> str:
    settings = (
        ("GPUs", old.world_size, new.world_size),
        ("parallel.expert_parallel_size", old.expert_parallel_size, new.expert_parallel_size),
        ("parallel.context_parallel_size", old.context_parallel_size, new.context_parallel_size),
        ("parallel.tensor_parallel_size", old.tensor_parallel_size, new.tensor_parallel_size),
        ("parallel.zero_stage", old.zero_stage, new.zero_stage),
        ("run.micro_batch_size", old.micro_batch_size, new.micro_batch_size),
        ("data.sequence_length", old.sequence_length, new.sequence_length),
        ("parallel.micro_batches_in_flight", old.micro_batches_in_flight, new.micro_batches_in_flight),
        ("parallel.token_exchange", old.token_exchange, new.token_exchange),
        ("parallel.recompute", _parts_list(old.recompute), _parts_list(new.recompute)),
        ("parallel.gradient_dtype", old.gradient_dtype, new.gradient_dtype),
        ("optimizer.moments_dtype", old.moments_dtype, new.moments_dtype),
        ("parallel.offload_optimizer", "none", "cpu" if new.offload_optimizer != old.offload_optimizer else "none"),
    )
    return ", ".join(f"{name} {after}" for name, before, after in settings if before != after)


def _layout(layout: Layout) -> str:
    sizes = {"CP": layout.context_parallel_size, "TP": layout.tensor_parallel_size}
    shared = "".join(f"{name} {size}, " for name, size in sizes.items() if size > 1)
    in_flight = f", {layout.micro_batches_in_flight} in flight" if layout.micro_batches_in_flight > 1 else ""
    return (
        f"EP {layout.expert_parallel_size}, {shared}DP {layout.data_parallel_size}, ZeRO-{layout.zero_stage}, "
        f"{layout.precision}{in_flight}"
    )


def _parts(counts: dict[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return " · ".join(f"{_words(part)} {_count(count)}" for part, count in ordered if count)


def _shares(flops: dict[str, int]) -> str:
    total = sum(flops.values())
    ordered = sorted(flops.items(), key=lambda item: -item[1])
    return " · ".join(f"{_words(part)} {count / total:.1%}" for part, count in ordered if count >= total / 1000)


def _words(part: str) -> str:
    return part.replace("_", " ")


def _count(number: int) -> str:
    return _si(number, "", giga="B").rstrip()


def _tokens(number: float) -> str:
    return _si(number, "", giga="B").rstrip() + " tokens"


def _bytes(number: int) -> str:
    return _si(number, "B")


def _si(number: float, unit: str, *, giga: str = "G") -> str:
    """A number with a decimal prefix, so 1 GB is 1e9 bytes; ``giga`` is B for counts of parameters."""
    for exponent, prefix in ((18, "E"), (15, "P"), (12, "T"), (9, giga), (6, "M"), (3, "k")):
        if abs(number) >= 10**exponent:
            return f"{number / 10**exponent:.2f} {prefix}{unit}"
    return f"{number:.0f} {unit}"
