"""The whole model on a GPU: it never waits for the device, repeats bit for bit, and learns what it learns in fp32."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from qwen3next_train.batch import PackedBatch, PackedRow
from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.kernels.selection import select_kernels
from qwen3next_train.model.init import initialize
from qwen3next_train.model.qwen3_next import LossScales, Qwen3NextForCausalLM
from qwen3next_train.parameters import parameter_table
from qwen3next_train.topology import Topology

pytestmark = pytest.mark.gpu

MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=4,
    layer_types=["linear_attention", "full_attention", "linear_attention", "full_attention"],
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    # The published size: some kernels take no other.
    linear_key_head_dim=128,
    linear_value_head_dim=128,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    num_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
    shared_expert_intermediate_size=64,
    mtp_num_layers=1,
)
LENGTH, ROWS = 256, 4
STEPS = 40
CPU = torch.device("cpu")


@pytest.fixture
def deterministic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def build(device: torch.device, dtype: torch.dtype) -> Qwen3NextForCausalLM:
    kernels = select_kernels(KernelsConfig(), device, dtype=dtype, model=MODEL)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(MODEL, kernels=kernels)
    initialize(model, parameter_table(MODEL), seed=0, topology=Topology(), device=device, dtype=dtype)
    return model


def batch(step: int, *, packed: bool) -> PackedBatch:
    """Rows of a language in which a token is followed by one of three."""
    generator = np.random.default_rng(step)
    rows = []
    for _ in range(ROWS):
        tokens = np.cumsum(generator.choice([1, 5, 17], LENGTH + 1)) * 7 % MODEL.vocab_size
        cuts = np.sort(generator.choice(np.arange(1, LENGTH), 3, replace=False)) if packed else []
        rows.append(PackedRow(tokens, np.array([0, *cuts, LENGTH], dtype=np.int64), True))
    return PackedBatch.from_rows(rows, mtp_depths=1)


def step(model: Qwen3NextForCausalLM, data: PackedBatch) -> torch.Tensor:
    """Forward and backward; the mean next-token loss."""
    model.zero_grad(set_to_none=True)
    model.begin_step()
    output = model([data], LossScales([float(count) for count in data.num_targets], num_micro_batches=1))[0]
    output.total.backward()
    return output.nll_lm_sum / data.num_targets[0]


@pytest.mark.parametrize("packed", [False, True])
def test_a_micro_batch_never_waits_for_the_device(packed: bool) -> None:
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    # The first one may: kernels are compiled and tuned, and tuning waits for its timings.
    for warmup in range(2):
        step(model, batch(warmup, packed=packed).to(device))
    data = batch(1, packed=packed).to(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(model, data)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("deterministic")
@pytest.mark.parametrize("packed", [False, True])
def test_repeated_gradients_are_equal_bit_for_bit_in_deterministic_mode(packed: bool) -> None:
    device = torch.device("cuda", 0)
    model = build(device, torch.bfloat16)
    data = batch(0, packed=packed).to(device)
    runs = []
    for _ in range(3):
        loss = step(model, data)
        runs.append((loss, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    for loss, gradients in runs[1:]:
        assert torch.equal(loss, runs[0][0])
        assert [name for name in gradients if not torch.equal(gradients[name], runs[0][1][name])] == []


def losses(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """Of each step of a training run with AdamW on fp32 weights, the model's own rounded from them."""
    model = build(device, dtype)
    masters = [parameter.detach().float().clone().requires_grad_() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(masters, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.1)
    found = []
    for number in range(STEPS):
        found.append(step(model, batch(number, packed=number % 2 == 1).to(device)).detach())
        with torch.no_grad():
            for master, parameter in zip(masters, model.parameters(), strict=True):
                master.grad = parameter.grad.float()
            optimizer.step()
            for master, parameter in zip(masters, model.parameters(), strict=True):
                parameter.copy_(master)
    return torch.stack(found).cpu()


def test_bf16_training_follows_fp32_training_on_cpu() -> None:
    expected = losses(CPU, torch.float32)
    found = losses(torch.device("cuda", 0), torch.bfloat16)
    assert expected[-5:].mean() < 0.6 * expected[0], "nothing was learnt, so nothing was compared"
    difference = (found - expected).abs() / expected
    assert float(difference.mean()) < 0.01
    assert float(difference.max()) < 0.05
