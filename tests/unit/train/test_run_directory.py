"""What a run directory holds, and what of it may be damaged, unreadable or planted."""

import errno
import io
import json
import os
import socket
from datetime import datetime
from pathlib import Path

import pytest

from qwen3next_train.config.describe import ConfigChanges, compare_configs, to_yaml
from qwen3next_train.config.schema import Config, ParallelConfig, RunConfig
from qwen3next_train.errors import ExitCode, StorageError
from qwen3next_train.train.run_directory import RunDirectory
from qwen3next_train.versions import software_versions
from tests.unit.train.run_directories import CONFIG, names, opened, record


def test_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_dir = RunDirectory(Path("runs/a"), rank=0)
    monkeypatch.chdir("/")
    run_dir.open()
    assert run_dir.path == tmp_path / "runs" / "a"
    assert run_dir.metrics_path == run_dir.path / "metrics.jsonl"
    assert run_dir.log_path == run_dir.path / "log.txt"
    assert run_dir.checkpoints_path == run_dir.path / "checkpoints"
    assert names(run_dir.path) == [".lock"]
    run_dir.close()


def test_configuration_and_information(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "0123456789secret")
    run_dir = opened(tmp_path)
    record(run_dir, command=("qwen3next-train", "--x", "0123456789secret", "--api-key=abc"))
    assert (tmp_path / "config.yaml").read_text() == to_yaml(CONFIG)
    info = run_dir.read_info()
    assert info == json.loads((tmp_path / "run.json").read_text())
    assert set(info) == {
        *("wandb_id", "versions", "git_revision", "layout", "parameters", "attempts", "checkpoint_step", "changes")
    }
    assert info["parameters"] == {"total": 5}
    assert info["wandb_id"] == "abcd1234"
    assert info["layout"] == {"world_size": 1}
    assert info["versions"] == software_versions()
    [attempt] = info["attempts"]
    assert attempt["command"] == ["qwen3next-train", "--x", "***", "--api-key=***"]
    assert attempt["host"] == socket.gethostname()
    assert (attempt["first_step"], attempt["logging_interval"], info["checkpoint_step"]) == (0, 1, None)
    assert datetime.fromisoformat(attempt["started_at"]).tzinfo is not None
    run_dir.close()
    everything = "".join(path.read_text() for path in tmp_path.iterdir())
    assert "0123456789secret" not in everything
    assert os.environ["PATH"] not in everything


def test_attempts_add_up(tmp_path):
    for number in range(3):
        run_dir = opened(tmp_path)
        assert len(run_dir.read_info().get("attempts", [])) == number
        record(run_dir)
        run_dir.close()
    starts = [attempt["started_at"] for attempt in RunDirectory(tmp_path, rank=1).read_info()["attempts"]]
    assert starts == sorted(starts)
    assert len(starts) == 3


def test_a_start_and_its_changes_are_recorded(tmp_path):
    run_dir = opened(tmp_path)
    change = {"key": "optimizer.lr", "old": 1e-3, "new": 5e-4, "step": 4}
    start = {"path": "runs/other", "config_sha256": "0"}
    run_dir.record_attempt(
        CONFIG, layout={}, workload={}, wandb_id="a", command=[], step=4, forked=True, start=start, changes=[change]
    )
    info = json.loads((tmp_path / "run.json").read_text())
    assert (info["changes"], info["checkpoint_step"]) == ([change], None)
    assert (info["attempts"][0]["resume_from"], info["attempts"][0]["first_step"]) == (start, 4)
    run_dir.close()


def test_saves_are_noted(tmp_path):
    run_dir = opened(tmp_path)
    record(run_dir, step=4)
    noted = [run_dir.read_info()["checkpoint_step"]]
    for step in (5, 6):
        run_dir.record_save(step)
        noted.append(json.loads((tmp_path / "run.json").read_text())["checkpoint_step"])
    assert noted == [4, 5, 6]
    run_dir.close()


def test_a_save_that_cannot_be_noted_is_a_warning(tmp_path, capsys):
    run_dir = opened(tmp_path)
    record(run_dir)
    (tmp_path / "run.json").unlink()
    (tmp_path / "run.json").mkdir()
    run_dir.record_save(5)
    assert "run.json: cannot be written" in capsys.readouterr().err
    run_dir.close()


DAMAGED = {
    "empty": "",
    "cut": "{",
    "a list": "[]",
    "zeros": "\0" * 100,
    "deep lists": "[" * 100_000,
    "deep but valid": '{"attempts": [' + "[" * 900 + "]" * 900 + "]}",
    "deep mappings": '{"a":' * 900 + "1" + "}" * 900,
    "not UTF-8": b"\xff\xfe{}",
    "a number too long to read": '{"attempts": ' + "9" * 5000 + "}",
}


@pytest.mark.parametrize("text", DAMAGED.values(), ids=DAMAGED)
def test_damaged_information_is_written_anew(tmp_path, capsys, text):
    opened(tmp_path).close()
    (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    run_dir = opened(tmp_path)
    record(run_dir)
    assert len(json.loads((tmp_path / "run.json").read_text())["attempts"]) == 1
    assert capsys.readouterr().err.count("run.json: ") == 1
    run_dir.close()


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (os.mkfifo, "is a special file, not a regular file"),
        (lambda path: path.symlink_to("/etc/passwd"), "is a symbolic link, not a regular file"),
        (
            lambda path: os.truncate(os.open(path, os.O_CREAT | os.O_WRONLY), 10**11),
            "has 100000000000 bytes, more than",
        ),
    ],
)
def test_what_is_no_small_file_is_not_read(tmp_path, capsys, make, reason):
    opened(tmp_path).close()
    make(tmp_path / "run.json")
    run_dir = opened(tmp_path)
    record(run_dir)
    assert reason in capsys.readouterr().err
    assert len(json.loads((tmp_path / "run.json").read_text())["attempts"]) == 1
    run_dir.close()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        ("run.json", lambda run_dir: run_dir.read_info()),
        ("config.yaml", lambda run_dir: run_dir.read_config()),
        ("metrics.jsonl", lambda run_dir: run_dir.last_logged_step()),
    ],
)
@pytest.mark.parametrize("code", [errno.EACCES, errno.EIO, errno.ESTALE, errno.EMFILE])
def test_what_cannot_be_read_now_is_not_damaged(tmp_path, monkeypatch, file, read, code):
    run_dir = opened(tmp_path)
    record(run_dir)
    run_dir.close()
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')

    real_open = io.open

    def refuse(path, *rest, **more):
        if str(path) == str(tmp_path / file):
            raise OSError(code, os.strerror(code), str(path))
        return (real_open if rest and isinstance(rest[0], str) else os_open)(path, *rest, **more)

    os_open = os.open
    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(io, "open", refuse)
    # Behind the reason, what raises the limit of open files.
    with pytest.raises(StorageError, match=rf"{file}: cannot be read \({os.strerror(code)}.*\); make it readable"):
        read(RunDirectory(tmp_path, rank=0))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda path: path.write_text("a file"), "not a directory"),
        (lambda path: path.symlink_to("nowhere/at/all"), "not a directory"),
    ],
)
def test_unusable_directory_is_one_line(tmp_path, make, reason):
    path = tmp_path / "run"
    make(path)
    with pytest.raises(StorageError, match=rf"^run\.dir: {path} cannot be created or written \(.*({reason})") as caught:
        opened(path)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 74


def test_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be created or written"):
        RunDirectory(tmp_path / "file" / "run", rank=1).open()


def test_planted_links_are_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    path = tmp_path / "run"
    opened(path).close()
    for name in ("config.yaml", "run.json", "exit.json"):
        (path / name).symlink_to(outside)
    run_dir = opened(path)
    record(run_dir)
    run_dir.finish(ExitCode.FINISHED, "finished")
    run_dir.close()
    assert not any((path / name).is_symlink() for name in ("config.yaml", "run.json", "exit.json"))
    (path / ".lock").unlink()
    (path / ".lock").symlink_to(outside)
    with pytest.raises(StorageError, match=r"\.lock: Too many levels of symbolic links"):
        opened(path)
    assert outside.read_text() == "precious"


def recorded_configuration(path: Path, text: str) -> dict | None:
    (path / "config.yaml").write_text(text)
    return RunDirectory(path, rank=0).read_config()


def test_configuration_of_the_attempt_before(tmp_path, capsys):
    assert recorded_configuration(tmp_path, to_yaml(CONFIG)) is None, "no step was logged"
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    recorded = recorded_configuration(tmp_path, to_yaml(CONFIG))
    assert compare_configs(recorded, CONFIG).trajectory == compare_configs(recorded, CONFIG).shape == ()
    other = recorded_configuration(tmp_path, to_yaml(Config(run=RunConfig(steps=7, seed=5))))
    assert [change.key for change in compare_configs(other, CONFIG).trajectory] == ["run.seed"]
    removed = recorded_configuration(tmp_path, to_yaml(CONFIG).replace("run:\n", "run:\n  removed_key: 3\n", 1))
    assert [change.key for change in compare_configs(removed, CONFIG).harmless] == ["run.removed_key"]
    assert capsys.readouterr().err == ""


def test_configuration_of_an_earlier_version_resumes_without_a_difference(tmp_path):
    config = Config(run=CONFIG.run, parallel=ParallelConfig(recompute=["norms", "gdn_prologue"]))
    text = (
        to_yaml(config).replace("gdn_prologue", "conv_gates").replace("kernels:\n", "kernels:\n  causal_conv1d: fla\n")
    )
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    recorded = recorded_configuration(tmp_path, text)
    assert compare_configs(recorded, config) == ConfigChanges((), (), ())
    # What the old file says is still compared, under its new name.
    (change,) = compare_configs(recorded, Config(run=CONFIG.run)).harmless
    assert (change.key, change.old, change.new) == ("parallel.recompute", ["norms", "gdn_prologue"], [])


@pytest.mark.parametrize("text", ["", "\0", "run: [", "- a", "run:\n  seed: 5\n", to_yaml(CONFIG)[:200]])
def test_damaged_configuration_does_not_stop_a_resume(tmp_path, capsys, text):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert recorded_configuration(tmp_path, text) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/config.yaml: ")
    assert line.endswith("; only the checkpoint's own copy is compared")
