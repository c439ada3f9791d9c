"""The line and the table that say which backend runs what."""

from __future__ import annotations

import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.kernels.choices import KernelChoice, summarize_choices
from qwen3next_train.kernels.selection import select_kernels

CPU = torch.device("cpu")


def test_the_choices_in_one_line() -> None:
    assert summarize_choices(select_kernels(KernelsConfig(), CPU).choices) == "reference (auto: CPU)"
    mixed = select_kernels(KernelsConfig(fused="reference"), CPU).choices
    assert summarize_choices(mixed) == (
        "gated_delta_rule reference (auto: CPU), varlen_attention reference (auto: CPU), "
        "grouped_matmul reference (auto: CPU), fused reference (asked for by name)"
    )


def test_operations_of_another_backend_than_their_key_stand_behind_it() -> None:
    choices = (
        KernelChoice("gated_delta_rule", "flash_qla", "auto: runs on this device", "gated_delta_rule"),
        KernelChoice("delta_rule_summary", "fla", "auto: runs on this device", "gated_delta_rule"),
        KernelChoice("varlen_attention", "flash", "auto: runs on this device", "varlen_attention"),
    )
    assert summarize_choices(choices) == "gated_delta_rule flash_qla (delta_rule_summary fla), varlen_attention flash"
