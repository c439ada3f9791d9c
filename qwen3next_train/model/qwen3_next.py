"""Qwen3-Next: embedding, hybrid layers, head, MTP and all losses of a micro-batch.

Letters: T tokens, D hidden (of a cache: documents), V vocabulary, E experts, L MoE layers (decoder layers, then MTP
layers).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import ModelConfig, RecomputePart
from qwen3next_train.kernels.cross_entropy import LinearCrossEntropy
from qwen3next_train.kernels.linear import Embedding
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.block import BatchContext, DecoderLayer
from qwen3next_train.model.decoding_cache import DecodingCache
from qwen3next_train.model.head_group import HeadGroup
from qwen3next_train.model.moe import SparseMoeBlock
from qwen3next_train.model.mtp import MultiTokenPredictor, input_ids
from qwen3next_train.model.norms import ZeroCenteredRmsNorm
from qwen3next_train.model.recompute import recomputed_layer, recomputing
from qwen3next_train.model.rope import RotaryTable, rotary_table
from qwen3next_train.model.router_losses import ExpertLoads, ReduceCounts, RouterStats, Summed, own_counts
from qwen3next_train.model.sequence_group import SequenceGroup, SlicedSequences
from qwen3next_train.parameters import parameter_table


@dataclass(frozen=True)
class LossScales:
    """What a micro-batch's sums are divided by, so that the step's losses add up over all micro-batches.

    Args:
        num_targets: real targets of the whole step, all ranks, by depth (``[0]`` next token, ``[k]`` MTP).
        num_micro_batches: micro-batches of the whole step, all ranks; of slices of rows each rank's counts as one.
    """

    num_targets: Sequence[float | torch.Tensor]
    num_micro_batches: float


class ModelOutput(NamedTuple):
    """Losses of one micro-batch; all but ``total`` are detached.

    Args:
        total: scalar to differentiate, this micro-batch's share of the step's loss.
        nll_lm_sum: fp32 scalar, sum of next-token losses in nats.
        nll_mtp_sums: fp32 ``[depths]``, the same by MTP depth.
        aux_L: fp32 ``[L]``, load-balancing loss before its coefficient.
        z_L: fp32 ``[L]``, z-loss before its coefficient.
        expert_counts_LE: int64 ``[L, E]``, rows sent to each expert by this rank's tokens.
        router_entropy_L: fp32 ``[L]``, nats.
        nll_T: fp32 ``[T]``, next-token loss of every position in nats, 0 without a target; ``[0]`` where nobody asked
            for it.
    """

    total: torch.Tensor
    nll_lm_sum: torch.Tensor
    nll_mtp_sums: torch.Tensor
    aux_L: torch.Tensor
    z_L: torch.Tensor
    expert_counts_LE: torch.Tensor
    router_entropy_L: torch.Tensor
    nll_T: torch.Tensor


class Qwen3NextModel(nn.Module):
    """Embedding, decoder layers and final norm (HF module name ``model``).

    Args:
        config: model section.
        kernels: selected backends.
        moe_block: class of the mixtures of experts.
        local_experts: global ids of the experts this rank holds.
        head_shares: ranks that divide the mixers' heads.
    """

    def __init__(
        self,
        config: ModelConfig,
        kernels: KernelSet,
        *,
        moe_block: type[SparseMoeBlock],
        local_experts: range,
        head_shares: int = 1,
    ) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DecoderLayer(
                config,
                layer_type,
                kernels,
                moe_block=moe_block,
                local_experts=local_experts,
                head_shares=head_shares,
            )
            for layer_type in config.layer_types
        )
        self.norm = ZeroCenteredRmsNorm(config.hidden_size, config.rms_norm_eps, kernels.rms_norm)

    def forward(
        self, inputs_T: Sequence[torch.Tensor], contexts: Sequence[BatchContext]
    ) -> tuple[list[torch.Tensor], list[list[RouterStats]]]:
        """Tokens ``[T]`` of each micro-batch in flight to hidden states after the final norm ``[T, D]``.

        Returns:
            the hidden states, and each layer's statistics of each micro-batch's routers.
        """
        xs_TD = [self.embed_tokens(input_ids_T) for input_ids_T in inputs_T]
        stats = []
        for layer in self.layers:
            xs_TD, layer_stats = recomputed_layer(layer, contexts, *xs_TD)
            stats.append(layer_stats)
        return [self.norm(x_TD) for x_TD in xs_TD], stats


class LanguageModelHead(nn.Module):
    """Output head; with labels it returns their loss and never holds all logits.

    Args:
        config: model section.
        kernel: selected head-and-loss backend.
    """

    def __init__(self, config: ModelConfig, kernel: LinearCrossEntropy) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.kernel = kernel

    def forward(
        self,
        hidden_TD: torch.Tensor,
        labels_T: torch.Tensor | None = None,
        losses_T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits ``[T, V]``, or with labels the fp32 sum of their negative log likelihoods in nats.

        Args:
            hidden_TD: ``[T, D]``.
            labels_T: int64 ``[T]``.
            losses_T: fp32 ``[T]``, receives the summands.
        """
        if labels_T is None:
            return F.linear(hidden_TD, self.weight)
        return self.kernel(hidden_TD, self.weight, labels_T, losses_T)


class Qwen3NextForCausalLM(nn.Module):
    """The whole model. Parameter names and shapes are those of ``parameters.parameter_table``.

    Parameters are created uninitialised (build under ``torch.device("meta")``, then ``model.init.initialize``).

    Args:
        config: model section, with ``layer_types`` filled in.
        kernels: selected backends.
        moe_block: class of the mixtures of experts, built as ``moe_block(config, kernels, local_experts)``.
        local_experts: global ids of the experts this rank holds; all when None.
        recompute: what the backward pass computes again instead of keeping it.
        weights_stay: see ``model.recompute.recomputing``.
        head_shares: ranks that divide the mixers' heads, of which this model has one share.
    """

    reduce_counts: ReduceCounts
    """Begins to sum expert counts over the ranks of a step; set by the engine when there are several."""
    reduce_row_counts: ReduceCounts
    """Begins to sum expert counts over the ranks that share rows; set by the engine where there are such."""
    sequence_group: SequenceGroup | None
    """The ranks with the other slices of the rows; set by the engine under context parallelism."""
    head_group: HeadGroup | None
    """The ranks with the other heads of the mixers; set by the engine under tensor parallelism."""

    def __init__(
        self,
        config: ModelConfig,
        *,
        kernels: KernelSet,
        moe_block: type[SparseMoeBlock] = SparseMoeBlock,
        local_experts: range | None = None,
        recompute: Collection[RecomputePart] = (),
        weights_stay: bool = True,
        head_shares: int = 1,
    ) -> None:
        super().__init__()
        assert len(config.layer_types) == config.num_hidden_layers, "layer_types are filled in when loading"
        experts = range(config.num_experts) if local_experts is None else local_experts
        self.config = config
        self.recompute = recompute
        self.weights_stay = weights_stay
        shares: dict[str, Any] = {"moe_block": moe_block, "local_experts": experts, "head_shares": head_shares}
        self.model = Qwen3NextModel(config, kernels, **shares)
        self.lm_head = LanguageModelHead(config, kernels.linear_cross_entropy)
        self.mtp = MultiTokenPredictor(config, kernels, **shares) if config.mtp_num_layers else None
        self.reduce_counts = own_counts
        self.reduce_row_counts = own_counts
        self.sequence_group = None
        self.head_group = None
        self._loads = ExpertLoads(config.router_aux_loss_scope)
        self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head share the embedding's parameter if the configuration says so."""
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.get_parameter("weight")

    def cast_(self, dtype: torch.dtype) -> None:
        """Convert the parameters in place, leaving those the parameter table marks as fp32 in fp32."""
        fp32 = {spec.name for spec in parameter_table(self.config) if spec.fp32}
        for name, parameter in self.named_parameters():
            parameter.data = parameter.data.to(torch.float32 if name in fp32 else dtype)

    def begin_step(self) -> None:
        """Start a new optimizer step: expert loads of scope ``global`` are counted from zero."""
        self._loads.begin_step()

    def forward(
        self, batches: Sequence[PackedBatch], scales: LossScales, *, token_losses: bool = False
    ) -> list[ModelOutput]:
        """Losses of the micro-batches in flight, of each by itself.

        ``total = nll_lm / N_0 + mtp_factor / depths * sum_k nll_mtp_k / N_k
        + (aux_coef * sum_L load_balancing + z_coef * sum_L z) / micro_batches``.

        Args:
            batches: on the parameters' device; several pass through the layers together, see ``model.overlap``.
            scales: divisors, counted over the whole step.
            token_losses: return the next-token loss of every position too.
        """
        with recomputing(self.recompute, weights_stay=self.weights_stay):
            contexts = [self._context(batch) for batch in batches]
            hiddens_TD, stats = self.model([batch.input_ids_T for batch in batches], contexts)
            # While the head computes, the ranks' counts travel.
            counts = [[self._count(layers)] for layers in zip(*stats, strict=True)]
            # Empty where nobody asks: the kernel keeps them to itself then.
            nlls_T = [h.new_empty(h.shape[0] * token_losses, dtype=torch.float32) for h in hiddens_TD]
            nlls = [
                [self.lm_head(h, batch.labels_T, nll_T if token_losses else None)]
                for h, batch, nll_T in zip(hiddens_TD, batches, nlls_T, strict=True)
            ]
            for depth_nlls, depth_stats, depth_counts in self._predict_further(hiddens_TD, batches, contexts):
                stats.append(depth_stats)
                for of_batch, nll, summed, more in zip(nlls, depth_nlls, counts, depth_counts, strict=True):
                    of_batch.append(nll)
                    summed.append(more)
            of_batches = zip(nlls, zip(*stats, strict=True), counts, nlls_T, strict=True)
            return [self._losses(nll, layers, summed, scales, nll_T) for nll, layers, summed, nll_T in of_batches]

    def _count(self, stats: Sequence[RouterStats]) -> Summed:
        return self._loads.begin(stats, self.reduce_counts, self.reduce_row_counts)

    def _losses(
        self,
        nlls: Sequence[torch.Tensor],
        stats: Sequence[RouterStats],
        counts: Sequence[Summed],
        scales: LossScales,
        nll_T: torch.Tensor,
    ) -> ModelOutput:
        """Of one micro-batch: ``nlls`` by depth, ``stats`` by layer, ``counts`` of layers one behind the other."""
        nll_lm, *nll_mtp = nlls
        balancing_L = self._loads.losses(stats, counts)
        z_L = torch.stack([layer.z for layer in stats])
        config = self.config
        total = nll_lm / _at_least_one(scales.num_targets[0])
        for depth, nll in enumerate(nll_mtp, start=1):
            factor = config.mtp_loss_scaling_factor / config.mtp_num_layers
            total = total + factor * nll / _at_least_one(scales.num_targets[depth])
        router_loss = config.router_aux_loss_coef * balancing_L.sum() + config.router_z_loss_coef * z_L.sum()
        return ModelOutput(
            total=total + router_loss / scales.num_micro_batches,
            nll_lm_sum=nll_lm.detach(),
            nll_mtp_sums=torch.stack(nll_mtp).detach() if nll_mtp else nll_lm.new_zeros(0),
            aux_L=balancing_L.detach(),
            z_L=z_L.detach(),
            expert_counts_LE=torch.stack([layer.counts_rE.sum(0) for layer in stats]),
            router_entropy_L=torch.stack([layer.entropy for layer in stats]),
            nll_T=nll_T,
        )

    def forward_hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Hidden states after the final norm ``[T, D]``."""
        (hidden_TD,), _ = self.model([batch.input_ids_T], [self._context(batch)])
        return hidden_TD

    def forward_logits(self, batch: PackedBatch) -> torch.Tensor:
        """Next-token logits ``[T, V]``, all at once: for evaluation of small batches and tests."""
        return self.lm_head(self.forward_hidden(batch))

    def next_token_nll(self, batch: PackedBatch) -> torch.Tensor:
        """Sum of next-token losses in nats, fp32 scalar, without MTP and router losses."""
        return self.lm_head(self.forward_hidden(batch), batch.labels_T)

    def next_logits(self, input_ids_T: torch.Tensor, counts: Sequence[int], cache: DecodingCache) -> torch.Tensor:
        """Let documents grow by some tokens: logits ``[D, V]`` of the token after each one's last.

        Rows are whole here, in a context or tensor group too: each of its ranks has all tokens.

        Args:
            input_ids_T: int64 ``[T]``, the new tokens, document after document.
            counts: how many each document gets, any number at first, then one.
            cache: what is kept of the documents; grows with them.
        """
        cache.advance(counts)
        rotary = self._rotary(cache.positions_T)
        context = BatchContext(cache.sequences, rotary, num_rows=1, head_group=self.head_group, cache=cache)
        (hidden_TD,), _ = self.model([input_ids_T], [context])
        return self.lm_head(hidden_TD[cache.sequences.cu_seqlens[1:].long() - 1])

    def _context(self, batch: PackedBatch) -> BatchContext:
        sequences = VarlenMetadata(batch.cu_seqlens, batch.cu_seqlens_cpu)
        rotary = self._rotary(batch.positions_U)
        return BatchContext(sequences, rotary, batch.num_rows, self._slices(batch), self.head_group)

    def _rotary(self, positions_U: torch.Tensor) -> RotaryTable:
        config = self.config
        return rotary_table(
            positions_U, head_dim=config.head_dim, fraction=config.partial_rotary_factor, theta=config.rope_theta
        )

    def _slices(self, batch: PackedBatch) -> SlicedSequences | None:
        if batch.slices is None:
            assert self.sequence_group is None, "whole rows in a context group"
            return None
        assert self.sequence_group is not None, "slices of rows without the ranks that have the rest"
        return SlicedSequences.of(batch.slices, self.sequence_group)

    def _predict_further(
        self, hiddens_TD: list[torch.Tensor], batches: Sequence[PackedBatch], contexts: Sequence[BatchContext]
    ) -> Iterator[tuple[list[torch.Tensor], list[RouterStats], list[Summed]]]:
        """Loss sums, router statistics and counts of the micro-batches, by MTP depth."""
        if self.mtp is None:
            return
        previous_T = [batch.labels_T for batch in batches]
        for depth in range(1, self.config.mtp_num_layers + 1):
            targets_T = [batch.mtp_targets[depth - 1] for batch in batches]
            embeddings_TD = [self.model.embed_tokens(input_ids(targets)) for targets in previous_T]
            hiddens_TD, stats = self.mtp(hiddens_TD, embeddings_TD, depth, contexts)
            counts = [self._count([layer]) for layer in stats]
            yield [self.lm_head(h, targets) for h, targets in zip(hiddens_TD, targets_T, strict=True)], stats, counts
            previous_T = targets_T


def _at_least_one(count: float | torch.Tensor) -> float | torch.Tensor:
    """A step without a single target has loss 0, not 0 / 0."""
    return count.clamp(min=1) if isinstance(count, torch.Tensor) else max(count, 1)
