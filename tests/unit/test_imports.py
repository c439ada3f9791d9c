import gc
import subprocess
import sys

import pytest

from qwen3next_train.imports import imported_to_stay

# Forks once for every limit, from its own size up: exit codes of the children, 0 for an import, 3 for no room.
UNDER_LIMITS = """
import os, re, resource
from qwen3next_train.imports import import_numpy

size = int(re.search(r"VmSize:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
for room in range(0, 260, 20):
    if not (child := os.fork()):
        resource.setrlimit(resource.RLIMIT_AS, (size + (room << 20),) * 2)
        try:
            import_numpy()
        except (OSError, MemoryError):
            os._exit(3)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.parametrize("num_threads", ["", "1"])
def test_numpy_is_imported_or_said_to_have_no_room(monkeypatch: pytest.MonkeyPatch, num_threads: str) -> None:
    """Its OpenBLAS would end the process with 1."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", num_threads)
    done = subprocess.run([sys.executable, "-c", UNDER_LIMITS], capture_output=True, text=True, check=True)
    codes = done.stdout.split()
    assert (set(codes) <= {"0", "3"}, codes[0], codes == sorted(codes, reverse=True)) == (True, "3", True), done.stderr
    if num_threads == "1":
        assert codes[-1] == "0"


def test_no_garbage_is_looked_for_until_all_is_imported() -> None:
    before = gc.get_freeze_count()
    try:
        with imported_to_stay():
            assert not gc.isenabled()
        assert gc.isenabled()
        assert gc.get_freeze_count() > before
    finally:
        gc.unfreeze()
