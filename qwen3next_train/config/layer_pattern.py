"""Megatron-LM's ``--linear-attention-freq`` patterns: ``([1,1,1,0]*12)``, parsed without ``eval``."""

from __future__ import annotations

import re

from qwen3next_train.config.validate import MAX_LAYERS

_MAX_TEXT = 10 * MAX_LAYERS
_MAX_DEPTH = 20
_TOKEN = re.compile(r"\s*(0|[1-9][0-9]{0,5}|[-+*()\[\],])")

Operand = int | list[int]


class PatternError(ValueError):
    """The text is not a pattern; the message says why."""


def parse_pattern(text: str) -> Operand:
    """Value of a sum of products of integers and ``[...]`` lists, with or without spaces.

    Raises:
        PatternError: when the text is not such an expression or unfolds to more layers than are allowed.
    """
    if len(text) > _MAX_TEXT:
        raise PatternError("too long")
    tokens, position = [], 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if not match:
            raise PatternError(f"unexpected {stripped[position : position + 10].strip()!a}")
        tokens.append(match[1])
        position = match.end()
    parser = _Parser(tokens)
    value = parser.sum(0)
    parser.expect("")
    return value


class _Parser:
    """Recursive descent over ``sum := product ('+' product)*``, ``product := atom ('*' atom)*``."""

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens
        self._next = 0

    def sum(self, depth: int) -> Operand:
        value = self._product(depth)
        while self._peek() == "+":
            self._next += 1
            value = _checked(_add(value, self._product(depth)))
        return value

    def expect(self, token: str) -> None:
        if self._peek() != token:
            raise PatternError(f"expected {token or 'the end'} but found {self._peek() or 'the end'}")
        self._next += 1

    def _product(self, depth: int) -> Operand:
        value = self._atom(depth)
        while self._peek() == "*":
            self._next += 1
            value = _multiply(value, self._atom(depth))
        return value

    def _atom(self, depth: int) -> Operand:
        token = self._peek()
        if token.isdigit():
            self._next += 1
            return int(token)
        if token == "[":
            return self._list()
        self.expect("(")
        if depth == _MAX_DEPTH:
            raise PatternError(f"more than {_MAX_DEPTH} nested brackets")
        value = self.sum(depth + 1)
        self.expect(")")
        return value

    def _list(self) -> list[int]:
        self.expect("[")
        items: list[int] = []
        while self._peek() != "]":
            if items:
                self.expect(",")
            token = self._peek()
            if not token.isdigit():
                raise PatternError(f"expected 0 or 1 but found {token or 'the end'}")
            items.append(int(token))
            self._next += 1
        self.expect("]")
        return items

    def _peek(self) -> str:
        return self._tokens[self._next] if self._next < len(self._tokens) else ""


def _add(left: Operand, right: Operand) -> Operand:
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    raise PatternError("a list and a number cannot be added")


def _multiply(left: Operand, right: Operand) -> Operand:
    if isinstance(left, list) and isinstance(right, list):
        raise PatternError("two lists cannot be multiplied")
    if isinstance(left, int) and isinstance(right, int):
        return _checked(left * right)
    items, count = (left, right) if isinstance(left, list) else (right, left)
    assert isinstance(items, list)
    assert isinstance(count, int)
    # Checked before the list is built: [1]*999999*999999 would take all memory.
    if len(items) * count > MAX_LAYERS:
        raise PatternError(f"more than {MAX_LAYERS} layers")
    return items * count


def _checked(value: Operand) -> Operand:
    if isinstance(value, list) and len(value) > MAX_LAYERS:
        raise PatternError(f"more than {MAX_LAYERS} layers")
    if isinstance(value, int) and value > 10**9:
        raise PatternError("a number that is too large")
    return value
