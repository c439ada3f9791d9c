"""``--dry-run``: build everything without allocating it, and show what the first step would see."""

from __future__ import annotations

import os

import torch

from qwen3next_train.config.batch_size import batch_size
from qwen3next_train.config.metric_names import validation_prefix
from qwen3next_train.config.schema import Config
from qwen3next_train.data.loader import TrainingData
from qwen3next_train.data.prepare import prepare_stores
from qwen3next_train.data.summary import data_lines, uses_of, warn_of_epochs
from qwen3next_train.data.validation import open_validation
from qwen3next_train.kernels.choices import format_choices
from qwen3next_train.kernels.selection import DTYPES, select_kernels
from qwen3next_train.metrics.wandb_settings import check_settings
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.parallel.process_groups import select_device
from qwen3next_train.parameters import parameter_table
from qwen3next_train.train.samples import EncodedPrompts
from qwen3next_train.train.validation import check_metrics

_SHOWN_ROWS = 8


def dry_run(config: Config) -> int:
    """Build the model on the meta device and print it, the kernels and the first rows.

    Raises:
        TrainError: whatever a real run would reject: variables, device, kernels, data.
    """
    check_settings(config.logging.wandb, os.environ, writes=True)
    device = select_device(config.run.device, local_rank=0)
    dtype = DTYPES[config.run.precision]
    kernels = select_kernels(config.kernels, device, dtype=dtype, model=config.model)
    with torch.device("meta"):
        model = Qwen3NextForCausalLM(config.model, kernels=kernels)
    built = sum(parameter.numel() for parameter in model.parameters())
    expected = sum(spec.numel for spec in parameter_table(config.model))
    assert built == expected, f"built {built} parameters, the table has {expected}"
    print(f"model built on the meta device: {built:,} parameters in {len(list(model.parameters()))} tensors")
    print(format_choices(kernels.choices))
    EncodedPrompts.of(config)
    prepared = prepare_stores(config)
    data = TrainingData(prepared, config)
    validation = open_validation(prepared, config)
    check_metrics(validation, config)
    for line in data_lines(prepared, config):
        print(line)
    for name, held_out in validation.items():
        print(f"{validation_prefix(name)}loss: {held_out.num_rows:,} rows of {config.data.sequence_length:,} tokens")
    for line in warn_of_epochs(uses_of(config, [source.documents.num_tokens for source in prepared.train])):
        print(f"WARNING {line}")
    for source, rows in zip(prepared.train, data.rows_per_epoch, strict=True):
        print(f"{source.label}: {rows:,} rows an epoch")
    num_rows = batch_size(config, 1)
    shown = min(_SHOWN_ROWS, num_rows)
    print(f"document boundaries of the first {shown} of {num_rows} rows of step 1:")
    for sample in range(shown):
        print(f"  row {sample}: {' '.join(map(str, data.row(sample).boundaries.tolist()))}")
    return 0
