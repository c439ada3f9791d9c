"""AdamW with bf16 moments against torch's with fp32 ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwen3next_train.config.schema import OptimizerConfig
from qwen3next_train.optim import adamw
from qwen3next_train.optim.adamw import Bf16MomentsAdamW, build_adamw

SETTINGS = OptimizerConfig(lr=1e-2, beta1=0.9, beta2=0.95, eps=1e-8)


def _groups(numel: int, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    decayed, free = (torch.nn.Parameter(torch.randn(numel, generator=generator)) for _ in range(2))
    return [{"params": [decayed], "weight_decay": 0.1}, {"params": [free], "weight_decay": 0.0}]


def _train(optimizer: torch.optim.Optimizer, num_steps: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for _ in range(num_steps):
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.grad = parameter.detach() + noise
        optimizer.step()
    return [parameter.detach().clone() for parameter in parameters]


def _both(num_steps: int, numel: int = 100) -> tuple[list[torch.Tensor], list[torch.Tensor], Bf16MomentsAdamW]:
    in_fp32 = build_adamw(_groups(numel), SETTINGS, fused=False)
    in_bf16 = build_adamw(_groups(numel), SETTINGS.model_copy(update={"moments_dtype": "bf16"}), fused=False)
    assert isinstance(in_fp32, torch.optim.AdamW)
    assert isinstance(in_bf16, Bf16MomentsAdamW)
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
        _train(Bf16MomentsAdamW(_groups(100), lr=0.0, betas=(0.9, 0.95), eps=1e-8), 0), in_fp32, in_bf16, strict=True
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
        optimizer = Bf16MomentsAdamW(groups, lr=1e-3, betas=(0.9, beta2), eps=1e-8)
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
    optimizer = Bf16MomentsAdamW(_groups(4), lr=1e-2, betas=(0.9, 0.95), eps=1e-8)
    before = [group["params"][0].clone() for group in optimizer.param_groups]
    optimizer.step()
    assert all(torch.equal(a, group["params"][0]) for a, group in zip(before, optimizer.param_groups, strict=True))
    assert not optimizer.state
