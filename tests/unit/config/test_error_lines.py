"""Which key is proposed for a name that is none."""

import pytest

from qwen3next_train.config import error_lines
from qwen3next_train.config.describe import keys
from qwen3next_train.config.error_lines import nearest


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learning_rate", "optimizer.lr"),
        ("optimizer.learning_rate", "optimizer.lr"),
        ("run.max-steps", "run.steps"),
        ("per_device_train_batch_size", "run.micro_batch_size"),
        ("gradient_checkpointing", "parallel.recompute"),
    ],
)
def test_names_of_other_programs_lead_to_ours(name: str, meant: str) -> None:
    assert nearest(name, keys()) == meant
    assert nearest(name, [f"--{key}" for key in keys()]) == f"--{meant}"


def test_every_name_of_other_programs_leads_to_a_key() -> None:
    assert set(error_lines._OTHER_NAMES.values()) <= set(keys())
