"""Choice of each operation's backend: once, by name, and said at start-up.

Only ``auto`` chooses. A backend asked for by name either runs or is rejected with the reason; nothing is
substituted for it.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypedDict

import torch

from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.errors import KernelUnavailable
from qwen3next_train.kernels.adamw import AdamWUpdate, adamw_update_reference
from qwen3next_train.kernels.attention import VarlenAttention, varlen_attention_reference
from qwen3next_train.kernels.choices import KernelChoice
from qwen3next_train.kernels.cross_entropy import LinearCrossEntropy, linear_cross_entropy_chunked
from qwen3next_train.kernels.fla.process import (
    keep_delta_rule_from_flash_qla,
    only_operations_of_fla,
    use_tuned_configs,
)
from qwen3next_train.kernels.gated_delta_rule import (
    DeltaRule,
    DeltaRuleSummary,
    DeltaStateGradient,
    GatedDeltaRule,
    delta_rule_summary_reference,
    delta_state_gradient_reference,
    gated_delta_rule_reference,
)
from qwen3next_train.kernels.gates import (
    OutputGate,
    SharedExpertCombine,
    SharedInput,
    SwiGlu,
    output_gate_reference,
    shared_expert_combine_reference,
    shared_input_reference,
    swiglu_reference,
)
from qwen3next_train.kernels.gdn_prologue import GdnPrologue, gdn_prologue_reference
from qwen3next_train.kernels.grouped_gemm import GroupedMatmul, grouped_matmul_reference
from qwen3next_train.kernels.norms import (
    GatedRmsNorm,
    QkNormRope,
    RmsNorm,
    gated_rms_norm_reference,
    qk_norm_rope_reference,
)
from qwen3next_train.kernels.routing import TokenPermutation, TopKRouting, top_k_routing_reference

HOPPER = 9
"""Major compute capability of H100, H200 and their like."""
BLACKWELL = 10
"""That of B200 and its like."""

_FLASH_QLA_HEAD_DIM = 128
_INSTALL_FLASH_QLA = "pip install 'flash-qla>=0.1.3,<0.2'"
_OWN_CHUNK_HEAD_DIMS = range(16, 129)
"""Heads for which our part of FLA's rule fits the shared memory of a Hopper GPU."""
_MAX_FLA_KEY_DIM = 256
_MAX_FLASH_HEAD_DIM = 256
_MAX_FUSED_FILTER = 4
_ALIGNED = 8
"""Elements of bf16 in 16 bytes, at whose multiples rows of operands have to begin."""


@dataclass(frozen=True)
class KernelSet:
    """The operations the model is built from, and how each was chosen."""

    gated_delta_rule: GatedDeltaRule
    delta_rule_summary: DeltaRuleSummary
    delta_state_gradient: DeltaStateGradient
    gdn_prologue: GdnPrologue
    varlen_attention: VarlenAttention
    grouped_matmul: GroupedMatmul
    top_k_routing: TopKRouting
    token_permutation: TokenPermutation
    swiglu: SwiGlu
    shared_expert_combine: SharedExpertCombine
    shared_input: SharedInput
    gated_rms_norm: GatedRmsNorm
    linear_cross_entropy: LinearCrossEntropy
    rms_norm: RmsNorm
    qk_norm_rope: QkNormRope
    output_gate: OutputGate
    choices: tuple[KernelChoice, ...]


DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Dtype of weights and activations by ``run.precision``."""


def select_kernels(
    config: KernelsConfig,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    model: ModelConfig | None = None,
) -> KernelSet:
    """Resolve every operation for ``device``.

    Args:
        config: backend names; ``auto`` is the reference on CPU and the fastest vendor backend that runs on CUDA.
        device: where the model will live.
        dtype: of weights and activations; the vendor backends take no fp32.
        model: whose sizes the backends have to take; None: FlashQLA and our grouped GEMM, which take few, are not
            chosen.

    Raises:
        KernelUnavailable: a backend asked for by name cannot run here.
    """
    place = _Place(device, dtype, model)
    operations = {
        "gated_delta_rule": _resolve("gated_delta_rule", config.gated_delta_rule, _RULE_VENDORS, place),
        "varlen_attention": _resolve("varlen_attention", config.varlen_attention, _ATTENTION_VENDORS, place),
        "grouped_matmul": _resolve("grouped_matmul", config.grouped_matmul, _GROUPED_GEMM_VENDORS, place),
    }
    fused_choice = _resolve("fused", config.fused, {"triton": _triton_unavailable_reason}, place)
    fused = _fused_triton() if fused_choice.backend == "triton" else _fused_reference()
    fused_choices = {name: replace(fused_choice, operation=name) for name in fused}
    prologue_choice = _resolve("fused", config.fused, {"triton": _fused_prologue_unavailable_reason}, place)
    if prologue_choice.backend == "reference":
        fused["gdn_prologue"] = gdn_prologue_reference
        fused_choices["gdn_prologue"] = replace(prologue_choice, operation="gdn_prologue")
    passing = _choose_passing(operations["gated_delta_rule"], place)
    operations |= {name: replace(passing, operation=name) for name in ("delta_rule_summary", "delta_state_gradient")}
    rule = _load_passing(passing.backend, _load_gated_delta_rule(operations["gated_delta_rule"].backend, place), place)
    return KernelSet(
        gated_delta_rule=rule.scan,
        delta_rule_summary=rule.summary,
        delta_state_gradient=rule.state_gradient,
        varlen_attention=_load_attention(operations["varlen_attention"].backend),
        grouped_matmul=_load_grouped_matmul(operations["grouped_matmul"].backend),
        **fused,
        choices=(*operations.values(), *fused_choices.values()),
    )


def reference_kernels() -> KernelSet:
    """Every operation by its reference, which runs on any device and in any dtype."""
    names = dict.fromkeys(KernelsConfig.model_fields, "reference")
    return select_kernels(KernelsConfig.model_validate(names), torch.device("cpu"))


def select_adamw_update(config: KernelsConfig, device: torch.device) -> AdamWUpdate:
    """The optimizer's update, which ``kernels.fused`` chooses with the other operations of one pass.

    Args:
        config: backend names.
        device: where the optimizer state lives.
    """
    choice = _resolve(
        "fused", config.fused, {"triton": _triton_unavailable_reason}, _Place(device, torch.float32, None)
    )
    if choice.backend == "reference":
        return adamw_update_reference
    from qwen3next_train.kernels.triton.adamw import adamw_update_triton

    return adamw_update_triton


def miscompiles_gated_backward(triton_version: str) -> bool:
    """Whether this Triton turns FLA's gated delta rule into wrong gradients of k on Hopper, silently.

    Versions 3.4 to 3.7.0 do (flash-linear-attention issue 640); 3.7.1 is right.
    """
    return (3, 4, 0) <= _version(triton_version) < (3, 7, 1)


@dataclass(frozen=True)
class _Place:
    device: torch.device
    dtype: torch.dtype
    model: ModelConfig | None

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the CUDA device."""
        return torch.cuda.get_device_capability(self.device)

    @property
    def rule_head_dims(self) -> tuple[int, int] | None:
        """Head dims of Gated DeltaNet's keys and values, None where unknown."""
        return None if self.model is None else (self.model.linear_key_head_dim, self.model.linear_value_head_dim)


_UnavailableReason = Callable[[_Place], str | None]
"""Why a backend cannot run at a place, with a hint what to do about it, or None."""


def _resolve(operation: str, asked: str, vendors: Mapping[str, _UnavailableReason], place: _Place) -> KernelChoice:
    """Choose between the reference and the operation's vendor backends, of which the first is preferred."""
    if asked == "reference":
        return KernelChoice(operation, "reference", "asked for by name", operation)
    kind = place.device.type
    unavailable = []
    for vendor in vendors if asked == "auto" else (asked,):
        why_not = f"needs CUDA and the model runs on {kind}" if kind != "cuda" else vendors[vendor](place)
        if why_not is None:
            reason = "auto: runs on this device" if asked == "auto" else "asked for by name"
            return KernelChoice(operation, vendor, reason, operation)
        unavailable.append(f"{vendor} {why_not}")
    if asked != "auto":
        raise KernelUnavailable(f"kernels.{operation}: {asked!r} {why_not}; or choose 'auto' or 'reference'")
    # The backend that comes with the package first, then those that are faster and optional.
    reason = "auto: CPU" if kind == "cpu" else f"auto: {'; '.join(reversed(unavailable))}"
    return KernelChoice(operation, "reference", reason, operation)


class _Fused(TypedDict):
    """The operations that ``kernels.fused`` chooses together."""

    rms_norm: RmsNorm
    gated_rms_norm: GatedRmsNorm
    qk_norm_rope: QkNormRope
    output_gate: OutputGate
    linear_cross_entropy: LinearCrossEntropy
    top_k_routing: TopKRouting
    token_permutation: TokenPermutation
    swiglu: SwiGlu
    shared_expert_combine: SharedExpertCombine
    shared_input: SharedInput
    gdn_prologue: GdnPrologue


def _fused_reference() -> _Fused:
    return {
        "rms_norm": RmsNorm(),
        "gated_rms_norm": gated_rms_norm_reference,
        "qk_norm_rope": qk_norm_rope_reference,
        "output_gate": output_gate_reference,
        "linear_cross_entropy": linear_cross_entropy_chunked,
        "top_k_routing": top_k_routing_reference,
        "token_permutation": TokenPermutation(),
        "swiglu": swiglu_reference,
        "shared_expert_combine": shared_expert_combine_reference,
        "shared_input": shared_input_reference,
        "gdn_prologue": gdn_prologue_reference,
    }


def _fused_triton() -> _Fused:
    from qwen3next_train.kernels.triton.gated_rms_norm import gated_rms_norm_triton
    from qwen3next_train.kernels.triton.gdn_prologue import gdn_prologue_triton
    from qwen3next_train.kernels.triton.linear_cross_entropy import linear_cross_entropy_triton
    from qwen3next_train.kernels.triton.output_gate import output_gate_triton
    from qwen3next_train.kernels.triton.qk_norm_rope import qk_norm_rope_triton
    from qwen3next_train.kernels.triton.rms_norm import RmsNormTriton
    from qwen3next_train.kernels.triton.shared_expert_combine import shared_expert_combine_triton
    from qwen3next_train.kernels.triton.shared_input import shared_input_triton
    from qwen3next_train.kernels.triton.swiglu import swiglu_triton
    from qwen3next_train.kernels.triton.token_permutation import TokenPermutationTriton
    from qwen3next_train.kernels.triton.top_k_routing import top_k_routing_triton

    return {
        "rms_norm": RmsNormTriton(),
        "gated_rms_norm": gated_rms_norm_triton,
        "qk_norm_rope": qk_norm_rope_triton,
        "output_gate": output_gate_triton,
        "linear_cross_entropy": linear_cross_entropy_triton,
        "top_k_routing": top_k_routing_triton,
        "token_permutation": TokenPermutationTriton(),
        "swiglu": swiglu_triton,
        "shared_expert_combine": shared_expert_combine_triton,
        "shared_input": shared_input_triton,
        "gdn_prologue": gdn_prologue_triton,
    }


def _triton_unavailable_reason(place: _Place) -> str | None:
    """Why own Triton kernels cannot run, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed: pip install triton"
    if place.dtype not in (torch.bfloat16, torch.float32):
        return f"takes bf16 or fp32 and the model is {place.dtype}"
    return _needs_ampere(place)


def _fused_prologue_unavailable_reason(place: _Place) -> str | None:
    """Why our convolution cannot run, or None."""
    width = 0 if place.model is None else place.model.linear_conv_kernel_dim
    if width > _MAX_FUSED_FILTER:
        return f"takes filters of the convolution up to {_MAX_FUSED_FILTER} wide and the model's are {width}"
    return _triton_unavailable_reason(place)


def _fla_unavailable_reason(place: _Place) -> str | None:
    """Why FLA's gated delta rule cannot be trusted here, or None."""
    for module, package in (("triton", "triton"), ("fla", "flash-linear-attention")):
        if importlib.util.find_spec(module) is None:
            return f"needs the package {package}, which is not installed: pip install {package}"
    reason = _needs_half_precision(place)
    if reason is not None:
        return reason
    if place.rule_head_dims is not None and place.rule_head_dims[0] > _MAX_FLA_KEY_DIM:
        return f"takes keys of {_MAX_FLA_KEY_DIM} at most and the model's have {place.rule_head_dims[0]}"
    import triton

    if place.capability[0] == HOPPER and miscompiles_gated_backward(triton.__version__):
        return f"has a wrong backward on Hopper with triton {triton.__version__}: install triton >= 3.7.1"
    return None


def _flash_qla_unavailable_reason(place: _Place) -> str | None:
    """Why FlashQLA's gated delta rule cannot run, or None."""
    if importlib.util.find_spec("flash_qla") is None:
        return f"needs the package flash-qla, which is not installed: {_INSTALL_FLASH_QLA}"
    try:
        version = importlib.metadata.version("flash-qla")
    except importlib.metadata.PackageNotFoundError:
        return f"can be imported but is not installed, so that its version is unknown: {_INSTALL_FLASH_QLA}"
    if not (0, 1, 3) <= _version(version) < (0, 2):
        return f"needs flash-qla 0.1.3 or a later 0.1 and this is {version}: {_INSTALL_FLASH_QLA}"
    if place.capability[0] not in (HOPPER, BLACKWELL):
        return f"has a backward for GPUs of compute capability 9 and 10 and this one has {place.capability}"
    heads = place.rule_head_dims
    if heads != (_FLASH_QLA_HEAD_DIM, _FLASH_QLA_HEAD_DIM):
        found = "unknown here" if heads is None else f"of {heads[0]} (keys) and {heads[1]} (values)"
        return f"takes heads of {_FLASH_QLA_HEAD_DIM} and the model's are {found}"
    return _needs_half_precision(place) or _flash_qla_import_error()


def _flash_qla_import_error() -> str | None:
    """Why FlashQLA cannot be imported, or its kernels not be compiled, or None."""
    try:
        from tilelang.env import CUDA_HOME

        if not CUDA_HOME:
            return "needs nvcc, which is not found: install the CUDA toolkit or set CUDA_HOME"
        importlib.import_module("qwen3next_train.kernels.flash_qla")
    except Exception as error:  # noqa: BLE001 - whatever importing other people's compilers may raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        return f"cannot be imported ({reason}): pip install --upgrade flash-qla tilelang"
    return None


_RULE_VENDORS: Mapping[str, _UnavailableReason] = {
    "flash_qla": _flash_qla_unavailable_reason,
    "fla": _fla_unavailable_reason,
}
"""The gated delta rule's vendor backends, the fastest first."""


def _flash_unavailable_reason(place: _Place) -> str | None:
    """Why torch's variable-length attention cannot run, or None."""
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return f"needs torch.nn.attention.varlen, which torch {torch.__version__} lacks: install torch >= 2.11"
    head_dim = _ALIGNED if place.model is None else place.model.head_dim
    if head_dim % _ALIGNED or head_dim > _MAX_FLASH_HEAD_DIM:
        return f"takes heads of a multiple of {_ALIGNED} up to {_MAX_FLASH_HEAD_DIM} and the model's have {head_dim}"
    return _needs_ampere(place) or _needs_half_precision(place)


_ATTENTION_VENDORS: Mapping[str, _UnavailableReason] = {"flash": _flash_unavailable_reason}
"""The attention's only vendor backend."""


def _grouped_mm_unavailable_reason(place: _Place) -> str | None:
    """Why torch's grouped GEMM cannot run, or None."""
    if not hasattr(torch.nn.functional, "grouped_mm"):
        return f"needs torch.nn.functional.grouped_mm, which torch {torch.__version__} lacks: install torch >= 2.11"
    return _needs_bf16(place) or _needs_ampere(place) or _unaligned_experts(place)


def _grouped_triton_unavailable_reason(place: _Place) -> str | None:
    """Why our grouped GEMM cannot run, or is not the fastest, or None."""
    reason = _triton_unavailable_reason(place) or _needs_bf16(place)
    if reason is not None:
        return reason
    if place.capability[0] != HOPPER:
        return f"is written for GPUs of compute capability 9 and this one has {place.capability}"
    import triton

    # Older ones have turned products of transposed operands into wrong numbers before, and were not tried here.
    if miscompiles_gated_backward(triton.__version__):
        return f"is not trusted to triton {triton.__version__}: install triton >= 3.7.1"
    if place.model is None:
        return f"takes feature sizes that are multiples of {_ALIGNED} and the model's are unknown here"
    return _unaligned_experts(place)


def _unaligned_experts(place: _Place) -> str | None:
    """Why a grouped GEMM that reads 16 bytes at once cannot take the experts, or None."""
    sizes = () if place.model is None else (place.model.hidden_size, place.model.moe_intermediate_size)
    if any(size % _ALIGNED for size in sizes):
        found = " and ".join(map(str, sizes))
        return f"takes feature sizes that are multiples of {_ALIGNED} and the model's are {found}"
    return None


_GROUPED_GEMM_VENDORS: Mapping[str, _UnavailableReason] = {
    "triton": _grouped_triton_unavailable_reason,
    "grouped_mm": _grouped_mm_unavailable_reason,
}
"""The grouped GEMM's vendor backends, the fastest first."""


def _needs_ampere(place: _Place) -> str | None:
    if place.capability[0] < 8:
        return f"needs a GPU of compute capability 8.0 or newer and this one has {place.capability}"
    return None


def _needs_bf16(place: _Place) -> str | None:
    if place.dtype != torch.bfloat16:
        return f"takes bf16 and the model is {place.dtype}: set run.precision to bf16"
    return None


def _needs_half_precision(place: _Place) -> str | None:
    if place.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bf16 and the model is {place.dtype}: set run.precision to bf16"
    return None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text)[:3])


def _load_gated_delta_rule(backend: str, place: _Place) -> GatedDeltaRule:
    if backend == "reference":
        return gated_delta_rule_reference
    if backend == "flash_qla":
        from qwen3next_train.kernels.flash_qla import gated_delta_rule_flash_qla

        return gated_delta_rule_flash_qla
    heads = place.rule_head_dims
    with _operations_of_fla(place):
        if place.capability[0] == HOPPER and heads is not None and all(dim in _OWN_CHUNK_HEAD_DIMS for dim in heads):
            from qwen3next_train.kernels.fla.gated_delta_rule_hopper import gated_delta_rule_fla_hopper

            return gated_delta_rule_fla_hopper
        from qwen3next_train.kernels.fla.gated_delta_rule import gated_delta_rule_fla

        return gated_delta_rule_fla


@contextmanager
def _operations_of_fla(place: _Place) -> Iterator[None]:
    """For the import of FLA's operations."""
    use_tuned_configs(place.capability, place.rule_head_dims or ())
    keep_delta_rule_from_flash_qla()
    with only_operations_of_fla():
        yield


def _choose_passing(rule: KernelChoice, place: _Place) -> KernelChoice:
    """How states are passed: by FLA beside any vendor's rule, as FlashQLA cannot; where FLA cannot run, by the rule."""
    by_fla = rule.backend != "reference" and _fla_unavailable_reason(place) is None
    return replace(rule, backend="fla") if by_fla else rule


def _load_passing(backend: str, scan: GatedDeltaRule, place: _Place) -> DeltaRule:
    if backend == "reference":
        return DeltaRule(scan, delta_rule_summary_reference, delta_state_gradient_reference)
    if backend != "fla":
        return DeltaRule.by(scan)

    def load() -> DeltaRule:
        with _operations_of_fla(place):
            from qwen3next_train.kernels.fla.state_passing import delta_rule_summary_fla, delta_state_gradient_fla

            return DeltaRule(scan, delta_rule_summary_fla, delta_state_gradient_fla)

    # Most runs pass no states, and beside FlashQLA need nothing else of FLA.
    return DeltaRule.loaded_later(scan, load)


def _load_attention(backend: str) -> VarlenAttention:
    if backend == "reference":
        return varlen_attention_reference
    from qwen3next_train.kernels.torch_attention import varlen_attention_flash

    return varlen_attention_flash


def _load_grouped_matmul(backend: str) -> GroupedMatmul:
    if backend == "reference":
        return grouped_matmul_reference
    if backend == "triton":
        from qwen3next_train.kernels.triton.grouped_matmul import grouped_matmul_triton

        return grouped_matmul_triton
    from qwen3next_train.kernels.grouped_gemm import grouped_matmul_grouped_mm

    return grouped_matmul_grouped_mm
