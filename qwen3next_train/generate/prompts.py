"""Prompts as tokens and tokens as text, or as ids where the model has no tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

from qwen3next_train.data.tokenization import Tokenizer
from qwen3next_train.errors import ConfigError

_MAX_SHOWN = 40


class Coder:
    """Turns prompts into tokens and tokens into text.

    Args:
        tokenizer: the model's; None: prompts are token ids between spaces or commas, and so is what is returned.
        vocab_size: ids that the model has.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size

    @property
    def end_token_id(self) -> int | None:
        """The token that ends a document, None where it is not known."""
        return None if self._tokenizer is None else self._tokenizer.eos_token_id

    def encode(self, prompt: str, label: str) -> list[int]:
        """Tokens of a prompt, at least one.

        Args:
            prompt: text, or ids.
            label: what to call it in messages.

        Raises:
            ConfigError: it has no token, or one that the model does not have.
        """
        if self._tokenizer is None:
            ids = self._parse(prompt, label)
        else:
            ids = next(self._tokenizer.encode_documents([prompt])).tolist()[:-1]
        if not ids:
            raise ConfigError(f"{label}: empty; give text to go on from")
        if max(ids) >= self._vocab_size:
            raise ConfigError(
                f"{label}: token {max(ids)} is not below the model's vocab_size {self._vocab_size}; "
                + ("give smaller ids" if self._tokenizer is None else "name the tokenizer that the model was made with")
            )
        return ids

    def decode(self, prompt_ids: Sequence[int], ids: Sequence[int]) -> str:
        """The text that the tokens behind a prompt add to it."""
        if self._tokenizer is None:
            return " ".join(map(str, ids))
        before, whole = self._tokenizer.decode(prompt_ids), self._tokenizer.decode([*prompt_ids, *ids])
        # A character may have begun in the prompt's last token; then what is added cannot be told from it.
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(ids)

    def _parse(self, prompt: str, label: str) -> list[int]:
        words = prompt.replace(",", " ").split()
        if not all(word.isascii() and word.isdecimal() and len(word) < 19 for word in words):
            raise ConfigError(
                f"{label}: the model came without a tokenizer, and this is no list of token ids (got "
                f"{prompt[:_MAX_SHOWN]!a}); name a tokenizer, or give ids such as '12 7 305'"
            )
        return [int(word) for word in words]


def require_room(
    prompt_ids: Sequence[int], max_new_tokens: int, limit: int, *, label: str, limit_name: str, setting: str
) -> None:
    """Reject a prompt that is, with what is to come, longer than the model can see.

    Args:
        prompt_ids: tokens.
        max_new_tokens: of what is to come.
        limit: tokens.
        label: what to call the prompt.
        limit_name: what to call the limit.
        setting: what says how many tokens are to come.

    Raises:
        ConfigError: the two are longer than the limit.
    """
    if len(prompt_ids) + max_new_tokens <= limit:
        return
    room = limit - len(prompt_ids)
    advice = f"give {setting} {room} or fewer, or a shorter prompt" if room > 0 else "give a shorter prompt"
    raise ConfigError(
        f"{label}: {len(prompt_ids)} tokens and {max_new_tokens} new ones are more than {limit_name} {limit}; {advice}"
    )
