"""Names of earlier versions: one line with the successor for a user, a translation for what a run has stored."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from qwen3next_train.cli.main import main
from qwen3next_train.config import renamed
from qwen3next_train.config.describe import keys
from qwen3next_train.config.renamed import Successor, with_current_names

REMOVED = "the convolution is part of the GDN prologue; choose with kernels.fused, or leave the key out"


@pytest.mark.parametrize(
    ("yaml", "argv", "line"),
    [
        ("kernels: {causal_conv1d: fla}", [], f"FILE: kernels.causal_conv1d: removed (got 'fla'); {REMOVED}"),
        ("kernels.causal_conv1d: fla", [], f"FILE: kernels.causal_conv1d: removed (got 'fla'); {REMOVED}"),
        ("{}", ["--kernels.causal_conv1d", "auto"], f"--kernels.causal_conv1d: removed (got 'auto'); {REMOVED}"),
        (
            "parallel: {recompute: [norms, conv_gates]}",
            [],
            "FILE: parallel.recompute[1]: renamed (got 'conv_gates'); write gdn_prologue",
        ),
        (
            "{}",
            ["--parallel.recompute", "[conv_gates]"],
            "--parallel.recompute[0]: renamed (got 'conv_gates'); write gdn_prologue",
        ),
    ],
)
def test_old_names_are_rejected_with_their_successor(
    yaml: str, argv: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"{yaml}\n")
    assert main(["plan", "--config", str(path), *argv]) == 2
    assert capsys.readouterr().err.splitlines() == [line.replace("FILE", str(path))]


def test_renamed_key_names_the_new_one(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(renamed, "KEYS", {"run.seeds": Successor("run.seed", "it is one number")})
    assert main(["plan", "--run.seeds", "7"]) == 2
    assert capsys.readouterr().err == "--run.seeds: renamed (got 7); write run.seed (it is one number)\n"


def test_stored_configurations_get_the_current_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(renamed, "KEYS", {**renamed.KEYS, "run.seeds": Successor("run.seed", "")})
    stored = {
        "run": {"seeds": 7, "steps": 3},
        "kernels": {"causal_conv1d": "fla", "fused": "auto"},
        "parallel": {"recompute": ["norms", "conv_gates"]},
    }
    before = repr(stored)
    assert with_current_names(stored) == {
        "run": {"seed": 7, "steps": 3},
        "kernels": {"fused": "auto"},
        "parallel": {"recompute": ["norms", "gdn_prologue"]},
    }
    assert repr(stored) == before, "the caller's is not changed"
    assert with_current_names({"run": {"seeds": 7, "seed": 8}}) == {"run": {"seed": 8}}, "the current name counts"


@pytest.mark.parametrize(
    "stored",
    [{}, {"kernels": None, "parallel": 3}, {"parallel": {"recompute": "x"}}, {"parallel": {"recompute": [[]]}}],
)
def test_stored_configurations_that_are_damaged_stay_as_they_are(stored: dict[str, object]) -> None:
    assert with_current_names(stored) == stored


def test_tables_agree_with_the_schema() -> None:
    for old, successor in renamed.KEYS.items():
        assert old not in keys()
        assert old.count(".") == 1
        assert successor.new is None or (successor.new in keys() and successor.new.count(".") == 1)
    for key, choices in renamed.CHOICES.items():
        assert key.count(".") == 1
        annotation = keys()[key].annotation
        allowed = {*get_args(annotation), *(choice for item in get_args(annotation) for choice in get_args(item))}
        assert choices.keys().isdisjoint(allowed)
        assert set(choices.values()) <= allowed
