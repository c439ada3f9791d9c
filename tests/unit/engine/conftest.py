"""One process group for all tests of the engine: starting one takes longer than most of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen3next_train.parallel.process_groups import ProcessContext, process_context


@pytest.fixture(scope="package")
def context() -> Iterator[ProcessContext]:
    with process_context("cpu") as found:
        yield found
