"""A finished model in one process, without DeepSpeed: what ``eval`` and ``generate`` run."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from qwen3next_train.checkpoint.weights import Weights
from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.log import get_logger
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table

_COPIED_ELEMENTS = 1 << 26
_PROGRESS_INTERVAL_S = 10.0


def load_model(weights: Weights, *, device: torch.device, dtype: torch.dtype, command: str) -> Qwen3NextForCausalLM:
    """Build the model without MTP and fill it, with never more than one tensor's piece on the host.

    Args:
        weights: where they come from.
        device: where the model will live.
        dtype: of the parameters, except those that the parameter table keeps in fp32.
        command: subcommand that says how far it is.
    """
    config = weights.model.model_copy(update={"mtp_num_layers": 0})
    kernels = select_kernels(KernelsConfig(), device, dtype=dtype, model=config)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=kernels)
    table = parameter_table(config)
    report = Progress(f"{command}: loading weights, parameters", sum(spec.numel for spec in table))
    for spec in table:
        value = torch.empty(spec.shape, dtype=torch.float32 if spec.fp32 else dtype, device=device)
        flat = value.view(-1)
        for start in range(0, spec.numel, _COPIED_ELEMENTS):
            stop = min(start + _COPIED_ELEMENTS, spec.numel)
            flat[start:stop] = weights.read(spec.name, start, stop).to(device)
        module_name, _, attribute = spec.name.rpartition(".")
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(value, requires_grad=False))
        report.add(spec.numel)
    model.tie_weights()
    return model.eval()


class Progress:
    """Says now and then how far a long loop is.

    Args:
        label: what is counted.
        total: how much there is.
        clock: seconds.
    """

    def __init__(self, label: str, total: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._label = label
        self._total = total
        self._clock = clock
        self._done = 0
        self._said_at = clock()

    def add(self, count: int, remark: str = "") -> None:
        """More is done."""
        self._done += count
        if self._clock() - self._said_at >= _PROGRESS_INTERVAL_S:
            self._said_at = self._clock()
            tail = f", {remark}" if remark else ""
            get_logger().info("%s: %s of %s%s", self._label, f"{self._done:,}", f"{self._total:,}", tail)
