"""What every rank of a run has to have in common."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import qwen3next_train
from qwen3next_train.config.describe import flatten
from qwen3next_train.config.schema import Config
from qwen3next_train.parallel.rank_check import RunFingerprint
from qwen3next_train.train.resume import NEWEST, Resume
from qwen3next_train.versions import software_versions

_OF_A_NODE = frozenset(("data.cache_dir",))
"""Settings that may name a disk of the node."""


def run_fingerprint(config: Config, resume: Resume = NEWEST) -> RunFingerprint:
    """Configuration, ``--resume`` options, versions and sources of this process.

    The sources are there because a version number does not change with every commit, and one node's checkout may
    be older than the others'.
    """
    software = {name: version or "not installed" for name, version in software_versions().items()}
    settings = flatten(config.model_dump(mode="json")) | resume.settings()
    return RunFingerprint(
        software=software | {"qwen3next_train sources": sources_digest(Path(qwen3next_train.__file__).parent)},
        settings={key: json.dumps(value) for key, value in settings.items() if key not in _OF_A_NODE},
    )


def sources_digest(package: Path) -> str:
    """Twelve hexadecimal digits that change with any Python file of the folder, its name or its content."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(package).as_posix()}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()[:12]
