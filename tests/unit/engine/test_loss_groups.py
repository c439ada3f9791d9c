"""Next-token loss by source and position against sums over single tokens."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import torch

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch, PackedRow
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import StepTotals
from qwen3next_train.engine.loss_groups import LossGroups, range_starts
from qwen3next_train.row_slices import RowSlice

LENGTH = 96
SOURCES = (2, 0, 2, 0)


def config_of(*groupings: str) -> Config:
    sources = [{"source": "x/web"}, {"source": "never"}, {"source": "a.txt", "alias": "books"}]
    return Config.model_validate(
        {"data": {"sources": sources, "sequence_length": LENGTH}, "logging": {"loss_by": list(groupings)}}
    )


def batch_of(sources: tuple[int, ...] = SOURCES) -> PackedBatch:
    """Rows of a long document and two short ones."""
    boundaries = np.array([0, 70, 71, LENGTH])
    return PackedBatch.from_rows(
        [PackedRow(np.arange(LENGTH + 1), boundaries, index % 2 == 0, source) for index, source in enumerate(sources)],
        mtp_depths=0,
    )


def losses_of(batch: PackedBatch) -> torch.Tensor:
    losses_T = torch.rand(batch.num_tokens, generator=torch.Generator().manual_seed(0)) + 1
    return losses_T * (batch.labels_T != IGNORE_INDEX)


def metrics_of(groups: LossGroups, parts: list[tuple[PackedBatch, torch.Tensor]]) -> dict[str, float]:
    """Of a step with these micro-batches."""
    sums = torch.stack([torch.cat(groups.sums(batch, losses_T)) for batch, losses_T in parts]).sum(0)
    assert sums.dtype == torch.float64
    assert sums.numel() == groups.num_sums
    return groups.metrics(sums, StepTotals.over_ranks([batch for batch, _ in parts], list))


def test_groups_are_means_over_their_tokens() -> None:
    batch, groups = batch_of(), LossGroups(config_of("source", "position"))
    losses_T = losses_of(batch)
    by_name = defaultdict(list)
    for token, (loss, label) in enumerate(zip(losses_T.tolist(), batch.labels_T.tolist(), strict=True)):
        if label != IGNORE_INDEX:
            by_name["loss/" + ("web", "never", "books")[SOURCES[token // LENGTH]]].append(loss)
            position = int(batch.positions_T[token])
            by_name[f"loss/position_{max(first for first in (0, 16, 64) if first <= position)}"].append(loss)
    expected = {name: np.mean(values) for name, values in by_name.items()}
    shares = {"data/share_web": 0.5, "data/share_never": 0.0, "data/share_books": 0.5}
    assert metrics_of(groups, [(batch, losses_T)]) == pytest.approx(expected | shares, rel=1e-14)


def test_slices_and_micro_batches_have_the_sums_of_the_whole() -> None:
    batch, groups = batch_of(), LossGroups(config_of("source", "position"))
    losses_T = losses_of(batch)
    whole = metrics_of(groups, [(batch, losses_T)])
    sliced = []
    for index in range(4):
        part = batch.cut(RowSlice(index, 4, halo=3))
        sliced.append((part, losses_T.view(4, 4, -1)[:, index].flatten()))
    assert metrics_of(groups, sliced) == pytest.approx(whole, rel=1e-14)
    # The last position of every other row has a target; two rows by two are the same rows.
    halves = [(batch_of(SOURCES[start : start + 2]), losses_T.view(2, -1)[start // 2]) for start in (0, 2)]
    assert metrics_of(groups, halves) == pytest.approx(whole, rel=1e-14)


def test_what_is_not_asked_for_is_not_there() -> None:
    batch = batch_of()
    by_source = metrics_of(LossGroups(config_of("source")), [(batch, losses_of(batch))])
    by_position = metrics_of(LossGroups(config_of("position")), [(batch, losses_of(batch))])
    assert by_source.keys() == {
        *("loss/web", "loss/books"),
        *("data/share_web", "data/share_never", "data/share_books"),
    }
    assert by_position.keys() == {"loss/position_0", "loss/position_16", "loss/position_64"}
    nothing = LossGroups(config_of())
    assert not nothing
    assert nothing.num_sums == 0


def test_a_source_called_like_another_is_no_matter_without_the_grouping() -> None:
    config = Config.model_validate({"data": {"sources": [{"source": "a"}, {"source": "a"}]}})
    assert not LossGroups(config)


@pytest.mark.parametrize(
    ("length", "starts"),
    [
        (1, [0]),
        (16, [0]),
        (17, [0, 16]),
        (4096, [0, 16, 64, 256, 1024]),
        (262_144, [0, *(16 * 4**n for n in range(7))]),
    ],
)
def test_ranges_reach_as_far_as_rows(length: int, starts: list[int]) -> None:
    assert range_starts(length) == starts
