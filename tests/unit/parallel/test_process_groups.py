import datetime
import errno
import os
import re
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch
import torch.distributed as dist

from qwen3next_train.errors import ConfigError, PeerLostError
from qwen3next_train.parallel import process_groups
from qwen3next_train.parallel.control import ControlGroup, SingleProcess
from qwen3next_train.parallel.process_groups import ProcessContext, process_context, select_device
from qwen3next_train.parallel.rank_check import RankInfo
from tests.distributed.engine import build_engine
from tests.distributed.test_layout_equality import small_config
from tests.forked import pipe, start
from tests.integration.launching import free_port


def test_auto_takes_the_cpu_where_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert select_device("auto", 0) == torch.device("cpu")


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ConfigError, match=r"^run\.device: cuda is not available on this machine; use --run\.device cpu$"
    ):
        select_device("cuda", 0)
    with pytest.raises(ConfigError, match=r"^--device: cuda is not available on this machine; use --device cpu$"):
        select_device("cuda", 0, setting="--device")


def test_more_local_ranks_than_gpus_is_refused_with_both_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ConfigError, match="local rank 2 has no GPU, this machine has 2"):
        select_device("cuda", 2)


def test_one_process_without_a_launcher_gets_a_group_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        monkeypatch.delenv(variable, raising=False)
    with process_context("cpu") as context:
        assert (context.rank, context.world_size, context.local_rank) == (0, 1, 0)
        assert context.control.sum_ints([3, 4]) == [3, 4]
        assert os.environ["DS_ACCELERATOR"] == "cpu"
        assert os.environ["LOCAL_SIZE"] == "1"
        assert dist.get_backend() == "gloo"
    assert not dist.is_initialized()
    assert "LOCAL_SIZE" not in os.environ


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_rank_that_is_lost_while_groups_are_formed_is_said(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    formed: list[object] = []

    def form(*arguments: object) -> ControlGroup:
        formed.append(arguments)
        if len(formed) == number:
            raise dist.DistStoreError("wait timeout after 5ms, keys: /process_group/0/1\nException raised from wait")
        return SingleProcess()

    monkeypatch.setattr(process_groups, "_control_group", form)
    with pytest.raises(PeerLostError) as caught, process_context("cpu"):
        pass
    assert str(caught.value) == (
        "rank 0: another rank was lost or cannot be reached, while the process groups were formed: wait timeout after "
        "5ms, keys: /process_group/0/1; run the same line again"
    )
    assert not dist.is_initialized()


def test_a_group_that_is_patient_is_not_formed_patiently(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody would wait a week for a rank that has died before its groups are there."""
    formed: list[tuple[datetime.timedelta, dist.ProcessGroup]] = []
    new_group = dist.new_group

    def form(*, backend: str, timeout: datetime.timedelta) -> dist.ProcessGroup:
        group = new_group(backend=backend, timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        formed.append((timeout, group))
        return group

    monkeypatch.setattr(dist, "new_group", form)
    with process_context("cpu"):
        for world_size, wanted in ((2, datetime.timedelta(days=7)), (2, datetime.timedelta(seconds=20))):
            process_groups._control_group(world_size, wanted)
        # Gloo connects every rank with every other.
        process_groups._control_group(1024, datetime.timedelta(days=7))
        assert [timeout.total_seconds() for timeout, _ in formed] == [120 + 2, 20, 120 + 1024]
        kept = [group._get_backend(torch.device("cpu")).options._timeout for _, group in formed]
        assert kept == [datetime.timedelta(days=7), datetime.timedelta(seconds=20), datetime.timedelta(days=7)]


@pytest.mark.parametrize(("peer_timeout_s", "forming_s"), [(900.0, 121.0), (20.0, 20.0)])
def test_the_first_group_is_not_formed_more_patiently(
    monkeypatch: pytest.MonkeyPatch, peer_timeout_s: float, forming_s: float
) -> None:
    """Once it is there, it waits for its peers as long as it is told to."""
    forming: list[datetime.timedelta] = []
    init_process_group = dist.init_process_group

    def form(*arguments: Any, **names: Any) -> None:
        forming.append(names["timeout"])
        init_process_group(*arguments, **names)

    monkeypatch.setattr(dist, "init_process_group", form)
    with process_context("cpu", peer_timeout_s=peer_timeout_s):
        assert [timeout.total_seconds() for timeout in forming] == [forming_s]
        assert dist.group.WORLD is not None
        kept = dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout
        assert kept == datetime.timedelta(seconds=peer_timeout_s)


def _dies_once_all_have_met(variables: dict[str, str]) -> None:
    os.environ.update(variables)
    dist.init_process_group = lambda *arguments, **names: os._exit(9)
    with process_context("cpu"):
        pass


def _waits_two_seconds_for_the_first_group(variables: dict[str, str], result: Connection) -> None:
    os.environ.update(variables)
    process_groups._FORMING_TIMEOUT = datetime.timedelta(0)
    try:
        with process_context("cpu", peer_timeout_s=3600.0):
            result.send("formed")
    except PeerLostError as error:
        result.send(str(error))


@pytest.mark.slow
def test_a_rank_that_dies_before_the_first_group_is_not_waited_for_long() -> None:
    """Under two launchers, which tell each other nothing: the other rank gives up after the time to form a group."""
    variables = [
        {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        for rank in range(2)
    ]
    port = str(free_port())
    ours, theirs = pipe()
    waiting = start(_waits_two_seconds_for_the_first_group, variables[0] | {"MASTER_PORT": port}, theirs)
    dying = start(_dies_once_all_have_met, variables[1] | {"MASTER_PORT": port})
    try:
        # An hour of patience would be seen.
        assert ours.poll(120)
        said = ours.recv()
    finally:
        for process in (waiting, dying):
            process.kill()
            process.join()
    assert dying.exitcode == 9
    assert re.match(r"rank 0: rank 1 \(process \d+ on .*\) has died, while the process groups were formed: ", said), (
        said
    )


def _tells_where_all_live(variables: dict[str, str], result: Connection) -> None:
    os.environ.update(variables)
    with process_context("cpu") as context:
        result.send([info.pid for info in context.rank_infos])
        # Until it is killed.
        result.recv()


@pytest.mark.slow
def test_workers_that_are_started_again_read_nothing_of_those_before() -> None:
    """torchrun keeps its store, where addresses and process numbers of killed workers still stand."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    for restart in range(2):
        launched = common | {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": str(restart)}
        pipes = [pipe() for _ in range(2)]
        workers = [
            start(_tells_where_all_live, launched | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, theirs)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        try:
            for ours, _ in pipes:
                assert ours.poll(60)
                assert ours.recv() == [worker.pid for worker in workers]
        finally:
            for worker in workers:
                worker.kill()
                worker.join()


@pytest.mark.slow
def test_a_process_may_train_in_one_context_after_another() -> None:
    """DeepSpeed keeps the groups it has seen until it is told that they end."""
    config = small_config(micro_batch_size=1)
    for _ in range(2):
        with process_context("cpu") as context:
            build_engine(config, context)


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            f"[enforce fail at /a/gloo/device.cc:9] fd_ != -1. -1 vs -1. socket: {os.strerror(errno.EMFILE)}",
            RuntimeError,
        ),
        ("NCCL error: unhandled cuda error, Cuda failure 2 'out of memory'", RuntimeError),
        ("[enforce fail at /a/gloo/device.cc:9] ifa != nullptr. Unable to find address for: eth7", ConfigError),
        ("Gloo connectFullMesh failed with [/a/pair.cc:1] timed out connecting", PeerLostError),
    ],
)
def test_what_this_machine_lacks_is_no_lost_rank(
    monkeypatch: pytest.MonkeyPatch, text: str, kind: type[Exception]
) -> None:
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        # Set first, so that what the context leaves behind is taken back.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)

    def fail(*arguments: object, **names: object) -> None:
        raise RuntimeError(text)

    monkeypatch.setattr(dist, "init_process_group", fail)
    with pytest.raises(kind) as caught, process_context("cpu"):
        pass
    assert type(caught.value) is kind
    if kind is ConfigError:
        assert str(caught.value).startswith("GLOO_SOCKET_IFNAME: no network interface eth7 here; ")
    else:
        assert text in str(caught.value)


@pytest.mark.parametrize(("hosts", "expected"), [("aaaa", 4), ("aabb", 2), ("aaaabb", 2), ("abab", 1), ("aaabb", 1)])
def test_ranks_per_node_divide_every_machine_s(hosts: str, expected: int) -> None:
    infos = tuple(RankInfo(host, 0, pid) for pid, host in enumerate(hosts))
    device, control = torch.device("cpu"), SingleProcess()
    context = ProcessContext(0, len(hosts), 0, 1, device, control, control, control, infos)
    assert context.ranks_per_node == expected
