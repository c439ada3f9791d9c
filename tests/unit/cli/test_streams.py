"""Standard streams that are closed, broken, full or ASCII change neither exit code nor what is written elsewhere."""

import os
import subprocess
import sys

import pytest

from qwen3next_train.config.presets import shipped_folder

# The entry point, with what trains in the place of training: it writes to both streams all it has.
PROGRAM = """
import os, sys, types
from qwen3next_train.cli import main as entry
def run_training(config, check_world, resume):
    first = os.open("/dev/null", os.O_RDONLY)
    for stream in (sys.stdout, sys.stderr):
        for _ in range(3):
            stream.write("\\u00e9\\udcff" * 5000 + "\\n")
            stream.flush()
    with open(sys.argv[1], "w") as file:
        file.write(f"{first} {sys.stdin.read()!r}")
    return 75
stand_in = types.ModuleType("qwen3next_train.train.run")
stand_in.run_training = run_training
sys.modules[stand_in.__name__] = stand_in
sys.exit(entry.main(["--config", "qwen3next_tiny.yaml"]))
"""


def code_of(tmp_path, redirections: str, **environment: str) -> int:
    report = tmp_path / "report"
    command = 'exec "$0" -c "$1" "$2" ' + redirections
    done = subprocess.run(
        ["bash", "-c", command, sys.executable, PROGRAM, str(report)],
        env={**os.environ, "PYTHONPATH": str(shipped_folder().parent), **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        check=False,
    )
    first, stdin = report.read_text().split()
    # Nothing that is opened later may get the number of a standard stream.
    assert int(first) > 2
    assert stdin == "''"
    assert b"Traceback" not in done.stderr
    return done.returncode


@pytest.mark.parametrize(
    "redirections",
    ["0<&- 1>&- 2>&-", "1>/dev/full 2>/dev/full", "0<&-", "2>&-", "> >(exec 0<&-; true) 2> >(exec 0<&-; true)"],
    ids=["closed", "full", "no stdin", "no stderr", "broken pipes"],
)
def test_training_ends_with_its_own_code(tmp_path, redirections):
    assert code_of(tmp_path, redirections) == 75


@pytest.mark.parametrize("encoding", ["ascii", "ascii:strict", "latin-1", "utf-16"])
def test_any_text_can_be_printed(tmp_path, encoding):
    assert code_of(tmp_path, "", PYTHONIOENCODING=encoding) == 75
