"""Metrics of one step from its micro-batches, in one reduction over the ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.engine.base import StepTotals
from qwen3next_train.engine.host_copy import HostCopy
from qwen3next_train.engine.loss_groups import LossGroups
from qwen3next_train.metrics.moe import balance_metrics
from qwen3next_train.model.qwen3_next import ModelOutput


class StepReport:
    """Sums what the micro-batches of a step report, without waiting for the device.

    Letters: L MoE layers (MTP's included), E experts.

    Args:
        model: model section.
        groups: what the next-token loss is split by.
    """

    def __init__(self, model: ModelConfig, groups: LossGroups) -> None:
        self._model = model
        self._groups = groups
        self._sums: torch.Tensor | None = None
        self._reduced: HostCopy | None = None
        self._num_layers = model.num_hidden_layers + model.mtp_num_layers

    def add(self, output: ModelOutput, batch: PackedBatch) -> None:
        """Add one micro-batch; ``batch`` is on the device."""
        parts = [
            output.nll_lm_sum.reshape(1),
            output.nll_mtp_sums.reshape(-1),
            output.aux_L,
            output.z_L,
            output.router_entropy_L,
            output.expert_counts_LE.reshape(-1),
            *(self._groups.sums(batch, output.nll_T) if self._groups else ()),
        ]
        # fp64: token sums and expert counts of a large global batch exceed fp32's exact integers.
        values = torch.cat([part.detach().to(torch.float64) for part in parts])
        self._sums = values if self._sums is None else self._sums + values

    def begin_reduce(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Reduce over ranks and send to the host; to be called before the update is launched, which is long.

        Args:
            sum_over_ranks: in-place all-reduce.
        """
        assert self._sums is not None, "no micro-batch was added"
        self._reduced = HostCopy(sum_over_ranks(self._sums))

    def metrics(self, totals: StepTotals, *, with_layers: bool) -> dict[str, float]:
        """What was reduced, once it has arrived on the host.

        Args:
            totals: counts of the global batch.
            with_layers: include the per-layer MoE statistics.

        Returns:
            Metrics by name; losses in nats per token, before any scaling.
        """
        assert self._reduced is not None, "nothing was reduced"
        model, layers = self._model, self._num_layers
        depths = model.mtp_num_layers
        sizes = [1, depths, layers, layers, layers, layers * model.num_experts, self._groups.num_sums]
        lm, mtp, aux_L, z_L, entropy_L, counts, grouped = self._reduced.read().split(sizes)
        aux_L, z_L, entropy_L = (values / totals.num_micro_batches for values in (aux_L, z_L, entropy_L))
        metrics = {
            "loss/lm": float(lm) / max(totals.num_targets[0], 1),
            "loss/load_balancing": float(aux_L.mean()),
            "loss/z": float(z_L.mean()),
        }
        total = metrics["loss/lm"]
        total += model.router_aux_loss_coef * float(aux_L.sum()) + model.router_z_loss_coef * float(z_L.sum())
        if depths:
            by_depth = [float(nll) / max(count, 1) for nll, count in zip(mtp, totals.num_targets[1:], strict=True)]
            metrics["loss/mtp"] = sum(by_depth) / depths
            total += model.mtp_loss_scaling_factor * metrics["loss/mtp"]
        metrics["loss/total"] = total
        metrics |= self._groups.metrics(grouped, totals)
        counts_LE = counts.reshape(layers, model.num_experts)
        return metrics | balance_metrics(counts_LE, entropy_L, with_layers=with_layers)
