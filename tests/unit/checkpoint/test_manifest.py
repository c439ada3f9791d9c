"""MANIFEST.json of an earlier version, and of a run that was changed on the way."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwen3next_train.checkpoint.fragments import RankShare, write_rank_files
from qwen3next_train.checkpoint.manifest import config_hash, encode_manifest, parse_manifest
from qwen3next_train.checkpoint.train_state import AcceptedChange
from qwen3next_train.config.describe import ConfigChanges, compare_configs
from qwen3next_train.config.schema import Config, ParallelConfig
from qwen3next_train.data.position import SourcePosition
from qwen3next_train.engine.base import FRAGMENT_KINDS
from qwen3next_train.errors import CheckpointError
from qwen3next_train.optim.schedule import Rewarmup
from tests.unit.checkpoint.support import (
    PARAMETERS,
    HookedFilesystem,
    fragments_of,
    header,
    rewrite_manifest,
    train_state,
)


def test_configuration_of_an_earlier_version_resumes_without_a_difference(tmp_path):
    config = Config(parallel=ParallelConfig(recompute=["activations", "gdn_prologue"]))
    stored = config.model_dump(mode="json")
    stored["parallel"]["recompute"] = ["activations", "conv_gates"]
    stored["kernels"]["causal_conv1d"] = "reference"
    share = RankShare.collect(fragments_of(1), {})
    files = write_rank_files(HookedFilesystem(), tmp_path, share, rank=0, parameters=PARAMETERS)
    described = replace(header(), config=stored)
    raw = encode_manifest(step=1, header=described, train_state=train_state(1), kinds=FRAGMENT_KINDS, files=files)
    assert b"conv_gates" in raw
    assert b"causal_conv1d" in raw
    manifest = parse_manifest(raw, step=1)
    assert compare_configs(manifest.config, config, step=1) == ConfigChanges((), (), ())
    assert manifest.config == config.model_dump(mode="json")
    assert manifest.config_xxh3_128 == config_hash(stored), "the hash is that of what the earlier version wrote"
    # What it says is still compared, under its new name.
    (change,) = compare_configs(manifest.config, Config()).harmless
    assert (change.key, change.old) == ("parallel.recompute", ["activations", "gdn_prologue"])


def _manifest(tmp_path, state):
    share = RankShare.collect(fragments_of(1), {})
    files = write_rank_files(HookedFilesystem(), tmp_path, share, rank=0, parameters=PARAMETERS)
    return encode_manifest(step=1, header=header(), train_state=state, kinds=FRAGMENT_KINDS, files=files)


def test_what_resumes_have_changed_comes_back_as_it_was(tmp_path):
    source = SourcePosition(content="ab", order=1, first_row=7, sequence_length=64, seed=3)
    state = replace(
        train_state(1),
        sources=(source,),
        former_sources=(replace(source, order=0),),
        changes=(
            AcceptedChange(key="optimizer.lr", old=0.1, new=3e-4, step=0),
            AcceptedChange(key="data.sources", old=[{"source": "a", "weight": 1.0}], new=[], step=1),
        ),
        rewarmup=Rewarmup(after_step=1, from_lr=0.25, steps=8),
    )
    assert parse_manifest(_manifest(tmp_path, state), step=1).train_state == state


@pytest.mark.parametrize(
    "fields",
    [
        {"sources": [{"content": "ab", "order": -1, "first_row": 0, "sequence_length": 1, "seed": 0}]},
        {"sources": [{"content": "ab", "order": 0, "first_row": 2**63, "sequence_length": 1, "seed": 0}]},
        {"rewarmup": {"after_step": 1, "from_lr": 0.1, "steps": 0}},
        {"rewarmup": {"after_step": 1, "from_lr": "0.1", "steps": 3.0}},
        {"changes": [{"key": "a", "old": json.loads("[" * 400 + "]" * 400), "new": 0, "step": 1}]},
        {"changes": [{"key": 5, "old": 0, "new": 0, "step": 1}]},
    ],
)
def test_a_state_that_no_run_comes_to_is_damage(tmp_path, fields):
    path = tmp_path / "MANIFEST.json"
    path.write_bytes(_manifest(tmp_path, train_state(1)))
    rewrite_manifest(path, lambda manifest: manifest["train_state"].update(fields))
    with pytest.raises(CheckpointError) as caught:
        parse_manifest(path.read_bytes(), step=1)
    assert "\n" not in str(caught.value)
