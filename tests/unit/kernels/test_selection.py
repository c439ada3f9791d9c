"""Which backend runs where, and what a refusal says."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import types
from contextlib import nullcontext

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.errors import ExitCode, KernelUnavailable
from qwen3next_train.kernels.choices import KernelChoice, format_choices, summarize_choices
from qwen3next_train.kernels.gated_delta_rule import gated_delta_rule_reference
from qwen3next_train.kernels.gdn_prologue import gdn_prologue_reference
from qwen3next_train.kernels.grouped_gemm import grouped_matmul_grouped_mm
from qwen3next_train.kernels.selection import select_kernels

RULE_ALONE = KernelsConfig(varlen_attention="reference", grouped_matmul="reference", fused="reference")
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VENDORS = {
    "gated_delta_rule": "fla",
    "varlen_attention": "flash",
    "grouped_matmul": "grouped_mm",
    "fused": "triton",
}
FUSED = {
    "gdn_prologue",
    "rms_norm",
    "qk_norm_rope",
    "output_gate",
    "linear_cross_entropy",
    "top_k_routing",
    "token_permutation",
    "swiglu",
    "shared_expert_combine",
    "shared_input",
    "gated_rms_norm",
}


def test_auto_on_cpu_is_always_the_reference() -> None:
    kernels = select_kernels(KernelsConfig(), CPU)
    assert kernels.gated_delta_rule is gated_delta_rule_reference
    assert {choice.backend for choice in kernels.choices} == {"reference"}
    assert {choice.key for choice in kernels.choices} == set(VENDORS)
    assert {choice.operation for choice in kernels.choices if choice.key == "fused"} == FUSED


@pytest.mark.parametrize(("operation", "vendor"), list(VENDORS.items()))
def test_a_vendor_backend_by_name_is_refused_on_cpu(operation: str, vendor: str) -> None:
    with pytest.raises(KernelUnavailable) as caught:
        select_kernels(KernelsConfig.model_validate({operation: vendor}), CPU)
    text = str(caught.value)
    assert text == (
        f"kernels.{operation}: '{vendor}' needs CUDA and the model runs on cpu; or choose 'auto' or 'reference'"
    )
    assert caught.value.exit_code == ExitCode.USAGE


def test_selecting_on_cpu_imports_neither_fla_nor_triton() -> None:
    code = (
        "import sys, torch\n"
        "from qwen3next_train.config.schema import KernelsConfig\n"
        "from qwen3next_train.kernels.selection import select_kernels\n"
        "select_kernels(KernelsConfig(), torch.device('cpu'))\n"
        "print([name for name in ('fla', 'triton', 'transformers') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A machine that looks like an H100; returns its triton, whose version a test sets."""
    triton = types.ModuleType("triton")
    triton.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    triton.__version__ = "3.6.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "triton", triton)
    fla = types.ModuleType("fla")
    fla.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    monkeypatch.setitem(sys.modules, "fla", fla)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    return triton


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0", "3.7.0+git1234"])
def test_flas_rule_is_refused_on_hopper_with_a_wrong_triton(hopper: types.ModuleType, version: str) -> None:
    hopper.__version__ = version  # type: ignore[attr-defined]
    with pytest.raises(KernelUnavailable, match=r"wrong backward on Hopper with triton .*: install triton >= 3\.7\.1"):
        select_kernels(KernelsConfig(gated_delta_rule="fla"), CUDA)


def test_fp32_on_cuda_refuses_the_half_precision_backends(hopper: types.ModuleType) -> None:
    config = KernelsConfig(gated_delta_rule="reference", grouped_matmul="reference", fused="reference")
    with pytest.raises(KernelUnavailable, match=r"kernels.varlen_attention: 'flash' takes bf16 .* run\.precision"):
        select_kernels(config.model_copy(update={"varlen_attention": "flash"}), CUDA, dtype=torch.float32)
    kernels = select_kernels(config, CUDA, dtype=torch.float32)
    assert {choice.backend for choice in kernels.choices} == {"reference"}


def test_auto_says_why_the_reference_runs_on_cuda(hopper: types.ModuleType) -> None:
    table = format_choices(select_kernels(RULE_ALONE, CUDA).choices)
    assert "gated_delta_rule      reference   auto: fla has a wrong backward on Hopper with triton 3.6.0" in table


def test_the_line_says_why_only_where_a_faster_backend_does_not_run(hopper: types.ModuleType) -> None:
    (refused, *_) = select_kernels(RULE_ALONE, CUDA).choices
    attention = KernelChoice("varlen_attention", "flash", "auto: runs on this device", "varlen_attention")
    line = summarize_choices((refused, attention))
    assert line.startswith("gated_delta_rule reference (auto: fla has a wrong backward on Hopper with triton 3.6.0")
    assert line.endswith("), varlen_attention flash")


@pytest.fixture
def flash_qla(hopper: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An H100 with FlashQLA 0.1.3 and a CUDA toolkit, and a Triton with which FLA is right; returns tilelang.env."""
    hopper.__version__ = "3.7.1"  # type: ignore[attr-defined]
    for name in ("flash_qla", "tilelang", "tilelang.env"):
        module = types.ModuleType(name)
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["tilelang.env"].CUDA_HOME = "/usr/local/cuda"  # type: ignore[attr-defined]
    monkeypatch.setattr(importlib.metadata, "version", {"flash-qla": "0.1.3"}.get)
    return sys.modules["tilelang.env"]


def refusal(model: ModelConfig | None) -> str:
    """Why FlashQLA, asked for by name, is refused."""
    config = KernelsConfig(gated_delta_rule="flash_qla")
    with pytest.raises(KernelUnavailable) as caught:
        select_kernels(config, CUDA, model=model)
    return str(caught.value)


def test_flash_qla_is_taken_where_it_runs(flash_qla: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = types.ModuleType("backend")
    backend.gated_delta_rule_flash_qla = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen3next_train.kernels.flash_qla", backend)
    kernels = select_kernels(RULE_ALONE, CUDA, model=ModelConfig())
    assert kernels.gated_delta_rule is backend.gated_delta_rule_flash_qla
    assert "gated_delta_rule      flash_qla   auto: runs on this device" in format_choices(kernels.choices)
    others = "delta_rule_summary fla, delta_state_gradient fla"
    assert summarize_choices(kernels.choices).startswith(f"gated_delta_rule flash_qla ({others}), varlen_attention ")


@pytest.mark.parametrize(
    ("model", "capability", "own"),
    [
        (ModelConfig(), (9, 0), True),
        (ModelConfig(linear_key_head_dim=16), (9, 0), True),
        (ModelConfig(linear_value_head_dim=256), (9, 0), False),
        (ModelConfig(linear_key_head_dim=8), (9, 0), False),
        (None, (9, 0), False),
        (ModelConfig(), (8, 0), False),
        (ModelConfig(), (10, 0), False),
    ],
)
def test_own_kernels_do_a_part_of_flas_rule_on_hopper(
    hopper: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    model: ModelConfig | None,
    capability: tuple[int, int],
    own: bool,
) -> None:
    hopper.__version__ = "3.7.1"  # type: ignore[attr-defined]
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR", "FLA_FLASH_QLA"):
        monkeypatch.setenv(name, "")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    rules = {}
    modules = {"fla": "gated_delta_rule", "fla_hopper": "gated_delta_rule_hopper"}
    for name, module in modules.items():
        backend = types.ModuleType(name)
        rules[name] = object()
        setattr(backend, f"gated_delta_rule_{name}", rules[name])
        monkeypatch.setitem(sys.modules, f"qwen3next_train.kernels.fla.{module}", backend)
    kernels = select_kernels(RULE_ALONE, CUDA, model=model)
    assert kernels.gated_delta_rule is rules["fla_hopper" if own else "fla"]
    assert next(choice.backend for choice in kernels.choices if choice.operation == "gated_delta_rule") == "fla"


def test_flash_qla_says_what_it_misses(flash_qla: types.ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow = ModelConfig(linear_key_head_dim=64)
    assert "takes heads of 128 and the model's are of 64 (keys) and 128 (values)" in refusal(narrow)
    assert "takes heads of 128 and the model's are unknown here" in refusal(None)
    flash_qla.CUDA_HOME = ""  # type: ignore[attr-defined]
    assert "needs nvcc, which is not found: install the CUDA toolkit or set CUDA_HOME" in refusal(ModelConfig())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "has a backward for GPUs of compute capability 9 and 10 and this one has (8, 0)" in refusal(ModelConfig())
    monkeypatch.setattr(importlib.metadata, "version", {"flash-qla": "0.1.2"}.get)
    assert "needs flash-qla 0.1.3 or a later 0.1 and this is 0.1.2" in refusal(ModelConfig())
    monkeypatch.delitem(sys.modules, "flash_qla")
    assert "needs the package flash-qla, which is not installed: pip install 'flash-qla" in refusal(ModelConfig())


def test_auto_names_the_optional_backend_last(hopper: types.ModuleType) -> None:
    table = format_choices(select_kernels(RULE_ALONE, CUDA, model=ModelConfig()).choices)
    reason = next(line for line in table.splitlines() if line.startswith("gated_delta_rule"))
    assert reason.index("auto: fla has a wrong backward") < reason.index("; flash_qla needs the package flash-qla")


@pytest.mark.parametrize(
    ("model", "capability", "triton", "backend"),
    [
        (ModelConfig(), (9, 0), "3.7.1", "triton"),
        (ModelConfig(), (9, 0), "3.6.0", "grouped_mm"),
        (ModelConfig(), (8, 0), "3.7.1", "grouped_mm"),
        (ModelConfig(), (10, 0), "3.7.1", "grouped_mm"),
        (ModelConfig(moe_intermediate_size=500), (9, 0), "3.7.1", "reference"),
        (ModelConfig(hidden_size=2052), (8, 0), "3.7.1", "reference"),
        (None, (9, 0), "3.7.1", "grouped_mm"),
    ],
)
def test_own_grouped_gemm_is_taken_on_hopper(
    hopper: types.ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    model: ModelConfig | None,
    capability: tuple[int, int],
    triton: str,
    backend: str,
) -> None:
    hopper.__version__ = triton  # type: ignore[attr-defined]
    backend_module = types.ModuleType("backend")
    backend_module.grouped_matmul_triton = object()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "qwen3next_train.kernels.triton.grouped_matmul", backend_module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    config = KernelsConfig(gated_delta_rule="reference", varlen_attention="reference", fused="reference")
    choices = select_kernels(config, CUDA, model=model).choices
    assert next(choice.backend for choice in choices if choice.operation == "grouped_matmul") == backend


SIZES_THAT_VENDORS_LACK = [
    ("gated_delta_rule", "fla", {"linear_key_head_dim": 264}, "keys of 256 at most and the model's have 264"),
    ("varlen_attention", "flash", {"head_dim": 260}, "heads of a multiple of 8 up to 256 and the model's have 260"),
    ("varlen_attention", "flash", {"head_dim": 264}, "heads of a multiple of 8 up to 256 and the model's have 264"),
    (
        "grouped_matmul",
        "grouped_mm",
        {"moe_intermediate_size": 500},
        "feature sizes that are multiples of 8 and the model's are 2048 and 500",
    ),
]


@pytest.mark.parametrize(("operation", "vendor", "sizes", "reason"), SIZES_THAT_VENDORS_LACK)
def test_sizes_that_a_vendor_lacks_are_computed_by_the_reference(
    hopper: types.ModuleType, operation: str, vendor: str, sizes: dict[str, int], reason: str
) -> None:
    hopper.__version__ = "3.7.1"  # type: ignore[attr-defined]
    others = dict.fromkeys(VENDORS, "reference")
    model = ModelConfig.model_validate(sizes)
    choices = select_kernels(KernelsConfig.model_validate(others | {operation: "auto"}), CUDA, model=model).choices
    (choice,) = [choice for choice in choices if choice.operation == operation]
    assert choice.backend == "reference"
    assert f"{vendor} takes {reason}" in choice.reason
    with pytest.raises(KernelUnavailable, match=f"'{vendor}' takes {reason}"):
        select_kernels(KernelsConfig.model_validate(others | {operation: vendor}), CUDA, model=model)


def test_wide_filters_are_convolved_by_the_reference_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    others = {"gated_delta_rule": "reference", "varlen_attention": "reference", "grouped_matmul": "reference"}
    model = ModelConfig(linear_conv_kernel_dim=5)
    kernels = select_kernels(KernelsConfig.model_validate(others), CUDA, model=model)
    assert kernels.gdn_prologue is gdn_prologue_reference
    chosen = {choice.operation: choice for choice in kernels.choices if choice.key == "fused"}
    assert {name for name, choice in chosen.items() if choice.backend == "reference"} == {"gdn_prologue"}
    reason = "triton takes filters of the convolution up to 4 wide and the model's are 5"
    assert chosen["gdn_prologue"].reason == f"auto: {reason}"
    assert summarize_choices(kernels.choices).endswith(", fused triton (gdn_prologue reference)")
    with pytest.raises(KernelUnavailable, match=r"kernels\.fused: 'triton' takes filters"):
        select_kernels(KernelsConfig.model_validate(others | {"fused": "triton"}), CUDA, model=model)


@pytest.mark.parametrize(("hidden", "ffn", "fits"), [(64, 24, True), (64, 20, False), (60, 24, False)])
def test_torchs_grouped_gemm_takes_the_sizes_it_is_chosen_for(hidden: int, ffn: int, *, fits: bool) -> None:
    rows = torch.ones(4, hidden, dtype=torch.bfloat16, requires_grad=True)
    up, down = torch.ones(2, 2 * ffn, hidden, dtype=torch.bfloat16), torch.ones(2, hidden, ffn, dtype=torch.bfloat16)
    counts = torch.tensor([1, 3])

    def experts() -> None:
        inner = grouped_matmul_grouped_mm(rows, up, counts_e=counts)[:, :ffn].contiguous()
        grouped_matmul_grouped_mm(inner, down, counts_e=counts).backward(torch.ones_like(rows))

    with nullcontext() if fits else pytest.raises(RuntimeError, match="multiple of 16 bytes"):
        experts()


def test_torchs_own_backends_are_taken_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = KernelsConfig(gated_delta_rule="reference", fused="reference")
    chosen = {choice.operation: choice.backend for choice in select_kernels(config, CUDA).choices}
    assert (chosen["varlen_attention"], chosen["grouped_matmul"]) == ("flash", "grouped_mm")


@pytest.mark.parametrize(
    ("dtype", "backend", "reason"),
    [
        (torch.float32, "triton", "auto: runs on this device"),
        (torch.bfloat16, "triton", "auto: runs on this device"),
        (torch.float64, "reference", "auto: triton takes bf16 or fp32 and the model is torch.float64"),
    ],
)
def test_one_key_chooses_all_fused_operations(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, backend: str, reason: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    config = KernelsConfig(
        gated_delta_rule="reference",
        varlen_attention="reference",
        grouped_matmul="reference",
    )
    chosen = [choice for choice in select_kernels(config, CUDA, dtype=dtype).choices if choice.key == "fused"]
    assert {choice.operation for choice in chosen} == FUSED
    assert {(choice.backend, choice.reason) for choice in chosen} == {(backend, reason)}
