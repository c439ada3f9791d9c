"""Multi-token prediction: the docstring's worked example and what a depth is made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qwen3next_train.batch import IGNORE_INDEX, PackedBatch, PackedRow
from qwen3next_train.model.mtp import input_ids
from tests.unit.model.small_models import batch_of, build, scales_of, small_config

A, B, C, D, E, G = range(1, 7)
NONE = IGNORE_INDEX


def five_tokens(*, continues: bool) -> PackedBatch:
    return PackedBatch.from_rows([PackedRow(np.array([A, B, C, D, E, G]), np.array([0, 5]), continues)], mtp_depths=2)


def walk(batch: PackedBatch, depths: int) -> list[tuple[list[int], list[int]]]:
    """(tokens read, tokens predicted) by depth from 1."""
    read = (batch.labels_T, *batch.mtp_targets)
    assert len(batch.mtp_targets) == depths
    return [(input_ids(ids).tolist(), targets.tolist()) for ids, targets in zip(read, batch.mtp_targets, strict=False)]


def test_worked_example_of_a_whole_document() -> None:
    batch = five_tokens(continues=False)
    assert batch.labels_T.tolist() == [B, C, D, E, NONE]
    assert walk(batch, 2) == [
        ([B, C, D, E, 0], [C, D, E, NONE, NONE]),
        ([C, D, E, 0, 0], [D, E, NONE, NONE, NONE]),
    ]


def test_worked_example_of_a_document_that_goes_on_after_the_row() -> None:
    assert walk(five_tokens(continues=True), 2) == [
        ([B, C, D, E, G], [C, D, E, G, NONE]),
        ([C, D, E, G, 0], [D, E, G, NONE, NONE]),
    ]


@pytest.mark.parametrize("continues", [False, True])
def test_targets_are_those_the_batch_counted_and_stay_in_their_document(continues: bool) -> None:
    batch = batch_of([[1, 2, 3, 9], [4, 11]], mtp_depths=4, continues=continues)
    document_T = np.repeat(np.arange(6), np.diff(batch.cu_seqlens_cpu.numpy()))
    for depth, targets in enumerate(batch.mtp_targets, start=1):
        real = np.flatnonzero(targets != IGNORE_INDEX)
        assert len(real) == batch.num_targets[depth]
        for position in real:
            inside = position + depth
            assert document_T[inside] == document_T[position]
            assert targets[position] == batch.labels_T[inside]


def test_a_depth_reads_embedding_then_hidden_state() -> None:
    config = small_config(mtp_num_layers=2)
    model = build(config)
    batch = batch_of([[9, 7]], mtp_depths=2)
    mtp, embed = model.mtp, model.model.embed_tokens
    assert mtp is not None
    context = model._context(batch)
    hidden, sums = model.forward_hidden(batch), []
    for depth, read in enumerate((batch.labels_T, batch.mtp_targets[0])):
        embedding = embed(input_ids(read))
        joined = torch.cat((mtp.pre_fc_norm_embedding(embedding), mtp.pre_fc_norm_hidden(hidden)), dim=1)
        out, _ = mtp.layers[depth]([context], mtp.fc(joined))
        hidden = mtp.norm(out)
        sums.append(F.cross_entropy(model.lm_head(hidden), batch.mtp_targets[depth], reduction="sum"))
    torch.testing.assert_close(model([batch], scales_of(batch))[0].nll_mtp_sums, torch.stack(sums))


def test_mtp_loss_reaches_the_trunk_and_the_shared_head() -> None:
    model = build(small_config(router_aux_loss_coef=0.0))
    batch = batch_of([[9, 7]])
    output = model([batch], scales_of(batch))[0]
    (output.total - model.next_token_nll(batch) / batch.num_targets[0]).backward()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight", "mtp.fc.weight"):
        assert model.get_parameter(name).grad.abs().max() > 1e-6, name
