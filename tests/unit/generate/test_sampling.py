"""Which token comes next, against distributions by hand."""

from __future__ import annotations

import math

import pytest
import torch

from qwen3next_train.generate.sampling import NO_TOKEN, Sampler, Sampling, draw

PROBABILITIES = (0.1, 0.4, 0.2, 0.3)
LOGITS_DV = torch.tensor([PROBABILITIES]).log() + 5.0


def drawn(uniform: float, **settings: float) -> int:
    sampling = Sampling(1, **({"temperature": 1.0} | settings))
    return int(draw(LOGITS_DV, torch.tensor([uniform], dtype=torch.float64), sampling))


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        # The upper end of the uniform numbers that give each token, likeliest first.
        ({}, {1: 0.4, 3: 0.7, 2: 0.9, 0: 1.0}),
        ({"top_p": 0.65}, {1: 4 / 7, 3: 1.0}),
        ({"top_p": 0.75}, {1: 4 / 9, 3: 7 / 9, 2: 1.0}),
        ({"top_p": 1e-9}, {1: 1.0}),
        ({"top_k": 2}, {1: 4 / 7, 3: 1.0}),
        ({"top_k": 99}, {1: 0.4, 3: 0.7, 2: 0.9, 0: 1.0}),
        # Of the 3 likeliest, 4/9, 3/9 and 2/9, the first has less than 0.6, the first two have more.
        ({"top_k": 3, "top_p": 0.6}, {1: 4 / 7, 3: 1.0}),
        # Squares: 0.01, 0.16, 0.04, 0.09 of 0.3.
        ({"temperature": 0.5}, {1: 16 / 30, 3: 25 / 30, 2: 29 / 30, 0: 1.0}),
    ],
)
def test_a_token_is_drawn_as_often_as_it_is_likely(settings: dict[str, float], steps: dict[int, float]) -> None:
    least = 0.0
    for token, most in steps.items():
        assert drawn(least + 1e-6, **settings) == drawn(most - 1e-6, **settings) == token
        least = most
    assert drawn(0.0, **settings) == 1
    assert drawn(1 - 2**-53, **settings) == list(steps)[-1]


def test_greedy_takes_the_likeliest_and_draws_nothing() -> None:
    state = torch.get_rng_state()
    assert Sampler(Sampling(1), 0, 1).choose(LOGITS_DV).tolist() == [1]
    assert torch.equal(torch.get_rng_state(), state)


def test_what_a_document_draws_depends_on_its_number_alone() -> None:
    sampling = Sampling(1, temperature=1.0, seed=2**64 + 3)
    logits_DV = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    together, last = Sampler(sampling, 0, 4), Sampler(sampling, 3, 1)
    tokens = [together.choose(logits_DV).tolist() for _ in range(5)]
    assert [last.choose(logits_DV[3:]).tolist() for _ in range(5)] == [[row[3]] for row in tokens]
    assert torch.equal(torch.get_rng_state(), state)
    # Equal prompts go on differently, and a document draws anew for every token.
    same_DV = logits_DV[:1].expand(4, -1)
    rows = [Sampler(sampling, 0, 4).choose(same_DV).tolist() for _ in range(2)]
    assert rows[0] == rows[1]
    assert len(set(rows[0])) == 4
    assert len({tuple(row) for row in tokens}) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_no_numbers_have_no_next_token(temperature: float, bad: float) -> None:
    logits_DV = torch.cat([LOGITS_DV, LOGITS_DV])
    logits_DV[0, 2] = bad
    first, second = Sampler(Sampling(1, temperature=temperature), 0, 2).choose(logits_DV).tolist()
    assert first == NO_TOKEN
    assert second in range(4)
