"""Device names as torch reports them, and the refusal to guess."""

from __future__ import annotations

import pytest

from qwen3next_train.accounting.hardware import DEVICES, find_device


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H200 NVL", "h200-nvl"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H20-3e", "h20-3e"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40"),
        ("NVIDIA A100 80GB PCIe", "a100-pcie-80"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA B300 SXM6 AC", "b300"),
        ("NVIDIA GB300", "gb300"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA A10G", "a10g"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        (" H100 ", "h100"),
    ],
)
def test_known_names(name: str, expected: str) -> None:
    """torch.cuda.get_device_name() and short names."""
    device = find_device(name)
    assert device is not None
    assert device.name == expected


@pytest.mark.parametrize(
    "name",
    [
        "",
        "cpu",
        "h10",
        "gpu",
        "Tesla T4",
        "NVIDIA",
        "NVIDIA L40",
        "NVIDIA A10",
        "NVIDIA H800",
        "NVIDIA GH200 480GB",
        "NVIDIA H100 64GB HBM2",
        "NVIDIA A100-SXM-64GB",
        "NVIDIA H100 80GB HBM3 MIG 1g.10gb",
        "NVIDIA GeForce RTX 4090 D",
        "NVIDIA GeForce RTX 4090 Laptop GPU",
        "NVIDIA GeForce RTX 3090 Ti",
        "AMD Instinct MI300X",
    ],
)
def test_unknown_is_none(name: str) -> None:
    """A relative of a known GPU is not that GPU."""
    assert find_device(name) is None


def test_peaks_follow_precision() -> None:
    """bf16 tensor cores, or plain fp32 cores."""
    device = find_device("h100")
    assert device is not None
    assert device.peak_flops("bf16") == 989.4e12
    assert device.peak_flops("fp32") == 66.9e12


def test_table_is_plausible() -> None:
    """Names are unique; a slipped digit or a swapped column would show."""
    assert len({device.name for device in DEVICES}) == len(DEVICES)
    for device in DEVICES:
        assert 20e12 < device.bf16_flops < 3e15
        assert 1.5 < device.bf16_flops / device.fp32_flops < 40
        assert 20e9 < device.memory_bytes < 400e9
        assert 30e9 <= device.link_bytes_per_s <= 900e9
