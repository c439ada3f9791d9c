"""Shipped configurations: where they are, and the model shapes (presets) they stand for.

The YAML files live in the repository's ``configs/`` and are installed as the package
``qwen3next_train.configs``. ``model.preset: tiny`` takes the model section of ``qwen3next_tiny.yaml``, so
that no number stands in two places.
"""

from __future__ import annotations

from contextlib import suppress
from importlib import resources
from pathlib import Path

from qwen3next_train.config.bounds import path_argument
from qwen3next_train.config.error_lines import show, show_name
from qwen3next_train.errors import ConfigError

PRESETS = ("tiny", "20m", "100m", "1b", "3b_a400m", "80b")


def shipped_folder() -> Path:
    """Folder of the shipped YAML files, of the installed package or of the checkout.

    Raises:
        ConfigError: when the installation lacks them.
    """
    return shipped_file("qwen3next_train.configs", "configs/qwen3next_80b.yaml").parent


def shipped_file(package: str, path: str) -> Path:
    """A file that lies outside the package's own folder in a checkout and is installed as a package of its own.

    Args:
        package: the package as it is installed.
        path: the file's path in a checkout.

    Raises:
        ConfigError: when the installation lacks it.
    """
    name = Path(path).name
    places = []
    with suppress(ModuleNotFoundError):  # a checkout that is not installed has no such package
        places.append(Path(str(resources.files(package) / name)))
    places.append(Path(__file__).resolve().parents[2] / path)
    for place in places:
        if place.is_file():
            return place
    looked = " and ".join(str(place.parent) for place in places)
    raise ConfigError(f"{name}: a shipped file is missing from {looked}; reinstall")


def find_config(name: str) -> Path:
    """File of a ``--config`` word: a path, or a bare name looked up here and then among the shipped ones.

    Raises:
        ConfigError: naming every place looked in.
    """
    shown = show_name(name)
    if not name:
        raise ConfigError(f"--config: not a file name (got {show(name)}); give a YAML file")
    path = Path(path_argument(name, "--config"))
    try:
        found = path.exists()
    except OSError as error:
        raise ConfigError(f"{shown}: cannot be read ({error.strerror}); give a YAML file") from error
    if found:
        return path
    if path.name != name:
        raise ConfigError(f"{shown}: no such file; give the path of a YAML file or the name of a shipped one")
    shipped = shipped_folder()
    if (shipped / name).is_file():
        return shipped / name
    available = ", ".join(sorted(each.name for each in shipped.glob("*.yaml")))
    raise ConfigError(f"{shown}: no such file in {Path.cwd()} or {shipped}; shipped are {available}")


def preset_file(name: object) -> Path:
    """File whose model section the preset is.

    Raises:
        ConfigError: when there is no such preset; the text is the line after the key.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset (got {show(name)}); give one of {', '.join(PRESETS)}")
    return shipped_folder() / f"qwen3next_{name}.yaml"
