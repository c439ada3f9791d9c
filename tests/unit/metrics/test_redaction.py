import pytest

from qwen3next_train.metrics.redaction import MASK, Redactor

KEY = "0123456789abcdef0123456789abcdef01234567"


def test_values_of_secret_variables():
    redactor = Redactor({"WANDB_API_KEY": KEY, "HOME": "somewhere/else", "AWS_SECRET_ACCESS_KEY": KEY + "longer"})
    assert (
        redactor.text(f"using {KEY}longer and {KEY} from somewhere/else")
        == f"using {MASK} and {MASK} from somewhere/else"
    )


def test_short_values_and_paths_are_no_secrets(tmp_path):
    path = str(tmp_path)
    redactor = Redactor({"USE_AUTH": "true", "GOOGLE_APPLICATION_CREDENTIALS": path, "API_KEY": ""})
    assert redactor.text(f"true {path}") == f"true {path}"


@pytest.mark.parametrize("text", ["hf_" + "a1B2" * 8, "wandb_v1_" + "x" * 30, "ghp_" + "Z" * 36])
def test_tokens_are_known_by_their_shape(text):
    assert Redactor({}).text(f"login {text}.") == f"login {MASK}."


def test_passwords_in_addresses():
    assert Redactor({}).text("https://me:pw@host/x?y=a@b s3://bucket/k") == f"https://{MASK}@host/x?y=a@b s3://bucket/k"


def test_command_line():
    argv = [
        "train",
        "--data.tokenizer",
        "tokens.json",
        "--hub-token",
        "abc",
        "--api_key=xyz",
        "--run.seed",
        "1",
        "--token",
        "--x",
    ]
    expected = [*argv[:4], MASK, f"--api_key={MASK}", *argv[6:]]
    assert Redactor({}).argv(argv) == expected


def test_ordinary_arguments_are_kept():
    argv = ["--data.tokenizer=builtin:python-4k", "--model.num_key_value_heads", "2", "--optimizer.lr", "-1"]
    assert Redactor({}).argv(argv) == argv


def test_json():
    config = {"a": [KEY, 1, None, 1.5, True], "b": {"c": f"x{KEY}"}}
    assert Redactor({"MY_TOKEN": KEY}).json(config) == {"a": [MASK, 1, None, 1.5, True], "b": {"c": f"x{MASK}"}}
