"""Which token ends a document: the one asked for, else the one the tokenizer's own files name, else a usual one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwen3next_train.config.error_lines import json_problem
from qwen3next_train.data.reading import is_missing, read_small_file
from qwen3next_train.errors import ConfigError, DataError

EOS_CANDIDATES = ("<|endoftext|>", "<|im_end|>", "<|end_of_text|>", "</s>", "<eos>")
"""Tokens taken as end of document where nothing names one, the first that the tokenizer has."""

_MAX_SETTINGS_BYTES = 64 << 20
_SETTINGS_NAMES = ("tokenizer_config.json", "special_tokens_map.json")


@dataclass(frozen=True)
class EndToken:
    """The token that ends a document.

    Args:
        token: as it is spelled.
        named_by: what says so, for messages.
    """

    token: str
    named_by: str


def choose_end_token(asked: str, tokenizer: str, folder: Path | None, vocabulary: Mapping[str, int]) -> EndToken:
    """Find the token that ends a document.

    Args:
        asked: ``data.eos_token``, empty to leave it to the tokenizer.
        tokenizer: what to call the tokenizer in messages.
        folder: where its settings lie; None for one that has none.
        vocabulary: ids by token.

    Raises:
        ConfigError: the token is not in the vocabulary, the settings are damaged, or nothing names a token.
    """
    if asked:
        if asked not in vocabulary:
            raise ConfigError(
                f"data.eos_token: {asked!r} is not a token of {tokenizer}; name one of its tokens, or leave the key out"
            )
        return EndToken(asked, "data.eos_token")
    for name in _SETTINGS_NAMES if folder is not None else ():
        assert folder is not None
        token = named_in(folder / name)
        if token is not None and token not in vocabulary:
            raise ConfigError(
                f"data.tokenizer: {folder / name}: eos_token {token!r} is not a token of {tokenizer}; "
                "repair the file or set data.eos_token"
            )
        if token is not None:
            return EndToken(token, name)
    for token in EOS_CANDIDATES:
        if token in vocabulary:
            return EndToken(token, "the usual name")
    raise ConfigError(
        f"data.tokenizer: {tokenizer}: no end-of-document token, looked for {', '.join(EOS_CANDIDATES)}; "
        "set data.eos_token to one of its tokens"
    )


def named_in(path: Path) -> str | None:
    """The ``eos_token`` of a tokenizer's settings; None where there is no such file or it names none.

    Raises:
        ConfigError: the file is damaged or no file.
        StorageError: it cannot be read now.
    """
    if is_missing(path):
        return None
    try:
        settings = json.loads(read_small_file(path, max_bytes=_MAX_SETTINGS_BYTES))
    except DataError as error:
        raise ConfigError(f"data.tokenizer: {error}, or remove what has its name") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"data.tokenizer: {path}: cannot be read ({json_problem(error)}); repair or remove it"
        ) from None
    found = settings.get("eos_token") if isinstance(settings, dict) else settings
    token = found.get("content") if isinstance(found, dict) else found
    if token is None:
        return None
    if not isinstance(token, str) or not token:
        raise ConfigError(f"data.tokenizer: {path}: eos_token: expected a token, found {token!r}; repair the file")
    return token
