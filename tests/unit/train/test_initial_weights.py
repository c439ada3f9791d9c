"""``checkpoint.init_from``: what is taken from a checkpoint, and which checkpoints are refused."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from qwen3next_train.checkpoint import discovery, filesystem
from qwen3next_train.checkpoint.filesystem import Filesystem
from qwen3next_train.config.schema import CheckpointConfig, Config, ModelConfig
from qwen3next_train.engine.base import FRAGMENT_KINDS
from qwen3next_train.errors import CheckpointError, ConfigError, TrainError
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.train.initial_weights import InitialWeights, find_initial_weights
from tests.unit.checkpoint.support import collected_log, on_ranks
from tests.unit.huggingface.support import random_tensors, tiny_model, write_folder
from tests.unit.huggingface.test_export_folder import save_run

NAME = "model.norm.weight"


def config(path: Path | str, model: ModelConfig | None = None) -> Config:
    return Config(model=model or tiny_model(), checkpoint=CheckpointConfig(init_from=str(path)))


def find(path: Path | str, model: ModelConfig | None = None) -> InitialWeights:
    found = find_initial_weights(config(path, model), SingleProcess())
    assert found is not None
    return found


def refusal(path: Path | str, kind: type[TrainError], model: ModelConfig | None = None) -> str:
    with pytest.raises(kind) as caught:
        find(path, model)
    assert caught.type is kind
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_not_set() -> None:
    assert find_initial_weights(Config(), SingleProcess()) is None


def test_weights_are_read_and_moments_are_zero(tmp_path: Path) -> None:
    """The source has moments: they are those of another run."""
    weights = find(save_run(tmp_path, tiny_model(), steps=(3, 5)))
    assert weights.path.name == "step_00000005"
    assert weights.read(NAME, "master", 2, 8).tolist() == [5 + 1 / 512] * 6
    for kind in FRAGMENT_KINDS[1:]:
        assert weights.reader.read(NAME, kind, 2, 8).tolist() == [5 + 1 / 512] * 6
        assert weights.read(NAME, kind, 2, 8).tolist() == [0.0] * 6


def test_a_checkpoint_may_be_named_instead_of_the_newest(tmp_path: Path) -> None:
    save_run(tmp_path, tiny_model(), steps=(3, 5))
    weights = find(tmp_path / "checkpoints" / "step_00000003")
    assert weights.read(NAME, "master", 0, 1).item() == 3 + 1 / 512


def test_imported_weights(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = random_tensors(model)
    import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "ours")
    weights = find(tmp_path / "ours")
    assert torch.equal(weights.read(NAME, "master", 0, 8), tensors[NAME])
    assert weights.read(NAME, "exp_avg", 0, 8).count_nonzero() == 0


def test_ranks_share_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_run(tmp_path, tiny_model())
    hashed: list[str] = []

    def hash_file(fs: Filesystem, path: Path, enough: threading.Event) -> str:
        hashed.append(path.name)
        return filesystem.hash_file(fs, path, enough)

    monkeypatch.setattr(discovery, "hash_file", hash_file)
    for path in (tmp_path, tmp_path / "checkpoints" / "step_00000003"):
        hashed.clear()
        found = on_ranks(3, lambda control, path=path: find_initial_weights(config(path), control))
        assert [weights.path.name for weights in found if isinstance(weights, InitialWeights)] == ["step_00000003"] * 3
        assert hashed == ["rank_00000.safetensors"]


def test_a_damaged_checkpoint_is_refused_on_every_rank(tmp_path: Path) -> None:
    checkpoint = save_run(tmp_path, tiny_model()) / "checkpoints" / "step_00000003"
    file = checkpoint / "rank_00000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    error = "rank_00000.safetensors does not match its hash"
    for path, line in (
        (checkpoint, f"{checkpoint}: {error}"),
        (tmp_path, f"{tmp_path}/checkpoints: no intact checkpoint: step_00000003: {error}; restore one, or choose "),
    ):
        refused = on_ranks(2, lambda control, path=path: find_initial_weights(config(path), control))
        assert [type(error) for error in refused] == [CheckpointError] * 2
        assert all(str(error).startswith(f"checkpoint.init_from: {line}") for error in refused)


def test_places_without_a_checkpoint(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refusal(missing, ConfigError).startswith(f"checkpoint.init_from: {missing}: no such directory; name a run")
    assert refusal(tmp_path, ConfigError).startswith(f"checkpoint.init_from: {tmp_path}: no checkpoint in it; name")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"hidden_size": 10}, "model.hidden_size was 8, now 10; "),
        ({"mtp_num_layers": 0}, "model.mtp_num_layers was 1, now 0; "),
        ({"mtp_num_layers": 2}, "model.mtp_num_layers was 1, now 2; "),
        ({"tie_word_embeddings": True}, "model.tie_word_embeddings was false, now true; "),
        # Four key channels, cut into two heads instead of one.
        ({"linear_num_key_heads": 2, "linear_key_head_dim": 2}, "model.linear_key_head_dim was 4, now 2; "),
    ],
)
def test_another_model_is_refused_by_its_first_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, object], named: str
) -> None:
    checkpoint = save_run(tmp_path, tiny_model()) / "checkpoints" / "step_00000003"
    # Not a byte of its weights is read for it.
    monkeypatch.setattr(discovery, "hash_file", lambda *arguments: pytest.fail("a file of weights was read"))
    line = refusal(tmp_path, CheckpointError, tiny_model(**changes))
    assert line.startswith(f"checkpoint.init_from: {checkpoint}: checkpoint of another model: {named}")
    assert line.endswith("use the model section of the run that wrote it")


def test_settings_that_give_the_weights_another_meaning_are_said(tmp_path: Path) -> None:
    save_run(tmp_path, tiny_model())
    with collected_log() as lines:
        find(tmp_path, tiny_model(router_aux_loss_coef=0.5))
        assert lines == []
        find(tmp_path, tiny_model(rope_theta=5e6))
    assert lines == ["checkpoint.init_from: the weights were trained with model.rope_theta 10000000.0, now 5000000.0"]
