"""setup.cfg against the tree: packages, shipped files, dependencies and their tested versions."""

from __future__ import annotations

import re
import sys
from configparser import ConfigParser
from importlib.metadata import packages_distributions

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.architecture.tree import PACKAGE, ROOT, imported_packages, modules

NOT_IMPORTED_BY_US = {"triton"}
"""Declared because flash-linear-attention needs it and does not say so."""

COMES_WITH = {
    "annotated-types": "pydantic",
    "fla-core": "flash-linear-attention",
    "pyarrow": "datasets",
    "pydantic-core": "pydantic",
}
"""Distributions that a declared one is built on and whose version it pins."""

OPTIONAL = {
    "flash_qla": "flash-qla",
    "matplotlib": "matplotlib",
    "tensorboardX": "tensorboardx",
    "tilelang": "flash-qla",
}
"""Modules that are imported only where they are installed, and the extra that brings them."""


def _setup() -> ConfigParser:
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def _requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line.strip() and not line.startswith("#")]


def _constraints() -> dict[str, str]:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pins = [line.split("==") for line in text.splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, version in pins}


def test_every_package_is_listed() -> None:
    folders = {path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")}
    expected = {".".join(folder.parts) for folder in folders} | {"qwen3next_train.configs", "qwen3next_train.slurm"}
    assert set(_setup()["options"]["packages"].split()) == expected


def test_every_shipped_file_matches_a_pattern() -> None:
    data = _setup()["options.package_data"]
    assert {path.suffix for path in (ROOT / "configs").iterdir()} <= {".yaml", ".md"}
    assert data["qwen3next_train.configs"].split() == ["*.yaml"]
    assert {path.suffix for path in (ROOT / "scripts" / "slurm").iterdir()} == {".sbatch"}
    assert data["qwen3next_train.slurm"].split() == ["*.sbatch"]
    assets = {path for path in (PACKAGE / "data").rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    shipped = {path for pattern in data["qwen3next_train.data"].split() for path in (PACKAGE / "data").glob(pattern)}
    assert assets
    assert assets <= shipped


def test_dependencies_are_what_is_imported() -> None:
    distributions = packages_distributions()
    imported = {name for tree in modules().values() for name in imported_packages(tree)}
    third_party = imported - set(sys.stdlib_module_names) - {"qwen3next_train"} - set(OPTIONAL)
    names = {canonicalize_name(distributions[name][0]) for name in third_party}
    ours = {COMES_WITH.get(name, name) for name in names}
    declared = {canonicalize_name(item.name) for item in _requirements(_setup()["options"]["install_requires"])}
    assert ours - declared == set()
    assert declared - ours - NOT_IMPORTED_BY_US == set()


def test_what_is_optional_has_an_extra_of_its_own_and_is_imported() -> None:
    extras = _setup()["options.extras_require"]
    imported = {name for tree in modules().values() for name in imported_packages(tree)}
    assert set(OPTIONAL) <= imported
    for extra in set(OPTIONAL.values()):
        assert canonicalize_name(_requirements(extras[extra])[0].name) == extra


def test_tested_versions_are_allowed_ones() -> None:
    pins = _constraints()
    setup = _setup()
    lists = setup["options"]["install_requires"] + setup["options.extras_require"]["dev"]
    for item in _requirements(lists):
        assert item.specifier.contains(pins[canonicalize_name(item.name)]), item


def test_python_versions_agree() -> None:
    minimum = _setup()["options"]["python_requires"].removeprefix(">=")
    short = minimum.replace(".", "")
    assert f'target-version = "py{short}"' in (ROOT / "ruff.toml").read_text(encoding="utf-8")
    assert _setup()["mypy"]["python_version"] == minimum
    major, minor = minimum.split(".")
    assert f"sys.version_info < ({major}, {minor})" in (ROOT / "Makefile").read_text(encoding="utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_make_targets_in_documents_exist(document: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`)make ((?:[a-z-]+ ?)+)(?=`|\s|$)", text, flags=re.MULTILINE))
    assert {word for group in named for word in group.split()} <= targets
