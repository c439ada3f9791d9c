"""What a device can do: peak rates, memory and links of known GPUs. An unknown device is None, never a guess.

Peaks are the vendors' dense figures (no structured sparsity) at boost clock, from the data sheets; they are the
denominator of MFU, not what a kernel reaches.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Precision = Literal["bf16", "fp32"]

_GIGA = 10**9
_MIB = 2**20


@dataclass(frozen=True)
class Device:
    """One GPU model.

    Args:
        name: short name, as ``plan`` takes it.
        bf16_flops: peak dense bf16 tensor-core rate with fp32 accumulation, FLOP/s.
        fp32_flops: peak fp32 rate of the plain cores, FLOP/s. TF32 is not meant: torch multiplies fp32
            matrices in full precision unless TF32 is switched on, which this project never does.
        memory_bytes: device memory as the driver reports it, bytes.
        link_bytes_per_s: bandwidth of one GPU to the others of its domain, one direction (NVLink, or PCIe
            where there is none), bytes/s.
        domain_size: GPUs that are joined by that link.
    """

    name: str
    bf16_flops: float
    fp32_flops: float
    memory_bytes: int
    link_bytes_per_s: int
    domain_size: int

    def peak_flops(self, precision: Precision) -> float:
        """Peak FLOP/s of matrix products in ``precision``."""
        return self.bf16_flops if precision == "bf16" else self.fp32_flops


def _device(name: str, *, bf16_t: float, fp32_t: float, memory_mib: int, link_g: int, domain_size: int = 8) -> Device:
    # Through whole GFLOP/s, so that 66.9 T is 66.9e12 to the last digit.
    bf16, fp32 = (float(round(rate * 1000) * _GIGA) for rate in (bf16_t, fp32_t))
    return Device(name, bf16, fp32, memory_mib * _MIB, link_g * _GIGA, domain_size)


DEVICES: tuple[Device, ...] = (
    _device("a100-40", bf16_t=312, fp32_t=19.5, memory_mib=40_960, link_g=300),
    _device("a100-80", bf16_t=312, fp32_t=19.5, memory_mib=81_920, link_g=300),
    _device("a100-pcie-40", bf16_t=312, fp32_t=19.5, memory_mib=40_960, link_g=32),
    _device("a100-pcie-80", bf16_t=312, fp32_t=19.5, memory_mib=81_920, link_g=32),
    _device("h100", bf16_t=989.4, fp32_t=66.9, memory_mib=81_559, link_g=450),
    _device("h100-pcie", bf16_t=756, fp32_t=51.2, memory_mib=81_559, link_g=64),
    _device("h100-nvl", bf16_t=835.5, fp32_t=60, memory_mib=95_830, link_g=300, domain_size=2),
    _device("h200", bf16_t=989.4, fp32_t=66.9, memory_mib=143_771, link_g=450),
    _device("h200-nvl", bf16_t=835.5, fp32_t=60, memory_mib=143_771, link_g=450, domain_size=4),
    _device("h20", bf16_t=148, fp32_t=44, memory_mib=97_871, link_g=450),
    _device("h20-3e", bf16_t=148, fp32_t=44, memory_mib=143_771, link_g=450),
    _device("b200", bf16_t=2250, fp32_t=75, memory_mib=183_359, link_g=900),
    _device("gb200", bf16_t=2500, fp32_t=80, memory_mib=189_471, link_g=900, domain_size=72),
    _device("b300", bf16_t=2250, fp32_t=75, memory_mib=275_040, link_g=900),
    _device("gb300", bf16_t=2500, fp32_t=80, memory_mib=284_208, link_g=900, domain_size=72),
    _device("l40s", bf16_t=362, fp32_t=91.6, memory_mib=46_068, link_g=32),
    _device("a10g", bf16_t=70, fp32_t=31.2, memory_mib=23_028, link_g=32),
    _device("l4", bf16_t=121, fp32_t=30.3, memory_mib=23_034, link_g=32),
    _device("rtx3090", bf16_t=71, fp32_t=35.6, memory_mib=24_576, link_g=32),
    _device("rtx4090", bf16_t=165.2, fp32_t=82.6, memory_mib=24_564, link_g=32),
    _device("rtx5090", bf16_t=209.5, fp32_t=104.8, memory_mib=32_607, link_g=64),
)

# torch.cuda.get_device_name() by word: all words must occur. The first match wins, so narrower rows come first.
_CUDA_NAMES: tuple[tuple[frozenset[str], str], ...] = tuple(
    (frozenset(words.split()), name)
    for words, name in (
        ("a100 pcie 40gb", "a100-pcie-40"),
        ("a100 pcie 80gb", "a100-pcie-80"),
        ("a100 sxm4 40gb", "a100-40"),
        ("a100 sxm4 80gb", "a100-80"),
        ("h100 pcie", "h100-pcie"),
        ("h100 nvl", "h100-nvl"),
        ("h100 80gb hbm2e", "h100-pcie"),
        ("h100 80gb hbm3", "h100"),
        ("h200 nvl", "h200-nvl"),
        ("h200", "h200"),
        ("h20 3e", "h20-3e"),
        ("h20", "h20"),
        ("gb200", "gb200"),
        ("b200", "b200"),
        ("gb300", "gb300"),
        ("b300", "b300"),
        ("l40s", "l40s"),
        ("a10g", "a10g"),
        ("l4", "l4"),
        ("rtx 3090", "rtx3090"),
        ("rtx 4090", "rtx4090"),
        ("rtx 5090", "rtx5090"),
    )
)
_OTHER_PRODUCTS = frozenset({"laptop", "mig", "d", "ti", "super"})
"""Words of products that share a name with a row of the table but not its figures."""


def find_device(name: str) -> Device | None:
    """The device of a short name (``h100``) or of a ``torch.cuda`` device name (``NVIDIA H100 80GB HBM3``).

    Returns:
        The device, or None when it is not in the table (also for MIG slices and laptop variants).
    """
    by_name = {device.name: device for device in DEVICES}
    key = name.strip().lower()
    if key in by_name:
        return by_name[key]
    words = frozenset(key.replace("-", " ").split())
    if "nvidia" not in words or words & _OTHER_PRODUCTS:
        return None
    for needed, device_name in _CUDA_NAMES:
        if needed <= words:
            return by_name[device_name]
    return None
