"""What of FlashQLA is compiled before the first call, on stand-ins for its stages, which need CUDA."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from qwen3next_train.kernels.varlen import VarlenMetadata

NAME = "qwen3next_train.kernels.flash_qla"
CPU = torch.device("cpu")
KEY_HEADS, VALUE_HEADS, HEAD_DIM = 2, 4, 128
PROCESSORS = 11
STAGES = ("fused_gdr_bwd", "fused_gdr_fwd", "fused_gdr_h", "kkt_solve", "chunk_local_cumsum", "group_reduce_vector")


class Stages:
    """Records with what each stage is called."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def named(self, name: str) -> list[dict[str, Any]]:
        return [arguments for called, arguments in self.calls if called == name]

    def stage(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: self.calls.append((name, kwargs))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Iterator[Stages]:
    """The backend over stand-ins, on a device with eleven multiprocessors."""
    recorded = Stages()
    root = types.ModuleType("flash_qla")
    root.chunk_gated_delta_rule = lambda q, k, v, g, beta, **options: (v, None)  # type: ignore[attr-defined]
    chunk = types.ModuleType("flash_qla.ops.gated_delta_rule.chunk")
    for name in STAGES:
        setattr(chunk, name, recorded.stage(name))
    place = types.ModuleType("flash_qla.ops.gated_delta_rule")
    place.chunk = chunk  # type: ignore[attr-defined]
    index = types.ModuleType("flash_qla.utils.index")
    index.prepare_varlen_metadata = lambda starts, starts_cpu: starts  # type: ignore[attr-defined]
    for module in (root, chunk, place, index):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, NAME, raising=False)
    backend = importlib.import_module(NAME)
    monkeypatch.setattr(backend, "num_processors", lambda device: PROCESSORS)
    monkeypatch.setattr(backend, "call_side_by_side", lambda calls, device: [call() for call in calls])
    yield recorded
    del sys.modules[NAME]


def run(lengths: tuple[int, ...], *, with_state: bool = False) -> None:
    tokens = sum(lengths)
    sequences = VarlenMetadata.from_lengths(lengths, CPU)
    sys.modules[NAME].gated_delta_rule_flash_qla(
        torch.zeros(tokens, KEY_HEADS, HEAD_DIM),
        torch.zeros(tokens, KEY_HEADS, HEAD_DIM),
        torch.zeros(tokens, VALUE_HEADS, HEAD_DIM),
        g_TN=torch.zeros(tokens, VALUE_HEADS),
        beta_TN=torch.zeros(tokens, VALUE_HEADS),
        sequences=sequences,
        initial_state_DNKV=torch.zeros(len(lengths), VALUE_HEADS, HEAD_DIM, HEAD_DIM) if with_state else None,
    )


def test_the_forward_stage_is_compiled_for_any_number_of_documents(stages: Stages) -> None:
    """Its width follows documents times heads as long as these are fewer than multiprocessors, here up to two."""
    run((70,))
    forward = stages.named("fused_gdr_fwd")
    assert [len(call["cu_seqlens"]) - 1 for call in forward] == [3, 2, 1]
    for call, documents in zip(forward, (3, 2, 1), strict=True):
        assert call["cu_seqlens"].tolist() == list(range(0, 64 * documents + 1, 64))
        assert call["raw_cu_seqlens"] is call["cu_seqlens"]
        assert call["k"].shape == (1, 64 * documents, KEY_HEADS, HEAD_DIM)
        assert call["v"].shape == (1, 64 * documents, VALUE_HEADS, HEAD_DIM)
        assert call["a"].shape == (1, 64 * documents, VALUE_HEADS, 64)
        assert call["initial_state"] is None
    assert VALUE_HEADS * 3 >= PROCESSORS > VALUE_HEADS * 2


def test_nothing_is_compiled_by_later_calls(stages: Stages) -> None:
    run((70,))
    before = len(stages.calls)
    run((5, 6, 7, 8, 9))
    run((64, 64))
    assert len(stages.calls) == before


def test_other_stages_are_called_once_each(stages: Stages) -> None:
    run((70,))
    counts = {name: len(stages.named(name)) for name in STAGES if name != "fused_gdr_fwd"}
    assert counts == dict.fromkeys(counts, 1) | {"chunk_local_cumsum": 2}


def test_states_have_kernels_of_their_own(stages: Stages) -> None:
    """As context parallelism needs them, and only then."""
    run((70,))
    before = len(stages.calls)
    run((70,), with_state=True)
    with_state = stages.calls[before:]
    forward = [arguments for name, arguments in with_state if name == "fused_gdr_fwd"]
    assert [call["initial_state"].shape[0] for call in forward] == [3, 2, 1]
    assert all(call["initial_state"].dtype == torch.float32 for call in forward)
    (states,) = [arguments for name, arguments in with_state if name == "fused_gdr_h"]
    assert states["initial_state"].shape == (1, VALUE_HEADS, HEAD_DIM, HEAD_DIM)
