"""Every way to start the program trains, and two processes give the curve of one."""

from pathlib import Path

import pytest

from tests.integration.launching import arguments, exit_record, metrics, run, write_corpus

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PROCESSES = {"console": 1, "file": 1, "script": 2}
"""Launch forms (:func:`tests.integration.launching.start`). The module under torchrun is that of ``test_nodes`` and
``test_lost_ranks``, and so is the own launcher."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of four steps, by form; beside each a file of what its processes have imported."""
    folder = tmp_path_factory.mktemp("forms")
    corpus = write_corpus(folder)
    found = {}
    for form, num_processes in PROCESSES.items():
        args = arguments(corpus, folder / form, run__steps=4)
        done = run(form, args, num_processes=num_processes, variables={"PYTHONPROFILEIMPORTTIME": "1"})
        assert done.returncode == 0, done.stderr
        (folder / f"{form}.imports").write_text(done.stderr)
        found[form] = folder / form
    return found


@pytest.mark.parametrize("form", PROCESSES)
def test_each_launch_form_trains_to_the_last_step(runs: dict[str, Path], form: str) -> None:
    assert [row["step"] for row in metrics(runs[form])] == [1, 2, 3, 4]
    assert exit_record(runs[form])["code"] == 0
    assert (runs[form] / "checkpoints" / "step_00000004" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("form", PROCESSES)
def test_no_process_imports_the_compiler(runs: dict[str, Path], form: str) -> None:
    """``torch._dynamo``, which takes as long to import as all that is used of torch."""
    lines = runs[form].with_suffix(".imports").read_text().splitlines()
    modules = {line.rpartition("|")[2].strip() for line in lines if "import time:" in line}
    assert {"torch", "deepspeed"} < modules
    assert "torch._dynamo" not in modules


def test_two_processes_give_the_curve_of_one(runs: dict[str, Path]) -> None:
    for one, two in zip(metrics(runs["console"]), metrics(runs["script"]), strict=True):
        for name in ("loss/lm", "loss/mtp", "loss/load_balancing", "optim/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-6), name


def test_one_process_under_torchrun_gives_the_numbers_of_one_without(runs: dict[str, Path]) -> None:
    assert metrics(runs["file"]) == metrics(runs["console"])
