"""AdamW parameter groups from the parameter table: who decays, in which dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.parameters import ParamSpec


def takes_weight_decay(spec: ParamSpec, *, apply_wd_to_qk_layernorm: bool) -> bool:
    """Megatron-LM's rule for Qwen3-Next (PR 2753): matrices decay, 1-D parameters do not, except q/k norms."""
    return spec.decay or (spec.qk_norm and apply_wd_to_qk_layernorm)


def parameter_groups(model: nn.Module, table: Iterable[ParamSpec], optimizer: OptimizerConfig) -> list[dict[str, Any]]:
    """Partition the model's parameters into optimizer groups by weight decay and dtype.

    ZeRO flattens a group into one buffer, so a group has one dtype. Groups of lower precision come first:
    DeepSpeed takes the first parameter's dtype for the model's and accumulates the others' gradients in
    fp32 only if that differs.

    Args:
        model: the built model; parameter names are the table's.
        table: the parameter table.
        optimizer: weight decay and the q/k norm rule.

    Returns:
        Groups ``{"params", "name", "weight_decay"}``, none empty, together every parameter exactly once.
    """
    parameters = dict(model.named_parameters())
    specs = {spec.name: spec for spec in table}
    assert parameters.keys() == specs.keys(), parameters.keys() ^ specs.keys()
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for name, spec in specs.items():
        parameter = parameters[name]
        decays = takes_weight_decay(spec, apply_wd_to_qk_layernorm=optimizer.apply_wd_to_qk_layernorm)
        label = f"{'decay' if decays else 'no_decay'}_{_dtype_name(parameter.dtype)}"
        group = groups.setdefault(
            (parameter.element_size(), not decays),
            {"params": [], "name": label, "weight_decay": optimizer.weight_decay if decays else 0.0},
        )
        group["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
