"""Every configuration field does something: it is read somewhere outside ``config/``.

Reads are found in the syntax trees. What holds a section is followed through annotations, assignments, loops and
attributes of the same name, without regard to order or scope: enough to tell ``checkpoint.interval`` from
``eval.interval``.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from typing import get_args

from pydantic import BaseModel

from qwen3next_train.config import schema
from tests.architecture.tree import modules

SECTIONS: dict[str, type[BaseModel]] = {
    name: value
    for name, value in vars(schema).items()
    if isinstance(value, type) and issubclass(value, schema.Section) and value is not schema.Section
}
READ_BY_CONFIG_ITSELF = {
    ("ModelConfig", "full_attention_interval"),
    ("ModelConfig", "max_position_embeddings"),
    ("ScheduleConfig", "decay_steps"),
    ("ScheduleConfig", "rampup_batch_size"),
    ("SourceConfig", "alias"),
}
"""The first is resolved into ``layer_types`` when a configuration is loaded, the second bounds the sequence length, the
third is half of ``config.curve.decay_span``, of the fourth ``config.batch_size`` makes the batch of every step, of
the fifth ``config.metric_names`` the names of metrics."""

Holders = defaultdict[str, set[str]]


class _Reader(ast.NodeVisitor):
    """Collects ``(section class, field)`` pairs that one module reads.

    Args:
        attributes: attribute names known to hold sections, shared by all modules.
    """

    def __init__(self, attributes: Holders) -> None:
        self.attributes = attributes
        self.names: Holders = defaultdict(set)
        self.reads: set[tuple[str, str]] = set()

    def sections_of(self, node: ast.expr) -> set[str]:
        if isinstance(node, ast.Name):
            return self.names[node.id]
        if not isinstance(node, ast.Attribute):
            return set()
        found = set(self.attributes[node.attr])
        for holder in self.sections_of(node.value):
            if node.attr in SECTIONS[holder].model_fields:
                self.reads.add((holder, node.attr))
                found |= _sections_named(SECTIONS[holder].model_fields[node.attr].annotation)
        return found

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.sections_of(node)
        self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> None:
        self.names[node.arg] |= _sections_in(node.annotation)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if isinstance(node.target, ast.Name):
            self.names[node.target.id] |= _sections_in(node.annotation)
            self.attributes[node.target.id] |= _sections_in(node.annotation)
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self._bind(target, node.value)
        self.generic_visit(node)

    def visit_For(self, node: ast.For) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        self._bind(node.target, node.iter)
        self.generic_visit(node)

    def _bind(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            for one_target, one_value in zip(target.elts, value.elts, strict=False):
                self._bind(one_target, one_value)
        elif isinstance(target, ast.Name):
            self.names[target.id] |= self.sections_of(value)
        elif isinstance(target, ast.Attribute):
            self.attributes[target.attr] |= self.sections_of(value)


def _sections_in(annotation: ast.expr | None) -> set[str]:
    """Sections an annotation names, inside unions and containers too."""
    if annotation is None:
        return set()
    return {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)} & set(SECTIONS)


def _sections_named(annotation: object) -> set[str]:
    """The section class of a field, or that of its items."""
    candidates = (annotation, *get_args(annotation))
    return {item.__name__ for item in candidates if isinstance(item, type) and item.__name__ in SECTIONS}


def test_every_field_is_read_outside_config() -> None:
    attributes: Holders = defaultdict(set)
    readers = {path: _Reader(attributes) for path in modules() if not path.startswith("qwen3next_train/config/")}
    for _ in range(3):  # holders found late in one pass are known in the next
        for path, reader in readers.items():
            reader.visit(modules()[path])
    reads = set().union(*(reader.reads for reader in readers.values()))
    fields = {(name, field) for name, section in SECTIONS.items() for field in section.model_fields}
    assert sorted(fields - reads - READ_BY_CONFIG_ITSELF) == []
