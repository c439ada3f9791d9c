"""Small models and batches for the model's tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import KernelsConfig, LayerType, ModelConfig
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology

CPU = torch.device("cpu")
HYBRID: list[LayerType] = ["linear_attention", "full_attention"]


def small_config(**changes: object) -> ModelConfig:
    """A two-layer hybrid with key dim != value dim, grouped heads everywhere and one MTP depth."""
    values: dict[str, object] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": HYBRID,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 12,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 6,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
        "initializer_range": 0.1,
        "mtp_num_layers": 1,
        "router_aux_loss_scope": "sequence",
    }
    return ModelConfig.model_validate(values | changes)


def cpu_kernels() -> KernelSet:
    """What ``auto`` takes on CPU."""
    return select_kernels(KernelsConfig(), CPU)


def build(config: ModelConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3NextForCausalLM:
    """An initialised model on CPU whose norms, gates and decays are moved off their initial constants."""
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config, kernels=cpu_kernels())
    table = parameter_table(config)
    initialize(model, table, seed=seed, topology=Topology(), device=CPU, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def batch_of(
    rows: Sequence[Sequence[int]], *, vocab_size: int = 61, seed: int = 0, mtp_depths: int = 1, continues: bool = False
) -> PackedBatch:
    """One row per entry, an entry giving its documents' lengths; all rows of equal length."""
    rng = np.random.default_rng(seed)
    packed = []
    for lengths in rows:
        boundaries = np.cumsum([0, *lengths])
        tokens = rng.integers(0, vocab_size, boundaries[-1] + 1)
        packed.append(PackedRow(tokens, boundaries, continues))
    return PackedBatch.from_rows(packed, mtp_depths=mtp_depths)


def scales_of(batch: PackedBatch, *, num_micro_batches: float = 1) -> LossScales:
    """Divisors of a step that consists of this one micro-batch."""
    return LossScales(batch.num_targets, num_micro_batches)
