"""A run of two ranks that nothing has disturbed, for the tests that disturb one."""

from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import TWO_RANKS, arguments, exit_codes, metrics, start_ranks, write_corpus


@pytest.fixture(scope="session")
def shared_corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def two_ranks(shared_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    args = arguments(shared_corpus, run_dir, **TWO_RANKS)
    assert exit_codes(start_ranks([args, args])) == [0, 0]
    found = metrics(run_dir)
    assert [row["step"] for row in found] == list(range(1, TWO_RANKS["run__steps"] + 1))
    return found
