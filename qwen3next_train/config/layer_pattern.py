"""Megatron-LM's ``--linear-attention-freq`` patterns: ``([1,1,1,0]*12)``, read by Python's parser, never evaluated."""

from __future__ import annotations

import ast
import re
from itertools import accumulate

from qwen3next_train.config.validate import MAX_LAYERS

_MAX_TEXT = 10 * MAX_LAYERS
_MAX_DEPTH = 20
_MAX_OPERATORS = 200  # each is a level of the tree, and of the walk over it
_NUMBER = r"(?:0|[1-9][0-9]{0,5})(?![0-9])"
_LIST = rf"\[ ?(?:{_NUMBER} ?(?:, ?{_NUMBER} ?)*)?\]"
# Of all that Python would read, what a pattern is made of; brackets need only match.
_WORDS = re.compile(rf" ?(?:{_NUMBER}|{_LIST}|[+*()])")

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
    text = " ".join(text.split())
    position = 0
    while position < len(text):
        if not (word := _WORDS.match(text, position)):
            raise PatternError(f"unexpected {text[position : position + 10].strip()!a}")
        position = word.end()
    if max(accumulate((char == "(") - (char == ")") for char in text), default=0) > _MAX_DEPTH:
        raise PatternError(f"more than {_MAX_DEPTH} nested brackets")
    if text.count("+") + text.count("*") > _MAX_OPERATORS:
        raise PatternError(f"more than {_MAX_OPERATORS} operators")
    try:
        tree = ast.parse(text, mode="eval")
    except SyntaxError as error:
        raise PatternError(error.msg) from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PatternError("cannot be read") from error
    return _value(tree.body)


def _value(node: ast.expr) -> Operand:
    match node:
        case ast.Constant() | ast.List():
            literal: Operand = ast.literal_eval(node)  # _WORDS let through integers and lists of them only
            return literal
        case ast.BinOp(op=ast.Add()):
            return _checked(_add(_value(node.left), _value(node.right)))
        case ast.BinOp(op=ast.Mult()):
            return _checked(_multiply(_value(node.left), _value(node.right)))
    raise PatternError(f"unexpected {ast.unparse(node)[:20]!a}")


def _add(left: Operand, right: Operand) -> Operand:
    if isinstance(left, list) and isinstance(right, list):
        return left + right
    if isinstance(left, int) and isinstance(right, int):
        return left + right
    raise PatternError("a list and a number cannot be added")


def _multiply(left: Operand, right: Operand) -> Operand:
    if isinstance(left, int):
        return left * right if isinstance(right, int) else _multiply(right, left)
    if isinstance(right, list):
        raise PatternError("two lists cannot be multiplied")
    # Checked before the list is built: [1]*999999*999999 would take all memory.
    if len(left) * right > MAX_LAYERS:
        raise PatternError(f"more than {MAX_LAYERS} layers")
    return left * right


def _checked(value: Operand) -> Operand:
    if isinstance(value, list) and len(value) > MAX_LAYERS:
        raise PatternError(f"more than {MAX_LAYERS} layers")
    if isinstance(value, int) and value > 10**9:
        raise PatternError("a number that is too large")
    return value
