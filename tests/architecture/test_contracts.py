"""Who may import whom: the layers in setup.cfg cover every package, and each third party has one door."""

from __future__ import annotations

import ast
import subprocess
import sys
from configparser import ConfigParser

from tests.architecture.tree import PACKAGE, ROOT, imported_packages, modules

TORCH_FREE = ("accounting", "config", "errors", "files", "log", "parameters", "planner", "topology", "versions")
DOORS = {
    "deepspeed": {"engine"},
    "fla": {"kernels"},
    "flash_qla": {"kernels"},
    "tilelang": {"kernels"},
    "triton": {"kernels"},
    "datasets": {"data"},
    "matplotlib": {"plots"},
    "pyarrow": {"data"},
    "tokenizers": {"data"},
    "safetensors": {"checkpoint", "huggingface"},
    "tensorboardX": {"metrics"},
    "wandb": {"metrics"},
    "yaml": {"config"},
}
"""The rooms that import a library; no other does, not even inside a function."""


SELDOM = ("matplotlib", "qwen3next_train.engine.step_profile", "tensorboardX", "torch.profiler", "wandb")
"""What is imported for a plot, a profile or a destination of records alone."""


def _room(path: str) -> str:
    return path.split("/")[1].removesuffix(".py")


def _top_level_modules() -> set[str]:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return names - {"__init__", "__main__"}


def test_each_library_has_its_door() -> None:
    importers: dict[str, set[str]] = {library: set() for library in DOORS}
    for path, tree in modules().items():
        for library in DOORS.keys() & set(imported_packages(tree)):
            importers[library].add(_room(path))
    assert importers == DOORS


def test_what_only_some_runs_need_is_imported_where_it_is_used() -> None:
    """Inside a function: a run that asks for none of it does not pay for it."""
    at_load = [
        f"{path}: {module}"
        for path, tree in modules().items()
        for node in tree.body
        for module in _imported(node)
        if module.startswith(SELDOM) and path != "qwen3next_train/engine/step_profile.py"
    ]
    assert at_load == []


def _imported(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) else []


def test_every_package_has_a_layer() -> None:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    layers = parser["importlinter:contract:layers"]["layers"].replace("|", " ").split()
    assert sorted(layers) == sorted(_top_level_modules())


def test_planning_and_the_start_of_a_run_import_no_torch() -> None:
    names = ["qwen3next_train.train.run"] + [
        path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        for path in modules()
        if _room(path) in TORCH_FREE
    ]
    program = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
