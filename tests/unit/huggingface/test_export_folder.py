"""From a checkpoint to a Hugging Face folder, and the round trip."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.checkpoint.manager import CheckpointManager
from qwen3next_train.checkpoint.manifest import Header, WorldLayout, config_hash
from qwen3next_train.checkpoint.tensor_file import StoredTensor, write_tensor_file
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.schema import Config, DataConfig, ModelConfig
from qwen3next_train.engine.base import FRAGMENT_KINDS, Fragment
from qwen3next_train.errors import CheckpointError, ConfigError, StorageError
from qwen3next_train.held_elements import Runs
from qwen3next_train.huggingface import export_folder
from qwen3next_train.huggingface.export_folder import ExportDtype, export_hf
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.parallel.control import SingleProcess
from qwen3next_train.parameters import parameter_table
from tests.unit.checkpoint.support import rewrite_manifest
from tests.unit.huggingface.support import (
    INDEX,
    Tensors,
    assert_bit_equal,
    random_tensors,
    read_folder,
    tiny_model,
    write_folder,
)

FP32_NAMES = ("A_log", "dt_bias", "mlp.gate.weight")


def save_run(
    run_dir: Path, model: ModelConfig, *, steps: Sequence[int] = (3,), tokenizer: str = "", eos_token: str = ""
) -> Path:
    """A run with moments in its checkpoints; the weights of step s are all s + 1/512, which bf16 cannot hold."""
    table = parameter_table(model)
    config = Config(model=model, data=DataConfig(tokenizer=tokenizer, eos_token=eos_token))
    layout = WorldLayout(world_size=1, expert_parallel_size=1, zero_stage=1)
    header = Header(table, config.model_dump(mode="json"), layout, {})
    run_dir.mkdir(exist_ok=True)
    checkpoints = CheckpointManager(run_dir / "checkpoints", control=SingleProcess(), keep=9)
    for step in steps:
        checkpoints.save(
            step=step,
            fragments=[
                Fragment(
                    spec.name,
                    Runs(0, spec.numel),
                    {kind: torch.full((spec.numel,), step + 1 / 512) for kind in FRAGMENT_KINDS},
                )
                for spec in table
            ],
            train_state=TrainState(
                step=step,
                consumed_samples=0,
                consumed_tokens=0,
                flops_total=0,
                skipped_steps=0,
                optimizer_step=step,
                data_fingerprint="",
            ),
            rank_tensors={},
            header=header,
        )
    return run_dir


@pytest.fixture
def imported(tmp_path: Path) -> tuple[Path, Tensors]:
    """A checkpoint of fp32 weights, and what was imported."""
    model = tiny_model()
    tensors = random_tensors(model)
    import_hf(write_folder(tmp_path / "hf", model, tensors, shards=2), tmp_path / "ours")
    return tmp_path / "ours", tensors


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize(
    "model", [tiny_model(mtp_num_layers=2), tiny_model(tie_word_embeddings=True, mtp_num_layers=0)]
)
def test_round_trip_to_the_bit(
    tmp_path: Path, model: ModelConfig, dtype: ExportDtype, torch_dtype: torch.dtype
) -> None:
    tensors = random_tensors(model, torch_dtype)
    import_hf(write_folder(tmp_path / "hf", model, tensors, shards=3), tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back", dtype=dtype, max_shard_bytes=2000)
    assert_bit_equal(read_folder(tmp_path / "back"), tensors)
    import_hf(tmp_path / "back", tmp_path / "again")
    export_hf(tmp_path / "again", tmp_path / "back_again", dtype=dtype)
    assert_bit_equal(read_folder(tmp_path / "back_again"), tensors)


def test_mixed_dtypes_survive(tmp_path: Path) -> None:
    """A_log in fp32 among bf16, as Qwen3.5 is published."""
    model = tiny_model()
    tensors = random_tensors(model, torch.bfloat16)
    name = "model.layers.0.linear_attn.A_log"
    tensors[name] = random_tensors(model)[name]
    import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "ours")
    export_hf(tmp_path / "ours", tmp_path / "back")
    assert_bit_equal(read_folder(tmp_path / "back"), tensors)


def test_parameters_that_are_fp32_by_nature_are_never_rounded(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", tiny_model())
    export_hf(run_dir, tmp_path / "out")
    for name, tensor in read_folder(tmp_path / "out").items():
        exact = name.endswith(FP32_NAMES)
        assert tensor.dtype == (torch.float32 if exact else torch.bfloat16), name
        assert (tensor == (3 + 1 / 512 if exact else 3)).all(), name


def test_a_run_exports_its_newest_intact_checkpoint(tmp_path: Path) -> None:
    run_dir = save_run(tmp_path / "run", tiny_model(), steps=(3, 5, 8))
    damaged = run_dir / "checkpoints" / "step_00000008" / "rank_00000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    for checkpoint, value in ((run_dir, 5), (run_dir / "checkpoints", 5), (run_dir / "checkpoints/step_00000003", 3)):
        export_hf(checkpoint, tmp_path / f"out_{checkpoint.name}")
        assert (read_folder(tmp_path / f"out_{checkpoint.name}")["lm_head.weight"] == value).all()
    with pytest.raises(CheckpointError, match=r"step_00000008: rank_00000\.safetensors does not match its hash"):
        export_hf(run_dir / "checkpoints" / "step_00000008", tmp_path / "out")


class TestFiles:
    def test_one_shard_needs_no_index(self, tmp_path: Path, imported: tuple[Path, Tensors]) -> None:
        export_hf(imported[0], tmp_path / "out", dtype="fp32")
        names = {path.name for path in (tmp_path / "out").iterdir()}
        assert names == {"model.safetensors", "config.json", "generation_config.json"}

    def test_shards_and_index(self, tmp_path: Path, imported: tuple[Path, Tensors]) -> None:
        export_hf(imported[0], tmp_path / "out", dtype="fp32", max_shard_bytes=3000)
        index = json.loads((tmp_path / "out" / INDEX).read_text())
        shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
        assert set(index["weight_map"].values()) == set(shards)
        assert index["metadata"]["total_size"] == sum(4 * each.numel() for each in imported[1].values())
        for shard in shards:
            content = (tmp_path / "out" / shard).read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            assert header.pop("__metadata__") == {"format": "pt"}
            assert set(header) == {name for name, file in index["weight_map"].items() if file == shard}
            assert len(content) - 8 - int.from_bytes(content[:8], "little") <= 3000

    def test_a_tensor_larger_than_a_shard_has_one_of_its_own(self, tmp_path: Path, imported: tuple[Path, Any]) -> None:
        export_hf(imported[0], tmp_path / "out", max_shard_bytes=1)
        assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(imported[1])

    def test_memory_holds_one_shard(
        self, tmp_path: Path, imported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        sizes = []

        def write(fs: Any, path: Path, tensors: Sequence[StoredTensor]) -> Any:
            sizes.append(sum(stored.tensor.nbytes for stored in tensors))
            return write_tensor_file(fs, path, tensors)

        monkeypatch.setattr(export_folder, "write_tensor_file", write)
        export_hf(imported[0], tmp_path / "out", max_shard_bytes=2000)
        assert max(sizes) <= 2000
        assert len(sizes) == 4

    def test_config(self, tmp_path: Path, imported: tuple[Path, Tensors]) -> None:
        for dtype, name in (("bf16", "bfloat16"), ("fp32", "float32")):
            export_hf(imported[0], tmp_path / dtype, dtype=dtype)
            config = json.loads((tmp_path / dtype / "config.json").read_text())
            assert config["dtype"] == config["torch_dtype"] == name
            assert config["model_type"] == "qwen3_next"
            assert config["architectures"] == ["Qwen3NextForCausalLM"]
            assert config["mtp_num_hidden_layers"] == config["num_nextn_predict_layers"] == 1
            assert "eos_token_id" not in config
            assert json.loads((tmp_path / dtype / "generation_config.json").read_text()) == {"do_sample": False}

    def test_a_model_without_counterpart(self, tmp_path: Path) -> None:
        run_dir = save_run(tmp_path / "run", tiny_model(attention_output_gate=False))
        with pytest.raises(ConfigError, match=r"attention_output_gate: false cannot be exported"):
            export_hf(run_dir, tmp_path / "out")
        assert not (tmp_path / "out").exists()


class TestTokenizer:
    @pytest.fixture
    def run_dir(self, tmp_path: Path) -> Path:
        return save_run(tmp_path / "run", tiny_model(vocab_size=4096), tokenizer="builtin:python-4k")

    def test_that_of_the_run(self, tmp_path: Path, run_dir: Path) -> None:
        export_hf(run_dir, tmp_path / "out")
        settings = json.loads((tmp_path / "out/tokenizer_config.json").read_text())
        generation = json.loads((tmp_path / "out/generation_config.json").read_text())
        vocabulary = json.loads((tmp_path / "out/tokenizer.json").read_text())
        ids = {token["content"]: token["id"] for token in vocabulary["added_tokens"]}
        assert settings["eos_token"] == "<|endoftext|>"
        assert generation["eos_token_id"] == ids["<|endoftext|>"]
        assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == ids["<|endoftext|>"]

    def test_a_folder_keeps_its_settings(self, tmp_path: Path, run_dir: Path) -> None:
        export_hf(run_dir, tmp_path / "first")
        own = tmp_path / "own"
        own.mkdir()
        (own / "tokenizer.json").write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
        (own / "generation_config.json").write_text('{"temperature": 0.7}')
        (own / "chat_template.jinja").write_text("{{ messages }}")
        export_hf(run_dir, tmp_path / "out", tokenizer=str(own))
        for path in own.iterdir():
            assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
        assert (tmp_path / "out" / "tokenizer_config.json").exists()

    def test_every_file_names_the_token_that_ended_the_documents(self, tmp_path: Path, run_dir: Path) -> None:
        export_hf(run_dir, tmp_path / "first")
        own = tmp_path / "own"
        own.mkdir()
        (own / "tokenizer.json").write_bytes((tmp_path / "first" / "tokenizer.json").read_bytes())
        (own / "tokenizer_config.json").write_text('{"eos_token": "def", "pad_token": "if"}')
        (own / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.7}')
        export_hf(run_dir, tmp_path / "out", tokenizer=str(own))
        eos = json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"]
        vocabulary = json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]
        assert eos == vocabulary["def"]
        assert json.loads((tmp_path / "out/generation_config.json").read_text()) == {
            "eos_token_id": eos,
            "temperature": 0.7,
        }
        assert (tmp_path / "out/tokenizer_config.json").read_bytes() == (own / "tokenizer_config.json").read_bytes()

    def test_data_eos_token_goes_before_the_tokenizers_own(self, tmp_path: Path) -> None:
        own = tmp_path / "own"
        export_hf(save_run(tmp_path / "first", tiny_model(vocab_size=4096), tokenizer="builtin:python-4k"), own)
        run_dir = save_run(tmp_path / "run", tiny_model(vocab_size=4096), tokenizer=str(own), eos_token="def")
        export_hf(run_dir, tmp_path / "out")
        eos = json.loads((own / "tokenizer.json").read_text())["model"]["vocab"]["def"]
        assert json.loads((tmp_path / "out/config.json").read_text())["eos_token_id"] == eos
        assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == eos
        assert json.loads((tmp_path / "out/tokenizer_config.json").read_text())["eos_token"] == "def"

    @pytest.mark.parametrize("content", ["{", "[]"])
    def test_damaged_generation_settings_are_one_line(self, tmp_path: Path, run_dir: Path, content: str) -> None:
        export_hf(run_dir, tmp_path / "own")
        (tmp_path / "own" / "generation_config.json").write_text(content)
        with pytest.raises(ConfigError, match=r"export-hf: generation_config\.json of the tokenizer"):
            export_hf(run_dir, tmp_path / "out", tokenizer=str(tmp_path / "own"))

    def test_the_default_of_a_run_on_ready_tokens_is_not_passed_off_as_the_models(self, tmp_path: Path) -> None:
        run_dir = save_run(tmp_path / "run", tiny_model(), tokenizer="builtin:python-4k")
        export_hf(run_dir, tmp_path / "out")
        assert not (tmp_path / "out" / "tokenizer.json").exists()
        with pytest.raises(ConfigError, match="smaller than the tokenizer's"):
            export_hf(run_dir, tmp_path / "other", tokenizer="builtin:python-4k")

    def test_one_that_is_not_there(self, tmp_path: Path, run_dir: Path) -> None:
        with pytest.raises(ConfigError, match="cannot be read"):
            export_hf(run_dir, tmp_path / "out", tokenizer=str(tmp_path / "nowhere"))
        assert not (tmp_path / "out").exists()


class TestFaults:
    def test_output_exists(self, tmp_path: Path, imported: tuple[Path, Any]) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ConfigError, match=r"export-hf: .*out exists; remove it"):
            export_hf(imported[0], tmp_path / "out")
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize("name", ["nowhere", "hf", "hf/config.json"])
    def test_no_checkpoint(self, tmp_path: Path, imported: tuple[Path, Any], name: str) -> None:
        with pytest.raises(ConfigError, match="name a run directory or one of its checkpoints"):
            export_hf(tmp_path / name, tmp_path / "out")

    def test_a_renamed_checkpoint(self, tmp_path: Path, imported: tuple[Path, Any]) -> None:
        (imported[0] / "checkpoints" / "step_00000000").rename(tmp_path / "mine")
        with pytest.raises(ConfigError, match="call it step_ and its step in eight digits"):
            export_hf(tmp_path / "mine", tmp_path / "out")

    def test_a_relative_name_and_a_link(
        self, tmp_path: Path, imported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(imported[0] / "checkpoints" / "step_00000000")
        export_hf(Path(), tmp_path / "out")
        (tmp_path / "newest").symlink_to(Path.cwd())
        export_hf(tmp_path / "newest", tmp_path / "out2")
        assert_bit_equal(read_folder(tmp_path / "out"), read_folder(tmp_path / "out2"))

    def test_a_shard_of_nothing(self, tmp_path: Path, imported: tuple[Path, Any]) -> None:
        with pytest.raises(ConfigError, match="0 bytes a shard"):
            export_hf(imported[0], tmp_path / "out", max_shard_bytes=0)

    def test_a_full_disk_leaves_nothing(
        self, tmp_path: Path, imported: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        before = {path.name for path in tmp_path.iterdir()}

        def full(fs: Any, path: Path, tensors: Any) -> None:
            raise OSError(28, os.strerror(28), str(path))

        monkeypatch.setattr(export_folder, "write_tensor_file", full)
        with pytest.raises(StorageError, match=r"out: cannot be written \(model\.safetensors: No space left"):
            export_hf(imported[0], tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == before

    def test_a_checkpoint_whose_configuration_is_not_of_its_weights(self, tmp_path: Path) -> None:
        run_dir = save_run(tmp_path / "run", tiny_model())

        def change(fields: dict[str, Any]) -> None:
            fields["config"]["model"]["rope\ntheta"] = 1
            fields["config_xxh3_128"] = config_hash(fields["config"])

        rewrite_manifest(run_dir / "checkpoints/step_00000003/MANIFEST.json", change)
        with pytest.raises(CheckpointError, match=r"model\.rope\\ntheta: Extra inputs are not permitted"):
            export_hf(run_dir, tmp_path / "out")
