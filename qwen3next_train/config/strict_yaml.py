"""A strict subset of YAML: mappings, lists and scalars that mean what they look like.

PyYAML follows YAML 1.1, where ``1e-3`` is text, ``no`` is false, ``0123`` is 83, ``12:30`` is 750, a repeated
key silently wins, and a few hundred bytes of aliases unfold into gigabytes. Here scalars follow the core
schema of YAML 1.2 without octal and hexadecimal numbers, and everything else is rejected with its line.
"""

from __future__ import annotations

import os
import re
import select
import signal
from pathlib import Path
from typing import Any

import yaml

from qwen3next_train.errors import ConfigError, StoppedBySignal

MAX_BYTES = 1_000_000
MAX_DEPTH = 20
MAX_NODES = 20_000
_POLL_S = 0.1
_MAX_SHOWN = 60
_MEND_FILE = "check indentation, colons and quotes"
_MEND_WORD = """check brackets and quotes; a name that begins with a bracket is written '["NAME"]'"""

Value = str | int | float | bool | None | list["Value"] | dict[str, "Value"]

# Integers of more than 18 digits stay text: no setting is that large, and they would overflow later.
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,17})")
_FLOAT = re.compile(r"[-+]?([0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_CONSTANTS: dict[str, bool | None] = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}


def read_yaml(path: Path) -> Value:
    """Parse a file.

    Returns:
        The document's value, always a mapping of text keys at the top.

    Raises:
        ConfigError: one line naming the file, the line and what is not allowed.
        StoppedBySignal: a signal came that is held, while a pipe said nothing.
    """
    try:
        raw = _read(path, MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); name a readable YAML file") from error
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{path}: larger than {MAX_BYTES} bytes; a configuration is a few kilobytes of YAML")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8 text") from error
    value = parse_yaml(text, str(path))
    if value is None:
        raise ConfigError(f"{path}: empty; give sections such as 'run:' and 'model:'")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise ConfigError(f"{path}: {kind} instead of sections; give sections such as 'run:' and 'model:'")
    return value


def _read(path: Path, size: int) -> bytes:
    """Up to ``size`` bytes. A pipe's writer is waited for, but for no longer than until somebody ends the program.

    Raises:
        OSError: the file cannot be read.
        StoppedBySignal: as :func:`read_yaml`.
    """
    # Opened otherwise, a named pipe that nobody writes to would be waited for; so it is empty.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    raw = b""
    try:
        while len(raw) < size:
            try:
                piece = os.read(descriptor, size - len(raw))
            except BlockingIOError:
                if (waiting := signal.sigpending()) and not select.select([descriptor], (), (), 0)[0]:
                    name = signal.Signals(min(waiting)).name
                    raise StoppedBySignal(f"{path}: {name} came before the configuration") from None
                select.select([descriptor], (), (), _POLL_S)
                continue
            if not piece:
                break
            raw += piece
    finally:
        os.close(descriptor)
    return raw


def parse_yaml(text: str, origin: str) -> Value:
    """Parse one document; ``origin`` (a file or an option) begins the error line.

    Raises:
        ConfigError: when the text is not YAML of the strict subset.
    """
    try:
        node = _compose(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}: " if mark else ""
        raise ConfigError(f"{origin}: {where}{_explain(error.problem or error.context or 'not YAML')}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{origin}: not YAML text ({' '.join(str(error).split())}); save it as plain text") from error
    return None if node is None else _construct(node, origin, "")


def parse_scalar(text: str, origin: str) -> Value:
    """The value of a command line word: a scalar, or a list or mapping in brackets.

    Raises:
        ConfigError: when what begins with a bracket or a quote is not YAML of the strict subset.
    """
    if text[:1] not in ("[", "{", '"', "'"):
        return plain_value(text)
    try:
        node = _compose(text)
    except yaml.YAMLError as error:
        # Not a line of a file: there is a word to show, and nothing to indent.
        problem = error.problem or error.context if isinstance(error, yaml.MarkedYAMLError) else str(error)
        problem, _, remedy = _explain(problem or "", remedy=_MEND_WORD).partition("; ")
        shown = ascii(text) if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]!a}..."
        raise ConfigError(f"{origin}: {problem} (got {shown}); {remedy}") from error
    return None if node is None else _construct(node, origin, "")


def plain_value(text: str) -> str | int | float | bool | None:
    """What an unquoted scalar means."""
    if text in _CONSTANTS:
        return _CONSTANTS[text]
    if _INT.fullmatch(text):
        return int(text)
    if _FLOAT.fullmatch(text):
        return float(text)
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", "").lower())
    return text


def is_shallow(value: object, max_depth: int = MAX_DEPTH) -> bool:
    """Whether mappings and lists are nested no deeper than ``max_depth``, so that all of Python can walk them."""
    if not isinstance(value, dict | list):
        return True
    items = value.values() if isinstance(value, dict) else value
    return max_depth > 0 and all(is_shallow(item, max_depth - 1) for item in items)


def dump_yaml(value: Value) -> str:
    """Write a value as ASCII so that both this reader and any YAML 1.1 reader get it back, floats bit for bit."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=120)


def _compose(text: str) -> yaml.Node | None:
    """The one document of a text.

    Raises:
        yaml.YAMLError: it is not YAML of the strict subset.
    """
    loader = _StrictLoader(text)
    try:
        node: yaml.Node | None = loader.get_single_node()
        return node
    finally:
        loader.dispose()


class _StrictLoader(yaml.SafeLoader):
    """Rejects everything beyond plain trees while the node tree is composed."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth = 0
        self._num_nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        """Compose one node after checking the event it starts with."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        self._depth += 1
        self._num_nodes += 1
        rejection = ""
        if isinstance(event, yaml.AliasEvent):
            rejection = "aliases (*name) are not supported; write the value out"
        elif event.anchor is not None:
            rejection = "anchors (&name) are not supported; write the value where it is used"
        elif event.tag is not None:
            rejection = "tags (!name) are not supported; write the plain value"
        elif self._depth > MAX_DEPTH:
            rejection = f"nested deeper than {MAX_DEPTH} levels; flatten it"
        elif self._num_nodes > MAX_NODES:
            rejection = f"more than {MAX_NODES} values; a configuration is a few hundred"
        if rejection:
            raise yaml.composer.ComposerError(None, None, rejection, event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as something else, keeps lists of scalars on one line."""

    def ignore_aliases(self, data: object) -> bool:
        """Never write aliases: the reader rejects them."""
        return True


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.ScalarNode:
    style = None if isinstance(plain_value(data), str) else "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


def _represent_list(dumper: yaml.SafeDumper, data: list[Value]) -> yaml.SequenceNode:
    flow = not any(isinstance(item, dict | list) for item in data)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=flow)


_Dumper.add_representer(str, _represent_text)
_Dumper.add_representer(list, _represent_list)


def _explain(problem: str, *, remedy: str = _MEND_FILE) -> str:
    problem = " ".join(problem.split())
    if "'\\t'" in problem:
        return "a tab where YAML wants spaces; indent with spaces"
    if problem.startswith("expected a single document") or "but found another document" in problem:
        return "a second document ('---'); keep one document per file"
    if ";" in problem:
        return problem
    return f"not YAML: {problem}; {remedy}"


def _construct(node: yaml.Node, origin: str, path: str) -> Value:
    if isinstance(node, yaml.ScalarNode):
        return plain_value(node.value) if node.style is None else str(node.value)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(item, origin, f"{path}[{index}]") for index, item in enumerate(node.value)]
    assert isinstance(node, yaml.MappingNode)
    result: dict[str, Value] = {}
    lines: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError(f"{origin}: line {line}: a key that is not a word; write 'key: value'")
        name = str(key_node.value)
        shown = name if name.isascii() and name.isprintable() else ascii(name)
        key = f"{path}.{shown}" if path else shown
        if name == "<<":
            raise ConfigError(f"{origin}: line {line}: merge keys (<<) are not supported; write the keys out")
        if name in lines:
            raise ConfigError(f"{origin}: {key}: given twice (lines {lines[name]} and {line}); keep one of them")
        lines[name] = line
        result[name] = _construct(value_node, origin, key)
    return result
