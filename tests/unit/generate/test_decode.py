"""The loop against whole documents that are run again for every token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.generate.decode import continue_prompts
from qwen3next_train.generate.sampling import Continuation, Sampling
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from tests.unit.model.small_models import CPU, build, small_config

PROMPTS = [[5], [7, 8], list(range(25)), [1, 2, 3, 4, 5]]
COUNT = 6
"""New tokens."""

LAYERS = ["linear_attention", "full_attention", "linear_attention"]


@pytest.fixture(scope="module")
def model() -> Qwen3NextForCausalLM:
    return build(small_config(layer_types=LAYERS, num_hidden_layers=3, initializer_range=0.4)).eval()


def go_on(
    model: Qwen3NextForCausalLM,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    end: int | None = None,
    max_batch_tokens: int = 10**6,
    agree: Callable[[torch.Tensor], torch.Tensor] | None = None,
    **settings: float,
) -> list[Continuation]:
    sampling = Sampling(**({"max_new_tokens": COUNT} | settings))
    more = {} if agree is None else {"agree": agree}
    return continue_prompts(
        model, prompts, sampling, end_token_id=end, max_batch_tokens=max_batch_tokens, device=CPU, **more
    )


def by_whole_documents(model: Qwen3NextForCausalLM, prompt: Sequence[int], count: int) -> list[int]:
    ids = list(prompt)
    for _ in range(count):
        row = PackedRow(np.array([*ids, 0]), np.array([0, len(ids)]), ends_inside_document=True)
        with torch.no_grad():
            ids.append(int(model.forward_logits(PackedBatch.from_rows([row], mtp_depths=0))[-1].argmax()))
    return ids[len(prompt) :]


def test_greedy_equals_whole_documents_in_any_batch(model: Qwen3NextForCausalLM) -> None:
    expected = [Continuation(by_whole_documents(model, prompt, COUNT), "length") for prompt in PROMPTS]
    assert len({tuple(each.ids) for each in expected}) == len(PROMPTS)
    assert min(len(set(each.ids)) for each in expected) > 3
    for max_batch_tokens in (1, 20, 10**6):
        assert go_on(model, max_batch_tokens=max_batch_tokens) == expected


def test_a_document_ends_with_its_token_and_the_others_go_on(model: Qwen3NextForCausalLM) -> None:
    whole = [each.ids for each in go_on(model)]
    end = whole[2][3]
    for ids, found in zip(whole, go_on(model, end=end), strict=True):
        stop = ids.index(end) if end in ids else None
        assert found == Continuation(ids[:stop], "length" if stop is None else "stop")


def test_nothing_is_computed_once_all_have_ended(model: Qwen3NextForCausalLM) -> None:
    calls: list[int] = []

    def always_three(chosen_D: torch.Tensor) -> torch.Tensor:
        calls.append(len(chosen_D))
        return torch.full_like(chosen_D, 3)

    assert go_on(model, end=3, agree=always_three) == [Continuation([], "stop")] * 4
    assert calls == [4]


def test_the_ranks_go_on_with_what_they_agree_on(model: Qwen3NextForCausalLM) -> None:
    script = iter(range(20, 20 + COUNT))
    (found,) = go_on(model, [[5]], agree=lambda chosen_D: torch.full_like(chosen_D, next(script)))
    assert found == Continuation(list(range(20, 20 + COUNT)), "length")


def test_drawn_documents_depend_on_seed_and_number_alone(model: Qwen3NextForCausalLM) -> None:
    drawn = go_on(model, temperature=1.0, seed=3)
    state = torch.get_rng_state()
    assert go_on(model, temperature=1.0, seed=3, max_batch_tokens=1) == drawn
    assert go_on(model, temperature=1.0, seed=4)[:3] == go_on(model, temperature=1.0, seed=4, max_batch_tokens=40)[:3]
    assert go_on(model, temperature=1.0, seed=4) != drawn
    assert go_on(model, PROMPTS[:1], temperature=1.0, seed=3) == drawn[:1]
    assert torch.equal(torch.get_rng_state(), state)


def test_logits_that_are_no_numbers_end_a_document() -> None:
    model = build(small_config()).eval()
    with torch.no_grad():
        model.model.embed_tokens.weight[5] = math.nan
    found = go_on(model, [[5], [6, 7]], max_new_tokens=2)
    assert found[0] == Continuation([], "not_finite")
    assert len(found[1].ids) == 2


def test_no_prompts_are_no_work(model: Qwen3NextForCausalLM) -> None:
    assert go_on(model, []) == []
