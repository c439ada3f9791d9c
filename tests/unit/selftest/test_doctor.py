"""The ``doctor`` subcommand: every check runs, whatever the others find; lines, JSON and exit code."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import Config
from qwen3next_train.errors import ConfigError, ExitCode, PeerLostError
from qwen3next_train.kernels.selection import KernelSet
from qwen3next_train.selftest import doctor
from qwen3next_train.selftest.doctor import doctor_command
from tests.integration.launching import exit_codes, start_ranks
from tests.unit.model.small_models import cpu_kernels

OPERATIONS = [choice.operation for choice in cpu_kernels().choices]
NAMES = [
    *("versions", "triton", "cpu", "gpu", "device", "cache", "wandb"),
    *(f"kernel {operation}" for operation in OPERATIONS),
    *("packing", "all-reduce", "all-to-all"),
]
"""On a machine without a GPU."""


@pytest.fixture(autouse=True)
def own_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher and no GPU; what the process group writes into the environment is taken back."""
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "DS_ACCELERATOR"):
        # First set, so that it is known to be absent afterwards.
        monkeypatch.setenv(variable, "")
        monkeypatch.delenv(variable)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)


@pytest.fixture(scope="module")
def measured() -> dict[object, Any]:
    """What the kernels' and the packing check found, by the arguments that decide it."""
    return {}


@pytest.fixture(autouse=True)
def each_measurement_once(measured: dict[object, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The two checks that take seconds run for real, but once for the same kernels, model, device and precision."""

    def once(name: str) -> Callable[..., Any]:
        check = getattr(doctor, name)

        def remembered(kernels: KernelSet, *where: object) -> Any:
            key = (name, kernels.choices, *map(repr, where))
            if key not in measured:
                measured[key] = check(kernels, *where)
            return measured[key]

        return remembered

    for name in ("kernel_checks", "packing_check"):
        monkeypatch.setattr(doctor, name, once(name))


def small(**overrides: str) -> Config:
    values = {
        "model.preset": "tiny",
        "run.precision": "bf16",
        "logging.wandb.mode": "disabled",
        **{name.replace("__", "."): value for name, value in overrides.items()},
    }
    return load_config([], list(values.items())).config


def test_a_good_machine_gets_a_line_a_check_and_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(small(), as_json=False) == ExitCode.FINISHED
    lines = capsys.readouterr().out.splitlines()
    assert [line[5:33].strip() for line in lines] == NAMES
    assert {line[:5] for line in lines} == {"ok   "}
    assert "bf16" in lines[7]


def test_json_is_a_list_of_check_ok_detail(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(small(), as_json=True) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["check"] for item in found] == NAMES
    for item in found:
        assert list(item) == ["check", "ok", "detail"]
        assert item["ok"] is True
        assert "\n" not in item["detail"]


def test_a_device_that_is_not_there_fails_and_the_rest_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(small(run__device="cuda"), as_json=True) == ExitCode.INTERNAL
    found = json.loads(capsys.readouterr().out)
    assert [item["check"] for item in found] == NAMES
    bad = [item for item in found if not item["ok"]]
    text = "run.device: cuda is not available on this machine; use --run.device cpu"
    assert bad == [{"check": "device", "ok": False, "detail": text}]


def test_a_backend_that_cannot_run_fails_with_the_remedy(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor_command(small(kernels__gated_delta_rule="fla"), as_json=False) == ExitCode.INTERNAL
    lines = {line[5:33].strip(): line for line in capsys.readouterr().out.splitlines()}
    assert lines["kernels"].startswith("FAIL kernels")
    assert "'fla' needs CUDA and the model runs on cpu; or choose 'auto' or 'reference'" in lines["kernels"]
    assert lines["packing"].startswith("FAIL")
    assert lines["all-to-all"].startswith("ok")


def test_checks_that_crash_do_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise ValueError("broken\nin two lines")

    for name in ("version_check", "device_checks", "packing_check", "all_reduce_check"):
        monkeypatch.setattr(doctor, name, crash)
    assert doctor_command(small(), as_json=True) == ExitCode.INTERNAL
    found = {item["check"]: item for item in json.loads(capsys.readouterr().out)}
    bad = [name for name, item in found.items() if not item["ok"]]
    assert bad == ["versions", "devices", "packing", "all-reduce"]
    assert {found[name]["detail"] for name in bad} == {"ValueError: broken"}
    assert found["all-to-all"]["ok"]


def test_ranks_that_do_not_find_each_other_are_one_failed_check(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def alone(device: str) -> None:
        raise PeerLostError("rank 0: the 2 processes did not find each other: timeout; check the master address")

    monkeypatch.setattr(doctor, "process_context", alone)
    assert doctor_command(small(), as_json=True) == ExitCode.INTERNAL
    found = json.loads(capsys.readouterr().out)
    assert [item["check"] for item in found] == [*NAMES[:-2], "collectives"]
    assert [item["detail"] for item in found if not item["ok"]] == [
        "rank 0: the 2 processes did not find each other: timeout; check the master address"
    ]


def test_under_a_launcher_a_missing_device_ends_all_ranks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=r"run\.device: cuda is not available"):
        doctor_command(small(run__device="cuda"), as_json=False)


@pytest.mark.dist
def test_two_ranks_measure_what_is_between_them() -> None:
    options = ["--model.preset", "tiny", "--run.device", "cpu", "--logging.wandb.mode", "disabled"]
    ranks = start_ranks([["doctor", "--json", *options]] * 2)
    (stdout, stderr), (silent, _) = (rank.communicate(timeout=200) for rank in ranks)
    assert exit_codes(ranks) == [0, 0], stderr
    assert silent == ""
    found = {item["check"]: item for item in json.loads(stdout)}
    assert all(item["ok"] for item in found.values())
    assert found["all-reduce"]["detail"].startswith("all-reduce of 64 MiB over 2 ranks (gloo): right, ")
    assert found["all-to-all"]["detail"] == "rows between 2 ranks: right"
