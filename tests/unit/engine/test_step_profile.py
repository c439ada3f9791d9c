"""What steps consist of, from a profiler's events with times of our own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen3next_train.engine.step_profile import (
    PARTS,
    exposed_and_idle,
    longest_kernels,
    named_parts,
    new_profiler,
    profile_table,
    read_profile,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


def event(name: str, start_us: float, end_us: float, *, on_device: bool = True, **fields: Any) -> Any:
    kind = torch.autograd.DeviceType.CUDA if on_device else torch.autograd.DeviceType.CPU
    time_range = SimpleNamespace(start=start_us, end=end_us, elapsed_us=lambda: end_us - start_us)
    defaults = {
        "device_type": kind,
        "is_user_annotation": False,
        "cpu_time_total": 0.0 if on_device else end_us - start_us,
        "self_cpu_time_total": 0.0 if on_device else end_us - start_us,
        "device_time_total": 0.0,
    }
    return SimpleNamespace(name=name, time_range=time_range, **(defaults | fields))


EVENTS = [
    event("gemm", 0, 4000),
    event("ncclDevKernel_ReduceScatter", 3000, 6000),
    event("gemm", 8000, 9000),
    event("ncclDevKernel_SendRecv", 8500, 10000),
    event("_adamw_update", 10000, 10500),
    event("whole step", 0, 10500, is_user_annotation=True),
    event("part norm", 0, 100, on_device=False, device_time_total=250.0),
    event("cudaStreamSynchronize", 100, 700, on_device=False),
    event("cudaStreamSynchronize", 800, 900, on_device=False),
]


def test_exposed_and_idle_time() -> None:
    spans = [(0.0, 4.0, False), (3.0, 6.0, True), (8.0, 9.0, False), (8.5, 10.0, True)]
    assert exposed_and_idle(spans) == (3.0, 2.0)
    assert exposed_and_idle([]) == (0.0, 0.0)
    assert exposed_and_idle([(0.0, 2.0, True), (1.0, 3.0, True)]) == (3.0, 0.0)


def test_events_of_two_steps_on_a_gpu() -> None:
    profiled = read_profile(EVENTS, CUDA, 2)
    assert (profiled.exposed_ms, profiled.idle_ms) == (1.5, 1.0)
    assert (profiled.host_waits, profiled.host_wait_ms) == (1.0, pytest.approx(0.35))
    assert profiled.parts == {
        "model": pytest.approx((4 + 3 + 1 + 1.5 + 0.5 - 3 - 1.5 - 0.5 - 0.25) / 2),
        "exchange": 0.75,
        "accumulation": 0.0,
        "reduction": 1.5,
        "norm": 0.125,
        "AdamW": 0.25,
        "gathering": 0.0,
    }
    assert [(kernel.name, kernel.ms, kernel.calls) for kernel in profiled.kernels] == [
        ("gemm", 2.5, 1.0),
        ("ncclDevKernel_ReduceScatter", 1.5, 0.5),
        ("ncclDevKernel_SendRecv", 0.75, 0.5),
        ("_adamw_update", 0.25, 0.5),
    ]


def test_a_table_has_a_line_for_each_number() -> None:
    lines = profile_table(read_profile(EVENTS, CUDA, 2), heading="steps 4-5 of rank 0", on_gpu=True, wall_ms=7.125)
    assert lines[0] == "steps 4-5 of rank 0"
    assert lines[3] == "      7.12  wall time"
    assert lines[5] == "      0.75  exchange"
    assert lines[11:14] == [
        "      1.50  exposed communication",
        "      1.00  idle",
        "      0.35  host waits for the device, 1.0 times",
    ]
    assert lines[15:17] == ["        ms    calls  kernel", "      2.50      1.0  gemm"]
    assert lines[-1] == "      5.00      2.5  all 4"


def test_a_table_of_a_cpu_leaves_out_what_is_not_known_there() -> None:
    profiled = replace(read_profile([], CPU, 1), parts={"model": 0.0, "AdamW": 2.0})
    lines = profile_table(profiled, heading="steps 4-5 of rank 0", on_gpu=False, wall_ms=7.125)
    assert lines[3:] == [
        "      7.12  wall time",
        "      2.00  AdamW",
        "",
        "        ms    calls  kernel",
        "      0.00      0.0  all 0",
    ]


def test_operators_on_cpu_are_counted_per_step() -> None:
    x = torch.ones(4, 4)
    with new_profiler(CPU) as profiler:
        for _ in range(2):
            x = x @ x
            x = x + x
            x = x + x
    calls = {kernel.name: kernel.calls for kernel in longest_kernels(profiler.events(), CPU, 2)}
    assert (calls["aten::mm"], calls["aten::add"]) == (1.0, 2.0)


def test_parts_of_the_optimizer_are_ranges_only_meanwhile() -> None:
    from qwen3next_train.engine import partitioned_parameters
    from qwen3next_train.engine.clipped_update import ClippedUpdate
    from qwen3next_train.engine.gradient_buckets import _Bucket

    def named() -> list[object]:
        finish = partitioned_parameters.PartitionedParameterOptimizer._finish_reductions
        return [_Bucket.add, ClippedUpdate._gradient_norm, finish, partitioned_parameters._fill_rows]

    originals = named()
    with named_parts():
        assert all(found is not original for found, original in zip(named(), originals, strict=True))
    assert named() == originals
    assert set(PARTS) >= {"norm", "accumulation"}
