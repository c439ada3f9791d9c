"""How Sphinx builds these pages (``make docs``). Why Sphinx: decisions/0001-dependencies.md."""

from __future__ import annotations

import os
from pathlib import Path

# Autodoc imports what it describes, which shall not look for a GPU; and help is wrapped to a terminal's width.
os.environ |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "COLUMNS": "110"}

from qwen3next_train import __version__
from qwen3next_train.cli.help_text import help_text

_BUILD = Path(__file__).resolve().parents[1] / "build"
_BUILD.mkdir(exist_ok=True)
# Included by options.md.
(_BUILD / "options.txt").write_text(help_text(["--help", "all"]), encoding="utf-8")

project = "qwen3next-train"
release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "alabaster"
html_title = f"{project} {release}"
html_theme_options = {"page_width": "1200px", "sidebar_width": "260px"}
html_sidebars = {"**": ["about.html", "searchfield.html", "navigation.html"]}
# GitHub's anchors, so that a link works in both places.
myst_heading_anchors = 4
autodoc_default_options = {"members": True, "member-order": "bysource"}
