"""Taking secrets out of text before it is logged, stored or uploaded.

A secret is known by the name of what holds it (``WANDB_API_KEY``, ``--hub.token``), by its value (that of an
environment variable with such a name) or by its shape (a Hugging Face token, a password inside a URL).
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

MASK = "***"

# "key" and "token" only at the end of a name: there are num_key_heads and tokens as well.
_SECRET_NAME = re.compile(
    r"secret|password|passwd|passphrase|(^|[^a-z0-9])(api_?key|key|token|credentials?|auth)([_-]?\d+)?$", re.IGNORECASE
)
_SECRET_SHAPE = re.compile(r"\b(hf_|ghp_|github_pat_|wandb_v1_|sk-)[A-Za-z0-9_-]{16,}")
_URL_PASSWORD = re.compile(r"(?P<scheme>[a-z][a-z0-9+.-]*://)[^\s/@]+@", re.IGNORECASE)
_MIN_VALUE_LENGTH = 8


class Redactor:
    """Masks the secrets of one environment.

    Args:
        environ: where secrets' values are taken from, usually ``os.environ``.
    """

    def __init__(self, environ: Mapping[str, str]) -> None:
        values = {value for name, value in environ.items() if _SECRET_NAME.search(name) and _is_secret_value(value)}
        # Longest first: a secret that contains another one is masked whole.
        self._values = sorted(values, key=len, reverse=True)

    def text(self, text: str) -> str:
        """``text`` with every secret replaced by ``***``."""
        for value in self._values:
            text = text.replace(value, MASK)
        return _URL_PASSWORD.sub(rf"\g<scheme>{MASK}@", _SECRET_SHAPE.sub(MASK, text))

    def argv(self, argv: Sequence[str]) -> list[str]:
        """A command line, with the values of arguments that are named like a secret masked as well."""
        redacted: list[str] = []
        is_secret = False
        for argument in argv:
            name, separator, _ = argument.partition("=")
            if is_secret and not argument.startswith("--"):
                redacted.append(MASK)
                is_secret = False
            elif separator and _SECRET_NAME.search(name):
                redacted.append(f"{name}={MASK}")
                is_secret = False
            else:
                redacted.append(self.text(argument))
                is_secret = argument.startswith("-") and _SECRET_NAME.search(argument) is not None
        return redacted

    def json(self, value: Any) -> Any:
        """A JSON value with every string in it redacted."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {key: self.json(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.json(item) for item in value]
        return value


def _is_secret_value(value: str) -> bool:
    """Short values ("true", "0") and paths (of a credentials file) are no secrets and occur everywhere."""
    return len(value) >= _MIN_VALUE_LENGTH and not os.path.exists(value)
