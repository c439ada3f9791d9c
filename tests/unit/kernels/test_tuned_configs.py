"""The configurations of FLA's kernels that are shipped, and when they are used."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from qwen3next_train.kernels.gated_delta_rule import tuned_configs
from qwen3next_train.kernels.gated_delta_rule.tuned_configs import use_tuned_configs

SHIPPED = Path(tuned_configs.__file__).parent / "tuned"
KERNELS = {
    "chunk_bwd_kernel_dqkwg",
    "chunk_bwd_kernel_dv_local",
    "chunk_fwd_kernel_o",
    "chunk_gated_delta_rule_bwd_kernel_dhu_blockdim64",
    "chunk_gated_delta_rule_fwd_kernel_h_blockdim64",
    "chunk_gated_delta_rule_fwd_kkt_solve_kernel",
    "chunk_local_cumsum_scalar_kernel",
    "prepare_wy_repr_bwd_kernel",
    "recompute_w_u_fwd_kernel",
}
HOPPER = (9, 0)


@pytest.fixture(autouse=True)
def tuned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with configurations for Hopper, and an environment without FLA's settings."""
    for name in ("FLA_CACHE_MODE", "FLA_CONFIG_DIR"):
        # First set, so that it is known to be absent afterwards.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    (tmp_path / "sm90").mkdir()
    monkeypatch.setattr(tuned_configs, "_TUNED", tmp_path)
    return tmp_path


def test_a_gpu_gets_what_was_tuned_on_its_kind(tuned: Path) -> None:
    use_tuned_configs(HOPPER)
    assert os.environ["FLA_CACHE_MODE"] == "default"
    assert Path(os.environ["FLA_CONFIG_DIR"]) == tuned / "sm90"


def test_other_gpus_get_what_fla_finds() -> None:
    use_tuned_configs((8, 0))
    assert not {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & set(os.environ)


def test_what_users_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    use_tuned_configs(HOPPER)
    assert os.environ["FLA_CACHE_MODE"] == "disabled"


@pytest.mark.parametrize("folder", sorted(SHIPPED.glob("sm*")), ids=lambda path: path.name)
def test_what_is_shipped_is_complete_and_in_fla_s_form(folder: Path) -> None:
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    assert set(records) == KERNELS
    for name, record in records.items():
        assert record["kernel_name"] == name
        assert set(record["default_config"]) >= {"kwargs", "num_warps", "num_stages", "num_ctas"}, name
