"""What saves memory changes nothing else: offloaded optimizer, bf16 moments and gradients.

For recompute see ``tests/distributed/test_memory_knobs.py``.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3next_train.accounting.layout import Layout
from qwen3next_train.config.schema import Config
from qwen3next_train.engine.base import FragmentKind, ReadFragment
from qwen3next_train.kernels.main_grad import main_grad_of
from qwen3next_train.parallel.process_groups import ProcessContext
from tests.distributed.engine import build_engine
from tests.distributed.test_layout_equality import small_config
from tests.unit.engine.test_zero_engine import _state, _step

pytestmark = pytest.mark.slow

State = dict[tuple[str, FragmentKind], torch.Tensor]


def _config(*, precision: str = "fp32", moments_dtype: str = "fp32", **parallel: Any) -> Config:
    """Two micro-batches a step, clipped."""
    values = small_config(micro_batch_size=1, clip_grad=0.5).model_dump()
    values["run"] |= {"precision": precision, "global_batch_size": 2}
    values["optimizer"]["moments_dtype"] = moments_dtype
    values["parallel"] |= parallel
    return Config.model_validate(values)


def _train(config: Config, context: ProcessContext, num_steps: int = 2) -> tuple[Any, list[dict[str, float]]]:
    engine = build_engine(config, context)
    return engine, [_step(engine, config, step).metrics for step in range(num_steps)]


def _reader(state: State) -> ReadFragment:
    return lambda name, kind, start, stop: state[name, kind][start:stop]


@pytest.mark.parametrize(("zero_stage", "precision"), [(1, "fp32"), (2, "fp32"), (1, "bf16"), (2, "bf16")])
def test_an_offloaded_optimizer_takes_the_same_steps(
    context: ProcessContext, zero_stage: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the rounding of another implementation of AdamW; three steps of two micro-batches."""
    with monkeypatch.context() as patch:
        if precision == "bf16":
            # The buckets of stage 1 sum unrounded products, DeepSpeed, which keeps offload, sums gradients in bf16.
            patch.setattr(Layout, "sums_in_buckets", False)
        here, here_metrics = _train(_config(zero_stage=zero_stage, precision=precision), context, 3)
    there, there_metrics = _train(
        _config(zero_stage=zero_stage, precision=precision, offload_optimizer="cpu"), context, 3
    )
    tolerance = 1e-5 if precision == "fp32" else 1e-3
    for expected, found in zip(here_metrics, there_metrics, strict=True):
        for metric, value in expected.items():
            assert found[metric] == pytest.approx(value, rel=tolerance, abs=1e-7), metric
    state = _state(there)
    # Of a moment of 1e-8 in bf16 runs, a weight rounded the other way is a large part.
    kinds = ("master", "exp_avg", "exp_avg_sq") if precision == "fp32" else ("master",)
    for key, tensor in _state(here).items():
        # Gradients of dt_bias and A_log are small differences of large terms, mostly rounding.
        decides_decay = key[0].endswith(("dt_bias", "A_log"))
        if key[1] not in kinds or (decides_decay and key[1] != "master"):
            continue
        assert float((state[key] - tensor).norm()) <= tolerance * float(tensor.norm()) + 1e-12, key


@pytest.mark.parametrize(
    ("zero_stage", "moments_dtype", "offload"),
    [(2, "fp32", "cpu"), (2, "bf16", "none"), (1, "bf16", "cpu"), (3, "bf16", "none")],
)
def test_a_resume_goes_on_bit_for_bit(
    context: ProcessContext, zero_stage: int, moments_dtype: str, offload: str
) -> None:
    """Fragments hold moments as they are kept; a checkpoint's files widen them."""
    config = _config(zero_stage=zero_stage, moments_dtype=moments_dtype, offload_optimizer=offload)
    engine, _ = _train(config, context)
    saved = _state(engine)
    kept = {"fp32": torch.float32, "bf16": torch.bfloat16}[moments_dtype]
    dtypes = {(kind, tensor.dtype) for (_, kind), tensor in saved.items()}
    assert dtypes == {("master", torch.float32), ("exp_avg", kept), ("exp_avg_sq", kept)}
    expected = [_step(engine, config, step).metrics for step in (2, 3)]
    other = build_engine(config.model_copy(update={"run": config.run.model_copy(update={"seed": 99})}), context)
    other.load_state(_reader(saved), 2)
    assert [_step(other, config, step).metrics for step in (2, 3)] == expected


def test_the_moments_dtype_may_change_on_resume(context: ProcessContext) -> None:
    """Widened exactly, or rounded once; master weights are untouched."""
    bf16, _ = _train(_config(moments_dtype="bf16"), context)
    fp32, _ = _train(_config(), context)
    for source, moments_dtype in ((bf16, "fp32"), (fp32, "bf16")):
        saved = _state(source)
        engine = build_engine(_config(moments_dtype=moments_dtype), context)
        engine.load_state(_reader(saved), 2)
        for (name, kind), tensor in _state(engine).items():
            before = saved[name, kind]
            rounded = before if kind == "master" or moments_dtype == "fp32" else before.bfloat16().float()
            assert torch.equal(tensor, rounded), (name, kind)
        assert not _step(engine, _config(moments_dtype=moments_dtype), 2).skipped


def test_bf16_gradients_follow_the_curve_of_fp32_ones(context: ProcessContext) -> None:
    """The sum of two micro-batches is rounded, so norms are off by some 1e-3 and losses by less."""
    _, fp32 = _train(_config(precision="bf16"), context, 4)
    engine, bf16 = _train(_config(precision="bf16", gradient_dtype="bf16"), context, 4)
    dtypes = {p.dtype: main_grad_of(p).values.dtype for p in engine._model.parameters()}
    assert dtypes == {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16}
    assert fp32[0]["loss/lm"] == bf16[0]["loss/lm"]
    for step, (expected, found) in enumerate(zip(fp32, bf16, strict=True)):
        assert found["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-3), step
        assert found["optim/grad_norm"] == pytest.approx(expected["optim/grad_norm"], rel=1e-2), step
    assert bf16[0]["optim/grad_norm"] != fp32[0]["optim/grad_norm"]


def test_bf16_moments_follow_the_curve_of_fp32_ones(context: ProcessContext) -> None:
    _, fp32 = _train(_config(), context, 4)
    _, bf16 = _train(_config(moments_dtype="bf16"), context, 4)
    assert fp32[0] == bf16[0]
    assert fp32[-1] != bf16[-1]
    for expected, found in zip(fp32, bf16, strict=True):
        assert found["loss/lm"] == pytest.approx(expected["loss/lm"], rel=1e-4)
