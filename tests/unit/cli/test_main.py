"""From words to exit code: what is called with what, what is printed, what is not imported."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from qwen3next_train import __version__
from qwen3next_train.cli.main import main
from qwen3next_train.cli.processes import Processes
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.errors import ConfigError, DataError, ExitCode
from qwen3next_train.train.resume import Resume
from qwen3next_train.train.run_directory import RunDirectory

ROOT = shipped_folder().parent
_UNSET = "start with torchrun or --nproc-per-node, or unset RANK, WORLD_SIZE, LOCAL_RANK for a single process"
TINY = ["--config", "qwen3next_tiny.yaml"]


def run(capsys, *argv: str) -> tuple[int, str, str]:
    code = main(argv)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def subprocess_run(*argv: str, **kwargs) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qwen3next_train", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, **kwargs)


def launched_as(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int, local_rank: int | None = None) -> None:
    local = rank if local_rank is None else local_rank
    variables = {"RANK": rank, "WORLD_SIZE": world_size, "LOCAL_RANK": local, "MASTER_PORT": 29500}
    for name, value in {**variables, "MASTER_ADDR": "localhost"}.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_a_launcher_that_says_half_is_rejected_in_one_line(fake, capsys, monkeypatch, name):
    calls = fake("train.run", "run_training")
    launched_as(monkeypatch, 1, 2)
    monkeypatch.setenv(name, "")
    code, out, err = run(capsys, *TINY)
    assert (code, out, calls) == (2, "", [])
    assert err.endswith(f"{name}: empty; {_UNSET}\n")
    assert len(err.splitlines()) == 1


def test_train_is_the_default(fake, capsys):
    calls = fake("train.run", "run_training", 75)
    assert run(capsys, *TINY)[0] == 75
    assert run(capsys, "train", *TINY, "--run.seed", "5")[0] == 75
    assert run(capsys, *TINY, "--run.seed=5", "train")[0] == 75
    configs = [args[0] for args, _ in calls]
    assert configs[0] == load_config([shipped_folder() / "qwen3next_tiny.yaml"]).config
    assert [config.run.seed for config in configs] == [1234, 5, 5]


def test_resume_options_go_to_training_and_are_checked_before(fake, capsys):
    calls = fake("train.run", "run_training")
    assert (
        run(capsys, *TINY, "--resume.accept=optimizer.lr", "--resume.accept", "run.steps", "--resume.from", "3")[0] == 0
    )
    _, check, resume = calls[0][0]
    assert resume == Resume(("optimizer.lr", "run.steps"), 3)
    with pytest.raises(ConfigError, match=r"^--resume\.from: .* has no checkpoint of step 3; it has none at all"):
        check()
    code, out, err = run(capsys, *TINY, "--resume.accept", "run.stepz")
    assert (code, out, len(calls)) == (2, "", 1)
    assert err == (
        "--resume.accept: unknown key (got 'run.stepz'); did you mean run.steps? --help all lists every key\n"
    )
    code, out, err = run(capsys, *TINY, "--resume.accpet", "run.steps")
    assert (code, out, len(calls)) == (2, "", 1)
    assert err == "--resume.accpet: unknown option; did you mean --resume.accept? --help all lists every option\n"


def test_train_wants_a_configuration(capsys):
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert err == "--config: missing; name a YAML file, such as the shipped qwen3next_tiny.yaml (see --help)\n"


def test_train_with_a_preset_needs_no_file(fake, capsys):
    calls = fake("train.run", "run_training")
    assert run(capsys, "--model.preset", "tiny")[0] == 0
    assert calls[0][0][0].model.hidden_size == 128


def test_dry_run(fake, capsys):
    calls = fake("train.dry_run", "dry_run")
    assert run(capsys, *TINY, "--dry-run")[0] == 0
    assert len(calls) == 1


def test_plan(fake, capsys):
    calls = fake("planner.report", "plan_command")
    assert run(capsys, "plan", *TINY, "--parallel.expert_parallel_size", "2")[0] == 0
    assert run(capsys, "--gpus", "8", *TINY, "--gpu=h200", "plan", "--mfu", "0.4", "--tokens", "1e12", "--json")[0] == 0
    assert [kwargs for _, kwargs in calls] == [
        {"gpus": 2, "gpu": "h100", "mfu": None, "tokens": None, "as_json": False},
        {"gpus": 8, "gpu": "h200", "mfu": 0.4, "tokens": 1e12, "as_json": True},
    ]
    assert type(calls[1][1]["gpus"]) is int


@pytest.mark.parametrize(
    ("option", "value", "wanted"),
    [
        *(("--gpus", value, "whole number > 0") for value in ("0", "-1", "1.5", "x", "true", "")),
        *(("--mfu", value, "number > 0 and <= 1") for value in ("0", "1.1", "x", ".nan", "-1")),
        *(("--tokens", value, "number > 0") for value in ("0", ".inf", "x", ".nan", "1e400")),
    ],
)
def test_wrong_numbers_of_plan(capsys, option, value, wanted):
    code, _, err = run(capsys, "plan", option, value)
    assert code == 2
    assert err == f"{option}: not a {wanted} (got '{value}'); give a {wanted}\n"


@pytest.mark.parametrize(
    ("option", "value", "limits"),
    [
        ("--gpus", "1000001", "1 and 1e+06"),
        ("--mfu", "1e-300", "1e-06 and 1"),
        ("--tokens", "1e300", "1 and 1e+30"),
    ],
)
def test_numbers_of_plan_whose_results_are_none(capsys, option, value, limits):
    code, _, err = run(capsys, "plan", option, value)
    assert (code, err) == (2, f"{option}: {value} is not between {limits}; give another number\n")


def test_tokenize(fake, capsys):
    calls = fake("data.tokenize_command", "tokenize")
    assert run(capsys, "tokenize", *TINY, "--data.sources", "a.jsonl", "--output", "out/x")[0] == 0
    assert run(capsys, "tokenize", *TINY)[0] == 0
    assert calls[0][0][0].data.sources[0].source == "a.jsonl"
    assert [args[1] for args, _ in calls] == [Path("out/x"), None]


@pytest.mark.parametrize("output", ["", ".", "..", "/", "out/", "out/.", "out/..", "~", "~root"])
def test_output_of_tokenize_is_a_file_name(fake, capsys, output):
    calls = fake("data.tokenize_command", "tokenize")
    line = f"--output: not a file name (got {output!r}); give the prefix of the .bin and .idx files\n"
    assert run(capsys, "tokenize", *TINY, "--output", output) == (2, "", line)
    assert calls == []


def test_checkpoint(fake, capsys):
    calls = fake("checkpoint.inspection", "checkpoint_command", 65)
    assert run(capsys, "checkpoint", "list", "runs/x")[0] == 65
    assert run(capsys, "checkpoint", "verify", *TINY)[0] == 65
    assert run(capsys, *TINY, "--run.dir", "here", "checkpoint", "list")[0] == 65
    assert [args for args, _ in calls] == [
        ("list", Path("runs/x")),
        ("verify", Path("runs/qwen3next_tiny")),
        ("list", Path("here")),
    ]


def test_doctor(fake, capsys):
    calls = fake("selftest.doctor", "doctor_command", 70)
    assert run(capsys, "doctor")[0] == 70
    assert run(capsys, "doctor", *TINY, "--json", "--run.device", "cpu")[0] == 70
    assert [kwargs for _, kwargs in calls] == [{"as_json": False}, {"as_json": True}]
    assert [args[0].run.precision for args, _ in calls] == ["bf16", "fp32"]


@pytest.mark.parametrize(
    ("argv", "text"),
    [
        (["checkpoint"], "checkpoint: which action? (got nothing); give list or verify"),
        (["checkpoint", "remove"], "checkpoint: which action? (got 'remove'); give list or verify"),
        (["checkpoint", "list", "a", "b"], "unexpected argument 'b'"),
        (["trian"], "unexpected argument 'trian'; did you mean train?"),
        (["--moe-aux-loss-coeff", "1e-3", "0.1"], "unexpected argument '0.1'; an option takes one value, a list as '["),
        (["train", "plan"], "unexpected argument 'plan'; train is the subcommand already; --help"),
        (["my.yaml"], "unexpected argument 'my.yaml'; name a configuration with --config"),
        (["--config", "a.yaml", "b.yaml"], "unexpected argument 'b.yaml'; name a configuration with --config"),
        ([*TINY, "--gpus", "3"], "--gpus: not an option of train; it belongs to plan"),
        (["plan", "--dry-run"], "--dry-run: not an option of plan; it belongs to train"),
        (["--config", "none.yaml"], "none.yaml: no such file in "),
        ([*TINY, "--nproc-per-node", "two"], "--nproc-per-node: not a whole number > 0 (got 'two')"),
        ([*TINY, "--run.stpes", "3"], "--run.stpes: unknown key (got 3); did you mean run.steps?"),
    ],
)
def test_wrong_command_lines(capsys, argv, text):
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert text in line


def test_print_config_is_loaded_back(capsys, tmp_path):
    for name in ("tiny", "1b", "80b"):
        code, out, _ = run(capsys, "--config", f"qwen3next_{name}.yaml", "--print-config", "--run.seed", "7")
        assert code == 0
        (tmp_path / "again.yaml").write_text(out)
        again = run(capsys, "--config", str(tmp_path / "again.yaml"), "--print-config")
        assert again == (0, out, "")


def test_help_and_version_answer_even_on_a_wrong_line(capsys):
    assert run(capsys, "--nonsense", "--version") == (0, f"qwen3next-train {__version__}\n", "")
    code, out, _ = run(capsys, "-h", "--nonsense")
    assert code == 0
    assert "--optimizer.lr" in out
    assert "--optimizer.lr" not in run(capsys, "plan", "--help")[1]


def test_launcher_is_started_after_the_configuration_is_checked(fake, capsys, monkeypatch):
    calls = fake("cli.launch", "run_processes", 75)
    assert run(capsys, *TINY, "--nproc-per-node", "2", "--run.steps", "0")[0] == 2
    assert not calls
    assert run(capsys, *TINY, "--nproc-per-node", "2", "--run.micro_batch_size", "8")[0] == 75
    (((processes, run_dir, check_world), _),) = calls
    assert (processes, run_dir) == (Processes(2), Path("runs/qwen3next_tiny"))
    check_world()
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run(capsys, *TINY, "--nproc-per-node", "2")
    assert (code, err) == (
        2,
        "--nproc-per-node: already started by a launcher (WORLD_SIZE is set); leave the option out, or torchrun\n",
    )


def test_world_size_of_a_launcher_is_checked(fake, capsys, monkeypatch):
    calls = fake("train.run", "run_training")
    launched_as(monkeypatch, 0, 3)
    assert run(capsys, *TINY)[0] == 0
    ((_, check_world, _), _) = calls[0]
    with pytest.raises(ConfigError, match="world size 3"):
        check_world()


def test_wrong_number_of_processes_is_recorded(capsys, tmp_path):
    record = tmp_path / "exit.json"
    earlier = RunDirectory(tmp_path, rank=0)
    earlier.open()
    earlier.finish(ExitCode.FINISHED, "finished at step 6")
    earlier.close()
    code, out, err = run(capsys, *TINY, "--nproc-per-node", "3", "--run.dir", str(tmp_path))
    assert (code, out, len(err.splitlines())) == (2, "", 1)
    assert "world size 3" in err
    assert (json.loads(record.read_text())["code"], json.loads(record.read_text())["reason"]) == (2, err.strip())


@pytest.mark.parametrize(("rank", "local_rank", "expected"), [(0, 0, "it"), (1, 1, ""), (8, 0, "[rank 8] it")])
def test_one_rank_of_a_node_prints_a_wrong_configuration(fake, capsys, monkeypatch, rank, local_rank, expected):
    launched_as(monkeypatch, rank, 9, local_rank=local_rank)
    fake("train.run", "run_training", ConfigError("it"))
    assert run(capsys, *TINY) == (2, "", f"{expected}\n" if expected else "")


def test_other_failures_are_printed_by_every_rank(fake, capsys, monkeypatch):
    launched_as(monkeypatch, 1, 2)
    fake("train.run", "run_training", DataError("no rows"))
    assert run(capsys, *TINY) == (65, "", "[rank 1] no rows\n")


def test_a_bug_keeps_its_traceback_and_exits_70(fake, capsys):
    fake("train.run", "run_training", ZeroDivisionError("oops"))
    code, _, err = run(capsys, *TINY)
    assert code == 70
    assert "Traceback" in err
    assert "ZeroDivisionError: oops" in err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 71, "out of memory on the host; close other programs, or use a machine with more memory\n"),
        (
            PermissionError(13, "Permission denied", "/x/cache"),
            74,
            "/x/cache: Permission denied (PermissionError); free space, fix permissions or choose another place\n",
        ),
    ],
)
def test_what_the_machine_lacks_is_one_line(fake, capsys, error, code, line):
    fake("train.run", "run_training", error)
    assert run(capsys, *TINY) == (code, "", line)


def test_interrupt(fake, capsys):
    fake("train.run", "run_training", KeyboardInterrupt())
    assert run(capsys, *TINY) == (130, "", "interrupted\n")


HEAVY = ("torch", "deepspeed", "wandb", "datasets", "transformers", "numpy", "triton", "fla", "safetensors")


@pytest.mark.parametrize(
    ("argv", "code"),
    [
        (["--help"], 0),
        (["plan", "--help"], 0),
        ([*TINY, "--print-config"], 0),
        ([*TINY, "--run.steps", "x"], 2),
        (["--config", "none.yaml"], 2),
        ([*TINY, "--nproc-per-node", "0"], 2),
    ],
)
def test_nothing_heavy_is_imported(argv, code):
    program = (
        "import sys; from qwen3next_train.cli.main import main; code = main(sys.argv[1:]);"
        f"print([name for name in {HEAVY} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program, *argv]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == code
    assert result.stderr.splitlines()[-1] == "[]"


def test_from_any_folder_and_as_a_module(tmp_path):
    result = subprocess_run(*TINY, "--print-config", cwd=tmp_path)
    assert result.returncode == 0
    assert "runs/qwen3next_tiny" in result.stdout


def test_closed_pipe_and_full_disk_leave_no_traceback():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "qwen3next_train", "--help"]
    reader, writer = os.pipe()
    os.close(reader)
    try:
        closed = subprocess.run(command, env=environment, stdout=writer, stderr=subprocess.PIPE, check=False)
    finally:
        os.close(writer)
    assert (closed.returncode, closed.stderr) == (0, b"")
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert result.returncode == 74
    assert result.stderr.startswith("standard output: cannot be written (No space left on device)")
    assert "Traceback" not in result.stderr


def test_undecodable_and_hostile_words():
    result = subprocess_run("--config", os.fsdecode(b"\xff\n.yaml"), "--run.dir", os.fsdecode(b"\xfe"))
    assert result.returncode == 2
    assert len(result.stderr.splitlines()) == 1


PATH_OPTIONS = (
    ["--config", "{}"],
    [*TINY, "--run.dir", "{}"],
    [*TINY, "--data.tokenizer", "{}"],
    [*TINY, "--data.cache_dir", "{}"],
    [*TINY, "--checkpoint.init_from", "{}"],
    [*TINY, "--data.sources", "{}"],
    [*TINY, "--data.validation_sources", "{}"],
    ["tokenize", *TINY, "--output", "{}"],
    ["eval", "--hf", "{}", "--data", "x"],
    ["eval", "--checkpoint", "x", "--data", "{}"],
    ["import-hf", "--hf", "x", "--output", "{}"],
    ["export-hf", "--checkpoint", "x", "--output", "y", "--tokenizer", "{}"],
    ["checkpoint", "list", "{}"],
)


@pytest.mark.parametrize("argv", PATH_OPTIONS, ids=" ".join)
@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("a\0b", "has a NUL byte"),
        ("a\nb", "has a line break or another control character"),
        ("a\u2028b", "has a line break or another control character"),
        ("a\udcfe", "has bytes that are no UTF-8"),
        ("x/" + "n" * 256, "has a name of more than 255 bytes"),
        ("~no-such-user/x", "names a home folder that is not known"),
    ],
)
def test_paths_that_the_system_cannot_take(capsys, argv, path, reason):
    code, out, err = run(capsys, *(word.format(path) for word in argv))
    assert (code, out) == (2, "")
    (line,) = err.splitlines()
    assert f": {reason}" in line
    assert line.endswith("; give another name")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["checkpoint", "list", ""], "RUN_DIR: empty (got ''); give a file or folder"),
        (["plot", ""], "RUN: empty (got ''); give a file or folder"),
        (["plot", "x", "--output="], "--output: empty (got ''); give a file or folder"),
        (["slurm-script", "--output", ""], "--output: empty (got ''); give a file or folder"),
        (["generate", "--hf", "x", "--prompts="], "--prompts: empty (got ''); give a file or folder"),
        (["eval", "--hf", "x", "--data", "y", "--tokenizer="], "--tokenizer: empty (got ''); give a file or folder"),
        (["eval", "--hf", "x", "--data", "y", "--text-field="], "--text-field: empty; give a column or JSON field"),
        (["plan", "--gpu="], "plan: --gpu: unknown GPU ''; choose one of a100-40, "),
    ],
)
def test_an_empty_word_is_neither_a_default_nor_the_current_folder(capsys, argv, line):
    """An unset variable of a shell leaves one behind."""
    code, out, err = run(capsys, *argv)
    assert (code, out) == (2, "")
    assert err.startswith(line)
    assert len(err.splitlines()) == 1


def test_home_in_paths(fake, capsys, monkeypatch):
    monkeypatch.setenv("HOME", "/homes/me")
    listed = fake("checkpoint.inspection", "checkpoint_command")
    assert run(capsys, "checkpoint", "list", "~/runs")[0] == 0
    assert run(capsys, *TINY, "checkpoint", "list", "--run.dir=~")[0] == 0
    assert [args[1] for args, _ in listed] == [Path("/homes/me/runs"), Path("/homes/me")]
    trained = fake("train.run", "run_training")
    keys = ("run.dir", "data.tokenizer", "data.cache_dir", "checkpoint.init_from", "data.sources")
    assert run(capsys, *TINY, *(f"--{key}=~/{key}" for key in keys))[0] == 0
    config = trained[0][0][0]
    found = (config.run.dir, config.data.tokenizer, config.data.cache_dir, config.checkpoint.init_from)
    assert (*found, config.data.sources[0].source) == tuple(f"/homes/me/{key}" for key in keys)
    monkeypatch.setenv("HOME", "")
    assert run(capsys, *TINY, "--run.dir", "~/x")[0] == 2


def test_signals_are_held_before_anything_is_imported():
    code = (
        "import sys; before = set(sys.modules); import qwen3next_train.cli.main;"
        "print(*sorted(name for name in set(sys.modules) - before if name.startswith('qwen3next_train.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == [
        "qwen3next_train.cli",
        "qwen3next_train.cli.main",
        "qwen3next_train.train",
        "qwen3next_train.train.held_signals",
    ]


@pytest.mark.parametrize("kib", [30_000, 60_000, 100_000])
def test_a_limit_of_memory_that_is_too_low_is_one_line(kib):
    """At the first import that does not fit, whatever it is."""
    program = [sys.executable, "-m", "qwen3next_train", "plan", "--config", "qwen3next_tiny.yaml"]
    limited = ["bash", "-c", 'ulimit -v "$0"; exec "$@"', str(kib), *program]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (71, "", 1), done.stderr
    assert f"raise ulimit -v, which is {kib}, or " in done.stderr
