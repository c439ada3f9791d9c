import pytest

from qwen3next_train.metrics.step_line import format_duration, format_evals, format_si, format_step, short

RECORD = {
    "step": 120,
    "tokens": 503_316_480,
    "loss/lm": 6.81234,
    "loss/mtp": 7.031,
    "loss/load_balancing": 1.00312,
    "optim/lr": 7.2e-5,
    "optim/grad_norm": 0.8412,
    "optim/skipped_steps": 0,
    "perf/flops_per_step": 105.4e15,
    "perf/tflops_per_gpu": 248.2,
    "perf/mfu": 0.251,
    "perf/tokens_per_s": 2.5e6,
    "perf/step_time_s": 1.68,
    "perf/data_wait_s": 0.00504,
    "mem/peak_gib": 61.24,
    "moe/max_violation": 0.42,
    "moe/dead_experts": 3,
}


def test_whole_line():
    line = format_step(RECORD, total_steps=238_419, eta="eta 4d14h", rate_unit="FLOP/s/gpu", width=200)
    assert line == (
        "step    120/238419  loss 6.8123  mtp 7.0310  aux 1.0031  lr 7.2e-05  gnorm 0.84  105 PFLOP  248 TFLOP/s/gpu  "
        "mfu 25.1%  2.50 Mtok/s  data 0.3%  mem 61.2 GiB  moe max +42%  dead 3  eta 4d14h"
    )


def test_what_a_hundred_columns_hold():
    on_gpus = format_step(RECORD, total_steps=238_419, eta="eta 4d14h", rate_unit="FLOP/s/gpu")
    assert on_gpus == (
        "step    120/238419  loss 6.8123  lr 7.2e-05  gnorm 0.84  248 TFLOP/s/gpu  2.50 Mtok/s  eta 4d14h"
    )
    small = RECORD | {"perf/tflops_per_gpu": 0.0137, "perf/flops_per_step": 38.92e9, "perf/tokens_per_s": 1441.0}
    assert format_step(small, total_steps=440, eta="eta 1m22s") == (
        "step 120/440  loss 6.8123  lr 7.2e-05  gnorm 0.84  38.9 GFLOP  13.7 GFLOP/s  1.44 ktok/s  eta 1m22s"
    )


@pytest.mark.parametrize("width", [60, 80, 100, 120])
@pytest.mark.parametrize("total_steps", [9, 440, 238_419, 99_999_999])
@pytest.mark.parametrize("factor", [1e-9, 1e-3, 1.0, 9.996, 999.7, 1e4, float("nan"), float("inf")])
def test_no_line_is_longer_than_the_terminal_is_wide(width, total_steps, factor):
    """Whatever the values are; which of them are shown does not depend on a digit of one."""
    rates = {name: RECORD[name] * factor for name in RECORD if name.startswith(("perf", "optim", "loss"))}
    record = RECORD | rates | {"perf/step_time_s": 1.0}
    line = format_step(record, total_steps=total_steps, eta="eta 4d14h", rate_unit="FLOP/s/gpu", width=width)
    assert len(line) <= width
    assert "loss " in line


def test_a_digit_more_or_less_moves_no_value_in_or_out():
    def names(record):
        return [part.split()[0] for part in format_step(record, total_steps=440, eta="").split("  ")[:4]]

    shown = {tuple(names(RECORD | {"optim/grad_norm": norm, "loss/lm": norm})) for norm in (0.5, 5.5, 55.5, 1e-7)}
    assert len(shown) == 1


def test_what_is_missing_is_left_out():
    assert format_step({"step": 5, "loss/lm": 2.0}, total_steps=9) == "step 5/9  loss 2.0000"
    assert format_step({"step": 5}, total_steps=10) == "step  5/10"


def test_rare_values_are_shown_first_when_there_are_any():
    record = RECORD | {"loss/lm": float("nan"), "optim/skipped_steps": 2, "perf/data_wait_s": 0.84}
    assert format_step(record, total_steps=440, eta="eta 9s", width=60) == (
        "step 120/440  loss nan  data 50.0%  skipped 2  eta 9s"
    )


def test_a_validation_is_a_line_in_the_same_columns():
    record = {"step": 9, "loss/lm": 2.0, "eval/loss": 1.5, "eval/bpb": 0.75, "eval/code/loss": 2.5, "eval/b/loss": 1}
    assert format_evals(record | {"eval/b/bpb": 0.5}, total_steps=440) == [
        "eval   9/440  loss 1.5000  0.7500 bits/byte",
        "eval   9/440  code  loss 2.5000",
        "eval   9/440  b  loss 1.0000  0.5000 bits/byte",
    ]
    assert format_evals({"step": 9, "loss/lm": 2.0}, total_steps=9) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.8412, "0.84"),
        (9.994, "9.99"),
        (9.996, "10.0"),
        (99.96, "100"),
        (999.7, "1000"),
        (12345.6, "1.2e+04"),
        (0.00123, "1.2e-03"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 "),
        (12.3456, "12.3 "),
        (1234, "1.23 k"),
        (2.5e6, "2.50 M"),
        (3.1e9, "3.10 G"),
        (5e12, "5.00 T"),
        (2.51e21, "2510 E"),
    ],
)
def test_si(value, text):
    assert format_si(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (12.4, "12s"), (59.6, "1m00s"), (200, "3m20s"), (7500, "2h05m"), (396_000, "4d14h"), (86_400, "1d00h")],
)
def test_duration(seconds, text):
    assert format_duration(seconds) == text
