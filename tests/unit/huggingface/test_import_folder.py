"""From a Hugging Face folder to a checkpoint: what is kept."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.checkpoint import weights as weights_module
from qwen3next_train.checkpoint.weights import Weights, weights_of_checkpoint
from qwen3next_train.config.load import load_config
from qwen3next_train.config.schema import CheckpointConfig, Config, DataConfig
from qwen3next_train.errors import ConfigError, DataError
from qwen3next_train.huggingface import import_folder
from qwen3next_train.huggingface import weights as hf_weights
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.huggingface.names import on_disk
from qwen3next_train.huggingface.weights import weights_of_hf
from qwen3next_train.log import get_logger
from qwen3next_train.parameters import ParamSpec, parameter_table
from tests.unit.huggingface.support import Tensors, random_tensors, tiny_model, write_folder


def on_disk_tensors(weights: Weights) -> Tensors:
    """A checkpoint's weights cut as Hugging Face has them, fp32."""
    return {
        tensor.name: weights.read(spec.name, tensor.start, tensor.stop).view(tensor.shape)
        for spec in weights.parameters
        for tensor in on_disk(spec)
    }


def assert_holds(output: Path, tensors: Tensors) -> None:
    found = on_disk_tensors(weights_of_checkpoint(output))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.float()), name


@pytest.fixture(autouse=True)
def info_lines(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    # Configured first: caplog brings back the level that it finds.
    logger = get_logger()
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level(logging.INFO, logger=logger.name)
    return caplog


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_weight_arrives(tmp_path: Path, dtype: torch.dtype, shards: int) -> None:
    model = tiny_model()
    tensors = random_tensors(model, dtype)
    source = write_folder(tmp_path / "hf", model, tensors, shards=shards)
    assert import_hf(source, tmp_path / "out") == 0
    assert_holds(tmp_path / "out", tensors)
    weights = weights_of_checkpoint(tmp_path / "out")
    assert weights.model.model_dump() == model.model_dump()
    assert len(list(weights.path.glob("rank_*.safetensors"))) == shards


@pytest.mark.parametrize("mapped_elements", [1, 100, 1 << 29])
def test_a_range_may_cross_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped_elements: int) -> None:
    """What a rank with another layout asks for; files may be unmapped and mapped again in between."""
    monkeypatch.setattr(weights_module, "_MAPPED_ELEMENTS", mapped_elements)
    model = tiny_model()
    tensors = random_tensors(model)
    source = write_folder(tmp_path / "hf", model, tensors, shards=3)
    import_hf(source, tmp_path / "out")
    prefix = "model.layers.1.mlp.experts"
    stacked = torch.stack(
        [
            torch.cat([tensors[f"{prefix}.{e}.gate_proj.weight"], tensors[f"{prefix}.{e}.up_proj.weight"]])
            for e in range(3)
        ]
    ).flatten()
    for weights in (weights_of_checkpoint(tmp_path / "out"), weights_of_hf(source)):
        for start, stop in ((0, 240), (39, 41), (37, 201), (239, 240), (5, 5)):
            assert torch.equal(weights.read(f"{prefix}.gate_up_proj", start, stop), stacked[start:stop])


def test_stacked_experts_are_taken_too(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = random_tensors(model)
    stacked = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.0.mlp.experts.")}
    for spec in parameter_table(model):
        if spec.expert and spec.name.startswith("model.layers.0."):
            parts = [tensors[tensor.name].flatten() for tensor in on_disk(spec)]
            stacked[spec.name] = torch.cat(parts).view(spec.shape)
    import_hf(write_folder(tmp_path / "hf", model, stacked), tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)


def test_both_forms_of_an_expert_are_one_too_many(tmp_path: Path) -> None:
    model = tiny_model()
    tensors = random_tensors(model) | {"model.layers.0.mlp.experts.down_proj": torch.zeros(3, 8, 5)}
    with pytest.raises(DataError, match=r"layers\.0\.mlp\.experts\.0\.down_proj\.weight is not part of the model"):
        import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "out")


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    model = tiny_model(tie_word_embeddings=True)
    tensors = random_tensors(model)
    import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)


class TestTiedHead:
    """A model with tied embeddings whose folder has ``lm_head.weight`` too, as some tools write it."""

    @pytest.fixture
    def tensors(self) -> Tensors:
        return random_tensors(tiny_model(tie_word_embeddings=True))

    def write(self, tmp_path: Path, tensors: Tensors, **options: Any) -> Path:
        return write_folder(tmp_path / "hf", tiny_model(tie_word_embeddings=True), tensors, **options)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("shards", [1, 3])
    def test_an_equal_one_is_left_out(
        self, tmp_path: Path, info_lines: pytest.LogCaptureFixture, dtype: torch.dtype, shards: int
    ) -> None:
        tensors = random_tensors(tiny_model(tie_word_embeddings=True), dtype)
        # In another dtype than the embedding: equal is equal.
        head = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone().float()}
        source = self.write(tmp_path, tensors | head, shards=shards)
        import_hf(source, tmp_path / "out")
        assert_holds(tmp_path / "out", tensors)
        assert "import-hf: lm_head.weight is left out: tied to the embedding, and equal to it" in info_lines.messages
        assert "lm_head.weight" not in {spec.name for spec in weights_of_hf(source).parameters}

    def test_alone_it_is_the_embedding(self, tmp_path: Path, tensors: Tensors) -> None:
        """What keeps the first name of shared weights, as safetensors' save_model does, drops the embedding's."""
        renamed = {name.replace("model.embed_tokens", "lm_head"): tensor for name, tensor in tensors.items()}
        source = self.write(tmp_path, renamed)
        import_hf(source, tmp_path / "out")
        assert_holds(tmp_path / "out", tensors)
        embedding = tensors["model.embed_tokens.weight"].flatten()
        assert torch.equal(weights_of_hf(source).read("model.embed_tokens.weight", 3, 50), embedding[3:50])

    @pytest.mark.parametrize("compared", [1, 7, 1 << 24])
    def test_another_one_is_rejected(
        self, tmp_path: Path, tensors: Tensors, monkeypatch: pytest.MonkeyPatch, compared: int
    ) -> None:
        monkeypatch.setattr(hf_weights, "_COMPARED_NUMEL", compared)
        head = tensors["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1e-3
        with pytest.raises(DataError, match=r"is not equal to .* tie_word_embeddings; set it to false there, or"):
            import_hf(self.write(tmp_path, tensors | {"lm_head.weight": head}), tmp_path / "out")

    @pytest.mark.parametrize(
        ("head", "text"),
        [
            (torch.zeros(8, 13), r"lm_head\.weight has shape \[8, 13\], the model wants \[13, 8\]$"),
            (torch.zeros(13, 8, dtype=torch.int8), r"lm_head\.weight has dtype I8, not one of F32, BF16, F16$"),
        ],
    )
    def test_a_wrong_one_is_rejected(self, tmp_path: Path, tensors: Tensors, head: torch.Tensor, text: str) -> None:
        with pytest.raises(DataError, match=text):
            import_hf(self.write(tmp_path, tensors | {"lm_head.weight": head}), tmp_path / "out")

    def test_without_embedding_and_head_the_embedding_is_missing(self, tmp_path: Path, tensors: Tensors) -> None:
        del tensors["model.embed_tokens.weight"]
        with pytest.raises(DataError, match=r"agree: model\.embed_tokens\.weight is missing$"):
            import_hf(self.write(tmp_path, tensors), tmp_path / "out")


def test_the_config_beside_it_trains_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From anywhere: its places are absolute; what is not the model's stays at its default."""
    model = tiny_model(max_position_embeddings=77, tie_word_embeddings=True, rope_theta=5e4)
    # A name that would break out of a comment.
    source = write_folder(tmp_path / "hf\nrun: {steps: 1}", model, random_tensors(model))
    (source / "tokenizer.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    import_hf(source, Path("out"))
    path = tmp_path / "out" / "config.yaml"
    assert f"qwen3next-train --config {path} --data.sources" in capsys.readouterr().out
    assert load_config([path]).config == Config(
        model=model,
        data=DataConfig(tokenizer=str(tmp_path / "out" / "tokenizer"), sequence_length=77),
        checkpoint=CheckpointConfig(init_from=str(tmp_path / "out")),
    )


def test_the_config_of_a_folder_without_tokenizer_asks_for_one(tmp_path: Path) -> None:
    """The default one would be another model's."""
    model = tiny_model()
    import_hf(write_folder(tmp_path / "hf", model, random_tensors(model)), tmp_path / "out")
    path = tmp_path / "out" / "config.yaml"
    with pytest.raises(ConfigError, match=r"data\.tokenizer: no tokenizer"):
        load_config([path])
    assert load_config([path], [("data.tokenizer", "mine.json")]).config.model == model


class TestMtp:
    def test_without_its_weights_there_is_none(self, tmp_path: Path, info_lines: pytest.LogCaptureFixture) -> None:
        """transformers drops ``mtp.*`` when it saves, and keeps the key of ``config.json``."""
        model = tiny_model(mtp_num_layers=0)
        source = write_folder(tmp_path / "hf", model, random_tensors(model), mtp_num_hidden_layers=1)
        import_hf(source, tmp_path / "out")
        assert weights_of_checkpoint(tmp_path / "out").model.mtp_num_layers == 0
        assert f"import-hf: no mtp.* weights in {source}: model.mtp_num_layers is 0" in info_lines.messages

    @pytest.mark.parametrize("depths", [1, 2])
    def test_depths_are_counted_where_the_config_is_silent(self, tmp_path: Path, depths: int) -> None:
        model = tiny_model(mtp_num_layers=depths)
        tensors = random_tensors(model)
        import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "out")
        assert weights_of_checkpoint(tmp_path / "out").model.mtp_num_layers == depths
        assert_holds(tmp_path / "out", tensors)

    def test_a_config_that_promises_more_is_believed(self, tmp_path: Path) -> None:
        model = tiny_model()
        source = write_folder(tmp_path / "hf", model, random_tensors(model), mtp_num_hidden_layers=2)
        with pytest.raises(DataError, match=r"mtp\.layers\.1\.self_attn\.q_proj\.weight is missing"):
            import_hf(source, tmp_path / "out")

    @pytest.mark.parametrize("asked", [0, 1])
    def test_surplus_depths_are_left_out_when_fewer_are_asked_for(self, tmp_path: Path, asked: int) -> None:
        model = tiny_model(mtp_num_layers=2)
        tensors = random_tensors(model)
        import_hf(write_folder(tmp_path / "hf", model, tensors), tmp_path / "out", mtp_num_layers=asked)
        gone = "mtp." if asked == 0 else "mtp.layers.1."
        assert_holds(tmp_path / "out", {name: each for name, each in tensors.items() if not name.startswith(gone)})

    @pytest.mark.parametrize(("held", "asked"), [(0, 1), (1, 2)])
    def test_depths_asked_for_beyond_the_held_ones_start_afresh(self, tmp_path: Path, held: int, asked: int) -> None:
        tensors = random_tensors(tiny_model(mtp_num_layers=held))
        source = write_folder(tmp_path / "hf", tiny_model(mtp_num_layers=held), tensors)
        filled = []

        def initial_value(spec: ParamSpec) -> torch.Tensor:
            filled.append(spec.name)
            return torch.full(spec.shape, 0.5)

        import_hf(source, tmp_path / "out", mtp_num_layers=asked, initial_value=initial_value)
        fresh = random_tensors(tiny_model(mtp_num_layers=asked)).keys() - tensors.keys()
        weights = weights_of_checkpoint(tmp_path / "out")
        found = on_disk_tensors(weights)
        assert found.keys() == tensors.keys() | fresh
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)
        assert all((found[name] == 0.5).all() for name in fresh)
        assert filled == [spec.name for spec in weights.parameters if spec.name.startswith(f"mtp.layers.{held}.")] or (
            held == 0 and filled == [spec.name for spec in weights.parameters if spec.name.startswith("mtp.")]
        )

    def test_no_initial_values_no_fresh_depths(self, tmp_path: Path) -> None:
        model = tiny_model(mtp_num_layers=0)
        source = write_folder(tmp_path / "hf", model, random_tensors(model))
        with pytest.raises(DataError, match=r"mtp\.pre_fc_norm_embedding\.weight is missing"):
            import_hf(source, tmp_path / "out", mtp_num_layers=1)

    def test_a_damaged_depth_is_not_filled(self, tmp_path: Path) -> None:
        model = tiny_model()
        tensors = random_tensors(model)
        del tensors["mtp.layers.0.mlp.experts.2.up_proj.weight"]
        source = write_folder(tmp_path / "hf", model, tensors)
        for asked in (None, 1, 2):
            with pytest.raises(DataError, match=r"mtp\.layers\.0\.mlp\.experts\.2\.up_proj\.weight is missing"):
                import_hf(source, tmp_path / "out", mtp_num_layers=asked, initial_value=lambda s: torch.zeros(s.shape))


def test_the_hugging_face_cache_is_read(tmp_path: Path) -> None:
    """Its snapshots are links into its blobs."""
    model = tiny_model()
    tensors = random_tensors(model)
    flat = write_folder(tmp_path / "flat", model, tensors, shards=2)
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "rev", tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in flat.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-{path.name}")
    import_hf(snapshot, tmp_path / "out")
    assert_holds(tmp_path / "out", tensors)


def test_a_killed_import_publishes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    source = write_folder(tmp_path / "hf", model, random_tensors(model), shards=3)

    def stop(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(import_folder, "_publish", stop)
    with pytest.raises(KeyboardInterrupt):
        import_hf(source, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    model = tiny_model()
    source = write_folder(tmp_path / "hf", model, random_tensors(model))
    (source / "tokenizer.json").write_text("{}")
    (source / "tokenizer_config.json").write_text('{"a": 1}')
    (source / "secret.txt").write_text("not a tokenizer file")
    import_hf(source, tmp_path / "out")
    folder = tmp_path / "out" / "tokenizer"
    assert {path.name for path in folder.iterdir()} == {"tokenizer.json", "tokenizer_config.json"}
    assert weights_of_checkpoint(tmp_path / "out").data.tokenizer == str(folder)


def test_without_a_tokenizer_none_is_named(tmp_path: Path) -> None:
    model = tiny_model(max_position_embeddings=77)
    import_hf(write_folder(tmp_path / "hf", model, random_tensors(model)), tmp_path / "out")
    weights = weights_of_checkpoint(tmp_path / "out")
    assert weights.data.tokenizer == ""
    assert weights.data.sequence_length == 77
