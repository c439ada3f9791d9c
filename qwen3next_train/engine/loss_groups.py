"""Next-token loss by training source and by position in the document, for ``logging.loss_by``.

Sums of each micro-batch, made on the device and reduced with the step's other sums, so nothing waits for them. They are
plain sums over tokens: the same at every layout, but for rounding.

Letters: T tokens, r rows, G sources, P ranges of positions.
"""

from __future__ import annotations

import torch

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch
from qwen3next_train.config.metric_names import source_names
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import StepTotals

_FIRST_RANGE, _GROWTH = 16, 4
"""The first range is of 16 positions, and each begins four times as far on as the one before: a few for any row."""


class LossGroups:
    """What ``logging.loss_by`` asks for.

    Args:
        config: the resolved configuration.
    """

    def __init__(self, config: Config) -> None:
        groupings = config.logging.loss_by
        self._sources = source_names(config) if "source" in groupings else []
        self._firsts = range_starts(config.data.sequence_length) if "position" in groupings else []
        self._sizes = [*[len(self._sources)] * 3, *[len(self._firsts)] * 2]

    def __bool__(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._sources or self._firsts)

    def sums(self, batch: PackedBatch, nll_T: torch.Tensor) -> list[torch.Tensor]:
        """Sums of one micro-batch.

        Args:
            batch: on the device.
            nll_T: fp32 ``[T]``, loss of each position, 0 where there is no target.

        Returns:
            fp64, of losses, targets and tokens ``[G]`` each, then of losses and targets ``[P]`` each.
        """
        values_2T = torch.stack([nll_T.detach(), batch.labels_T != IGNORE_INDEX]).double()
        parts: list[torch.Tensor] = []
        if self._sources:
            # Matrix products, as sums by index are atomic on CUDA: their order, and last bit, would change.
            by_row_2r = values_2T.view(2, batch.num_rows, -1).sum(-1)
            of_source_rG = torch.zeros(batch.num_rows, len(self._sources), dtype=torch.float64)
            of_source_rG[range(batch.num_rows), batch.sources] = 1.0
            of_source_rG = _to(of_source_rG, nll_T.device)
            tokens_G = of_source_rG.sum(0) * (batch.num_tokens // batch.num_rows)
            parts += [*(by_row_2r @ of_source_rG).unbind(), tokens_G]
        if self._firsts:
            bounds = _to(torch.tensor([*self._firsts, 2**62]), nll_T.device)
            positions_T1 = batch.positions_T[:, None]
            in_range_TP = (positions_T1 >= bounds[:-1]) & (positions_T1 < bounds[1:])
            parts += (values_2T @ in_range_TP.double()).unbind()
        return parts

    @property
    def num_sums(self) -> int:
        """Numbers that :meth:`sums` returns."""
        return sum(self._sizes)

    def metrics(self, sums: torch.Tensor, totals: StepTotals) -> dict[str, float]:
        """Metrics of the sums over the global batch, ``[num_sums]`` on the host.

        A loss of no token is left out.
        """
        nll_G, targets_G, tokens_G, nll_P, targets_P = (part.tolist() for part in sums.split(self._sizes))
        named = zip(self._sources, nll_G, targets_G, strict=True)
        metrics = {f"loss/{name}": nll / targets for name, nll, targets in named if targets}
        shares = zip(self._sources, tokens_G, strict=True)
        metrics |= {f"data/share_{name}": tokens / totals.num_tokens for name, tokens in shares}
        ranged = zip(self._firsts, nll_P, targets_P, strict=True)
        return metrics | {f"loss/position_{first}": nll / targets for first, nll, targets in ranged if targets}


def range_starts(sequence_length: int) -> list[int]:
    """First positions of the ranges: 0, 16, 64, 256, ... as far as rows go."""
    starts = [0]
    first = _FIRST_RANGE
    while first < sequence_length:
        starts.append(first)
        first *= _GROWTH
    return starts


def _to(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a small tensor of the host without waiting for the device."""
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)
