"""FLA comes without its layers and models, and both can still be had."""

from __future__ import annotations

import importlib
import subprocess
import sys
import types

import pytest

from qwen3next_train.kernels.fla_import import only_operations_of_fla

NAMES = ("fla.layers", "fla.models")


@pytest.mark.slow
@pytest.mark.parametrize("key", ["gated_delta_rule", "causal_conv1d"])
def test_selected_backends_bring_no_transformers_and_leave_the_layers_importable(key: str) -> None:
    code = (
        "import os, sys, torch\n"
        "from qwen3next_train.config.schema import KernelsConfig\n"
        "from qwen3next_train.kernels.selection import select_kernels\n"
        "unused = ('transformers', 'fla.layers', 'fla.models')\n"
        "torch.cuda.get_device_capability = lambda device: (8, 0)\n"
        f"select_kernels(KernelsConfig(gated_delta_rule='reference').model_copy(update={{{key!r}: 'fla'}}),"
        " torch.device('cuda'))\n"
        "print('fla' in sys.modules, [name for name in unused if name in sys.modules])\n"
        f"assert {key == 'causal_conv1d'} or os.environ['FLA_FLASH_QLA'] == '0'\n"
        "import fla.layers, fla.models\n"
        "print(fla.layers.GatedDeltaNet.__name__, [name for name in unused if name not in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["True []", "GatedDeltaNet []"]


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
