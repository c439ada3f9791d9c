from pathlib import Path

import pytest

from tests.integration.launching import arguments, exit_record, metrics, run, write_corpus

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("form", "num_processes"), [("console", 1), ("file", 2), ("script", 2), ("module", 2)], ids=lambda value: str(value)
)
def test_each_launch_form_trains_to_the_last_step(tmp_path: Path, form: str, num_processes: int) -> None:
    run_dir = tmp_path / "run"
    done = run(form, arguments(write_corpus(tmp_path), run_dir, run__steps=2), num_processes=num_processes)
    assert done.returncode == 0, done.stderr
    assert [row["step"] for row in metrics(run_dir)] == [1, 2]
    assert exit_record(run_dir)["code"] == 0
    assert (run_dir / "checkpoints" / "step_00000002" / "MANIFEST.json").is_file()


def test_nproc_per_node_starts_the_launcher_by_itself(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    args = arguments(write_corpus(tmp_path), run_dir, run__steps=2)
    done = run("console", ["--nproc-per-node", "2", *args])
    assert done.returncode == 0, done.stderr
    assert len(metrics(run_dir)) == 2


def test_two_processes_give_the_curve_of_one(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path)
    losses = {}
    for num_processes in (1, 2):
        run_dir = tmp_path / f"run{num_processes}"
        done = run("module", arguments(corpus, run_dir), num_processes=num_processes)
        assert done.returncode == 0, done.stderr
        losses[num_processes] = [
            (row["loss/lm"], row["loss/mtp"], row["loss/load_balancing"], row["optim/grad_norm"])
            for row in metrics(run_dir)
        ]
    assert len(losses[1]) == 6
    for one, two in zip(losses[1], losses[2], strict=True):
        assert two == pytest.approx(one, rel=2e-6)
