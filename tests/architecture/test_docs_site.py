"""`make docs` builds every page, and a link that leads nowhere is an error."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.integration.launching import REPOSITORY, run_forked


def _build(source: Path, output: Path) -> subprocess.CompletedProcess[str]:
    """Forked, since autodoc imports the package."""
    return run_forked(["-q", "-W", "--keep-going", "-b", "html", str(source), str(output)], program="sphinx")


@pytest.mark.slow
def test_the_pages_build_without_a_warning(tmp_path: Path) -> None:
    done = _build(REPOSITORY / "docs", tmp_path / "site")
    assert (done.returncode, done.stderr) == (0, "")
    pages = {page.name for page in (tmp_path / "site").glob("*.html")}
    assert {f"{page.stem}.html" for page in (REPOSITORY / "docs").glob("*.md")} <= pages
    assert "qwen3next_train.engine.base.Engine.train_step" in (tmp_path / "site" / "api.html").read_text()
    assert "--checkpoint.async_save" in (tmp_path / "site" / "options.html").read_text()


@pytest.mark.slow
def test_a_broken_link_is_an_error(tmp_path: Path) -> None:
    source = tmp_path / "docs"
    source.mkdir()
    (source / "conf.py").write_text('extensions = ["myst_parser"]\nmyst_heading_anchors = 4\n')
    (source / "index.md").write_text("# A\n\n[there](nowhere.md), [here](#a)\n")
    done = _build(source, tmp_path / "site")
    assert done.returncode != 0
    assert done.stderr.count("WARNING") == 1
    assert "nowhere.md" in done.stderr
