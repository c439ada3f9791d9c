"""The table of rates: complete, positive, each with its source, and how it is scaled."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from qwen3next_train.accounting.hardware import Device, find_device
from qwen3next_train.planner.rates import TABLE, Rates, rates_of


def device(name: str) -> Device:
    found = find_device(name)
    assert found is not None
    return found


def test_every_rate_has_a_value_and_a_source() -> None:
    """One row of the table for each field; what was not measured says so."""
    assert set(TABLE) == {each.name for each in fields(Rates)} - {"is_estimate"}
    for name, rate in TABLE.items():
        assert rate.h100 > 0, name
        assert rate.h200 >= rate.h100, name
        assert any(word in rate.source for word in ("2026-11-", "not measured", "expected")), name


def test_measured_devices_have_the_figures_of_the_table() -> None:
    """H100 and H200 in bf16 are no estimates."""
    for name in ("h100", "h200"):
        rates = rates_of(device(name), "bf16")
        assert rates.is_estimate is False
        assert {key: getattr(rates, key) for key in TABLE} == {key: getattr(TABLE[key], name) for key in TABLE}


@pytest.mark.parametrize(
    ("name", "precision", "peak", "link"),
    [("b200", "bf16", 2250 / 989.4, 2), ("a100-80", "bf16", 312 / 989.4, 2 / 3), ("h100", "fp32", 66.9 / 989.4, 1)],
)
def test_others_are_scaled(name: str, precision: str, peak: float, link: float) -> None:
    """By peak FLOP/s or by the link; shares and the network stay."""
    rates = rates_of(device(name), "bf16" if precision == "bf16" else "fp32")
    assert rates.is_estimate is True
    for key, rate in TABLE.items():
        factor = {"peak": peak, "link": link, "no": 1.0}[rate.scales]
        assert getattr(rates, key) == pytest.approx(rate.h100 * factor), key


def test_a_scaled_h200_would_be_an_h100() -> None:
    """Their peaks are equal: what memory gives an H200 was measured, not scaled."""
    scaled = rates_of(replace(device("h200"), name="h200 of another kind"), "bf16")
    assert replace(scaled, is_estimate=False) == rates_of(device("h100"), "bf16")
