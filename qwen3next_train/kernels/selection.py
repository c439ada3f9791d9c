"""Choice of each operation's backend: once, by name, and said at start-up.

Only ``auto`` chooses. A backend asked for by name either runs or is refused with the reason; nothing is
substituted for it.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.causal_conv1d import CausalConv1d
from qwen3next_train.kernels.causal_conv1d.reference import causal_conv1d_reference
from qwen3next_train.kernels.gated_delta_rule import GatedDeltaRule
from qwen3next_train.kernels.gated_delta_rule.reference import gated_delta_rule_reference
from qwen3next_train.kernels.gated_rms_norm import GatedRmsNorm
from qwen3next_train.kernels.gated_rms_norm.reference import gated_rms_norm_reference
from qwen3next_train.kernels.grouped_matmul import GroupedMatmul
from qwen3next_train.kernels.grouped_matmul.reference import grouped_matmul_reference
from qwen3next_train.kernels.linear_cross_entropy import LinearCrossEntropy
from qwen3next_train.kernels.linear_cross_entropy.reference import linear_cross_entropy_chunked
from qwen3next_train.kernels.token_permutation import TokenPermutation
from qwen3next_train.kernels.token_permutation.reference import TokenPermutationReference
from qwen3next_train.kernels.varlen_attention import VarlenAttention
from qwen3next_train.kernels.varlen_attention.reference import varlen_attention_reference

HOPPER = 9
"""Major compute capability of H100, H200 and their like."""


@dataclass(frozen=True)
class KernelChoice:
    """One line of the start-up table.

    Args:
        operation: field of :class:`KernelsConfig`, or an operation with one backend.
        backend: the backend that runs.
        reason: why it was chosen.
    """

    operation: str
    backend: str
    reason: str


@dataclass(frozen=True)
class KernelSet:
    """The operations the model is built from, and how each was chosen."""

    gated_delta_rule: GatedDeltaRule
    causal_conv1d: CausalConv1d
    varlen_attention: VarlenAttention
    grouped_matmul: GroupedMatmul
    token_permutation: TokenPermutation
    gated_rms_norm: GatedRmsNorm
    linear_cross_entropy: LinearCrossEntropy
    choices: tuple[KernelChoice, ...]


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by ``run.precision``."""


def select_kernels(config: KernelsConfig, device: torch.device, *, dtype: torch.dtype = torch.bfloat16) -> KernelSet:
    """Resolve every operation for ``device``.

    Args:
        config: backend names; ``auto`` is the reference on CPU and the vendor backend, where it runs, on CUDA.
        device: where the model will live.
        dtype: of weights and activations; the vendor backends take no fp32, save for the convolution.

    Raises:
        KernelUnavailable: a backend asked for by name cannot run here.
    """
    place = _Place(device, dtype)
    operations = {
        "gated_delta_rule": _resolve("gated_delta_rule", config.gated_delta_rule, "fla", place, _fla_rule_fault),
        "causal_conv1d": _resolve("causal_conv1d", config.causal_conv1d, "fla", place, _fla_fault),
        "varlen_attention": _resolve("varlen_attention", config.varlen_attention, "flash", place, _flash_fault),
        "grouped_matmul": _resolve("grouped_matmul", config.grouped_matmul, "grouped_mm", place, _grouped_mm_fault),
    }
    vendor = {name for name, choice in operations.items() if choice.backend != "reference"}
    only = tuple(
        KernelChoice(name, "reference", "only backend")
        for name in ("token_permutation", "gated_rms_norm", "linear_cross_entropy")
    )
    return KernelSet(
        gated_delta_rule=_load_fla_rule() if "gated_delta_rule" in vendor else gated_delta_rule_reference,
        causal_conv1d=_load_fla_conv() if "causal_conv1d" in vendor else causal_conv1d_reference,
        varlen_attention=_load_flash() if "varlen_attention" in vendor else varlen_attention_reference,
        grouped_matmul=_load_grouped_mm() if "grouped_matmul" in vendor else grouped_matmul_reference,
        token_permutation=TokenPermutationReference(),
        gated_rms_norm=gated_rms_norm_reference,
        linear_cross_entropy=linear_cross_entropy_chunked,
        choices=(*operations.values(), *only),
    )


def format_choices(choices: tuple[KernelChoice, ...]) -> str:
    """The start-up table, one operation a line."""
    return "\n".join(f"{c.operation:<22}{c.backend:<12}{c.reason}" for c in choices)


def miscompiles_gated_backward(triton_version: str) -> bool:
    """Whether this Triton turns FLA's gated delta rule into wrong gradients of k on Hopper, silently.

    Versions 3.4 to 3.7.0 do (flash-linear-attention issue 640); 3.7.1 is right.
    """
    return (3, 4, 0) <= _version(triton_version) < (3, 7, 1)


@dataclass(frozen=True)
class _Place:
    device: torch.device
    dtype: torch.dtype

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the CUDA device."""
        return torch.cuda.get_device_capability(self.device)


def _resolve(
    operation: str, asked: str, vendor: str, place: _Place, fault: Callable[[_Place], str | None]
) -> KernelChoice:
    """Choose between the reference and the operation's one vendor backend."""
    if asked == "reference":
        return KernelChoice(operation, "reference", "asked for by name")
    kind = place.device.type
    problem = f"needs CUDA and the model runs on {kind}" if kind != "cuda" else fault(place)
    if asked == "auto":
        if problem is None:
            return KernelChoice(operation, vendor, "auto: runs on this device")
        return KernelChoice(operation, "reference", "auto: CPU" if kind == "cpu" else f"auto: {vendor} {problem}")
    if problem is not None:
        raise KernelUnavailable(f"kernels.{operation}: {vendor!r} {problem}; or choose 'auto' or 'reference'")
    return KernelChoice(operation, vendor, "asked for by name")


def _fla_fault(place: _Place) -> str | None:
    """Why FLA cannot run, or None."""
    for module, package in (("triton", "triton"), ("fla", "flash-linear-attention")):
        if importlib.util.find_spec(module) is None:
            return f"needs the package {package}, which is not installed: pip install {package}"
    return None


def _fla_rule_fault(place: _Place) -> str | None:
    """Why FLA's gated delta rule cannot be trusted here, or None."""
    fault = _fla_fault(place) or _half_precision_fault(place)
    if fault is not None:
        return fault
    import triton

    if place.capability[0] == HOPPER and miscompiles_gated_backward(triton.__version__):
        return f"has a wrong backward on Hopper with triton {triton.__version__}: install triton >= 3.7.1"
    return None


def _flash_fault(place: _Place) -> str | None:
    """Why torch's variable-length attention cannot run, or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch.nn.attention.varlen, which torch {torch.__version__} lacks: install torch >= 2.11"
    return _ampere_fault(place) or _half_precision_fault(place)


def _grouped_mm_fault(place: _Place) -> str | None:
    """Why torch's grouped GEMM cannot run, or None."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"needs torch.nn.functional.grouped_mm, which torch {torch.__version__} lacks: install torch >= 2.11"
    if place.dtype != torch.bfloat16:
        return f"takes bf16 and the model is {place.dtype}: set run.precision to bf16"
    return _ampere_fault(place)


def _ampere_fault(place: _Place) -> str | None:
    if place.capability[0] < 8:
        return f"needs a GPU of compute capability 8.0 or newer and this one has {place.capability}"
    return None


def _half_precision_fault(place: _Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and the model is {place.dtype}: set run.precision to bf16"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _load_fla_rule() -> GatedDeltaRule:
    from qwen3next_train.kernels.gated_delta_rule.fla_backend import gated_delta_rule_fla

    return gated_delta_rule_fla


def _load_fla_conv() -> CausalConv1d:
    from qwen3next_train.kernels.causal_conv1d.fla_backend import causal_conv1d_fla

    return causal_conv1d_fla


def _load_flash() -> VarlenAttention:
    from qwen3next_train.kernels.varlen_attention.flash_backend import varlen_attention_flash

    return varlen_attention_flash


def _load_grouped_mm() -> GroupedMatmul:
    from qwen3next_train.kernels.grouped_matmul.torch_backend import grouped_matmul_grouped_mm

    return grouped_matmul_grouped_mm
