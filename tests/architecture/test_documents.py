"""The documents against the tree: links lead somewhere, tests named as proof exist, decisions stay short."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.tree import ROOT

DOCUMENTS = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
MAX_DECISION_LINES = 40


@pytest.mark.parametrize("document", DOCUMENTS)
def test_relative_links_lead_somewhere(document: str) -> None:
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8"))
    dead = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert dead == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_named_tests_exist(document: str) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        functions = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert not name or name in functions, f"{document}: {file}::{name}"


def test_decisions_are_short_numbered_and_complete() -> None:
    paths = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [path.name[:4] for path in paths] == [f"{number:04d}" for number in range(1, len(paths) + 1)]
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= MAX_DECISION_LINES, path.name
        assert text.startswith(f"# {path.name[:4]} ")
        assert re.findall(r"^## (.*)", text, flags=re.MULTILINE) == ["Context", "Decision", "Consequences"]
