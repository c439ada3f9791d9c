"""The ``doctor`` subcommand: can this machine train, and will what it computes be right?

Every check runs whatever the ones before it found. Under torchrun every rank checks its own device, and a line is good
when it is good on all of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, ExitCode, PeerLostError
from qwen3next_train.kernels.selection import DTYPES, KernelSet, select_kernels
from qwen3next_train.launcher import LaunchedProcess
from qwen3next_train.parallel.process_groups import ProcessContext, process_context, select_device
from qwen3next_train.selftest.check import Check, merge_ranks, try_check
from qwen3next_train.selftest.collectives import all_reduce_check, all_to_all_check
from qwen3next_train.selftest.environment import (
    cache_check,
    device_checks,
    triton_check,
    version_check,
    wandb_check,
)
from qwen3next_train.selftest.operations import kernel_checks
from qwen3next_train.selftest.packing import packing_check

Step = tuple[str, Callable[[], list[Check]]]
"""A name for what breaks off, and the checks."""


def doctor_command(config: Config, *, as_json: bool) -> int:
    """Run all checks and print one line each, or with ``as_json`` a list of ``{check, ok, detail}``.

    Args:
        config: read are device, precision, head sizes, kernels, cache folder and wandb's mode.
        as_json: print JSON.

    Returns:
        0 when every check is good, else 70 (:data:`ExitCode.INTERNAL`).

    Raises:
        ConfigError: started by torchrun, and this rank cannot have the device it is to use or describes no rank.
    """
    process = LaunchedProcess.from_environment(os.environ)
    process.check_host()
    device_name, problem = _usable_device(config.run.device, process)
    with ExitStack() as stack:
        context, failure = _join(device_name, stack)
        is_first = process.rank == 0
        findings: list[Check] = []
        for name, measure in _steps(config, device_name, process, context, problem=problem, failure=failure):
            checks = _on_all_ranks(context, try_check(name, measure))
            findings += checks
            if is_first and not as_json:
                # At once: the next check may take a while, or the whole process with it.
                print("\n".join(check.line() for check in checks), flush=True)
    if is_first and as_json:
        print(json.dumps([asdict(check) for check in findings], indent=2))
    return ExitCode.FINISHED if all(check.ok for check in findings) else ExitCode.INTERNAL


def _usable_device(name: str, process: LaunchedProcess) -> tuple[str, str | None]:
    """``run.device``, or the CPU and why the device asked for cannot be had.

    Raises:
        ConfigError: the latter, under torchrun: ranks with different devices cannot work together.
    """
    try:
        select_device(name, process.local_rank)
    except ConfigError as error:
        if process.is_launched:
            raise
        return "cpu", str(error)
    return name, None


def _join(device_name: str, stack: ExitStack) -> tuple[ProcessContext | None, str | None]:
    """The process group, or why there is none: then every rank checks for itself."""
    try:
        return stack.enter_context(process_context(device_name)), None
    except PeerLostError as error:
        return None, str(error)


def _on_all_ranks(context: ProcessContext | None, checks: list[Check]) -> list[Check]:
    if context is None:
        return checks
    by_rank = context.control.gather_json([asdict(check) for check in checks])
    return merge_ranks([[Check(**found) for found in of_rank] for of_rank in by_rank])


def _steps(
    config: Config,
    device_name: str,
    process: LaunchedProcess,
    context: ProcessContext | None,
    *,
    problem: str | None,
    failure: str | None,
) -> list[Step]:
    """All checks in their order, the quick ones first.

    Args:
        config: the resolved configuration.
        device_name: the device to check, as ``run.device`` names it.
        process: this process as the environment describes it.
        context: the same among the others, None when they did not find each other.
        problem: why ``run.device`` cannot be had.
        failure: why there is no context.
    """
    device = select_device(device_name, process.local_rank)
    dtype = DTYPES[config.run.precision]

    def kernels() -> KernelSet:
        return select_kernels(config.kernels, device, dtype=dtype, model=config.model)

    steps: list[Step] = [
        ("versions", lambda: [version_check()]),
        ("triton", lambda: [triton_check(config)]),
        ("devices", lambda: device_checks(config, problem=problem)),
        ("cache", lambda: [cache_check(config)]),
        # In training only rank 0 talks to wandb.
        ("wandb", lambda: [wandb_check(config)] if process.rank == 0 else []),
        ("kernels", lambda: kernel_checks(kernels(), config.model, device, dtype)),
        ("packing", lambda: [packing_check(kernels(), device, dtype)]),
    ]
    if context is None:
        return [*steps, ("collectives", lambda: [Check("collectives", False, failure or "")])]
    return [
        *steps,
        ("all-reduce", lambda: [all_reduce_check(context)]),
        ("all-to-all", lambda: [all_to_all_check(context)]),
    ]
