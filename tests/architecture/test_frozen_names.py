"""Names that users' scripts, configurations and dashboards rely on, written out.

A name is changed here together with a line in CHANGELOG.md, and never in passing.
"""

from __future__ import annotations

import re

import pytest

from qwen3next_train.cli.command import COMMON_OPTIONS
from qwen3next_train.cli.commands import COMMANDS
from qwen3next_train.config.describe import keys
from qwen3next_train.config.megatron import arguments
from qwen3next_train.errors import ExitCode
from qwen3next_train.metrics.names import LAYER_METRICS, METRICS, NAMED_METRICS, Metric
from tests.architecture.tree import ROOT

CONFIG_KEYS = """
run.dir
run.steps
run.seed
run.device
run.precision
run.global_batch_size
run.micro_batch_size
run.max_skipped_steps
run.peer_timeout_s

model.vocab_size
model.hidden_size
model.num_hidden_layers
model.num_attention_heads
model.num_key_value_heads
model.head_dim
model.max_position_embeddings
model.initializer_range
model.rms_norm_eps
model.tie_word_embeddings
model.rope_theta
model.partial_rotary_factor
model.linear_conv_kernel_dim
model.linear_key_head_dim
model.linear_value_head_dim
model.linear_num_key_heads
model.linear_num_value_heads
model.linear_dt_init
model.full_attention_interval
model.layer_types
model.attention_output_gate
model.num_experts
model.num_experts_per_tok
model.norm_topk_prob
model.moe_intermediate_size
model.shared_expert_intermediate_size
model.shared_expert_gate
model.router_aux_loss_coef
model.router_aux_loss_scope
model.router_z_loss_coef
model.mtp_num_layers
model.mtp_loss_scaling_factor

data.sources
data.validation_sources
data.validation_sets
data.validation_fraction
data.tokenizer
data.eos_token
data.sequence_length
data.isolate_documents
data.cache_dir
data.num_prefetch_steps

optimizer.lr
optimizer.beta1
optimizer.beta2
optimizer.eps
optimizer.weight_decay
optimizer.apply_wd_to_qk_layernorm
optimizer.clip_grad
optimizer.moments_dtype

schedule.kind
schedule.warmup_steps
schedule.decay_steps
schedule.min_lr
schedule.rampup_batch_size
schedule.rewarmup_steps
schedule.rewarmup_from

parallel.expert_parallel_size
parallel.context_parallel_size
parallel.tensor_parallel_size
parallel.token_exchange
parallel.micro_batches_in_flight
parallel.zero_stage
parallel.recompute
parallel.gradient_dtype
parallel.offload_optimizer

kernels.gated_delta_rule
kernels.varlen_attention
kernels.grouped_matmul
kernels.fused

checkpoint.interval
checkpoint.keep
checkpoint.best
checkpoint.max_failures
checkpoint.async_save
checkpoint.init_from

logging.interval
logging.layer_interval
logging.step_parts
logging.loss_by
logging.tensorboard
logging.profile.steps
logging.profile.all_ranks
logging.profile.memory
logging.wandb.mode
logging.wandb.project
logging.wandb.entity
logging.wandb.name
logging.wandb.tags

eval.interval
eval.rows
eval.patience
eval.patience_metric
eval.samples.prompts
eval.samples.interval
eval.samples.max_new_tokens
eval.samples.temperature
eval.samples.top_p
eval.samples.top_k
"""

MEGATRON_ARGUMENTS = """
--linear-attention-type
--experimental-attention-variant
--linear-attention-freq
--linear-conv-kernel-dim
--linear-key-head-dim
--linear-value-head-dim
--linear-num-key-heads
--linear-num-value-heads
--attention-output-gate
--num-layers
--hidden-size
--num-attention-heads
--group-query-attention
--num-query-groups
--kv-channels
--qk-layernorm
--normalization
--apply-layernorm-1p
--norm-epsilon
--position-embedding-type
--rotary-percent
--rotary-base
--max-position-embeddings
--disable-bias-linear
--add-qkv-bias
--hidden-dropout
--attention-dropout
--swiglu
--untie-embeddings-and-output-weights
--vocab-size
--make-vocab-size-divisible-by
--init-method-std
--num-experts
--moe-router-topk
--moe-ffn-hidden-size
--ffn-hidden-size
--moe-layer-freq
--moe-shared-expert-intermediate-size
--moe-shared-expert-gate
--moe-router-load-balancing-type
--moe-aux-loss-coeff
--moe-z-loss-coeff
--moe-router-score-function
--moe-router-enable-expert-bias
--moe-router-pre-softmax
--moe-router-dtype
--moe-token-dispatcher-type
--moe-grouped-gemm
--moe-permute-fusion
--mtp-num-layers
--mtp-loss-scaling-factor
--no-weight-decay-cond-type
--apply-wd-to-qk-layernorm
--optimizer
--lr
--min-lr
--lr-decay-style
--lr-warmup-iters
--lr-decay-iters
--lr-wsd-decay-iters
--weight-decay
--clip-grad
--adam-beta1
--adam-beta2
--adam-eps
--train-iters
--global-batch-size
--micro-batch-size
--rampup-batch-size
--seed
--bf16
--fp16
--seq-length
--data-path
--tokenizer-model
--tokenizer-type
--expert-model-parallel-size
--tensor-model-parallel-size
--pipeline-model-parallel-size
--context-parallel-size
--expert-tensor-parallel-size
--sequence-parallel
--use-distributed-optimizer
--transformer-impl
--use-mcore-models
--disable-jit-fuser
--save-interval
--async-save
--eval-interval
--log-interval
--wandb-project
--wandb-entity
--wandb-exp-name
"""

COMMAND_OPTIONS = {
    "train": [
        *("--dry-run", "--resume.accept", "--resume.from"),
        *("--nproc-per-node", "--nnodes", "--node-rank", "--rdzv-endpoint"),
    ],
    "plan": ["--gpus", "--gpu", "--mfu", "--tokens", "--json"],
    "tokenize": ["--output"],
    "train-tokenizer": ["--sources", "--output"],
    "eval": [
        *("--checkpoint", "--hf", "--data", "--json"),
        *("--device", "--precision", "--tokenizer", "--text-field"),
    ],
    "generate": [
        *("--checkpoint", "--hf", "--prompt", "--prompts", "--max-new-tokens"),
        *("--temperature", "--top-p", "--top-k", "--json", "--device", "--precision", "--tokenizer"),
    ],
    "import-hf": ["--hf", "--output"],
    "export-hf": ["--checkpoint", "--output", "--dtype", "--max-shard-bytes", "--tokenizer"],
    "plot": ["--text", "--html", "--axis", "--rate", "--smooth", "--output"],
    "checkpoint": [],
    "slurm-script": ["--nodes", "--gpus-per-node", "--time", "--output"],
    "doctor": ["--json"],
}

COMMAND_KEYS = {
    "eval": ("data.sequence_length",),
    "generate": ("run.seed",),
    "import-hf": ("model.mtp_num_layers", "run.seed"),
    "export-hf": (),
    "plot": (),
}
"""Of the configuration; subcommands that are not named here read all of it."""

COMMON = ["--config", "--print-config", "--help", "--version"]

METRIC_NAMES = """
step
tokens
loss/lm
loss/mtp
loss/load_balancing
loss/z
loss/total
optim/lr
optim/grad_norm
optim/skipped_steps
perf/flops_per_step
perf/flops_total
perf/tflops_per_gpu
perf/mfu
perf/tokens_per_s
perf/step_time_s
perf/data_wait_s
perf/forward_s
perf/backward_s
perf/optimizer_s
perf/save_s
perf/eval_s
mem/peak_gib
moe/max_violation
moe/dead_experts
moe/router_entropy
eval/loss
eval/bpb
"""

LAYER_METRIC_NAMES = """
moe/layer_{layer:02d}/max_violation
moe/layer_{layer:02d}/dead_experts
moe/layer_{layer:02d}/router_entropy
"""

NAMED_METRIC_NAMES = """
eval/{name}/loss
eval/{name}/bpb
loss/{name}
data/share_{name}
loss/position_{first}
"""

EXIT_CODES = {
    "FINISHED": 0,
    "USAGE": 2,
    "DATA": 65,
    "PEER_LOST": 69,
    "INTERNAL": 70,
    "NO_MEMORY": 71,
    "STORAGE": 74,
    "STOPPED": 75,
    "DIVERGED": 76,
}


def test_configuration_keys_are_frozen() -> None:
    assert list(keys()) == CONFIG_KEYS.split()


def test_megatron_arguments_are_frozen() -> None:
    assert [argument.flag for argument in arguments()] == MEGATRON_ARGUMENTS.split()


def test_subcommands_and_their_options_are_frozen() -> None:
    found = {name: [option.name for option in command.options] for name, command in COMMANDS.items()}
    assert found == COMMAND_OPTIONS
    assert [option.name for option in COMMON_OPTIONS] == COMMON
    limited = {name: command.keys for name, command in COMMANDS.items() if command.keys is not None}
    assert limited == COMMAND_KEYS


def test_metric_names_are_frozen() -> None:
    assert [metric.name for metric in METRICS] == METRIC_NAMES.split()
    assert [metric.name for metric in LAYER_METRICS] == LAYER_METRIC_NAMES.split()
    assert [metric.name for metric in NAMED_METRICS] == NAMED_METRIC_NAMES.split()


def test_exit_codes_are_frozen() -> None:
    assert {code.name: code.value for code in ExitCode} == EXIT_CODES


@pytest.mark.parametrize("metric", [*METRICS, *LAYER_METRICS, *NAMED_METRICS], ids=lambda metric: metric.name)
def test_metrics_are_documented_as_they_are_defined(metric: Metric) -> None:
    rows = _table_rows("docs/metrics.md")
    assert rows[_documented(metric)] == [metric.unit, metric.meaning]


def test_nothing_is_documented_that_does_not_exist() -> None:
    documented = set(_table_rows("docs/metrics.md"))
    assert documented == set(map(_documented, (*METRICS, *LAYER_METRICS, *NAMED_METRICS)))


def test_exit_codes_are_documented() -> None:
    rows = _table_rows("README.md")
    assert {int(name) for name in rows if name.isdigit()} == set(EXIT_CODES.values())


def _documented(metric: Metric) -> str:
    return metric.name.replace("{layer:02d}", "NN").replace("{name}", "NAME").replace("{first}", "N")


def _table_rows(document: str) -> dict[str, list[str]]:
    """Cells after the first of every table row whose first cell is code, by that cell."""
    text = (ROOT / document).read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| (.*) \|$", text, flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split(" | ")] for name, cells in rows}
