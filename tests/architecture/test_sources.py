"""Sizes, side effects and forbidden calls of the package's sources."""

from __future__ import annotations

import ast
import re

import pytest

from tests.architecture.tree import PACKAGE, ROOT, calls, dotted, imported_packages, modules

MAX_FILE_LINES = 500
MAX_FUNCTION_LINES = 100
UNSAFE_CALLS = {"eval", "exec", "torch.load", "os.system", "yaml.load", "yaml.unsafe_load", "yaml.full_load"}
UNSAFE_MODULES = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
MACHINE_PATH = re.compile(r"(?<![\w.}])/(?:home|root|Users|work|tmp|mnt|scratch)/[\w.]")
TEXT_SUFFIXES = {".py", ".yaml", ".yml", ".toml", ".cfg", ".md", ".sh", ".sbatch", ".txt", ""}


def test_files_are_short_enough_to_read() -> None:
    lengths = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in modules()}
    assert {name: length for name, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_functions_are_short_enough_to_read() -> None:
    long = [
        f"{name}:{node.lineno} {node.name}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and (node.end_lineno or 0) - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert long == []


def test_nothing_is_unpickled_evaluated_or_given_to_a_shell() -> None:
    found = [f"{name}:{line} {call}" for name, tree in modules().items() for line, call in calls(tree)]
    assert [entry for entry in found if entry.split()[1] in UNSAFE_CALLS] == []
    imports = {(name, package) for name, tree in modules().items() for package in imported_packages(tree)}
    assert [entry for entry in sorted(imports) if entry[1] in UNSAFE_MODULES] == []


def test_numpy_never_unpickles() -> None:
    allowing = [
        f"{name}:{node.value.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False"
    ]
    assert allowing == []


def test_configuration_is_never_read_by_string() -> None:
    """``getattr`` with a default hides a misspelt field for ever."""
    lenient = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "getattr"
        and len(node.args) == 3
        and "config" in ast.unparse(node.args[0])
    ]
    assert lenient == []


def test_importing_a_module_does_nothing_but_define() -> None:
    allowed = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign)
    acting = [
        f"{name}:{node.lineno}"
        for name, tree in modules().items()
        if name != "qwen3next_train/__main__.py"
        for node in tree.body
        if not isinstance(node, allowed) and not _is_docstring(node) and not _only_defines(node, tree)
    ]
    assert acting == []


def test_package_files_are_empty() -> None:
    """A filled ``__init__.py`` would only be a second way to a name."""
    version_only = PACKAGE / "__init__.py"
    filled = [
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("__init__.py")
        if path.read_text(encoding="utf-8").strip() and path != version_only
    ]
    assert filled == []
    version_lines = ast.parse(version_only.read_text(encoding="utf-8")).body
    assert [ast.unparse(node).split(" = ")[0] for node in version_lines[1:]] == ["__version__"]


@pytest.mark.parametrize("folder", ["qwen3next_train", "configs", "scripts", "docs", ".ci", "."])
def test_no_path_of_one_machine(folder: str) -> None:
    paths = (ROOT / folder).glob("*") if folder == "." else (ROOT / folder).rglob("*")
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in paths
        if path.is_file() and path.suffix in TEXT_SUFFIXES
        for match in MACHINE_PATH.finditer(path.read_text(encoding="utf-8"))
    ]
    assert found == []


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _only_defines(node: ast.stmt, tree: ast.Module) -> bool:
    """Imports for the type checker, a ``python -m`` entry, or a call on a class of this module (PyYAML's way)."""
    if isinstance(node, ast.If):
        return ast.unparse(node.test) in {"TYPE_CHECKING", "__name__ == '__main__'"}
    own = {item.name for item in tree.body if isinstance(item, ast.ClassDef)}
    return (
        isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and dotted(node.value.func).split(".")[0] in own
    )
