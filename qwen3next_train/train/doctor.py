"""The ``doctor`` subcommand: can this machine train, and will what it computes be right?

Every check runs whatever the ones before it found. Under torchrun every rank checks its own device, and a line is good
when it is good on all of them.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

import torch

from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, ExitCode, PeerLostError
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.parallel.process_groups import ProcessContext, process_context, select_device
from qwen3next_train.train.checks import Check, attempt, merge_ranks
from qwen3next_train.train.collective_self_test import all_reduce_check, all_to_all_check
from qwen3next_train.train.environment_checks import (
    cache_check,
    device_checks,
    triton_check,
    version_check,
    wandb_check,
)
from qwen3next_train.train.kernel_self_test import kernel_checks
from qwen3next_train.train.packing_self_test import packing_check

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
        ConfigError: started by torchrun, and this rank cannot have the device it is to use.
    """
    device_name, refusal = _usable_device(config.run.device)
    with ExitStack() as stack:
        context, failure = _join(device_name, stack)
        rank = int(os.environ["RANK"])
        all_good = True
        findings: list[Check] = []
        for name, measure in _steps(config, context, refusal, failure):
            checks = attempt(name, measure)
            if context is not None:
                checks = merge_ranks([[Check(**item) for item in items] for items in _gathered(context, checks)])
            all_good = all_good and all(check.ok for check in checks)
            findings += checks
            if rank == 0 and not as_json:
                # At once: the next check may take a while, or the whole process with it.
                print("\n".join(check.line() for check in checks), flush=True)
        if rank == 0 and as_json:
            print(json.dumps([asdict(check) for check in findings], indent=2))
    return ExitCode.FINISHED if all_good else ExitCode.INTERNAL


def _steps(config: Config, context: ProcessContext | None, refusal: str | None, failure: str | None) -> list[Step]:
    """All checks in their order, cheap and telling ones first.

    Args:
        config: the resolved configuration.
        context: this process among the others, None when they did not find each other.
        refusal: why ``run.device`` cannot be had.
        failure: why there is no context.
    """
    device = torch.device("cpu") if context is None else context.device
    dtype = torch.bfloat16 if config.run.precision == "bf16" else torch.float32
    return [
        ("versions", lambda: [version_check()]),
        ("triton", lambda: [triton_check(config)]),
        ("devices", lambda: device_checks(config, refusal=refusal)),
        ("cache", lambda: [cache_check(config)]),
        ("wandb", lambda: [wandb_check(config)]),
        (
            "kernels",
            lambda: kernel_checks(
                select_kernels(config.kernels, device, dtype=dtype), config.model, device=device, dtype=dtype
            ),
        ),
        ("packing", lambda: [packing_check(select_kernels(config.kernels, device, dtype=dtype), device, dtype)]),
        ("collectives", lambda: _collective_checks(context, failure)),
    ]


def _collective_checks(context: ProcessContext | None, failure: str | None) -> list[Check]:
    if context is None:
        return [Check("collectives", False, failure or "no process group")]
    return [all_reduce_check(context), all_to_all_check(context)]
