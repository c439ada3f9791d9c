"""Hundreds of wrong files, one wrong thing each: always exit 2 and one line that names file, key and remedy."""

import random
import re
from typing import Literal, get_origin

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.config.describe import keys
from qwen3next_train.config.presets import PRESETS, shipped_folder

NUMBERS = (int, float)


def wrong_values(annotation) -> list[str]:
    """Texts that no field of the type may accept."""
    common = ["{a: 1}", "null", "[[[]]]"]
    if annotation in NUMBERS:
        return [*common, "-1", ".nan", "1e400", "true", "'12'", "word", "[1]", "0x10", "1_000"]
    if annotation is bool:
        return [*common, "1", "yes", "'true'", "0.0"]
    if annotation is str:
        return [*common, "12", "1e-3", "true", "[a]"]
    if get_origin(annotation) is Literal:
        return [*common, "nonsense", "true", "[auto]", "1.5"]
    return ["{a: 1}", "null", "[[[]]]", "12", "true", "1e-3"]


MUTATIONS = [(key.name, text) for key in keys().values() for text in wrong_values(key.annotation)]


def document(key: str, text: str) -> str:
    *sections, name = key.split(".")
    lines = ["  " * depth + f"{section}:" for depth, section in enumerate(sections)]
    return "\n".join([*lines, "  " * len(sections) + f"{name}: {text}", ""])


def one_line(capsys, path, *options) -> str:
    code = main(["--config", str(path), "--print-config", *options])
    captured = capsys.readouterr()
    assert code == 2, captured.out
    assert captured.out == ""
    assert "Traceback" not in captured.err
    (line,) = captured.err.splitlines()
    assert line.startswith(f"{path}: ")
    assert len(line) < 500
    return line


def test_there_are_enough():
    assert len(MUTATIONS) > 400


@pytest.mark.parametrize("section", sorted({key.partition(".")[0] for key, _ in MUTATIONS}))
def test_wrong_value(tmp_path, capsys, section):
    path = tmp_path / "c.yaml"
    for key, text in MUTATIONS:
        if key.startswith(f"{section}."):
            path.write_text(document(key, text))
            line = one_line(capsys, path)
            assert re.match(rf"{re.escape(f'{path}: {key}')}(\[\d\])*(\.\w+)?: .+ \(got .+\); .+", line), (
                key,
                text,
                line,
            )


SHIPPED = [*(f"qwen3next_{name}.yaml" for name in PRESETS), "megatron_arguments.yaml"]


def new_keys() -> dict[str, list[tuple[int, re.Match[str]]]]:
    """By file, the lines with a key that no file before it has, and their numbers."""
    seen: set[tuple[str, str]] = set()
    found = {}
    for name in SHIPPED:
        lines = enumerate((shipped_folder() / name).read_text().splitlines())
        matches = [(number, re.match(r"( *(?:--)?)([\w-]+)(:.*)", line)) for number, line in lines]
        found[name] = [(number, match) for number, match in matches if match and match.group(1, 2) not in seen]
        seen |= {match.group(1, 2) for _, match in found[name]}
    return found


@pytest.mark.parametrize("name", [name for name, matches in new_keys().items() if matches])
def test_one_letter_wrong_in_any_key(tmp_path, capsys, name):
    rng = random.Random(0)
    lines = (shipped_folder() / name).read_text().splitlines()
    path = tmp_path / "c.yaml"
    for number, match in new_keys()[name]:
        start, key, rest = match.groups()
        # A letter: the digit is all that tells beta1 from beta2.
        position = rng.choice([index for index in range(1, len(key)) if not key[index].isdigit()])
        mutated = f"{start}{key[:position]}{'x' if key[position] != 'x' else 'y'}{key[position + 1 :]}{rest}"
        path.write_text("\n".join([*lines[:number], mutated, *lines[number + 1 :]]))
        text = one_line(capsys, path)
        assert "unknown key" in text
        assert key.replace("_", "-") in text.replace("_", "-"), text  # the right one is suggested


def test_structure_mutations(tmp_path, capsys):
    base = (shipped_folder() / "qwen3next_tiny.yaml").read_text()
    path = tmp_path / "c.yaml"
    for text in (
        base + "run: {steps: 1}\n",
        base.replace("  lr: 3e-3", "  lr: 3e-3\n  lr: 3e-3"),
        base.replace("  lr: 3e-3", "\tlr: 3e-3"),
        base.replace("  lr: 3e-3", "  lr: &a 3e-3"),
        base.replace("  lr: 3e-3", "  lr: *a"),
        base.replace("  lr: 3e-3", "  <<: {lr: 3e-3}"),
        base.replace("  lr: 3e-3", "  lr: !!float 3e-3"),
        base.replace("  lr: 3e-3", "  lr 3e-3"),
        base.replace("  lr: 3e-3", "  lr: 3e-3: 4"),
        base.replace("  lr: 3e-3", "  lr: [3e-3"),
        base.replace("  lr: 3e-3", "  ? {lr: 3e-3}"),
        base + "---\nrun: {}\n",
        base + "extra: 1\n",
        base + "4: 1\n",
        base + "true: 1\n",
        base + "null: 1\n",
        base + "'': 1\n",
        "[]",
        "4",
        "null",
        "\x00",
        "%YAML 9\n---\na: 1\n",
    ):
        path.write_text(text)
        one_line(capsys, path)
