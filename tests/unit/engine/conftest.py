"""One process group for all tests of the engine: DeepSpeed keeps the first one it has seen."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qwen3next_train.parallel.process_groups import ProcessContext, process_context


@pytest.fixture(scope="package")
def context() -> Iterator[ProcessContext]:
    with process_context("cpu") as found:
        yield found
