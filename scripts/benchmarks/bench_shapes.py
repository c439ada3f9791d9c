"""What the benchmark of a step runs on: a model with random weights, random rows, routing that can be forced."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from qwen3next_train.accounting.flops import PARTS_OUTSIDE_LAYERS, TRAINING_PASSES, forward_flops
from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.kernels.routing import Permutation, TokenPermutation
from qwen3next_train.kernels.selection import DTYPES, KernelSet
from qwen3next_train.model.init import initial_value
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parameters import ParamSpec, parameter_table

MEDIAN_DOCUMENT = 600
"""Tokens of the middle document in packed rows; lengths are log-normal with sigma 1."""


class Routing(TokenPermutation):
    """A token permutation that can overrule the router, so that every expert gets the same number of rows.

    Args:
        inner: the selected backend.
    """

    def __init__(self, inner: TokenPermutation) -> None:
        self._inner = inner
        self._ids: torch.Tensor | None = None
        self.balanced = False

    def sort(self, expert_ids_TK: torch.Tensor, num_experts: int, num_rows: int) -> Permutation:
        """See :class:`TokenPermutation`; the router's weights stay as they are."""
        ids_TK = self._even(expert_ids_TK, num_experts) if self.balanced else expert_ids_TK
        return self._inner.sort(ids_TK, num_experts, num_rows)

    def permute(self, x_TD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return self._inner.permute(x_TD, permutation)

    def permute_weights(self, weights_TK: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return self._inner.permute_weights(weights_TK, permutation)

    def unpermute(self, rows_RD: torch.Tensor, permutation: Permutation) -> torch.Tensor:
        """See :class:`TokenPermutation`."""
        return self._inner.unpermute(rows_RD, permutation)

    def _even(self, ids_TK: torch.Tensor, num_experts: int) -> torch.Tensor:
        """K neighbouring experts for each token, tokens in random order; the same for all layers."""
        if self._ids is None or self._ids.shape != ids_TK.shape:
            num_tokens, top_k = ids_TK.shape
            order_T = torch.randperm(num_tokens, generator=torch.Generator().manual_seed(0))
            ids = (order_T.unsqueeze(1) * top_k + torch.arange(top_k)) % num_experts
            self._ids = ids.to(ids_TK.device)
        return self._ids


def random_model(config: Config, kernels: KernelSet, device: torch.device) -> Qwen3NextForCausalLM:
    """The model with random weights, the large ones drawn on the device."""
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config.model, kernels=kernels, recompute=config.parallel.recompute)
    for spec in parameter_table(config.model):
        module_name, _, attribute = spec.name.rpartition(".")
        dtype = torch.float32 if spec.fp32 else DTYPES[config.run.precision]
        setattr(model.get_submodule(module_name), attribute, nn.Parameter(_random_weight(spec, device, dtype)))
    model.tie_weights()
    return model


def _random_weight(spec: ParamSpec, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    if spec.init.kind != "normal":
        return initial_value(spec, seed=0).to(device, dtype)
    return torch.empty(spec.shape, device=device, dtype=dtype).normal_(0.0, spec.init.a)


def random_batch(config: Config, *, packed: bool, seed: int = 0) -> PackedBatch:
    """One micro-batch of random tokens; packed rows hold documents of random lengths."""
    generator = np.random.default_rng(seed)
    length, rows = config.data.sequence_length, []
    for _ in range(config.run.micro_batch_size):
        boundaries = [0]
        while packed and boundaries[-1] < length:
            document = int(generator.lognormal(np.log(MEDIAN_DOCUMENT), 1.0)) + 1
            boundaries.append(min(boundaries[-1] + document, length))
        tokens = generator.integers(0, config.model.vocab_size, length + 1)
        rows.append(PackedRow(tokens, np.array(boundaries if packed else [0, length]), True))
    return PackedBatch.from_rows(rows, mtp_depths=config.model.mtp_num_layers)


def model_flops(config: Config, batch: PackedBatch, *, layers_only: bool = False) -> int:
    """Exact training FLOPs of a micro-batch without the routers', and without the heads' if ``layers_only``."""
    parts = forward_flops(config.model, num_tokens=batch.num_tokens, sum_squared_lengths=batch.sum_squared_lengths)
    left_out = {"router", "mtp_router"}
    if layers_only:
        # Without a loss the MTP depths are not computed at all.
        left_out |= PARTS_OUTSIDE_LAYERS | {part for part in parts if part.startswith("mtp_")}
    return TRAINING_PASSES * sum(flops for part, flops in parts.items() if part not in left_out)
