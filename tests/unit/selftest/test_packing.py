"""The packing self-test passes for kernels that respect boundaries and fails for every planted leak."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import KernelsConfig, ModelConfig
from qwen3next_train.kernels.gdn_prologue import GdnPrologueOutputs
from qwen3next_train.kernels.selection import KernelSet, select_kernels
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.selftest.packing import (
    BOUNDS,
    packing_check,
    packing_errors,
    random_documents,
    slowly_forgetting_model,
)
from tests.unit.model.small_models import CPU, cpu_kernels

FEW = 3
"""Documents that show a leak as well as six do, in half of the time."""
MIXERS = ("gated_delta_rule", "gdn_prologue", "varlen_attention")


def leaking(operation: str, kernels: KernelSet) -> KernelSet:
    """Kernels of which one takes the whole row for one document."""
    kernel = getattr(kernels, operation)

    def leak(*args, sequences, **rest):
        one = VarlenMetadata.from_lengths([sequences.num_tokens], sequences.cu_seqlens.device)
        return kernel(*args, sequences=one, **rest)

    return replace(kernels, **{operation: leak})


class _LeakingBackward(torch.autograd.Function):
    """The right values of one function with the gradients of another."""

    @staticmethod
    def forward(ctx, *outputs):
        right = tuple(output.clone() for output in outputs[: len(outputs) // 2])
        return right if len(right) > 1 else right[0]

    @staticmethod
    def backward(ctx, *grads):
        return *(None for _ in grads), *grads


def largest(kernels: KernelSet, dtype: torch.dtype = torch.float32, *, seed: int = 0) -> float:
    model = slowly_forgetting_model(kernels, CPU, dtype)
    return max(packing_errors(model, random_documents(seed, CPU, count=FEW)).values())


def test_packed_equals_separate() -> None:
    """Documents other than those of the test of every weight."""
    assert largest(cpu_kernels(), seed=1) < BOUNDS[torch.float32] / 2
    assert largest(cpu_kernels(), torch.bfloat16, seed=1) < BOUNDS[torch.bfloat16] / 2


def test_documents_are_random_and_one_of_them_is_a_single_token_after_another() -> None:
    for seed in range(20):
        documents = random_documents(seed, CPU)
        lengths = [batch.num_tokens for batch in documents.separate]
        assert len(lengths) == 6
        assert 1 in lengths[1:]
        assert max(lengths) <= 80
        assert documents.packed.cu_seqlens_cpu.tolist() == torch.tensor([0, *lengths]).cumsum(0).tolist()
        assert torch.equal(documents.packed.input_ids_T, torch.cat([b.input_ids_T for b in documents.separate]))
        assert torch.equal(documents.packed.labels_T, torch.cat([b.labels_T for b in documents.separate]))


def test_every_weight_is_compared_and_mtp_at_each_depth() -> None:
    model = slowly_forgetting_model(cpu_kernels(), CPU, torch.float32)
    errors = packing_errors(model, random_documents(0, CPU))
    assert max(errors.values()) < BOUNDS[torch.float32] / 2
    assert {"hidden states", "loss", "mtp loss 1", "mtp loss 2"} <= set(errors)
    assert {name.removeprefix("grad ") for name in errors if name.startswith("grad ")} == {
        name for name, _ in model.named_parameters()
    }


@pytest.mark.parametrize("operation", MIXERS)
def test_a_kernel_that_ignores_boundaries_is_found(operation: str) -> None:
    """Where the bound is widest; what is wrong by more than that in bf16 is so in fp32."""
    assert largest(leaking(operation, cpu_kernels()), torch.bfloat16) > 10 * max(BOUNDS.values())


@pytest.mark.parametrize("operation", MIXERS)
def test_a_leak_of_the_backward_alone_is_found(operation: str) -> None:
    right, wrong = cpu_kernels(), leaking(operation, cpu_kernels())

    def half(*args, **rest):
        outputs = [getattr(kernels, operation)(*args, **rest) for kernels in (right, wrong)]
        if operation == "gated_delta_rule":
            return _LeakingBackward.apply(outputs[0][0], outputs[1][0]), outputs[0][1]
        if operation == "gdn_prologue":
            return GdnPrologueOutputs(*_LeakingBackward.apply(*outputs[0], *outputs[1]))
        return _LeakingBackward.apply(*outputs)

    model = slowly_forgetting_model(replace(right, **{operation: half}), CPU, torch.float32)
    errors = packing_errors(model, random_documents(0, CPU, count=FEW))
    assert errors["hidden states"] < BOUNDS[torch.float32]
    assert max(error for name, error in errors.items() if name.startswith("grad ")) > 0.01


def without_inner_boundaries(batch: PackedBatch) -> PackedBatch:
    ends = torch.tensor([0, batch.num_tokens], dtype=torch.int32)
    return replace(batch, cu_seqlens=ends, cu_seqlens_cpu=ends)


def without_one_boundary(batch: PackedBatch) -> PackedBatch:
    ends = torch.cat((batch.cu_seqlens_cpu[:2], batch.cu_seqlens_cpu[3:]))
    return replace(batch, cu_seqlens=ends, cu_seqlens_cpu=ends)


def labels_that_go_on(batch: PackedBatch) -> PackedBatch:
    """The first document's last token predicts the second's first: MTP then reads and predicts across."""
    labels = batch.labels_T.clone()
    end = int(batch.cu_seqlens_cpu[1])
    labels[end - 1] = batch.input_ids_T[end]
    return replace(batch, labels_T=labels)


@pytest.mark.parametrize("spoil", [without_inner_boundaries, without_one_boundary, labels_that_go_on])
def test_a_batch_with_wrong_boundaries_is_found(spoil: Callable[[PackedBatch], PackedBatch]) -> None:
    documents = random_documents(0, CPU, count=FEW)
    model = slowly_forgetting_model(cpu_kernels(), CPU, torch.float32)
    errors = packing_errors(model, replace(documents, packed=spoil(documents.packed)))
    assert max(errors.values()) > 100 * BOUNDS[torch.float32]


def test_mtp_targets_that_cross_documents_are_found() -> None:
    documents = random_documents(0, CPU, count=FEW)
    crossing = tuple(documents.packed.labels_T.roll(-depth) for depth in (1, 2))
    documents = replace(documents, packed=replace(documents.packed, mtp_targets=crossing))
    model = slowly_forgetting_model(cpu_kernels(), CPU, torch.float32)
    errors = packing_errors(model, documents)
    assert errors["loss"] < BOUNDS[torch.float32]
    assert errors["mtp loss 1"] > 100 * BOUNDS[torch.float32]


def test_fast_decay_would_hide_the_leak() -> None:
    """Why the decays are slow: the same leak of the delta rule is many times smaller at fast decay."""
    kernels = leaking("gated_delta_rule", cpu_kernels())
    documents = random_documents(0, CPU)
    sizes = []
    for rate in (0.05, 16.0):
        model = slowly_forgetting_model(kernels, CPU, torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    parameter.fill_(torch.tensor(rate).log())
                if name.endswith("dt_bias") and rate > 1:
                    parameter.fill_(1.0)
        hidden = [model.forward_hidden(batch).detach() for batch in (documents.packed, documents.separate[-1])]
        last = documents.separate[-1].num_tokens
        sizes.append(float((hidden[0][-last:] - hidden[1]).norm()))
    assert sizes[1] < sizes[0] / 2


def test_the_check_takes_fp32_for_references_and_says_what_leaks() -> None:
    good = packing_check(cpu_kernels(), CPU, torch.bfloat16)
    assert good.ok
    assert " in fp32, allowed 1e-05" in good.detail
    bad = packing_check(leaking("gdn_prologue", cpu_kernels()), CPU, torch.bfloat16)
    assert not bad.ok
    assert bad.detail.endswith(
        "documents see each other; find the operation with kernels.OPERATION reference, one by one"
    )


@pytest.mark.gpu
def test_selected_kernels_keep_documents_apart_on_this_gpu() -> None:
    device = torch.device("cuda")
    kernels = select_kernels(KernelsConfig(), device, model=ModelConfig())
    check = packing_check(kernels, device, torch.bfloat16)
    assert check.ok, check.detail
    for operation in MIXERS:
        assert not packing_check(leaking(operation, kernels), device, torch.bfloat16).ok
