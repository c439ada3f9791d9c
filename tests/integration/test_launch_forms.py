"""Every way to start the program trains, and two processes give the curve of one."""

from pathlib import Path

import pytest

from tests.integration.launching import arguments, exit_record, metrics, run, write_corpus

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PROCESSES = {"console": 1, "file": 2, "script": 2, "module": 2}
"""Launch forms (:func:`tests.integration.launching.command`). The own launcher starts the runs of the fixture
``two_ranks``."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run directories of six steps, by form."""
    folder = tmp_path_factory.mktemp("forms")
    corpus = write_corpus(folder)
    found = {}
    for form, num_processes in PROCESSES.items():
        done = run(form, arguments(corpus, folder / form), num_processes=num_processes)
        assert done.returncode == 0, done.stderr
        found[form] = folder / form
    return found


@pytest.mark.parametrize("form", PROCESSES)
def test_each_launch_form_trains_to_the_last_step(runs: dict[str, Path], form: str) -> None:
    assert [row["step"] for row in metrics(runs[form])] == [1, 2, 3, 4, 5, 6]
    assert exit_record(runs[form])["code"] == 0
    assert (runs[form] / "checkpoints" / "step_00000006" / "MANIFEST.json").is_file()


@pytest.mark.parametrize("form", ["file", "script", "module"])
def test_two_processes_give_the_curve_of_one(runs: dict[str, Path], form: str) -> None:
    for one, two in zip(metrics(runs["console"]), metrics(runs[form]), strict=True):
        for name in ("loss/lm", "loss/mtp", "loss/load_balancing", "optim/grad_norm"):
            assert two[name] == pytest.approx(one[name], rel=2e-6), name
