"""Documents that grow token by token have the logits that the whole documents have, at every position."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import LayerType
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.decoding_cache import DecodingCache
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from tests.unit.model.small_models import CPU, batch_of, build, small_config

# What fp32 rounds off the logits of whole documents themselves, of a magnitude of 2, compared with fp64.
ROUNDING = 1.3e-5

MIXERS: dict[str, list[LayerType]] = {
    "delta_net": ["linear_attention"],
    "attention": ["full_attention"],
    "hybrid": ["linear_attention", "full_attention", "linear_attention", "full_attention"],
}


def model_of(name: str, **changes: object) -> Qwen3NextForCausalLM:
    layers = MIXERS[name]
    return build(small_config(layer_types=layers, num_hidden_layers=len(layers), **changes)).eval()


def documents_of(batch: PackedBatch) -> list[torch.Tensor]:
    ends = batch.cu_seqlens_cpu.tolist()
    return [batch.input_ids_T[start:stop] for start, stop in pairwise(ends)]


@torch.no_grad()
def grown(model: Qwen3NextForCausalLM, documents: Sequence[torch.Tensor], first: Sequence[int]) -> list[torch.Tensor]:
    """Logits of each document from its token ``first - 1`` on, ``[length - first + 1, V]``.

    Args:
        model: which.
        documents: all as many tokens longer than their beginning.
        first: tokens that each begins with.
    """
    cache = DecodingCache(len(documents), max(map(len, documents)), CPU)
    beginning = torch.cat([document[:count] for document, count in zip(documents, first, strict=True)])
    logits = [model.next_logits(beginning, first, cache)]
    for step in range(len(documents[0]) - first[0]):
        new_T = torch.stack([document[count + step] for document, count in zip(documents, first, strict=True)])
        logits.append(model.next_logits(new_T, [1] * len(documents), cache))
    return list(torch.stack(logits, dim=1))


@pytest.mark.parametrize("mixers", list(MIXERS))
@pytest.mark.parametrize("lengths", [(1, 2, 3, 40, 67), (5,), (1,), (1, 1)])
def test_logits_are_those_of_the_whole_documents(mixers: str, lengths: tuple[int, ...]) -> None:
    """Beginnings shorter and longer than the convolution and a chunk, 9 tokens more each."""
    model = model_of(mixers)
    batch = batch_of([[length + 9 for length in lengths]])
    with torch.no_grad():
        expected_TV = model.forward_logits(batch)
    start = 0
    for length, found in zip(lengths, grown(model, documents_of(batch), lengths), strict=True):
        stop = start + length + 9
        torch.testing.assert_close(found, expected_TV[start + length - 1 : stop], rtol=0, atol=ROUNDING)
        start = stop


@pytest.mark.parametrize("mixers", list(MIXERS))
def test_in_fp64_they_are_equal_to_the_last_digits(mixers: str) -> None:
    model = model_of(mixers).double()
    batch = batch_of([[50, 42]])
    with torch.no_grad():
        expected_TV = model.forward_logits(batch)
    long, short = grown(model, documents_of(batch), [9, 1])
    torch.testing.assert_close(long, expected_TV[8:50], rtol=0, atol=1e-13)
    torch.testing.assert_close(short, expected_TV[50:], rtol=0, atol=1e-13)


def test_a_document_does_not_see_the_others() -> None:
    model = model_of("hybrid")
    alone, others = documents_of(batch_of([[20, 31]]))[0], documents_of(batch_of([[20, 31]], seed=1))
    together = grown(model, [others[1], alone], [19, 8])[1]
    torch.testing.assert_close(together, grown(model, [alone], [8])[0], rtol=0, atol=ROUNDING)


def test_what_a_delta_net_keeps_does_not_grow() -> None:
    model = model_of("delta_net")
    sizes = []
    for length in (9, 90):
        cache = DecodingCache(1, length, CPU)
        model.next_logits(torch.arange(length) % 61, [length], cache)
        (kept,) = cache._of_mixer.values()
        sizes.append(sum(x.numel() for x in vars(kept).values() if isinstance(x, torch.Tensor)))
    # 6 heads of 8 x 12, and 3 tokens of 2 x (8 + 8 + 36 + 36) projections.
    assert sizes == [6 * 8 * 12 + 3 * 176] * 2


def test_more_tokens_than_there_is_room_for_are_a_fault_here() -> None:
    model = model_of("attention")
    cache = DecodingCache(1, 4, CPU)
    model.next_logits(torch.arange(4), [4], cache)
    with pytest.raises(AssertionError, match="longer than was said"):
        model.next_logits(torch.arange(1), [1], cache)


def test_positions_go_on_where_each_document_ended() -> None:
    cache = DecodingCache(2, 7, CPU)
    cache.advance([3, 1])
    assert (cache.positions_T.tolist(), cache.slots_T.tolist(), cache.longest) == ([0, 1, 2, 0], [0, 1, 2, 7], 3)
    cache.advance([1, 1])
    assert (cache.positions_T.tolist(), cache.slots_T.tolist(), cache.longest) == ([3, 1], [3, 8], 4)
    assert cache.visible().squeeze().int().tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert isinstance(cache.sequences, VarlenMetadata)
