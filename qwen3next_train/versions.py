"""What this program consists of: versions of the packages that compute, and the commit it runs from."""

from __future__ import annotations

import functools
import importlib.metadata
import platform
import subprocess
from pathlib import Path

import qwen3next_train

_DISTRIBUTIONS = ("torch", "deepspeed", "triton", "flash-linear-attention", "flash-qla", "tilelang", "numpy")
_GIT_TIMEOUT_S = 5.0


def software_versions() -> dict[str, str | None]:
    """Versions of python, this package and what computes; None for what is not installed. Imports none of them."""
    versions: dict[str, str | None] = {
        "python": platform.python_version(),
        "qwen3next_train": qwen3next_train.__version__,
    }
    return versions | {name: _installed_version(name) for name in _DISTRIBUTIONS}


@functools.cache
def _installed_version(distribution: str) -> str | None:
    """Parsed once a process: a start of training asks for all of them four times."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def git_revision() -> str | None:
    """Commit of the source tree this package runs from, ``-dirty`` when it was edited; None outside a repository."""
    package = Path(qwen3next_train.__file__).parent
    git = ["git", "--no-optional-locks", "-C", str(package)]
    try:
        # A package installed inside somebody's repository is not part of it.
        subprocess.run(
            [*git, "ls-files", "--error-unmatch", "__init__.py"],
            capture_output=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
        )
        described = subprocess.run(
            [*git, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            check=True,
            timeout=_GIT_TIMEOUT_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.decode().strip() or None
