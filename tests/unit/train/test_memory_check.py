"""What a run needs against what is free."""

import dataclasses

import pytest

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.accounting.memory import certain_bytes, host_bytes, memory_per_gpu
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.errors import OutOfMemory
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train import memory_check
from qwen3next_train.train.memory_check import (
    available_host_bytes,
    has_host_room,
    memory_problem,
    num_oom_kills,
    settings_that_help,
)

GIB = 2**30


def tiny(*overrides: tuple[str, str]):
    return load_config([shipped_folder() / "qwen3next_tiny.yaml"], overrides).config


def problem_of(config, *, num_local=1, host_available, device_free=None):
    layout = Layout.of(config, 1)
    parts = memory_per_gpu(config.model, layout)
    return memory_problem(
        config, layout, parts, num_local=num_local, host_available=host_available, device_free=device_free
    )


def test_the_host_of_a_run_on_cpu():
    config = tiny()
    layout = Layout.of(config, 1)
    needed = host_bytes(config, layout, trains_on_host=True)
    parts = memory_per_gpu(config.model, layout)
    # 4 steps of 16 rows (2 ahead, one made, one used) and 64 validation rows, 256 tokens of 8-byte input, position,
    # next token and second next; one step has 0.7 GiB of gradient bucket on a GPU that a model of 6 MiB never fills.
    batches = (4 * 16 + config.eval.rows) * 256 * 8 * 4
    model = sum(parts.values()) - parts["zero_buffers"] - parts["runtime"]
    assert needed == batches + model < 0.3 * GIB
    assert problem_of(config, host_available=needed) is None
    problem = problem_of(config, num_local=2, host_available=2 * needed - 1)
    assert problem is not None
    assert problem.startswith("out of memory: the plan takes 0.3 GiB of host memory for 2 processes, 0.3 GiB are free")


def test_more_experts_than_the_host_holds():
    config = tiny(("model.num_experts", "40000"))
    problem = problem_of(config, host_available=23 * GIB)
    assert problem is not None
    assert "of host memory, 23.0 GiB are free; lower run.micro_batch_size (8), add layer" in problem


def test_a_batch_that_the_host_cannot_prepare():
    config = tiny(("run.global_batch_size", str(8 * 10**5)), ("data.num_prefetch_steps", "10"))
    assert host_bytes(config, Layout.of(config, 1), trains_on_host=False) > 8e5 * 256 * 8 * 12


def test_a_gpu():
    config = tiny()
    needed = certain_bytes(memory_per_gpu(config.model, Layout.of(config, 1)))
    # 4 bytes of weight, 4 of gradient, 12 of optimizer a parameter, 1.6 million of them.
    assert needed == pytest.approx(20 * 1.6e6, rel=0.1)
    assert problem_of(config, host_available=GIB, device_free=needed) is None
    assert problem_of(config, host_available=None, device_free=needed) is None
    problem = problem_of(config, host_available=GIB, device_free=needed - 1)
    assert problem is not None
    assert problem.startswith("out of memory: weights, gradients and optimizer take 0.0 GiB of a GPU that has 0.0 GiB")
    assert problem.endswith("see qwen3next-train plan")


def test_all_ranks_stop_when_one_lacks_memory(monkeypatch):
    class Others(SingleProcess):
        def gather_json(self, value):
            return [value, "out of memory: there"]

    class Context:
        world_size, local_world_size, control = 1, 1, Others()
        device = type("Device", (), {"type": "cpu"})()

    monkeypatch.setattr(memory_check, "available_host_bytes", lambda: None)
    with pytest.raises(OutOfMemory, match=r"^out of memory: there$"):
        memory_check.check_memory(tiny(), Layout.of(tiny(), 1), Context())


def test_settings_that_help_are_those_not_used_yet():
    config = tiny(
        ("run.micro_batch_size", "1"),
        ("parallel.recompute", "[layer]"),
        ("parallel.offload_optimizer", "cpu"),
        ("parallel.zero_stage", "2"),
        ("optimizer.moments_dtype", "bf16"),
        ("data.num_prefetch_steps", "0"),
    )
    assert settings_that_help(config, on_device=True) == (
        "raise parallel.expert_parallel_size (1), raise parallel.context_parallel_size (1) on several GPUs, shorten "
        "data.sequence_length (256) or make the model smaller; see qwen3next-train plan"
    )
    assert settings_that_help(config, on_device=False) == (
        "set parallel.offload_optimizer to none, start fewer processes per node, shorten data.sequence_length (256) or "
        "make the model smaller; see qwen3next-train plan"
    )


OFFLOAD, STAGE, MOMENTS = "set parallel.offload_optimizer to cpu", "raise parallel.zero_stage", "moments_dtype to bf16"


@pytest.mark.parametrize(
    ("overrides", "offered"),
    [
        ({}, [OFFLOAD, STAGE, MOMENTS]),
        ({"parallel.offload_optimizer": "cpu"}, [STAGE, MOMENTS]),
        ({"parallel.offload_optimizer": "cpu", "parallel.zero_stage": "2"}, [MOMENTS]),
        ({"parallel.gradient_dtype": "bf16", "run.precision": "bf16", "parallel.zero_stage": "2"}, [MOMENTS]),
        ({"parallel.micro_batches_in_flight": "2", "parallel.zero_stage": "2"}, [OFFLOAD, MOMENTS]),
        ({"optimizer.beta2": "0.999", "parallel.zero_stage": "3"}, []),
    ],
    ids=str,
)
def test_what_would_be_refused_is_no_help(overrides: dict[str, str], offered: list[str]) -> None:
    """Stage 3 beside offload, bf16 gradients or two in flight; offload beside bf16 gradients; slow moments in bf16."""
    text = settings_that_help(tiny(*overrides.items()), on_device=True)
    assert [way for way in (OFFLOAD, STAGE, MOMENTS) if way in text] == offered


@pytest.fixture
def root(tmp_path):
    def write(name: str, text: str) -> None:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    write("proc/meminfo", "MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    return dataclasses.make_dataclass("Root", ["path", "write"])(tmp_path, write)


def test_free_memory_of_the_machine_and_of_control_groups(root):
    assert available_host_bytes(root.path / "nowhere") is None
    assert available_host_bytes(root.path) == 8000 * 1024
    # Version 1, at the root of a container; page cache is given up.
    root.write("sys/fs/cgroup/memory/memory.limit_in_bytes", "5000000\n")
    root.write("sys/fs/cgroup/memory/memory.usage_in_bytes", "3000000\n")
    root.write("sys/fs/cgroup/memory/memory.stat", "cache 5\ntotal_inactive_file 500000\n")
    assert available_host_bytes(root.path) == 2_500_000
    # Version 2: the group that allows least of those this process is in.
    root.write("proc/self/cgroup", "0::/job/step\n")
    root.write("sys/fs/cgroup/job/step/memory.max", "max\n")
    root.write("sys/fs/cgroup/job/step/memory.current", "1000000\n")
    root.write("sys/fs/cgroup/job/memory.max", "2000000\n")
    root.write("sys/fs/cgroup/job/memory.current", "1500000\n")
    assert available_host_bytes(root.path) == 500_000


def test_processes_the_kernel_has_killed(root):
    assert num_oom_kills(root.path) is None
    root.write("proc/vmstat", "pgfault 3\noom_kill 7\n")
    assert num_oom_kills(root.path) == 7
    root.write("sys/fs/cgroup/memory.events", "oom 2\noom_kill 1\n")
    assert num_oom_kills(root.path) == 1


def test_an_eighth_of_what_is_free_is_left_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_check, "available_host_bytes", lambda: 8000)
    assert has_host_room(7000, num_local=1)
    assert not has_host_room(7001, num_local=1)
    assert has_host_room(1750, num_local=4)
    assert not has_host_room(1751, num_local=4)
    # Where nothing is known of the memory, the copy is tried.
    monkeypatch.setattr(memory_check, "available_host_bytes", lambda: None)
    assert has_host_room(2**60, num_local=8)
