"""The references of gates and shared inputs."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.kernels.gates import shared_input_reference


@pytest.mark.parametrize("first", [0, 1, 2, 3])
def test_gradients_are_added_in_the_order_of_the_consumers(first: int) -> None:
    """Whichever computes first; a 1 that is added before the 1e8 is gone is lost in fp32."""
    x = torch.zeros(1, requires_grad=True)
    shares = shared_input_reference(x, 4)
    factors = [1.0, 1e8, -1e8, 0.0]
    order = sorted(range(4), key=lambda index: (index - first) % 4)
    total = torch.stack([factors[index] * shares[index] for index in order]).sum()
    (grad,) = torch.autograd.grad(total, x)
    assert grad.item() == 1.0


def test_consumers_that_are_not_there() -> None:
    x = torch.ones(5, requires_grad=True)
    for used in ([0], [1, 3], [0, 1, 2]):
        shares = shared_input_reference(x, 4)
        total = torch.stack([(index + 1) * shares[index] for index in used]).sum()
        (grad,) = torch.autograd.grad(total, x)
        assert grad.tolist() == [float(sum(used) + len(used))] * 5
