"""What FLA changes in the process: it comes without its layers and models, and with configurations that are shipped."""

from __future__ import annotations

import importlib
import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

from qwen3next_train.config.schema import KernelsConfig
from qwen3next_train.kernels.fla import process
from qwen3next_train.kernels.fla.process import only_operations_of_fla, use_tuned_configs
from qwen3next_train.kernels.selection import select_kernels
from tests.forked import Apart

NAMES = ("fla.layers", "fla.models")
SHIPPED = Path(process.__file__).parent / "tuned"
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
    monkeypatch.setattr(process, "_TUNED", tmp_path)
    return tmp_path


def test_a_gpu_gets_what_was_tuned_on_its_kind(tuned: Path) -> None:
    use_tuned_configs(HOPPER, (128, 64))
    assert os.environ["FLA_CACHE_MODE"] == "default"
    assert Path(os.environ["FLA_CONFIG_DIR"]) == tuned / "sm90"


def test_other_gpus_get_what_fla_finds() -> None:
    use_tuned_configs((8, 0), (128, 128))
    assert not {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & set(os.environ)


@pytest.mark.parametrize("head_dims", [(256, 128), (128, 160)])
def test_larger_heads_than_were_tuned_get_what_fla_finds(head_dims: tuple[int, int]) -> None:
    use_tuned_configs(HOPPER, head_dims)
    assert not {"FLA_CACHE_MODE", "FLA_CONFIG_DIR"} & set(os.environ)


def test_what_users_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLA_CACHE_MODE", "disabled")
    use_tuned_configs(HOPPER, (128, 64))
    assert os.environ["FLA_CACHE_MODE"] == "disabled"


@pytest.mark.parametrize("folder", sorted(SHIPPED.glob("sm*")), ids=lambda path: path.name)
def test_what_is_shipped_is_complete_and_in_fla_s_form(folder: Path) -> None:
    records = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.iterdir()}
    assert set(records) == KERNELS
    for name, record in records.items():
        assert record["kernel_name"] == name
        assert set(record["default_config"]) >= {"kwargs", "num_warps", "num_stages", "num_ctas"}, name


UNUSED = ("transformers", "fla.layers", "fla.models")


def _select_on_a_gpu() -> tuple[bool, list[str]]:
    torch.cuda.get_device_capability = lambda device: (8, 0)
    select_kernels(KernelsConfig(gated_delta_rule="fla"), torch.device("cuda"))
    assert os.environ["FLA_FLASH_QLA"] == "0"
    return "fla" in sys.modules, [name for name in UNUSED if name in sys.modules]


def _import_the_layers() -> tuple[str, list[str]]:
    layers, _ = importlib.import_module("fla.layers"), importlib.import_module("fla.models")
    return layers.GatedDeltaNet.__name__, [name for name in UNUSED if name not in sys.modules]


@pytest.mark.slow
def test_the_selected_rule_brings_no_transformers_and_leaves_the_layers_importable() -> None:
    with Apart() as process:
        assert process.call(_select_on_a_gpu) == (True, [])
        assert process.call(_import_the_layers) == ("GatedDeltaNet", [])


def test_nothing_stays_hidden_when_the_import_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    for name in NAMES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"fla\.models"), only_operations_of_fla():
        importlib.import_module("fla.models")
    assert [name for name in NAMES if name in sys.modules] == []


def test_what_is_loaded_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = types.ModuleType("fla.layers")
    monkeypatch.setitem(sys.modules, "fla.layers", layers)
    with only_operations_of_fla():
        assert sys.modules["fla.layers"] is layers
    assert sys.modules["fla.layers"] is layers
