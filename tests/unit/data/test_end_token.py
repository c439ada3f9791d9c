from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen3next_train.data.end_token import EndToken, choose_end_token
from qwen3next_train.errors import ConfigError

VOCABULARY = {"a": 0, "<|endoftext|>": 1, "<|im_end|>": 2, "</s>": 3, "<stop>": 4}


def choose(folder: Path | None, asked: str = "") -> EndToken:
    return choose_end_token(asked, "tokenizer.json", folder, VOCABULARY)


@pytest.mark.parametrize("named", ["</s>", {"content": "</s>", "lstrip": False, "special": True}])
def test_the_settings_name_it_as_text_or_as_an_added_token(tmp_path: Path, named: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    assert choose(tmp_path) == EndToken("</s>", "tokenizer_config.json")


def test_the_configuration_comes_first_then_the_settings_then_the_usual_names(tmp_path: Path) -> None:
    assert choose(tmp_path) == EndToken("<|endoftext|>", "the usual name")
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<stop>"}')
    assert choose(tmp_path) == EndToken("<stop>", "special_tokens_map.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": null, "bos_token": "a"}')
    assert choose(tmp_path) == EndToken("<stop>", "special_tokens_map.json")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    assert choose(tmp_path) == EndToken("<|im_end|>", "tokenizer_config.json")
    assert choose(tmp_path, "a") == EndToken("a", "data.eos_token")
    assert choose(None) == EndToken("<|endoftext|>", "the usual name")


def test_a_token_that_the_tokenizer_lacks_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.eos_token: '<e>' is not a token of tokenizer\.json; name one"):
        choose(tmp_path, "<e>")
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<e>"}')
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: eos_token '<e>' is not a token .*data\.eos_token"):
        choose(tmp_path)
    assert choose(tmp_path, "</s>").token == "</s>"
    with pytest.raises(ConfigError, match=r"no end-of-document token, looked for .*; set data\.eos_token"):
        choose_end_token("", "tokenizer.json", None, {"a": 0})


@pytest.mark.parametrize(
    "content", [b"{", b"\xff", b"[" * 100_000, b"[]", b"3", b'{"eos_token": 3}', b'{"eos_token": ""}']
)
def test_damaged_settings_are_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"tokenizer_config\.json: ") as caught:
        choose(tmp_path)
    assert "\n" not in str(caught.value)
