"""A Slurm cluster of two nodes on this machine, in a folder of its own, for as long as a test runs."""

from __future__ import annotations

import getpass
import os
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol", "squeue", "sinfo")
NODES = ("n1", "n2")
_START_TIMEOUT_S = 60.0

_CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until credentials of its first start have expired; two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=1,bf_interval=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=60
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=low Nodes=ALL Default=YES PriorityTier=1
PartitionName=urgent Nodes=ALL PriorityTier=2
"""


def missing_programs() -> list[str]:
    """What has to be installed before a cluster can be started."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return [name for name in PROGRAMS if shutil.which(name, path=path) is None]


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Args:
        folder: its configuration, logs and state.
        environment: for commands that talk to it.
    """

    folder: Path
    environment: Mapping[str, str]

    def run(self, *command: str, **environment: str) -> str:
        """Output of a Slurm command."""
        done = subprocess.run(
            command,
            env={**self.environment, **environment},
            cwd=self.folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """What ``scontrol show job`` says of a job."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(word.partition("=")[::2] for word in text.split() if "=" in word)


@contextmanager
def cluster(folder: Path) -> Iterator[Cluster]:
    """Start two nodes and their controller; cancel all jobs and stop the daemons afterwards."""
    for name in ("state", *(f"spool-{node}" for node in NODES)):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(secrets.token_bytes(128))
    (folder / "munge.key").chmod(0o600)
    configuration = folder / "slurm.conf"
    configuration.write_text(
        _CONFIGURATION.format(
            folder=folder, host=socket.gethostname().partition(".")[0], user=getpass.getuser(), ports=_free_ports(3)
        )
    )
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    started = Cluster(folder, {**os.environ, "SLURM_CONF": str(configuration), "PATH": path})
    munge = [f"--{name}-file={folder}/munge.{name}" for name in ("key", "pid", "log", "seed")]
    daemons = [
        # Forced: it would object to a folder below one that everybody may write.
        ["munged", "--foreground", "--force", f"--socket={folder}/munge.socket", *munge],
        ["slurmctld", "-D", "-f", str(configuration)],
        *(["slurmd", "-D", "-f", str(configuration), "-N", node] for node in NODES),
    ]
    with ExitStack() as stack:
        for daemon in daemons:
            stack.enter_context(_running(daemon, started))
        _wait_for_nodes(started)
        try:
            yield started
        finally:
            subprocess.run(["scancel", "--full", "--signal=KILL", "--user", getpass.getuser()], env=started.environment)
            subprocess.run(["scancel", "--user", getpass.getuser()], env=started.environment)


@contextmanager
def _running(command: list[str], cluster: Cluster) -> Iterator[None]:
    with (cluster.folder / f"{command[0]}.out").open("a") as output:
        process = subprocess.Popen(command, env=dict(cluster.environment), stdout=output, stderr=output)
    try:
        if command[0] == "munged":
            _wait_for_path(cluster.folder / "munge.socket")
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_for_path(path: Path) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not appeared"
        time.sleep(0.05)


def _wait_for_nodes(cluster: Cluster) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    states = ""
    while states.split() != ["idle"] * len(NODES):
        assert time.monotonic() < deadline, f"nodes are {states}; logs are in {cluster.folder}"
        time.sleep(0.2)
        done = subprocess.run(
            ["sinfo", "--Node", "--noheader", "--format=%t", "--partition=low"],
            env=dict(cluster.environment),
            capture_output=True,
            text=True,
            check=False,
        )
        states = done.stdout


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
