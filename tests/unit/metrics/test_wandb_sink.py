import json
import logging
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from qwen3next_train.config.schema import WandbConfig
from qwen3next_train.log import get_logger
from qwen3next_train.metrics.json_child import JsonChild
from qwen3next_train.metrics.samples import Sample
from qwen3next_train.metrics.wandb_sink import WandbLimits, WandbSink
from tests.unit.metrics.fake_wandb import SOURCE

RECORDS = [{"step": step, "loss/lm": 1 / step, "tokens": 10 * step} for step in range(1, 6)]
PATIENT = WandbLimits(start_s=200, finish_s=200, close_s=250)
"""Longer than anything takes, on a machine that is busy too."""


@pytest.fixture
def messages():
    """What the package logger says."""
    seen: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    get_logger().addHandler(handler)
    yield seen
    get_logger().removeHandler(handler)


@pytest.fixture
def fake(tmp_path, monkeypatch) -> Callable[..., list[list]]:
    """Puts the stand-in for wandb in place; called with faults, later without for the calls it saw."""
    package = tmp_path / "fake" / "wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(SOURCE)
    calls = tmp_path / "calls"
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    monkeypatch.setenv("FAKE_WANDB_CALLS", str(calls))

    def control(faults: str | None = None) -> list[list]:
        if faults is not None:
            monkeypatch.setenv("FAKE_WANDB", faults)
        return [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []

    return control


def run_sink(
    run_dir: Path,
    *,
    mode: str = "auto",
    limits: WandbLimits = PATIENT,
    resumed: bool = False,
    config: dict | None = None,
) -> None:
    run_dir.mkdir(exist_ok=True)
    sink = WandbSink(WandbConfig(mode=mode), run_dir, config or {}, "abcd1234", resumed, limits=limits)
    for record in RECORDS:
        sink.log(record)
    sink.close()


def named(calls: list[list], name: str) -> list[list]:
    return [call[1:] for call in calls if call[0] == name]


def test_this_module_imports_no_wandb():
    code = "import sys, qwen3next_train.metrics.wandb_sink;print('wandb' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_disabled_does_nothing(tmp_path, fake, messages):
    run_sink(tmp_path / "run", mode="disabled")
    assert fake() == []
    assert messages == []
    assert not (tmp_path / "run" / "wandb").exists()


def test_online(tmp_path, fake, messages, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    run_sink(tmp_path / "run", config={"run": {"seed": 1}, "note": "key " + "0123456789" * 4})
    calls = fake()
    [[arguments, settings]] = named(calls, "init")
    assert arguments == {
        "project": "qwen3next",
        "entity": None,
        "name": "run",
        "tags": [],
        "id": "abcd1234",
        "dir": str(tmp_path / "run"),
        "config": {"run": {"seed": 1}, "note": "key ***"},
        "mode": "online",
        "resume": "allow",
    }
    assert settings["console"] == "off"
    assert settings["save_code"] is False
    assert settings["x_stats_pid"] == os.getpid()
    assert named(calls, "config") == [[{"run": {"seed": 1}, "note": "key ***"}, True]]
    assert named(calls, "define_metric") == [[["step"], {}], [["*"], {"step_metric": "step"}]]
    assert named(calls, "log") == [[record] for record in RECORDS]
    assert named(calls, "finish") == [[0]]
    assert messages == ["wandb: https://wandb.example/run"]


def test_samples_are_a_table(tmp_path, fake):
    (tmp_path / "run").mkdir()
    sink = WandbSink(WandbConfig(mode="offline"), tmp_path / "run", {}, "abcd1234", False, limits=PATIENT)
    sink.log_samples(4, [Sample("a", "b\n", 2, "length"), Sample("c", "", 0, "stop")])
    sink.log_samples(8, [])
    sink.close()
    columns = ["prompt", "text", "tokens", "finish_reason"]
    assert named(fake(), "log") == [
        [{"step": 4, "samples": {"table": [columns, ["a", "b\n", 2, "length"], ["c", "", 0, "stop"]]}}],
        [{"step": 8, "samples": {"table": [columns]}}],
    ]
    disabled = WandbSink(WandbConfig(mode="disabled"), tmp_path / "run", {}, "abcd1234", False, limits=PATIENT)
    disabled.log_samples(4, [])
    disabled.close()


def test_a_change_is_a_row_with_text(tmp_path, fake):
    (tmp_path / "run").mkdir()
    sink = WandbSink(WandbConfig(mode="offline"), tmp_path / "run", {}, "abcd1234", True, limits=PATIENT)
    sink.note(300, "optimizer.lr: 0.001 -> 0.0005")
    sink.close()
    assert named(fake(), "log") == [[{"step": 300, "resume/changed": "optimizer.lr: 0.001 -> 0.0005"}]]


def test_without_a_key_offline_with_the_command(tmp_path, fake, messages):
    fake("online")
    run_sink(tmp_path / "my run")
    calls = fake()
    assert [arguments["mode"] for arguments, _ in named(calls, "init")] == ["online", "offline"]
    assert len(named(calls, "teardown")) == 1
    assert named(calls, "log") == [[record] for record in RECORDS]
    command = f"wandb sync {shlex.quote(str(tmp_path / 'my run' / 'wandb' / 'offline-run-1-abcd1234'))}"
    assert messages == [
        f"wandb: offline (No API key configured. Second line); to upload this run later: {command}",
        f"wandb: to upload this run: {command}",
    ]


def test_command_uploads_all_attempts_of_a_resumed_run(tmp_path, fake, messages):
    for name in ("offline-run-0-abcd1234", "offline-run-0-otherrun"):
        (tmp_path / "run" / "wandb" / name).mkdir(parents=True)
    run_sink(tmp_path / "run", mode="offline", resumed=True)
    folder = tmp_path / "run" / "wandb"
    assert (
        messages[-1]
        == f"wandb: to upload this run: wandb sync {folder}/offline-run-0-abcd1234 {folder}/offline-run-1-abcd1234"
    )


def test_failed_run_is_marked(tmp_path, fake):
    sink = WandbSink(WandbConfig(), tmp_path, {}, "abcd1234", False, limits=PATIENT)
    sink.close(failed=True)
    assert named(fake(), "finish") == [[1]]


@pytest.mark.parametrize(
    ("faults", "reason"),
    [("import", "ImportError: no such library"), ("online offline", "RuntimeError: disk full")],
)
def test_off_when_nothing_works(tmp_path, fake, messages, faults, reason):
    fake(faults)
    run_sink(tmp_path / "run")
    assert named(fake(), "log") == []
    assert messages[0] == f"wandb: off ({reason}); training goes on"
    assert all("not sent" in message for message in messages[1:])


def test_blocking_init_is_replaced_by_an_offline_run(tmp_path, fake, messages, monkeypatch):
    """The first child's time is over once it hangs in ``wandb.init``, however long it took to come that far."""
    fake("init_hang")
    receive, children = JsonChild.receive, []

    def hurried(child: JsonChild, timeout_s: float) -> dict[str, str]:
        if children:
            return receive(child, timeout_s)
        children.append(child)
        while not named(fake(), "init"):
            time.sleep(0.01)
        return receive(child, 0)

    monkeypatch.setattr(JsonChild, "receive", hurried)
    run_sink(tmp_path / "run", limits=PATIENT)
    assert [arguments["mode"] for arguments, _ in named(fake(), "init")] == ["online", "offline"]
    assert named(fake(), "log") == [[record] for record in RECORDS]
    assert messages[0].startswith("wandb: offline (no answer within 200 s); to upload this run later: wandb sync ")


def test_variables_that_have_a_say_and_those_that_have_none(tmp_path, fake, monkeypatch):
    """Nonsense in what wandb is told anyway would keep it from starting."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "77")
    monkeypatch.setenv("WANDB_SILENT", "banana")
    monkeypatch.setenv("WANDB_CONSOLE", "banana")
    monkeypatch.setenv("WANDB_NOTES", "some")
    run_sink(tmp_path / "run", mode="offline")
    [[arguments, settings]] = named(fake(), "init")
    assert arguments["dir"] == str(tmp_path / "elsewhere")
    assert settings["init_timeout"] == 77
    assert (tmp_path / "elsewhere" / "wandb" / "process.log").exists()
    assert not (tmp_path / "run" / "wandb").exists()
    assert named(fake(), "environment") == [[["WANDB_DIR", "WANDB_NOTES"]]]


def test_logging_that_raises_is_one_line_and_ends_after_three_tries(tmp_path, fake, messages):
    fake("log")
    sink = WandbSink(WandbConfig(), tmp_path, {}, "abcd1234", False, limits=PATIENT)
    while sink._thread.is_alive():
        sink.log(RECORDS[0])
        time.sleep(0.01)
    sink.log(RECORDS[0])
    sink.close()
    assert len(named(fake(), "init")) == 3
    lost = [message for message in messages if "connection lost" in message]
    assert lost == ["wandb: connection lost (ConnectionResetError: Connection lost); training goes on"] * 3
    assert re.fullmatch(r"wandb: \d+ records were not sent; metrics.jsonl has them", messages[-1])


def test_hanging_process_stalls_nothing_and_is_killed(tmp_path, fake, messages):
    fake("hang")
    sink = WandbSink(WandbConfig(), tmp_path, {}, "abcd1234", False, limits=replace(PATIENT, close_s=1, queue_size=10))
    while not messages:
        time.sleep(0.01)
    big = {f"moe/layer_{layer:02d}/max_violation": 0.1 for layer in range(2000)} | {"step": 1}
    for _ in range(200):
        sink.log(big)
    sink.close()
    assert not sink._thread.is_alive()
    assert messages[1] == "wandb: not finished after 1 s, stopped"
    assert re.fullmatch(r"wandb: 1\d\d records were not sent; metrics.jsonl has them", messages[-1])


@pytest.mark.parametrize("fault", ["finish", "finish_hang"])
def test_upload_that_does_not_end_names_the_command(tmp_path, fake, messages, fault):
    fake(fault)
    run_sink(tmp_path / "run", limits=replace(PATIENT, finish_s=1))
    assert len([message for message in messages if "upload not complete" in message]) == 1
    assert messages[-1] == f"wandb: to upload this run: wandb sync {tmp_path / 'run' / 'wandb' / 'run-1-abcd1234'}"


TRAINING = """
import sys, time
from pathlib import Path
from qwen3next_train.config.schema import WandbConfig
from qwen3next_train.metrics.json_child import JsonChild
from qwen3next_train.metrics.wandb_sink import WandbSink

sink = WandbSink(WandbConfig(), Path(sys.argv[1]), {}, "abcd1234", False)
for step in range(1, 4):
    sink.log({"step": step})
print("logged", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_killed_training_leaves_its_records_and_a_failed_run(tmp_path, fake, number):
    training = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path)], stdout=subprocess.PIPE)
    assert training.stdout is not None
    training.stdout.readline()
    while len(named(fake(), "log")) < 3:
        time.sleep(0.02)
    training.send_signal(number)
    training.wait()
    training.stdout.close()
    while not named(fake(), "finish"):
        time.sleep(0.02)
    assert named(fake(), "finish") == [[1]]


@pytest.mark.slow
def test_real_wandb_offline(tmp_path, messages, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for resumed in (False, True):
        run_sink(tmp_path / "run", resumed=resumed, config={"run": {"seed": 7}})
    runs = sorted((tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234"))
    assert len(runs) == 2
    assert messages[-1] == f"wandb: to upload this run: {shlex.join(['wandb', 'sync', *map(str, runs)])}"
    assert sum("offline (No API key configured" in message for message in messages) == 2
    inspect = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(runs[0])]
    log = subprocess.run(inspect, capture_output=True, text=True, check=True).stdout
    for text in ("loss/lm", "abcd1234", "seed"):
        assert text in log
    assert [json.loads(line)["type"] for line in log.splitlines()].count("history") == len(RECORDS)
    assert not any("patch" in path.name or path.suffix == ".py" for path in runs[0].rglob("*"))


@pytest.mark.slow
def test_real_wandb_without_a_network(tmp_path, messages, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef" * 3)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    run_sink(tmp_path / "run", limits=replace(PATIENT, init_s=2))
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*-abcd1234"))) == 1
    assert messages[0].startswith("wandb: offline (")
    everything = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"0123456789abcdef" * 3 not in everything
    assert "0123456789abcdef" not in "".join(messages)
