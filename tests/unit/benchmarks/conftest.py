"""The benchmarks are scripts that import their neighbours."""

from __future__ import annotations

import pytest

from tests.architecture.tree import ROOT


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder is what Python puts first when it runs one of them."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "benchmarks"))
