"""MANIFEST.json of an earlier version."""

from __future__ import annotations

from dataclasses import replace

from qwen3next_train.checkpoint.fragments import RankShare, write_rank_file
from qwen3next_train.checkpoint.manifest import config_hash, encode_manifest, parse_manifest
from qwen3next_train.config.describe import ConfigChanges, compare_configs
from qwen3next_train.config.schema import Config, ParallelConfig
from qwen3next_train.engine.base import FRAGMENT_KINDS
from tests.unit.checkpoint.support import PARAMETERS, HookedFilesystem, fragments_of, header, train_state


def test_configuration_of_an_earlier_version_resumes_without_a_difference(tmp_path):
    config = Config(parallel=ParallelConfig(recompute=["activations", "gdn_prologue"]))
    stored = config.model_dump(mode="json")
    stored["parallel"]["recompute"] = ["activations", "conv_gates"]
    stored["kernels"]["causal_conv1d"] = "reference"
    share = RankShare.collect(fragments_of(1), {})
    entry = write_rank_file(HookedFilesystem(), tmp_path, share, rank=0, parameters=PARAMETERS)
    described = replace(header(), config=stored)
    raw = encode_manifest(step=1, header=described, train_state=train_state(1), kinds=FRAGMENT_KINDS, files=[entry])
    assert b"conv_gates" in raw
    assert b"causal_conv1d" in raw
    manifest = parse_manifest(raw, step=1)
    assert compare_configs(manifest.config, config, step=1) == ConfigChanges((), (), ())
    assert manifest.config == config.model_dump(mode="json")
    assert manifest.config_xxh3_128 == config_hash(stored), "the hash is that of what the earlier version wrote"
    # What it says is still compared, under its new name.
    (change,) = compare_configs(manifest.config, Config()).harmless
    assert (change.key, change.old) == ("parallel.recompute", ["activations", "gdn_prologue"])
