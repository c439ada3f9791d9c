"""Text and token ids of prompts, both ways."""

from __future__ import annotations

import pytest

from qwen3next_train.data.tokenization import BUILTIN, Tokenizer
from qwen3next_train.errors import ConfigError
from qwen3next_train.generate.prompts import Coder, require_room


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(BUILTIN)


def test_text_goes_both_ways(tokenizer: Tokenizer) -> None:
    coder = Coder(tokenizer, 4096)
    text = "def f(x):\n    return 'Grüße'"
    ids = coder.encode(text, "prompt")
    assert tokenizer.eos_token_id not in ids
    assert coder.end_token_id == tokenizer.eos_token_id
    for cut in range(1, len(ids)):
        before = tokenizer.decode(ids[:cut])
        if "\ufffd" not in before:
            assert before + coder.decode(ids[:cut], ids[cut:]) == text


def test_a_character_that_began_in_the_prompt_stands_with_what_is_added(tokenizer: Tokenizer) -> None:
    coder = Coder(tokenizer, 4096)
    first, *rest = coder.encode("\U0001f40d", "prompt")
    assert rest
    assert coder.decode([first], rest) in ("\U0001f40d", tokenizer.decode(rest))


def test_a_special_token_in_a_prompt_is_text_and_one_that_is_drawn_is_spelled(tokenizer: Tokenizer) -> None:
    coder = Coder(tokenizer, 4096)
    ids = coder.encode(tokenizer.eos_token, "prompt")
    assert len(ids) > 1
    assert coder.decode(ids, [tokenizer.eos_token_id]) == tokenizer.eos_token


@pytest.mark.parametrize("prompt", ["3 14 9", "3,14,9", " 3, 14\n9 "])
def test_without_a_tokenizer_prompts_are_ids(prompt: str) -> None:
    coder = Coder(None, 15)
    assert coder.encode(prompt, "prompt") == [3, 14, 9]
    assert coder.decode([3, 14, 9], [1, 0]) == "1 0"
    assert coder.end_token_id is None


@pytest.mark.parametrize(
    ("vocab_size", "has_tokenizer", "prompt", "text"),
    [
        (4096, True, "", "p: empty; give text to go on from"),
        (15, False, " ", "p: empty; give text to go on from"),
        (
            15,
            False,
            "1 -2",
            r"p: the model came without a tokenizer, and this is no list of token ids \(got '1 -2'\); name a tokenizer",
        ),
        (15, False, "x" * 99, r"\(got 'x{40}'\)"),
        (15, False, "1 15", "p: token 15 is not below the model's vocab_size 15; give smaller ids"),
        (15, False, "9" * 99, "no list of token ids"),
        (20, True, "def f", r"p: token \d+ is not below the model's vocab_size 20; name the tokenizer that"),
    ],
)
def test_bad_prompts(tokenizer: Tokenizer, vocab_size: int, has_tokenizer: bool, prompt: str, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Coder(tokenizer if has_tokenizer else None, vocab_size).encode(prompt, "p")


def test_room_for_what_is_to_come() -> None:
    require_room([1] * 6, 4, 10, label="p", limit_name="limit", setting="--new")
    with pytest.raises(ConfigError) as caught:
        require_room([1] * 7, 4, 10, label="p", limit_name="limit", setting="--new")
    assert str(caught.value) == (
        "p: 7 tokens and 4 new ones are more than limit 10; give --new 3 or fewer, or a shorter prompt"
    )
    with pytest.raises(ConfigError, match="more than limit 10; give a shorter prompt"):
        require_room([1] * 10, 4, 10, label="p", limit_name="limit", setting="--new")
