"""Hugging Face folders that no checkpoint is made of."""

from __future__ import annotations

import errno
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM
from qwen3next_train.checkpoint.tensor_file import open_tensor_file
from qwen3next_train.errors import ConfigError, DataError, StorageError
from qwen3next_train.huggingface import folder as hf_folder
from qwen3next_train.huggingface import import_folder
from qwen3next_train.huggingface.import_folder import import_hf
from qwen3next_train.huggingface.weights import weights_of_hf
from tests.unit.huggingface.support import INDEX, Tensors, change_index, random_tensors, tiny_model, write_folder

SHARD = "model-00002-of-00003.safetensors"


class TestFaults:
    """Each is one line that names what is wrong, and leaves nothing behind."""

    def refused(self, source: Path, text: str, error: type[Exception] = DataError, **options: Any) -> None:
        output = source.parent / "out"
        with pytest.raises(error, match=text) as caught:
            import_hf(source, output, **options)
        assert "\n" not in str(caught.value)
        assert {path.name for path in source.parent.iterdir()} <= {source.name, "elsewhere", "kept"}

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        model = tiny_model()
        return write_folder(tmp_path / "hf", model, random_tensors(model), shards=3)

    @pytest.mark.parametrize(
        ("change", "text"),
        [
            (lambda t: t.pop("model.norm.weight"), r"agree: model\.norm\.weight is missing$"),
            (
                lambda t: t.pop("model.layers.1.mlp.experts.1.up_proj.weight"),
                r"experts\.1\.up_proj\.weight is missing$",
            ),
            (lambda t: t.update(extra=torch.zeros(1)), r"agree: extra is not part of the model$"),
            (lambda t: t.update({"a\nb": torch.zeros(1)}), r"'a\\nb' is not part of the model$"),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(8, 13)}),
                r"lm_head\.weight has shape \[8, 13\], the model wants \[13, 8\]$",
            ),
            (
                lambda t: t.update({"lm_head.weight": torch.zeros(13, 8, dtype=torch.float8_e4m3fn)}),
                r"lm_head\.weight has dtype F8_E4M3, not one of F32, BF16, F16$",
            ),
            (
                lambda t: t.update({"model.norm.weight": torch.full((8,), float("nan"))}),
                r"model\.norm\.weight: master is not finite",
            ),
        ],
    )
    def test_a_wrong_tensor(self, tmp_path: Path, change: Callable[[Tensors], object], text: str) -> None:
        model = tiny_model()
        tensors = random_tensors(model)
        change(tensors)
        self.refused(write_folder(tmp_path / "hf", model, tensors, shards=2), text)

    def test_many_faults_are_counted(self, tmp_path: Path) -> None:
        model = tiny_model()
        tensors = {name: each for name, each in random_tensors(model).items() if ".experts." not in name}
        # Three layers of three experts of three matrices.
        self.refused(write_folder(tmp_path / "hf", model, tensors), r"missing; .*missing; .*missing \(and 24 more diff")

    def test_output_exists(self, folder: Path) -> None:
        (folder.parent / "kept").mkdir()
        with pytest.raises(ConfigError, match=r"kept exists; remove it"):
            import_hf(folder, folder.parent / "kept")

    def test_not_a_folder(self, tmp_path: Path) -> None:
        (tmp_path / "hf").write_text("x")
        self.refused(tmp_path / "hf", "not a directory")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        self.refused(folder, r"config\.json: missing")

    @pytest.mark.parametrize(
        ("content", "text"),
        [
            (b"{", "not JSON"),
            (b"[" * 100_000, "not JSON"),
            (b"[1]", "not a JSON object but list"),
            (b"\xff\xfe\x00", "not JSON"),
            (b'{"a": 1, "a": 2}', "a key stands twice"),
            (b'{"a": ' + b"9" * 10_000 + b"}", "not JSON"),
        ],
    )
    @pytest.mark.parametrize("name", ["config.json", INDEX])
    def test_broken_json(self, folder: Path, name: str, content: bytes, text: str) -> None:
        (folder / name).write_bytes(content)
        self.refused(folder, text)

    def test_another_model(self, folder: Path) -> None:
        (folder / "config.json").write_text('{"model_type": "llama"}')
        self.refused(folder, "not qwen3_next", ConfigError)

    @pytest.mark.parametrize(
        "fields", [{"num_hidden_layers": 10**15}, {"num_experts": 10**15}, {"mtp_num_hidden_layers": 10**15}]
    )
    def test_a_model_out_of_all_proportion(self, folder: Path, fields: dict[str, int]) -> None:
        config = json.loads((folder / "config.json").read_text())
        del config["layer_types"]
        (folder / "config.json").write_text(json.dumps(config | fields))
        self.refused(folder, f"{next(iter(fields))}: more than")

    @pytest.mark.parametrize(
        "shard", ["../hf/" + SHARD, "sub/" + SHARD, "/etc/passwd", "..", "", ".hidden.safetensors", "a.bin", 7, None]
    )
    def test_a_name_that_leads_elsewhere(self, folder: Path, shard: object) -> None:
        change_index(folder, lambda index: index["weight_map"].update({"lm_head.weight": shard}))
        self.refused(folder, r"lm_head\.weight: expected the name of a \.safetensors file in the same folder")

    @pytest.mark.parametrize("weight_map", [{}, [], None, "x"])
    def test_an_index_without_a_map(self, folder: Path, weight_map: object) -> None:
        change_index(folder, lambda index: index.update(weight_map=weight_map))
        self.refused(folder, "weight_map: expected a mapping")

    def test_a_missing_shard(self, folder: Path) -> None:
        (folder / SHARD).unlink()
        self.refused(folder, f"{SHARD}: missing")

    def test_a_tensor_that_only_the_index_names(self, folder: Path) -> None:
        change_index(folder, lambda index: index["weight_map"].update(ghost=SHARD))
        self.refused(folder, f"{SHARD}: ghost is missing, though")

    def test_a_tensor_in_two_shards(self, folder: Path) -> None:
        """The index can name only one of them."""
        (folder / "model-00004-of-00003.safetensors").write_bytes((folder / SHARD).read_bytes())
        name = next(
            name for name, shard in json.loads((folder / INDEX).read_text())["weight_map"].items() if shard == SHARD
        )
        change_index(folder, lambda index: index["weight_map"].update({name: "model-00004-of-00003.safetensors"}))
        self.refused(folder, r"holds .*, but model\.safetensors\.index\.json places it in ")

    def test_a_tensor_that_the_index_does_not_name(self, folder: Path) -> None:
        change_index(folder, lambda index: index["weight_map"].pop("model.norm.weight"))
        self.refused(folder, r"holds model\.norm\.weight, but model\.safetensors\.index\.json does not name it")

    def test_no_safetensors(self, folder: Path) -> None:
        (folder / INDEX).unlink()
        for shard in folder.glob("*.safetensors"):
            shard.unlink()
        self.refused(folder, "pickled weights are not read")

    def test_shards_without_their_index(self, folder: Path) -> None:
        (folder / INDEX).unlink()
        self.refused(
            folder,
            r"has model-00001-of-00003\.safetensors but neither model\.safetensors nor model\.safetensors\.index\.json"
            ", which says what is in which file; fetch it again$",
        )

    def test_two_sets_of_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"")
        self.refused(folder, "has both")

    def test_links_out_of_the_folder(self, folder: Path) -> None:
        (folder.parent / "elsewhere").mkdir()
        for name in (SHARD, "config.json", INDEX):
            moved = folder.parent / "elsewhere" / name
            (folder / name).rename(moved)
            (folder / name).symlink_to(moved)
            self.refused(folder, "a link out of the folder")
            (folder / name).unlink()
            moved.rename(folder / name)
        (folder / SHARD).unlink()
        (folder / SHARD).symlink_to(folder / SHARD)
        self.refused(folder, "a link that leads nowhere")

    @pytest.mark.parametrize("name", ["config.json", SHARD])
    def test_a_file_that_cannot_be_read_now_is_no_damaged_one(
        self, folder: Path, name: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(path: Any, *args: Any, **kwargs: Any) -> Any:
                if Path(path).name == name:
                    raise OSError(errno.EIO, os.strerror(errno.EIO))
                return function(path, *args, **kwargs)

            return call

        monkeypatch.setattr(Path, "read_bytes", failing(Path.read_bytes))
        opened = failing(lambda path: open_tensor_file(LOCAL_FILESYSTEM, path))
        monkeypatch.setattr(hf_folder, "open_tensor_file", lambda filesystem, path: opened(path))
        with pytest.raises(StorageError, match=f"{name}: cannot be read .Input/output error.; it may be intact"):
            weights_of_hf(folder)

    def test_special_files(self, folder: Path) -> None:
        (folder / SHARD).unlink()
        os.mkfifo(folder / SHARD)
        self.refused(folder, "not a regular file")

    @pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
    def test_a_truncated_shard(self, folder: Path, size: int) -> None:
        content = (folder / SHARD).read_bytes()
        (folder / SHARD).write_bytes(content[:size])
        self.refused(folder, f"{SHARD}: ")

    @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 1 << 40, 65 << 20])
    def test_a_huge_header(self, folder: Path, length: int) -> None:
        with (folder / SHARD).open("r+b") as file:
            file.write(struct.pack("<Q", length))
        self.refused(folder, f"header length {length} does not fit")

    def test_a_full_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(import_folder.LOCAL_FILESYSTEM.__class__, "free_bytes", lambda fs, path: 1000)
        self.refused(folder, "1000 B available", StorageError)

    def test_an_unwritable_place(self, folder: Path) -> None:
        (folder.parent / "kept").write_text("a file")
        with pytest.raises(StorageError, match="import-hf"):
            import_hf(folder, folder.parent / "kept" / "out")
