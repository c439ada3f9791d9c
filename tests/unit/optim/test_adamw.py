"""AdamW with bf16 moments against torch's with fp32 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.kernels import adamw
from qwen3next_train.kernels.adamw import adamw_update_reference
from qwen3next_train.optim.adamw import OnePassAdamW, build_adamw

SETTINGS = OptimizerConfig(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)


def _groups(numel: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    decayed, free = (torch.nn.Parameter(torch.randn(numel, generator=generator)) for _ in range(2))
    return [{"params": [decayed], "weight_decay": 0.1}, {"params": [free], "weight_decay": 0.0}]


def _with_bf16_moments(groups: list[dict[str, Any]], **settings: Any) -> OnePassAdamW:
    return OnePassAdamW(groups, moments_dtype=torch.bfloat16, update=adamw_update_reference, **settings)


def _train(optimizer: torch.optim.Optimizer, num_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(num_steps):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = parameter.detach() + noise
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def _both(num_steps: int, numel: int = 100) -> tuple[list[torch.Tensor], list[torch.Tensor], OnePassAdamW]:
    in_fp32 = build_adamw(_groups(numel), SETTINGS, fused=False)
    in_bf16 = build_adamw(_groups(numel), SETTINGS.model_copy(update={"moments_dtype": "bf16"}), fused=False)
    assert isinstance(in_fp32, torch.optim.AdamW)
    assert isinstance(in_bf16, OnePassAdamW)
    return _train(in_fp32, num_steps), _train(in_bf16, num_steps), in_bf16


def test_the_first_step_is_torchs() -> None:
    """Moments are used before they are rounded, and decay is decoupled."""
    in_fp32, in_bf16, _ = _both(1)
    for expected, found in zip(in_fp32, in_bf16, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_many_steps_stay_close_and_the_state_is_bf16() -> None:
    """Each weight moved by about 1; rounding moments leaves it within a few per mille of that."""
    in_fp32, in_bf16, optimizer = _both(100)
    for before, expected, found in zip(
        _train(_with_bf16_moments(_groups(100), lr=0.0, betas=(0.9, 0.95), eps=1e-8), 0), in_fp32, in_bf16, strict=True
    ):
        assert (expected - before).abs().mean() > 0.3
        assert 0 < (found - expected).abs().max() < 0.03
    for state in optimizer.state.values():
        assert state["step"].item() == 100
        assert {state[kind].dtype for kind in ("exp_avg", "exp_avg_sq")} == {torch.bfloat16}


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A parameter that is worked through in pieces, the last one shorter."""
    _, whole, _ = _both(3)
    monkeypatch.setattr(adamw, "_CHUNK_NUMEL", 32)
    _, in_pieces, _ = _both(3)
    assert all(torch.equal(a, b) for a, b in zip(whole, in_pieces, strict=True))


def test_a_second_moment_comes_down_again_at_the_slowest_decay_allowed() -> None:
    """At beta2 0.99 a large gradient is forgotten; at 0.999 rounding to nearest would keep it for ever."""
    left = []
    for beta2 in (0.99, 0.999):
        parameter = torch.nn.Parameter(torch.zeros(1000))
        groups = [{"params": [parameter], "weight_decay": 0.0}]
        optimizer = _with_bf16_moments(groups, lr=1e-3, betas=(0.9, beta2), eps=1e-8)
        parameter.grad = torch.linspace(1, 10, 1000)
        optimizer.step()
        start = optimizer.state[parameter]["exp_avg_sq"].float()
        parameter.grad = torch.zeros(1000)
        for _ in range(200):
            optimizer.step()
        left.append((optimizer.state[parameter]["exp_avg_sq"].float() / start).max())
    assert left[0] < 0.4
    assert left[1] > 0.95


def test_parameters_without_a_gradient_are_left_alone() -> None:
    optimizer = _with_bf16_moments(_groups(4), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    before = [group["params"][0].clone() for group in optimizer.param_groups]
    optimizer.step()
    assert all(torch.equal(a, group["params"][0]) for a, group in zip(before, optimizer.param_groups, strict=True))
    assert not optimizer.state


def _one_pass(**settings: Any) -> OnePassAdamW:
    optimizer = build_adamw(_groups(100), SETTINGS, fused=False, update=adamw_update_reference, **settings)
    assert isinstance(optimizer, OnePassAdamW)
    return optimizer


def test_with_fp32_moments_it_is_torchs() -> None:
    expected = build_adamw(_groups(100), SETTINGS, fused=False)
    for ours, theirs in zip(_train(_one_pass(), 50), _train(expected, 50), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def test_a_step_that_is_not_finite_changes_nothing_and_does_not_count() -> None:
    optimizer, undisturbed = _one_pass(), _one_pass()
    _train(optimizer, 2)
    _train(undisturbed, 2)
    optimizer.found_inf = torch.ones(())
    for group in optimizer.param_groups:
        group["params"][0].grad.fill_(torch.nan)
    optimizer.step()
    optimizer.found_inf = torch.zeros(())
    for ours, theirs in zip(_train(optimizer, 1), _train(undisturbed, 1), strict=True):
        assert torch.equal(ours, theirs)
    assert {state["step"].item() for state in optimizer.state.values()} == {3.0}


def test_gradients_are_divided_and_kept() -> None:
    optimizer, scaled = _one_pass(), _one_pass()
    scaled.grad_scale = torch.tensor(4.0)
    for one, factor in ((optimizer, 1.0), (scaled, 4.0)):
        for group in one.param_groups:
            group["params"][0].grad = torch.full((100,), 0.5 * factor)
        one.step()
    for ours, theirs in zip(scaled.param_groups, optimizer.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])
        assert torch.equal(ours["params"][0].grad, torch.full((100,), 2.0))


def test_updated_parameters_are_published_in_their_readers_dtype() -> None:
    optimizer = _one_pass()
    parameters = [group["params"][0] for group in optimizer.param_groups]
    weights = torch.zeros(100, dtype=torch.bfloat16)
    optimizer.published[parameters[0]] = weights
    updated, _ = _train(optimizer, 1)
    assert torch.equal(weights, updated.bfloat16())


def test_gradients_may_live_in_a_buffer_of_another_dtype() -> None:
    """They are widened before anything is computed from them."""
    buffered, plain = _one_pass(), _one_pass()
    gradient = torch.linspace(-1, 1, 100).bfloat16()
    for optimizer in (buffered, plain):
        optimizer.grad_scale = torch.tensor(3.0)
    buffered.gradients[buffered.param_groups[0]["params"][0]] = gradient
    plain.param_groups[0]["params"][0].grad = gradient.float()
    buffered.step()
    plain.step()
    for ours, theirs in zip(buffered.param_groups, plain.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])
