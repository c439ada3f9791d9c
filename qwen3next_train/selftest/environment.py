"""What ``doctor`` finds out about the machine without computing anything: versions, devices, cache folder, wandb."""

from __future__ import annotations

import importlib.metadata
import netrc
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlsplit

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import qwen3next_train
from qwen3next_train.accounting.hardware import find_device
from qwen3next_train.config.schema import Config
from qwen3next_train.data.store_cache import default_cache_dir
from qwen3next_train.errors import ConfigError
from qwen3next_train.kernels.selection import HOPPER, miscompiles_gated_backward
from qwen3next_train.metrics.wandb_settings import resolve_mode
from qwen3next_train.selftest.check import Check
from qwen3next_train.versions import software_versions

_DISTRIBUTION = "qwen3next-train"
_WANDB_HOST = "https://api.wandb.ai"
_WANDB_IMPORT_TIMEOUT_S = 30.0
_GIB = 2**30


def version_check() -> Check:
    """Whether python and every required package are there, in the ranges of ``setup.cfg``."""
    python_range, requirements = _requirements()
    errors = []
    if not SpecifierSet(python_range).contains(platform.python_version(), prereleases=True):
        errors.append(f"python {platform.python_version()} is not {python_range}")
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        error = _version_error(requirement)
        if error is not None:
            errors.append(error)
    if errors:
        return Check("versions", False, "; ".join(errors))
    found = (f"{name} {version}" for name, version in software_versions().items() if version is not None)
    return Check("versions", True, ", ".join(found))


def triton_check(config: Config) -> Check:
    """Whether this Triton compiles the gated delta rule rightly on the GPUs that are here."""
    version = software_versions()["triton"]
    if version is None:
        return Check("triton", not _has_hopper(), "not installed: pip install triton, for the GPU kernels")
    if not miscompiles_gated_backward(version):
        return Check("triton", True, f"{version}, not one of those that miscompile FLA's gated delta rule on Hopper")
    detail = f"{version} compiles FLA's gated delta rule into wrong gradients on Hopper GPUs (H100, H200)"
    hint = "; install triton >= 3.7.1, until then auto takes the slow reference unless flash_qla runs"
    if not _has_hopper():
        return Check("triton", True, f"{detail}; none is here")
    asked = config.kernels.gated_delta_rule
    if asked not in ("auto", "fla"):
        return Check("triton", True, f"{detail}; not used, as kernels.gated_delta_rule is {asked}")
    return Check("triton", False, detail + hint)


def device_checks(config: Config, *, problem: str | None) -> list[Check]:
    """CPU, every GPU that torch sees, and whether ``run.device`` can be had.

    Args:
        config: asks for a device.
        problem: why it cannot be had, None when it can.
    """
    usable = len(os.sched_getaffinity(0))
    cores = f"{usable} of {os.cpu_count()} cores usable, torch uses {torch.get_num_threads()} threads"
    gpus = [_gpu_check(index, config) for index in range(torch.cuda.device_count())]
    if not gpus:
        why = "this torch is a build for the CPU" if torch.version.cuda is None else "torch sees none"
        gpus = [Check("gpu", True, f"none: {why}; training runs on the CPU")]
    if problem is not None:
        return [Check("cpu", True, cores), *gpus, Check("device", False, problem)]
    return [Check("cpu", True, cores), *gpus, Check("device", True, f"run.device {config.run.device} can be had")]


def cache_check(config: Config) -> Check:
    """Whether the token stores can be written where ``data.cache_dir`` says; leaves nothing behind."""
    folder = Path(config.data.cache_dir) if config.data.cache_dir else default_cache_dir()
    hint = "free space, fix permissions or set data.cache_dir to another folder"
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(bytes(2**16))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return Check("cache", False, f"{folder} cannot be written ({error.strerror}); {hint}")
    free_gib = shutil.disk_usage(existing).free / _GIB
    return Check("cache", True, f"{folder} can be written, {free_gib:.1f} GiB free")


def wandb_check(config: Config) -> Check:
    """Whether wandb can be imported, and the mode it would run in. Asks no server."""
    mode = resolve_mode(config.logging.wandb.mode, os.environ)
    if mode == "disabled":
        return Check("wandb", True, "disabled")
    # In a process of its own, as in training: on import wandb takes over sys.excepthook.
    command = [sys.executable, "-c", "import wandb; print(wandb.__version__)"]
    hint = "pip install wandb, or set logging.wandb.mode to disabled"
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            timeout=_WANDB_IMPORT_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired:
        return Check("wandb", False, f"no import within {_WANDB_IMPORT_TIMEOUT_S:.0f} s; {hint}")
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check("wandb", False, f"cannot be imported ({reason}); {hint}")
    version = done.stdout.split()[-1]
    if mode == "offline":
        return Check("wandb", True, f"{version}, offline: upload later with wandb sync")
    if not _has_wandb_key(os.environ):
        return Check("wandb", True, f"{version}, offline: no key in WANDB_API_KEY or netrc; wandb login makes one")
    return Check("wandb", True, f"{version}, online; offline if the server cannot be reached")


def _requirements() -> tuple[str, list[Requirement]]:
    """Range of python and requirements, from the installed distribution or from the checkout's setup.cfg."""
    try:
        metadata = importlib.metadata.metadata(_DISTRIBUTION)
        lines = importlib.metadata.requires(_DISTRIBUTION) or []
        return metadata["Requires-Python"] or "", [Requirement(line) for line in lines]
    except importlib.metadata.PackageNotFoundError:
        # A checkout runs without being installed.
        path = Path(qwen3next_train.__file__).parents[1] / "setup.cfg"
    parser = ConfigParser()
    if not parser.read(path, encoding="utf-8"):
        raise ConfigError(f"{_DISTRIBUTION}: neither installed nor a checkout; pip install it")
    options = parser["options"]
    lines = [line for line in options["install_requires"].splitlines() if line.strip() and not line.startswith("#")]
    return options["python_requires"], [Requirement(line) for line in lines]


def _version_error(requirement: Requirement) -> str | None:
    """Why a package does not satisfy its requirement, or None."""
    try:
        version = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name} is missing: pip install '{requirement.name}{requirement.specifier}'"
    # A vendor's build (2.11.0a0+nv) counts as the release it is named after.
    if requirement.specifier.contains(Version(version).base_version, prereleases=True):
        return None
    wanted = f"{requirement.name}{requirement.specifier}"
    return f"{requirement.name} {version} is not {requirement.specifier}: pip install '{wanted}'"


def _has_hopper() -> bool:
    return any(torch.cuda.get_device_capability(index)[0] == HOPPER for index in range(torch.cuda.device_count()))


def _gpu_check(index: int, config: Config) -> Check:
    properties = torch.cuda.get_device_properties(index)
    known = find_device(properties.name)
    peak = "peak unknown: no MFU"
    if known is not None:
        precision = config.run.precision
        peak = f"peak {known.peak_flops(precision) / 1e12:.1f} TFLOP/s in {precision}"
    memory = f"{properties.total_memory / _GIB:.1f} GiB"
    capability = f"compute capability {properties.major}.{properties.minor}"
    return Check(f"gpu {index}", True, f"{properties.name}, {memory}, {capability}, {peak}")


def _has_wandb_key(environ: Mapping[str, str]) -> bool:
    """Whether wandb would find a key, where it looks without asking a server."""
    if environ.get("WANDB_API_KEY") or environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environ.get("WANDB_BASE_URL") or _WANDB_HOST).netloc
    named = environ.get("NETRC")
    for path in [Path(named)] if named else [Path("~/.netrc"), Path("~/_netrc")]:
        try:
            if netrc.netrc(path.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
