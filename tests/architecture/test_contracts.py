"""The import contracts in setup.cfg cover every package, and hold when the modules are really imported."""

from __future__ import annotations

import subprocess
import sys
from configparser import ConfigParser

import pytest

from tests.architecture.tree import PACKAGE, ROOT, modules

TORCH_FREE = ("accounting", "config", "errors", "log", "planner", "topology")
DOORS = {
    "deepspeed": "engine",
    "kernel-libraries": "kernels",
    "datasets": "data",
    "safetensors": "checkpoint",
    "wandb": "metrics",
    "yaml": "config",
}


def _contracts() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _top_level_modules() -> set[str]:
    names = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    return names - {"__init__", "__main__"}


@pytest.mark.parametrize(("library", "door"), DOORS.items())
def test_each_library_has_one_door(library: str, door: str) -> None:
    section = _contracts()[f"importlinter:contract:{library}-door"]
    closed = {name.removeprefix("qwen3next_train.") for name in section["source_modules"].split()}
    assert closed == _top_level_modules() - {door}


def test_every_package_has_a_layer() -> None:
    layers = _contracts()["importlinter:contract:layers"]["layers"].replace("|", " ").split()
    assert sorted(layers) == sorted(_top_level_modules())


def test_planning_imports_no_torch() -> None:
    names = [
        path.removesuffix("/__init__.py").removesuffix(".py").replace("/", ".")
        for path in modules()
        if path.split("/")[1].removesuffix(".py") in TORCH_FREE
    ]
    program = f"import importlib, sys; [importlib.import_module(n) for n in {names}]; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode == 0
