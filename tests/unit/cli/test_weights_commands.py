"""``eval``, ``generate``, ``import-hf`` and ``export-hf``: what is called with what, and what is refused."""

import sys
from functools import partial
from pathlib import Path

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.generate.sampling import Sampling
from qwen3next_train.huggingface.export_folder import MAX_SHARD_BYTES
from qwen3next_train.model.init import initial_value

DEFAULTS = {
    "checkpoint": None,
    "hf": None,
    "data": "text.txt",
    "as_json": False,
    "device": "auto",
    "precision": None,
    "sequence_length": None,
    "tokenizer": None,
    "text_field": "text",
}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--checkpoint", "runs/x"], {"checkpoint": Path("runs/x")}),
        (["--hf=folder", "--json"], {"hf": Path("folder"), "as_json": True}),
        (
            ["--checkpoint=a=b", "--device=cpu", "--precision", "fp32", "--tokenizer=t.json", "--text-field", "body"],
            {
                "checkpoint": Path("a=b"),
                "device": "cpu",
                "precision": "fp32",
                "tokenizer": "t.json",
                "text_field": "body",
            },
        ),
        (["--hf", "a", "--hf", "b"], {"hf": Path("b")}),
        (["--hf", "a", "--data.sequence_length", "64"], {"hf": Path("a"), "sequence_length": 64}),
        (["--hf", "a", "--seq-length=64"], {"hf": Path("a"), "sequence_length": 64}),
    ],
)
def test_eval(fake, argv, expected):
    calls = fake("train.evaluate", "evaluate_command", 65)
    assert main(["eval", *argv, "--data", "text.txt"]) == 65
    assert calls == [((), DEFAULTS | expected)]


@pytest.mark.parametrize(
    ("argv", "expected", "sampling"),
    [
        (["--checkpoint=runs/x", "--prompt", "a"], {"checkpoint": Path("runs/x"), "prompts": ["a"]}, {}),
        (["--hf=x", "--prompt=a", "--prompt", "b c"], {"hf": Path("x"), "prompts": ["a", "b c"]}, {}),
        (["--hf=x", "--prompts", "f.txt", "--json"], {"hf": Path("x"), "prompts_file": Path("f.txt")}, {}),
        (["--hf=x", "--prompts=f", "--top-p=0.5"], {"prompts_file": Path("f")}, {"temperature": 1.0, "top_p": 0.5}),
        (["--hf=x", "--prompts=f", "--top-k", "7"], {"prompts_file": Path("f")}, {"temperature": 1.0, "top_k": 7}),
        (["--hf=x", "--prompts=f", "--temperature=0"], {"prompts_file": Path("f")}, {}),
        (
            ["--hf=x", "--prompts=f", "--temperature=.7", "--top-p", "1", "--seed=9", "--max-new-tokens=3"],
            {"prompts_file": Path("f")},
            {"temperature": 0.7, "seed": 9, "max_new_tokens": 3},
        ),
        (
            ["--hf=x", "--prompts=f", "--device=cpu", "--precision=fp32", "--tokenizer=t.json", "--run.seed", "8"],
            {"prompts_file": Path("f"), "device": "cpu", "precision": "fp32", "tokenizer": "t.json"},
            {"seed": 8},
        ),
    ],
)
def test_generate(fake, argv, expected, sampling):
    calls = fake("train.generate", "generate_command", 76)
    assert main(["generate", *argv]) == 76
    ((none, found),) = calls
    assert none == ()
    assert found == {
        "checkpoint": None,
        "hf": found["hf"],
        "prompts": [],
        "prompts_file": None,
        "as_json": "--json" in argv,
        "device": "auto",
        "precision": None,
        "tokenizer": None,
        "sampling": Sampling(**({"max_new_tokens": 128, "seed": 1234} | sampling)),
        **expected,
    }


def test_import(fake):
    calls = fake("huggingface.import_folder", "import_hf")
    assert main(["import-hf", "--hf=in", "--output", "out"]) == 0
    assert calls == [((Path("in"), Path("out")), {})]


@pytest.mark.parametrize("spelling", ["--mtp-num-layers=2", "--model.mtp_num_layers=2"])
def test_import_of_more_mtp_depths_draws_them_from_the_seed(fake, spelling):
    calls = fake("huggingface.import_folder", "import_hf")
    assert main(["--hf", "in", "import-hf", "--output=out", spelling, "--run.seed", "7"]) == 0
    ((paths, options),) = calls
    assert paths == (Path("in"), Path("out"))
    assert options["mtp_num_layers"] == 2
    draw = options["initial_value"]
    assert isinstance(draw, partial)
    assert (draw.func, draw.keywords) == (initial_value, {"seed": 7})


def test_export(fake, monkeypatch):
    calls = fake("huggingface.export_folder", "export_hf")
    monkeypatch.setattr(sys.modules["qwen3next_train.huggingface.export_folder"], "MAX_SHARD_BYTES", 9, raising=False)
    assert main(["export-hf", "--checkpoint", "in", "--output", "out"]) == 0
    options = ["--dtype", "fp32", "--max-shard-bytes=1000000", "--tokenizer=builtin:python-4k"]
    assert main(["export-hf", "--checkpoint=in", "--output=out", *options]) == 0
    assert calls == [
        ((Path("in"), Path("out")), {"dtype": "bf16", "max_shard_bytes": 9, "tokenizer": None}),
        (
            (Path("in"), Path("out")),
            {"dtype": "fp32", "max_shard_bytes": 10**6, "tokenizer": "builtin:python-4k"},
        ),
    ]


def test_help_states_the_shard_size_that_is_used(capsys):
    assert main(["export-hf", "--help"]) == 0
    assert f"(default {MAX_SHARD_BYTES})" in capsys.readouterr().out


EVAL = ["eval", "--hf", "a", "--data", "b"]
GENERATE = ["generate", "--hf", "a", "--prompt", "b"]
IMPORT = ["import-hf", "--hf", "a", "--output", "b"]
EXPORT = ["export-hf", "--checkpoint", "a", "--output", "b"]


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["eval", "--data", "b"],
            "eval: which model? (got neither of --checkpoint and --hf); give one of the two",
        ),
        (
            [*EVAL, "--checkpoint", "c"],
            "eval: which model? (got both of --checkpoint and --hf); give one of the two",
        ),
        (["eval", "--hf", "a"], "--data: missing; give the file, token store or dataset to evaluate on"),
        (["eval", "--hf", "a", "--data="], "--data: empty; give the file, token store or dataset to evaluate on"),
        (["eval", "--hf=", "--data", "b"], "--hf: empty; give a folder"),
        ([*EVAL, "--device", "tpu"], "--device: not one of the choices (got 'tpu'); give one of auto, cpu, cuda"),
        ([*EVAL, "--precision=bf16 "], "--precision: not one of the choices (got 'bf16 '); give one of bf16, fp32"),
        ([*EVAL, "--hf"], "--hf: no value; write --hf VALUE"),
        ([*EVAL, "--json=1"], "--json: takes no value (got '1'); leave the value out"),
        (
            [*EVAL, "--seq-length", "0"],
            "--seq-length (data.sequence_length): too small (got 0); give a whole number > 0",
        ),
        (
            ["generate", "--prompt", "b"],
            "generate: which model? (got neither of --checkpoint and --hf); give one of the two",
        ),
        (
            ["generate", "--hf", "a"],
            "generate: which prompts? (got neither of --prompt and --prompts); give one of the two",
        ),
        (
            [*GENERATE, "--prompts", "f"],
            "generate: which prompts? (got both of --prompt and --prompts); give one of the two",
        ),
        (
            [*GENERATE, "--temperature", "-1"],
            "--temperature: not a number >= 0 (got '-1'); give a number >= 0",
        ),
        (
            [*GENERATE, "--temperature=1e-9"],
            "--temperature: 1e-9 is not between 0.001 and 1000; give another number",
        ),
        (
            [*GENERATE, "--temperature", "0", "--top-k", "3", "--top-p", "0.9"],
            "--temperature: 0 takes the likeliest token, which leaves --top-p nothing to choose from; "
            "leave one of the two out",
        ),
        *(
            (
                [*GENERATE, "--top-p", value],
                f"--top-p: not a number > 0 and <= 1 (got '{value}'); give a number > 0 and <= 1",
            )
            for value in ("0", "1.01", "-0.5", ".nan", "x")
        ),
        ([*GENERATE, "--top-k=0.5"], "--top-k: not a whole number > 0 (got '0.5'); give a whole number > 0"),
        (
            [*GENERATE, "--max-new-tokens", "0"],
            "--max-new-tokens: not a whole number > 0 (got '0'); give a whole number > 0",
        ),
        ([*GENERATE, "--prompt", "x\0"], "--prompt: has a NUL byte (got 'x\\x00'); give another text"),
        (
            [*GENERATE, "--run.steps", "3"],
            "--run.steps: not read by generate; leave it out, of the configuration it reads run.seed",
        ),
        (["import-hf", "--hf", "a"], "--output: missing; give a folder"),
        (["import-hf", "--output", "a"], "--hf: missing; give a folder"),
        (
            [*IMPORT, "--mtp-num-layers", "-1"],
            "--mtp-num-layers (model.mtp_num_layers): too small (got -1); give a whole number >= 0",
        ),
        (["export-hf", "--output", "b"], "--checkpoint: missing; give a folder"),
        ([*EXPORT, "--dtype", "fp8"], "--dtype: not one of the choices (got 'fp8'); give one of bf16, fp32"),
        *(
            (
                [*EXPORT, "--max-shard-bytes", value],
                f"--max-shard-bytes: not a whole number > 0 (got '{value}'); give a whole number > 0",
            )
            for value in ("0", "-1", "5.5e-1", "x")
        ),
        (
            [*EXPORT, "--max-shard-bytes", "5e9"],
            "--max-shard-bytes: not written as a whole number (got '5e9'); write 5000000000",
        ),
        (
            [*EVAL, "--run.steps", "3"],
            "--run.steps: not read by eval; leave it out, of the configuration it reads data.sequence_length",
        ),
        (
            [*EVAL, "--data.tokenizer", "x"],
            "--data.tokenizer: not read by eval; give --tokenizer, of the configuration it reads data.sequence_length",
        ),
        (
            [*GENERATE, "--run.device", "cpu"],
            "--run.device: not read by generate; give --device, of the configuration it reads run.seed",
        ),
        (
            [*IMPORT, "--hidden-size", "8"],
            "--hidden-size (model.hidden_size): not read by import-hf; "
            "leave it out, of the configuration it reads model.mtp_num_layers, run.seed",
        ),
        (
            [*EXPORT, "--model.mtp_num_layers", "0"],
            "--model.mtp_num_layers: not read by export-hf; leave it out, it reads none",
        ),
        (
            [*EXPORT, "--run.stpes", "0"],
            "--run.stpes: unknown key (got 0); did you mean run.steps? --help all lists every key",
        ),
        (
            [*EVAL, "--output", "x"],
            "--output: not an option of eval; it belongs to tokenize, train-tokenizer, import-hf, export-hf, plot, "
            "slurm-script",
        ),
        (
            [*EVAL, "--config", "x"],
            "--config: not an option of eval; it belongs to train, plan, tokenize, train-tokenizer, checkpoint, "
            "slurm-script, doctor",
        ),
        (
            [*EXPORT, "--print-config"],
            "--print-config: not an option of export-hf; it belongs to train, plan, tokenize, train-tokenizer, "
            "checkpoint, slurm-script, doctor",
        ),
        (["--hf", "a"], "--hf: not an option of train; it belongs to eval, generate, import-hf"),
        (
            [*IMPORT, "more"],
            "qwen3next-train: unexpected argument 'more'; an option takes one value, a list as '[a, b]'; "
            "--help lists subcommands and sections",
        ),
    ],
)
def test_wrong_command_lines(capsys, argv, line):
    assert main(argv) == 2
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", line + "\n")


@pytest.mark.parametrize("argv", [EVAL, GENERATE, IMPORT, EXPORT], ids=lambda argv: argv[0])
def test_they_are_one_process(capsys, monkeypatch, argv):
    given = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert main(argv) == 2
    line = f"{argv[0]}: started as 2 processes (WORLD_SIZE); it is one, start it without torchrun\n"
    assert capsys.readouterr().err == line
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main(argv) == 2
    assert capsys.readouterr().err == ""


def test_eval_looks_for_its_data_before_it_reads_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--checkpoint", str(tmp_path / "no-run"), "--data", str(tmp_path / "no.txt"), "--device=cpu"]
    assert main(["eval", *words]) == 65
    assert capsys.readouterr().err == (
        f"{tmp_path}/no.txt: no such file, folder or token store; check the source's name\n"
    )
