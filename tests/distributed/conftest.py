"""Ranks that stay (:mod:`tests.distributed.ranks`) stay for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed import ranks


@pytest.fixture(scope="package", autouse=True)
def end_of_the_ranks() -> Iterator[None]:
    """Idle ones take a tenth of a core, for gloo's threads, which wake a hundred times a second."""
    yield
    ranks.end_all()
