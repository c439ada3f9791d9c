"""The commands of a documentation page, run as they stand there, with small numbers in place of large ones."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.integration.launching import REPOSITORY, run_forked

PROGRAM = "qwen3next-train"


class Page:
    """A page of ``docs/``.

    Args:
        name: its file.
        folder: where its files are made and its commands run.
        replaced: texts of the page and what stands for them in the test; each has to be there.
    """

    def __init__(self, name: str, folder: Path, replaced: Mapping[str, str]) -> None:
        self._text = (REPOSITORY / "docs" / name).read_text(encoding="utf-8")
        self._folder = folder
        for old, new in replaced.items():
            assert old in self._text, f"{name} does not say {old!r} any more"
            self._text = self._text.replace(old, new)

    def blocks(self, language: str) -> list[str]:
        """Its code blocks of one language."""
        return re.findall(rf"^```{language}\n(.*?)^```$", self._text, flags=re.MULTILINE | re.DOTALL)

    def write_file(self, name: str) -> None:
        """Make the file that the page shows as a block of YAML with its name in the first line."""
        (content,) = (block for block in self.blocks("yaml") if block.startswith(f"# {name}\n"))
        (self._folder / name).write_text(content, encoding="utf-8")

    def commands(self) -> list[str]:
        """All lines of its ``bash`` blocks, in order."""
        return [line for block in self.blocks("bash") for line in block.replace("\\\n", "").splitlines() if line]

    def run(self, command: str, *more: str) -> str:
        """Run one of the commands, with more arguments; it has to succeed. Returns what it printed."""
        if command.startswith(f"{PROGRAM} "):
            done = run_forked([*shlex.split(command, comments=True)[1:], *more], cwd=self._folder)
        else:
            done = subprocess.run(
                ["bash", "-c", command], cwd=self._folder, capture_output=True, text=True, check=False
            )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout
