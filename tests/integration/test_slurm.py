"""The shipped batch file on a Slurm cluster of two nodes, through a time limit and a preemption.

``apt-get install --no-install-recommends slurmctld slurmd slurm-client munge`` installs what it needs on Debian.
"""

from __future__ import annotations

import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.launching import (
    REPOSITORY,
    TWO_RANKS,
    arguments,
    exit_record,
    metrics,
    num_steps,
    processes_of,
    wait_until,
    workers_of,
)
from tests.integration.slurm_cluster import Cluster, cluster, missing_programs

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(missing_programs()), reason=f"needs Slurm: no {', '.join(missing_programs())} here"),
]

RESOURCES = ("--gpus-per-node=0", "--cpus-per-task=1", "--mem=100")


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


def _submit(slurm: Cluster, *options: str, args: list[str]) -> str:
    """Submit ``train.sbatch``; return the job's number."""
    return slurm.run(
        *("sbatch", "--parsable", f"--chdir={REPOSITORY}", f"--output={slurm.folder}/batch-%j.log"),
        *RESOURCES,
        *options,
        str(REPOSITORY / "scripts" / "slurm" / "train.sbatch"),
        *args,
        LOG_DIR=str(slurm.folder / "logs"),
        # The nodes' names mean nothing to the resolver of this machine.
        MEETING_HOST="127.0.0.1",
        PROCESSES_PER_NODE="1",
        OMP_NUM_THREADS="1",
        PATH=f"{Path(sys.executable).parent}:{slurm.environment['PATH']}",
    ).strip()


def _signal(workers: list[int], number: signal.Signals) -> None:
    for pid in workers:
        os.kill(pid, number)


def _without_exit_barrier(log: str) -> str:
    """Without what torch's agents log when the one that holds their store ends before the others have asked it.

    All ranks are through by then, and the agents end with 0 all the same.
    """
    return re.sub(r"^.*torch/distributed/elastic/agent/server/api\.py:\d+\] .*\n", "", log, flags=re.MULTILINE)


def _freeze_after(run_dir: Path, step: int) -> list[int]:
    """Stop the ranks after a step, so that the run cannot end before Slurm has done what the test waits for."""
    wait_until(lambda: sorted(workers_of(run_dir)) == [0, 1], "two ranks", poll_s=0.2)
    workers = list(workers_of(run_dir).values())
    wait_until(lambda: num_steps(run_dir) > step, f"step {step + 1}")
    _signal(workers, signal.SIGSTOP)
    assert num_steps(run_dir) < TWO_RANKS["run__steps"]
    return workers


def test_job_goes_on_after_its_time_limit_and_after_a_preemption(
    tmp_path: Path, slurm: Cluster, shared_corpus: Path, two_ranks: list[dict[str, Any]]
) -> None:
    run_dir = tmp_path / "run"
    args = arguments(shared_corpus, run_dir, **TWO_RANKS, checkpoint__interval=0)
    job = _submit(slurm, "--time=60", "--signal=B:USR1@600", args=args)
    batch_log = slurm.folder / f"batch-{job}.log"

    workers = _freeze_after(run_dir, 3)
    # Now the warning is due; Slurm looks at time limits every 30 s.
    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")
    wait_until(lambda: "USR1" in batch_log.read_text(), "Slurm's warning of the time limit")
    _signal(workers, signal.SIGCONT)
    wait_until((run_dir / "exit.json").exists, "the end of the first attempt")
    first = exit_record(run_dir)
    assert (first["code"], first["reason"].split(";")[0]) == (75, f"stopped on SIGUSR1 after step {first['step']}")
    wait_until(lambda: slurm.job(job).get("Restarts") == "1", "the requeueing", poll_s=0.5)

    slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=60")
    workers = _freeze_after(run_dir, first["step"] + 2)
    slurm.run("sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--mem=100", "--output=/dev/null", "--wrap=:")
    wait_until(lambda: "SIGTERM" in batch_log.read_text(), "the preemption")
    _signal(workers, signal.SIGCONT)
    wait_until((run_dir / "exit.json").exists, "the end of the second attempt")
    second = exit_record(run_dir)
    assert (second["code"], second["reason"].split(";")[0]) == (75, f"stopped on SIGTERM after step {second['step']}")

    wait_until(lambda: slurm.job(job)["JobState"] == "COMPLETED", "the last attempt", poll_s=0.5)
    assert slurm.job(job)["Restarts"] == "2"
    assert exit_record(run_dir)["code"] == 0
    assert processes_of(run_dir) == []
    node_0, node_1 = (slurm.folder / "logs" / f"node-{node}.log" for node in (0, 1))
    for stopped in (first, second):
        assert f"resumed from step {stopped['step']}: " in node_0.read_text()
    assert node_1.exists()
    assert "Traceback" not in _without_exit_barrier(node_0.read_text() + node_1.read_text())

    assert metrics(run_dir) == two_ranks


def test_only_a_stopped_run_is_requeued(tmp_path: Path, slurm: Cluster, shared_corpus: Path) -> None:
    run_dir = tmp_path / "run"
    wrong = _submit(slurm, "--time=5", args=arguments(shared_corpus, tmp_path / "wrong", run__steps=0))
    wait_until(lambda: slurm.job(wrong)["JobState"] == "FAILED", "the refusal", poll_s=0.5)
    assert (slurm.job(wrong)["ExitCode"], slurm.job(wrong)["Restarts"]) == ("2:0", "0")

    cancelled = _submit(slurm, "--time=5", args=arguments(shared_corpus, run_dir, run__steps=100_000))
    wait_until(lambda: num_steps(run_dir) > 0, "the first step")
    # On a machine so busy that ranks lose each other a run is started again before it has a first step.
    restarts = slurm.job(cancelled)["Restarts"]
    slurm.run("scancel", cancelled)
    wait_until(lambda: slurm.job(cancelled)["JobState"] == "CANCELLED", "the cancelled job's end", poll_s=0.5)
    assert slurm.job(cancelled)["Restarts"] == restarts
    # It has saved all the same.
    assert exit_record(run_dir)["code"] == 75
    assert (run_dir / "checkpoints" / f"step_{exit_record(run_dir)['step']:08d}").is_dir()
    assert processes_of(run_dir) == []
