"""Which steps have samples, with what settings, and which prompts are refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import pytest

from qwen3next_train.config.schema import Config
from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.errors import ConfigError
from qwen3next_train.generate.sampling import Continuation, Sampling
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.train.samples import EncodedPrompts, TrainingSamples


def config_of(prompts: Sequence[str], **changes: Any) -> Config:
    values = {
        "run": {"steps": 7, "seed": 5, "micro_batch_size": 2},
        "data": {"sequence_length": 32},
        "eval": {"samples": {"prompts": list(prompts), "interval": 3, "max_new_tokens": 8, "temperature": 0.5}},
    }
    values["eval"]["samples"] |= changes.pop("samples", {})
    return Config.model_validate(values | changes)


class WritingEngine:
    """Goes on with two words, or with the end of the document at once."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def continue_prompts(self, prompts: Any, sampling: Sampling, **settings: int) -> list[Continuation]:
        self.calls.append((prompts, sampling, settings))
        words = next(Tokenizer(BUILTIN).encode_documents([" = x"])).tolist()[:-1]
        return [Continuation(words, "length"), *(Continuation([], "stop") for _ in prompts[1:])]


def test_samples_are_taken_at_the_interval_and_behind_the_last_step() -> None:
    config = config_of(["def f", "y"])
    prompts = EncodedPrompts.of(config)
    assert prompts is not None
    engine = WritingEngine()
    logged: list[tuple[int, list[Sample]]] = []
    samples = TrainingSamples(config, prompts, cast(Any, engine), lambda *row: logged.append(cast(Any, row)))
    for step in range(1, 8):
        samples.take(step, is_last=step == 7)
    count = len(next(Tokenizer(BUILTIN).encode_documents([" = x"]))) - 1
    taken = [Sample("def f", " = x", count, "length"), Sample("y", "", 0, "stop")]
    assert logged == [(3, taken), (6, taken), (7, taken)]
    ids, sampling, settings = engine.calls[0]
    assert [Tokenizer(BUILTIN).decode(each) for each in ids] == ["def f", "y"]
    assert sampling == Sampling(8, temperature=0.5, seed=5)
    assert settings == {"end_token_id": Tokenizer(BUILTIN).eos_token_id, "max_batch_tokens": 64}


def test_no_prompts_read_no_tokenizer() -> None:
    assert EncodedPrompts.of(config_of([], data={"tokenizer": "/nowhere"})) is None


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (
            config_of(["x", "y" * 999]),
            r"eval\.samples\.prompts: prompt 2: \d+ tokens and 8 new ones are more than data\.sequence_length 32; "
            "give a shorter prompt",
        ),
        (
            config_of(["x"], samples={"max_new_tokens": 32}),
            r"prompt 1: 1 tokens and 32 new ones .* give --eval\.samples\.max_new_tokens 31 or fewer",
        ),
        (config_of(["def"], model={"vocab_size": 20}), r"prompts: prompt 1: token \d+ is not below"),
        (config_of(["x"], data={"tokenizer": "/nowhere/t.json"}), r"data\.tokenizer: /nowhere/t\.json"),
    ],
)
def test_prompts_that_cannot_go_on_are_refused(config: Config, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        EncodedPrompts.of(config)
