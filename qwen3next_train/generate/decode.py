"""The loop that lets documents grow: each token costs one pass of one token through the model.

Letters: D documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from qwen3next_train.generate.sampling import NO_TOKEN, Continuation, FinishReason, Sampler, Sampling
from qwen3next_train.model.decoding_cache import DecodingCache
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM

Agree = Callable[[torch.Tensor], torch.Tensor]
"""Makes the tokens int64 ``[D]`` that a rank has chosen the same on all ranks; may work in place."""


@torch.no_grad()
def continue_prompts(
    model: Qwen3NextForCausalLM,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    end_token_id: int | None,
    max_batch_tokens: int,
    device: torch.device,
    agree: Agree = lambda chosen_D: chosen_D,
) -> list[Continuation]:
    """Continue prompts, several at a time.

    Where ranks share a model, all of them have to call this with the same arguments: each computes every document, and
    ``agree`` keeps them together where rounding does not.

    Args:
        model: in evaluation mode, on ``device``.
        prompts: token ids of each, at least one.
        sampling: how they go on.
        end_token_id: the token that ends a document; None: no token does.
        max_batch_tokens: tokens of the prompts that go on together, each counted as the longest of them with its new
            ones, which is what an attention layer keeps; a longer one goes alone.
        device: where to run.
        agree: see above.
    """
    results: list[Continuation] = []
    for batch in _batches(prompts, sampling.max_new_tokens, max_batch_tokens):
        sampler = Sampler(sampling, len(results), len(batch))

        def choose(logits_DV: torch.Tensor, sampler: Sampler = sampler) -> list[int]:
            tokens: list[int] = agree(sampler.choose(logits_DV)).tolist()
            return tokens

        results += _continue_batch(model, batch, choose, sampling.max_new_tokens, end_token_id, device)
    return results


def _continue_batch(
    model: Qwen3NextForCausalLM,
    prompts: Sequence[Sequence[int]],
    choose: Callable[[torch.Tensor], list[int]],
    max_new_tokens: int,
    end_token_id: int | None,
    device: torch.device,
) -> list[Continuation]:
    cache = DecodingCache(len(prompts), max(map(len, prompts)) + max_new_tokens, device)
    ids: list[list[int]] = [[] for _ in prompts]
    reasons: list[FinishReason | None] = [None] * len(prompts)
    new, counts = [token for prompt in prompts for token in prompt], [len(prompt) for prompt in prompts]
    for _ in range(max_new_tokens):
        logits_DV = model.next_logits(torch.tensor(new, device=device), counts, cache)
        # A document that has ended goes on with the others, and nobody looks at it.
        new, counts = choose(logits_DV), [1] * len(prompts)
        for document, token in enumerate(new):
            if token == NO_TOKEN:
                new[document] = 0
            if reasons[document] is not None:
                continue
            if token == NO_TOKEN:
                reasons[document] = "not_finite"
            elif token == end_token_id:
                reasons[document] = "stop"
            else:
                ids[document].append(token)
        if None not in reasons:
            break
    return [Continuation(tokens, reason or "length") for tokens, reason in zip(ids, reasons, strict=True)]


def _batches(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, max_batch_tokens: int
) -> Iterator[list[Sequence[int]]]:
    batch: list[Sequence[int]] = []
    for prompt in prompts:
        longest = max(map(len, [*batch, prompt])) + max_new_tokens
        if batch and (len(batch) + 1) * longest > max_batch_tokens:
            yield batch
            batch = []
        batch.append(prompt)
    if batch:
        yield batch
