"""Versions, devices, cache folder, wandb: what is found, and what is said when it is not right."""

from __future__ import annotations

import errno
import importlib.metadata
import os
import platform
import tempfile
from configparser import ConfigParser
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from qwen3next_train.config.schema import Config, DataConfig, KernelsConfig, LoggingConfig, WandbConfig
from qwen3next_train.selftest import environment
from qwen3next_train.selftest.environment import (
    cache_check,
    device_checks,
    triton_check,
    version_check,
    wandb_check,
)
from qwen3next_train.versions import _installed_version
from tests.architecture.tree import ROOT


@pytest.fixture
def versions(monkeypatch: pytest.MonkeyPatch) -> dict[str, str | None]:
    """Pretended versions of packages; None for one that is not installed."""
    pretended: dict[str, str | None] = {}
    real = importlib.metadata.version

    def version(name: str) -> str:
        found = pretended[name] if name in pretended else real(name)
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    # As it is behind the cache, which may hold the real ones.
    monkeypatch.setattr("qwen3next_train.versions._installed_version", _installed_version.__wrapped__)
    return pretended


def test_this_environment_is_in_range() -> None:
    check = version_check()
    assert check.ok, check.detail
    assert f"python {platform.python_version()}" in check.detail
    assert f"torch {importlib.metadata.version('torch')}" in check.detail


def test_each_version_out_of_range_is_named_with_the_command_that_mends_it(versions: dict) -> None:
    versions |= {"torch": "2.10.0+cu128", "deepspeed": "0.19.9", "wandb": None}
    check = version_check()
    assert not check.ok
    assert check.detail.split("; ") == [
        "torch 2.10.0+cu128 is not >=2.11: pip install 'torch>=2.11'",
        "deepspeed 0.19.9 is not ==0.19.8: pip install 'deepspeed==0.19.8'",
        "wandb is missing: pip install 'wandb>=0.31'",
    ]


def test_a_vendors_pre_release_counts_as_the_release(versions: dict) -> None:
    versions["torch"] = "2.11.0a0+nv26.2"
    assert version_check().ok
    versions["torch"] = "2.10.0a0+nv25.9"
    assert not version_check().ok


def test_an_old_python_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "python_version", lambda: "3.10.14")
    check = version_check()
    assert (check.ok, check.detail) == (False, "python 3.10.14 is not >=3.11")


def test_a_checkout_that_is_not_installed_reads_its_setup_cfg(monkeypatch: pytest.MonkeyPatch, versions: dict) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "metadata", missing)
    assert version_check().ok
    parser = ConfigParser()
    parser.read(ROOT / "setup.cfg")
    for line in parser["options"]["install_requires"].split():
        name = line.split("=")[0].rstrip(";<>")
        if name and name[0].isalpha() and name not in {"sys_platform"}:
            versions[name] = None
    check = version_check()
    assert check.detail.count("is missing: pip install") == len(versions)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A machine with one GPU, an H100 unless a test says otherwise."""
    properties = SimpleNamespace(name="NVIDIA H100 80GB HBM3", total_memory=80 * 2**30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (properties.major, properties.minor))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    return properties


@pytest.mark.parametrize("version", ["3.4.0", "3.6.0", "3.7.0"])
def test_a_triton_that_miscompiles_on_hopper(gpu: SimpleNamespace, versions: dict, version: str) -> None:
    versions["triton"] = version
    check = triton_check(Config())
    assert (check.ok, check.detail) == (
        False,
        f"{version} compiles FLA's gated delta rule into wrong gradients on Hopper GPUs (H100, H200); "
        "install triton >= 3.7.1, until then auto takes the slow reference unless flash_qla runs",
    )
    for other in ("reference", "flash_qla"):
        check = triton_check(Config(kernels=KernelsConfig(gated_delta_rule=other)))
        assert check.ok
        assert check.detail.endswith(f"; not used, as kernels.gated_delta_rule is {other}")
    assert not triton_check(Config(kernels=KernelsConfig(gated_delta_rule="fla"))).ok
    gpu.major = 8
    check = triton_check(Config())
    assert check.ok
    assert check.detail.endswith("wrong gradients on Hopper GPUs (H100, H200); none is here")


@pytest.mark.parametrize("version", ["3.3.1", "3.7.1", "3.9.0"])
def test_a_triton_that_compiles_rightly(gpu: SimpleNamespace, versions: dict, version: str) -> None:
    versions["triton"] = version
    check = triton_check(Config())
    assert check.ok
    assert check.detail.startswith(f"{version}, not one of those that miscompile")


def test_no_triton(gpu: SimpleNamespace, versions: dict) -> None:
    versions["triton"] = None
    assert triton_check(Config()).detail == "not installed: pip install triton, for the GPU kernels"
    assert not triton_check(Config()).ok


def test_a_known_gpu_has_a_peak_and_an_unknown_one_no_mfu(gpu: SimpleNamespace) -> None:
    (_, check, device) = device_checks(Config(), problem=None)
    assert check.check == "gpu 0"
    assert check.detail == "NVIDIA H100 80GB HBM3, 80.0 GiB, compute capability 9.0, peak 989.4 TFLOP/s in bf16"
    assert device.ok
    gpu.name = "NVIDIA Z1000"
    check = device_checks(Config(), problem=None)[1]
    assert check.ok
    assert check.detail.endswith("peak unknown: no MFU")


def test_no_gpu_and_a_refused_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    cpu, gpu, device = device_checks(Config(), problem="run.device: cuda is not available")
    assert cpu.detail == f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores usable, torch uses 1 threads"
    assert (gpu.ok, gpu.detail) == (True, "none: this torch is a build for the CPU; training runs on the CPU")
    assert (device.ok, device.detail) == (False, "run.device: cuda is not available")


def with_cache(path: Path) -> Config:
    return Config(data=DataConfig(cache_dir=str(path)))


def test_a_cache_folder_that_does_not_exist_yet_is_tried_and_not_made(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "yet"
    check = cache_check(with_cache(folder))
    assert check.ok
    assert check.detail.startswith(f"{folder} can be written, ")
    assert check.detail.endswith(" GiB free")
    assert list(tmp_path.iterdir()) == []


def test_the_default_cache_folder(cache_dir: Path) -> None:
    assert cache_check(Config()).detail.startswith(f"{cache_dir / 'qwen3next_train'} can be written")


def test_a_cache_folder_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        check = cache_check(with_cache(folder))
        assert not check.ok
        assert check.detail.startswith(f"{folder} cannot be written (")
        assert check.detail.endswith("; free space, fix permissions or set data.cache_dir to another folder")


def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(**kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    check = cache_check(with_cache(tmp_path))
    assert not check.ok
    assert "No space left on device" in check.detail


def with_wandb(mode: str) -> Config:
    return Config(logging=LoggingConfig(wandb=WandbConfig.model_validate({"mode": mode})))


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module that stands in for wandb in the process that imports it."""
    module = tmp_path / "wandb.py"
    module.write_text("__version__ = '0.31.0'\nprint('noise')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return module


@pytest.mark.parametrize(
    ("mode", "environment", "detail"),
    [
        ("auto", {}, "0.31.0, offline: no key in WANDB_API_KEY or netrc; wandb login makes one"),
        ("auto", {"WANDB_API_KEY": "x"}, "0.31.0, online; offline if the server cannot be reached"),
        ("online", {"WANDB_API_KEY": "x"}, "0.31.0, online; offline if the server cannot be reached"),
        ("auto", {"WANDB_API_KEY": "x", "WANDB_MODE": "offline"}, "0.31.0, offline: upload later with wandb sync"),
        ("offline", {"WANDB_API_KEY": "x"}, "0.31.0, offline: upload later with wandb sync"),
        ("auto", {"WANDB_MODE": "disabled"}, "disabled"),
        ("disabled", {}, "disabled"),
    ],
)
def test_the_mode_wandb_would_use(
    fake_wandb: Path, monkeypatch: pytest.MonkeyPatch, mode: str, environment: dict, detail: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    check = wandb_check(with_wandb(mode))
    assert (check.ok, check.detail) == (True, detail)


def test_a_key_in_netrc_is_that_of_the_server_in_use(
    fake_wandb: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example.org login user password x\n")
    assert "offline: no key" in wandb_check(Config()).detail
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example.org")
    assert "online" in wandb_check(Config()).detail
    (tmp_path / "netrc").write_text("machine\n")
    assert "offline: no key" in wandb_check(Config()).detail


def test_a_wandb_that_cannot_be_imported(fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_wandb.write_text("import no_such_protobuf\n")
    check = wandb_check(Config())
    assert (check.ok, check.detail) == (
        False,
        "cannot be imported (ModuleNotFoundError: No module named 'no_such_protobuf'); "
        "pip install wandb, or set logging.wandb.mode to disabled",
    )
    fake_wandb.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(environment, "_WANDB_IMPORT_TIMEOUT_S", 0.1)
    check = wandb_check(Config())
    assert not check.ok
    assert check.detail.startswith("no import within 0 s")
