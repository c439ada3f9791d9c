"""What every test runs under: one CPU thread, no network, no account, caches in a folder of this session."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

# Environment variables that libraries read when they are imported are set before anything is imported, and
# every process a test starts inherits them. One thread: results and times then do not depend on how many cores
# the machine has, and several processes do not fight over two.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", NETRC=os.devnull)
for name in (
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("WANDB_API_KEY", "WANDB_MODE", "WANDB_RUN_ID", "HF_TOKEN"),
):
    os.environ.pop(name, None)

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"
    # The Triton kernels' tests then run on the CPU; triton reads this once, when it is imported.
    os.environ["TRITON_INTERPRET"] = "1"

TOGETHER = {
    "tests/distributed/": "ranks that stay",
    **dict.fromkeys((f"tests/integration/test_{name}.py" for name in ("lost_ranks", "nodes")), "two ranks"),
    "tests/unit/engine/": "imports DeepSpeed",
    "tests/unit/kernels/fla/": "imports FLA",
    "tests/unit/plots/": "imports matplotlib",
}
"""Files that one worker does in one go, by the beginning of their path: ranks that stay (``tests.distributed.ranks``),
the files that compare with the run of the fixture ``two_ranks``, and those of a library that takes seconds to import.
Slurm's compares with that run too, but waits for three minutes, in which the others go on.
"""

_FIRST = tuple(f"tests/integration/test_{name}.py" for name in ("slurm", "lost_ranks", "nodes"))
"""Three minutes each of Slurm and the other two in one go, most of them waiting: begun late they would end last, with
nothing beside them."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put first what waits longest for others, and skip the GPU tests where there is no GPU, saying so."""
    items.sort(key=lambda item: not item.nodeid.startswith(_FIRST))
    if torch.cuda.is_available():
        return
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(no_gpu)


def pytest_collection_finish() -> None:
    """Nothing that is imported and collected by now becomes garbage; to look through it again and again takes time."""
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With ``--dist loadfile``, a whole folder goes to one worker where its files share a fixture or a resource."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFileOrFolder(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            scopes = (scope for beginning, scope in TOGETHER.items() if nodeid.startswith(beginning))
            return next(scopes, super()._split_scope(nodeid))

    return ByFileOrFolder(config, log)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape what UTF-8 does not have in captured output: a worker of pytest-xdist cannot send it and would end."""
    report = yield
    report.sections = [(name, text.encode("utf-8", "backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The user's cache folder as this test session sees it, or this worker of it: tokenised once, read by all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session", autouse=True)
def own_cache(cache_dir: Path) -> Iterator[None]:
    """Keep the tests, and what they start, out of the developer's own cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache_dir))
        yield
