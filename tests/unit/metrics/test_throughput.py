import pytest

from qwen3next_train.metrics.names import is_metric_name
from qwen3next_train.metrics.throughput import Throughput


def test_one_step_by_hand():
    throughput = Throughput(1e15, 4)
    metrics = throughput.record_step(flops=8e14, tokens=1000, step_time_s=0.5, data_wait_s=0.125)
    assert metrics == {
        "perf/flops_per_step": 8e14,
        "perf/flops_total": 8e14,
        "perf/tflops_per_gpu": 400.0,
        "perf/tokens_per_s": 2000.0,
        "perf/step_time_s": 0.5,
        "perf/data_wait_s": 0.125,
        "perf/mfu": 0.4,
    }
    assert all(is_metric_name(name) for name in metrics)


def test_no_mfu_without_a_peak():
    metrics = Throughput(None, 1).record_step(flops=1e9, tokens=1, step_time_s=1.0, data_wait_s=0.0)
    assert "perf/mfu" not in metrics


def test_total_goes_on_after_a_resume():
    whole = Throughput(None, 1)
    totals = [
        whole.record_step(flops=flops, tokens=1, step_time_s=1.0, data_wait_s=0.0)["perf/flops_total"]
        for flops in (0.1, 0.2, 0.3)
    ]
    first = Throughput(None, 1)
    first.record_step(flops=0.1, tokens=1, step_time_s=1.0, data_wait_s=0.0)
    second = Throughput(None, 1, flops_total=first.flops_total)
    resumed = [
        second.record_step(flops=flops, tokens=1, step_time_s=9.0, data_wait_s=0.0)["perf/flops_total"]
        for flops in (0.2, 0.3)
    ]
    assert resumed == totals[1:]


def test_numbers_of_a_long_run_stay_json_numbers():
    throughput = Throughput(None, 1, flops_total=2.5e22)
    total = throughput.record_step(flops=10**17, tokens=1, step_time_s=1.0, data_wait_s=0.0)["perf/flops_total"]
    assert total == 2.5e22 + 1e17
    assert isinstance(total, float)


def test_eta_is_the_median_step():
    throughput = Throughput(None, 1)
    assert throughput.eta_s(10) is None
    for seconds in (60.0, 2.0, 2.0, 2.5, 1.5):
        throughput.record_step(flops=1, tokens=1, step_time_s=seconds, data_wait_s=0.0)
    assert throughput.eta_s(10) == 20.0
    assert throughput.eta_s(0) == 0.0


def test_eta_follows_recent_steps():
    throughput = Throughput(None, 1)
    for seconds in [5.0] * 100 + [1.0] * 50:
        throughput.record_step(flops=1, tokens=1, step_time_s=seconds, data_wait_s=0.0)
    assert throughput.eta_s(3) == 3.0


@pytest.mark.parametrize("seconds", [0.0, -1.0])
def test_a_step_takes_time(seconds):
    with pytest.raises(AssertionError):
        Throughput(None, 1).record_step(flops=1, tokens=1, step_time_s=seconds, data_wait_s=0.0)
