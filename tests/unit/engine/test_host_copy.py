"""What is on its way to the host keeps its value."""

from __future__ import annotations

import pytest
import torch

from qwen3next_train.engine.host_copy import HostCopy


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_later_changes_are_not_copied(device: str) -> None:
    values = torch.tensor([1.0, 2.0], dtype=torch.float64, device=device)
    copy = HostCopy(values)
    values.fill_(7)
    found = copy.read()
    assert found.device.type == "cpu"
    assert found.dtype == torch.float64
    assert found.tolist() == [1.0, 2.0]
