"""The ``import-hf`` subcommand: a Hugging Face folder becomes a checkpoint of ours, weights only.

One shard at a time is mapped, converted to fp32 piece by piece and written as one file of the checkpoint, so memory
does not grow with the model. The result is a folder ``OUTPUT`` like a run directory with one checkpoint, that of
step 0, with the tokenizer and a configuration beside it::

    OUTPUT/checkpoints/step_00000000/{MANIFEST.json, rank_00000.safetensors, …}
    OUTPUT/tokenizer/{tokenizer.json, …}
    OUTPUT/config.yaml, which trains it
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import torch

from qwen3next_train import __version__
from qwen3next_train.checkpoint import publication
from qwen3next_train.checkpoint.filesystem import LOCAL_FILESYSTEM, format_bytes, write_file
from qwen3next_train.checkpoint.fragments import FragmentIndex, RankShare, write_rank_files
from qwen3next_train.checkpoint.manifest import FileEntry, Header, WorldLayout, encode_manifest, parse_manifest
from qwen3next_train.checkpoint.names import CHECKPOINTS_NAME, step_name
from qwen3next_train.checkpoint.staged_folder import staged_folder
from qwen3next_train.checkpoint.train_state import TrainState
from qwen3next_train.config.describe import to_yaml
from qwen3next_train.config.schema import CheckpointConfig, Config
from qwen3next_train.engine.base import Fragment
from qwen3next_train.errors import DataError, DivergedError, ExitCode
from qwen3next_train.held_elements import Runs
from qwen3next_train.huggingface.folder import HfFolder
from qwen3next_train.huggingface.names import HEAD
from qwen3next_train.huggingface.weights import HfMatch, data_config, match_folder
from qwen3next_train.log import get_logger
from qwen3next_train.parameters import ParamSpec

CONFIG_YAML = "config.yaml"
TOKENIZER_FOLDER = "tokenizer"
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "chat_template.jinja", "generation_config.json"),
)
"""What belongs to a tokenizer and to text generation in a Hugging Face folder."""

_STEP = 0


def import_hf(
    source: Path,
    output: Path,
    *,
    mtp_num_layers: int | None = None,
    initial_value: Callable[[ParamSpec], torch.Tensor] | None = None,
) -> int:
    """Write a Hugging Face checkpoint as one of ours.

    Args:
        source: folder with ``config.json`` and safetensors shards, ``mtp.*`` included.
        output: folder to create.
        mtp_num_layers: MTP depths of the model; None takes those ``source`` has weights of.
        initial_value: gives the fp32 initial value of the parameters of MTP depths that were asked for and that
            ``source`` does not hold; None makes them an error.

    Returns:
        The exit code, 0.

    Raises:
        ConfigError: ``output`` exists, or ``config.json`` is of another model.
        DataError: a file is missing or damaged; a tensor is missing, surplus, misshaped or not finite.
        StorageError: ``output`` cannot be written.
    """
    folder = HfFolder(source)
    match = match_folder(folder, mtp_num_layers=mtp_num_layers)
    if match.absent and initial_value is None:
        raise DataError(f"{source}: {match.absent[0].name} is missing; import without MTP (model.mtp_num_layers 0)")
    _say_what_is_left_out(match)
    num_bytes = 4 * sum(spec.numel for spec in match.parameters)
    output = Path(os.path.abspath(output))
    with staged_folder(LOCAL_FILESYSTEM, output, what="import-hf", num_bytes=num_bytes) as staged:
        _copy_tokenizer(folder, staged / TOKENIZER_FOLDER)
        _write_checkpoint(match, staged / CHECKPOINTS_NAME, output, initial_value)
        write_file(LOCAL_FILESYSTEM, staged / CONFIG_YAML, _training_config(match, output).encode())
    numel = sum(spec.numel for spec in match.parameters)
    print(f"{output / CHECKPOINTS_NAME / step_name(_STEP)}: {numel:,} parameters, {format_bytes(num_bytes)}")
    print(f"to train it: qwen3next-train --config {output / CONFIG_YAML} --data.sources ... --run.dir ...")
    return ExitCode.FINISHED


def _say_what_is_left_out(match: HfMatch) -> None:
    if match.has_head_copy:
        get_logger().info("import-hf: %s is left out: tied to the embedding, and equal to it", HEAD)
    depths = match.model.mtp_num_layers
    if match.num_left_out:
        get_logger().info("import-hf: %d mtp.* tensors left out", match.num_left_out)
    elif match.absent:
        get_logger().info("import-hf: %d mtp.* parameters are not in the folder and start afresh", len(match.absent))
    elif depths == 0:
        get_logger().info("import-hf: no mtp.* weights in %s: model.mtp_num_layers is 0", match.folder.path)


def _copy_tokenizer(folder: HfFolder, target: Path) -> None:
    present = [name for name in TOKENIZER_FILES if folder.has(name)]
    if present:
        LOCAL_FILESYSTEM.make_dir(target)
    for name in present:
        write_file(LOCAL_FILESYSTEM, target / name, folder.read_bytes(name))


def _write_checkpoint(
    match: HfMatch, directory: Path, output: Path, initial_value: Callable[[ParamSpec], torch.Tensor] | None
) -> None:
    fs = LOCAL_FILESYSTEM
    staging = publication.staging_name(_STEP)
    publication.create_staging(fs, directory, staging)
    files: list[FileEntry] = []

    def write(fragments: Iterable[Fragment], origin: str) -> int:
        try:
            share = RankShare.collect(fragments, {})
        except DivergedError as error:
            raise DataError(f"{match.folder.path / origin}: {error}") from error
        rank = files[-1].rank + 1 if files else 0
        written = write_rank_files(fs, directory / staging, share, rank=rank, parameters=match.parameters)
        files.extend(written)
        return sum(file.size for file in written)

    shards = match.folder.shards
    for number, shard in enumerate(shards, start=1):
        if fragments := _fragments(match, shard):
            size = write(fragments, shard)
            get_logger().info("import-hf: %s (%d of %d), %s", shard, number, len(shards), format_bytes(size))
        # The fragments hold the mapping alive.
        del fragments
        match.folder.close(shard)
    for spec in match.absent:
        assert initial_value is not None
        write([Fragment(spec.name, Runs(0, spec.numel), {"master": initial_value(spec).reshape(-1)})], spec.name)
    _publish(match, directory, staging, output, files)


def _training_config(match: HfMatch, output: Path) -> str:
    """YAML of a run that starts from the weights: what belongs to the model, all else at its default."""
    config = Config(
        model=match.model,
        data=data_config(match.folder, match.model, output / TOKENIZER_FOLDER),
        checkpoint=CheckpointConfig(init_from=str(output)),
    )
    include = {"model": True, "data": {"tokenizer", "sequence_length"}, "checkpoint": {"init_from"}}
    return (
        f"# A run that starts from the weights of {ascii(match.folder.path.name)[1:-1]}. What to train on is yours to "
        "say\n# (data.sources), and a rate that suits weights that are trained already (optimizer.lr).\n"
        + to_yaml(config, include=include)
    )


def _fragments(match: HfMatch, shard: str) -> list[Fragment]:
    fragments = []
    for name in match.folder.names_in(shard):
        if name in match.tensors:
            tensor = match.tensors[name]
            weight = match.folder.tensor(name).reshape(-1)
            fragments.append(Fragment(tensor.parameter, Runs(tensor.start, weight.numel()), {"master": weight}))
    return fragments


def _publish(match: HfMatch, directory: Path, staging: str, output: Path, files: list[FileEntry]) -> None:
    config = Config(model=match.model, data=data_config(match.folder, match.model, output / TOKENIZER_FOLDER))
    header = Header(
        parameters=match.parameters,
        config=config.model_dump(mode="json"),
        layout=WorldLayout(world_size=files[-1].rank + 1, expert_parallel_size=1, zero_stage=0),
        versions={"qwen3next_train": __version__} | {name: version(name) for name in ("torch", "safetensors")},
    )
    state = TrainState(
        step=_STEP,
        consumed_samples=0,
        consumed_tokens=0,
        flops_total=0,
        skipped_steps=0,
        optimizer_step=0,
        data_fingerprint="",
    )
    raw = encode_manifest(step=_STEP, header=header, train_state=state, kinds=["master"], files=files)
    FragmentIndex(parse_manifest(raw, step=_STEP)).check_tiling()
    publication.publish(LOCAL_FILESYSTEM, directory, staging, _STEP, raw)
    publication.write_latest_hint(LOCAL_FILESYSTEM, directory, _STEP)
