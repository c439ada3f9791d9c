import hashlib
import random

import numpy as np
import pytest
import torch

from qwen3next_train.train.seeding import fix_cpu_threads, seed_everything, use_deterministic_kernels
from tests.forked import Apart


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))


@pytest.fixture(autouse=True)
def _leave_no_trace():
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    deterministic, fill = (
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    with torch.random.fork_rng():
        yield
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.mark.parametrize("seed", [0, 1234, 2**32 + 5, 2**64 + 7, 10**40])
def test_seed_decides_every_generator(seed):
    seed_everything(seed)
    first = draw()
    assert draw() != first
    seed_everything(seed)
    assert draw() == first
    seed_everything(seed + 1)
    assert all(new != old for new, old in zip(draw(), first, strict=True))


@pytest.mark.parametrize(
    ("variable", "local_world_size", "threads"), [(None, 1, 6), (None, 2, 3), (None, 4, 1), (None, 9, 1), ("6", 4, 6)]
)
def test_processes_share_the_cores_unless_told(monkeypatch, variable, local_world_size, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    torch.set_num_threads(6)
    assert fix_cpu_threads(local_world_size) == threads
    assert torch.get_num_threads() == threads


def test_deterministic_kernels_on_cpu_only():
    use_deterministic_kernels(torch.device("cuda"))
    assert not torch.are_deterministic_algorithms_enabled()
    use_deterministic_kernels(torch.device("cpu"))
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory


def bits() -> str:
    seed_everything(5)
    fix_cpu_threads(1)
    use_deterministic_kernels(torch.device("cpu"))
    x = torch.randn(257, 513, requires_grad=True)
    y = torch.zeros(64, 513).index_add(0, torch.randint(64, (257,)), x) @ torch.randn(513, 129)
    y.logsumexp(1).sum().backward()
    return hashlib.sha256(x.grad.numpy().tobytes()).hexdigest()


@pytest.mark.slow
def test_two_processes_compute_the_same_bits():
    digests = set()
    for _ in range(2):
        with Apart() as process:
            digests.add(process.call(bits))
    assert len(digests) == 1
