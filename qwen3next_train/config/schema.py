"""The typed configuration: one frozen section per concern, every field with the line ``--help`` prints.

Field names of :class:`ModelConfig` are those of Hugging Face's ``Qwen3NextConfig``; what Hugging Face has no
name for bears Megatron-LM's. Defaults of the model section are Qwen3-Next-80B-A3B. Rules that span fields
live in ``config.validate``.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qwen3next_train.config.bounds import (
    DecayRate,
    Fraction,
    Heads,
    KernelWidth,
    Layers,
    MtpDepths,
    NewTokens,
    NonNegativeFloat,
    PathText,
    Positions,
    PositiveFloat,
    PrefetchSteps,
    Probability,
    Ranks,
    RotaryBase,
    RotaryFraction,
    Rows,
    Samples,
    Seconds,
    Seed,
    Steps,
    StepsOrNone,
    Temperature,
    Text,
    TopK,
    VocabSize,
    WeightDecay,
    Width,
    WidthOrNone,
)

LayerType = Literal["linear_attention", "full_attention"]
RecomputePart = Literal["norms", "activations", "gdn_prologue", "layer"]
MomentsDtype = Literal["fp32", "bf16"]
MemorySnapshot = Literal["steps", "out_of_memory"]
GradientDtype = Literal["fp32", "bf16"]
LossGrouping = Literal["source", "position"]
TokenExchange = Literal["auto", "dense", "exact"]


class Section(BaseModel):
    """Base of all sections: immutable, exact types, no unknown keys."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class RunConfig(Section):
    """What is run, where, and for how long."""

    dir: PathText = Field("runs/qwen3next", description="run directory: configuration, metrics, log, checkpoints")
    steps: Steps = Field(1000, description="optimizer steps to train")
    seed: Seed = Field(1234, description="seed of initialisation, data order and drawn samples")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where to train; auto takes CUDA when present")
    precision: Literal["bf16", "fp32"] = Field(
        "bf16", description="dtype of weights and activations; A_log, dt_bias and router stay fp32"
    )
    global_batch_size: Rows = Field(256, description="sequences per optimizer step, over all ranks")
    micro_batch_size: Rows = Field(1, description="sequences per rank and forward pass; accumulation follows")
    max_skipped_steps: Steps = Field(
        10, description="consecutive steps with non-finite gradients before the run stops with exit code 76"
    )
    peer_timeout_s: Seconds = Field(
        900.0,
        description="seconds to wait for another rank before it counts as lost (exit code 69); more than ranks can "
        "differ in a save or a first step",
    )


class ModelConfig(Section):
    """Shape and losses of the model (names of Hugging Face's Qwen3NextConfig)."""

    vocab_size: VocabSize = Field(151936, description="rows of the embedding and of the output head")
    hidden_size: Width = Field(2048, description="width of the residual stream")
    num_hidden_layers: Layers = Field(48, description="decoder layers, MTP layers not counted")
    num_attention_heads: Heads = Field(16, description="query heads of the softmax layers")
    num_key_value_heads: Heads = Field(2, description="key and value heads of the softmax layers")
    head_dim: Heads = Field(256, description="head dimension of the softmax layers")
    max_position_embeddings: Positions = Field(262144, description="longest sequence RoPE is meant for")
    initializer_range: PositiveFloat = Field(0.02, description="standard deviation of initial weights")
    rms_norm_eps: PositiveFloat = Field(1e-6, description="epsilon of every RMSNorm")
    tie_word_embeddings: bool = Field(False, description="share the embedding with the output head")
    rope_theta: RotaryBase = Field(1e7, description="base of the rotary frequencies")
    partial_rotary_factor: RotaryFraction = Field(0.25, description="leading fraction of head_dim that RoPE rotates")
    linear_conv_kernel_dim: KernelWidth = Field(4, description="width of the GDN causal convolution")
    linear_key_head_dim: Heads = Field(128, description="GDN key and query head dimension")
    linear_value_head_dim: Heads = Field(128, description="GDN value head dimension")
    linear_num_key_heads: Heads = Field(16, description="GDN key and query heads")
    linear_num_value_heads: Heads = Field(32, description="GDN value heads, a multiple of the key heads")
    linear_dt_init: Literal["ones", "log_uniform"] = Field(
        "ones",
        description="initial dt_bias of GDN: ones as Megatron-LM and Hugging Face (state forgotten within a token at "
        "first), or dt log-uniform in [0.001, 0.1] as the Gated DeltaNet paper (memory from the first step)",
    )
    full_attention_interval: Layers = Field(
        4, description="every N-th layer is softmax attention; read only when layer_types is not given"
    )
    layer_types: list[LayerType] = Field(
        default_factory=list, description="mixer of each layer; empty: follows full_attention_interval"
    )
    attention_output_gate: bool = Field(True, description="softmax attention output times sigmoid of a gate")
    num_experts: Heads = Field(512, description="routed experts per layer")
    num_experts_per_tok: Heads = Field(10, description="experts each token is sent to")
    norm_topk_prob: bool = Field(True, description="renormalise the chosen experts' probabilities to sum to 1")
    moe_intermediate_size: Width = Field(512, description="hidden width of one routed expert")
    shared_expert_intermediate_size: WidthOrNone = Field(512, description="shared expert width, 0 for none")
    shared_expert_gate: bool = Field(True, description="shared expert output times sigmoid of a gate")
    router_aux_loss_coef: NonNegativeFloat = Field(1e-3, description="weight of the load-balancing loss, per layer")
    router_aux_loss_scope: Literal["sequence", "micro_batch", "global"] = Field(
        "global",
        description="over what expert loads are counted: each row, the micro-batch of all ranks, or all ranks and "
        "the accumulation so far",
    )
    router_z_loss_coef: NonNegativeFloat = Field(0.0, description="weight of the router z-loss, per layer")
    mtp_num_layers: MtpDepths = Field(1, description="multi-token prediction depths, 0 for none")
    mtp_loss_scaling_factor: NonNegativeFloat = Field(0.1, description="weight of the MTP loss, shared by the depths")


class SourceConfig(Section):
    """One training source and its share of the samples."""

    source: PathText = Field(
        description="builtin:python-stdlib, a .bin/.idx prefix, a file or glob, or a HF dataset name"
    )
    weight: PositiveFloat = Field(1.0, description="share of the samples, relative to the other sources")
    text_field: Text = Field("text", description="column or JSON field that holds the text")
    split: Text = Field("train", description="split of a dataset, on the Hugging Face hub or in a folder or glob")
    name: Text = Field("", description="configuration of a Hugging Face dataset; empty: its default")
    alias: Text = Field("", description="name in loss/NAME and data/share_NAME; empty: the last part of the source")


class DataConfig(Section):
    """Where tokens come from and how rows are cut from them."""

    sources: list[SourceConfig] = Field(
        default_factory=lambda: [SourceConfig(source="builtin:python-stdlib")],
        description="training sources: one name, a list of names, or a list of "
        "{source, weight, text_field, split, name, alias}",
    )
    validation_sources: list[SourceConfig] = Field(
        default_factory=list, description="held-out sources; empty: validation_fraction of the training documents"
    )
    validation_sets: dict[str, list[SourceConfig]] = Field(
        default_factory=dict,
        description="further held-out sets, {NAME: sources}, each with its own eval/NAME/loss and eval/NAME/bpb; "
        "training text is held out for eval/loss as without them",
    )
    validation_fraction: Fraction = Field(
        0.02, description="documents held out by hash of their name or content, or the end of a single text file"
    )
    tokenizer: PathText = Field(
        "builtin:python-4k", description="tokenizer.json, a folder with one, or builtin:python-4k"
    )
    eos_token: Text = Field(
        "", description="token that ends a document; empty: the one that tokenizer_config.json names"
    )
    sequence_length: Positions = Field(4096, description="tokens per row")
    isolate_documents: bool = Field(
        True, description="documents packed into a row never see each other; false: a row is one sequence"
    )
    cache_dir: PathText = Field("", description="token store cache; empty: the user's cache directory")
    num_prefetch_steps: PrefetchSteps = Field(2, description="steps of batches prepared ahead in a thread")


class OptimizerConfig(Section):
    """AdamW."""

    lr: NonNegativeFloat = Field(3e-4, description="peak learning rate")
    beta1: DecayRate = Field(0.9, description="decay of the first moment")
    beta2: DecayRate = Field(0.95, description="decay of the second moment")
    eps: PositiveFloat = Field(1e-8, description="AdamW epsilon")
    weight_decay: WeightDecay = Field(0.1, description="decoupled weight decay")
    apply_wd_to_qk_layernorm: bool = Field(
        True, description="decay the q/k norm weights although they are one-dimensional (Megatron's Qwen3-Next rule)"
    )
    clip_grad: NonNegativeFloat = Field(1.0, description="global gradient norm to clip to, 0 for no clipping")
    moments_dtype: MomentsDtype = Field(
        "fp32", description="dtype the two moments are kept in; bf16 takes 4 bytes a parameter less"
    )


class ScheduleConfig(Section):
    """Learning rate over steps."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = Field("cosine", description="shape after the warm-up")
    warmup_steps: StepsOrNone = Field(500, description="steps of linear warm-up from 0")
    decay_steps: StepsOrNone = Field(
        0,
        description="linear, cosine: step at which min_lr is reached; wsd: length of the final decay; 0: run.steps, "
        "for wsd a tenth of it",
    )
    min_lr: NonNegativeFloat = Field(3e-5, description="learning rate at the end of the decay")
    rampup_batch_size: list[Samples] = Field(
        default_factory=list,
        description="START, INCREMENT, SAMPLES: the global batch grows from START by INCREMENT at a time to "
        "run.global_batch_size over SAMPLES samples; empty: it never changes",
    )
    rewarmup_steps: StepsOrNone = Field(
        0, description="steps in which the rate returns to the schedule after a change that --resume.accept lets pass"
    )
    rewarmup_from: Literal["current", "zero"] = Field(
        "current", description="where that return begins: at the rate of the last step before the change, or at 0"
    )


class ParallelConfig(Section):
    """Layout over processes; the data-parallel size is the world size."""

    expert_parallel_size: Ranks = Field(1, description="ranks that share one set of experts")
    context_parallel_size: Ranks = Field(
        1, description="ranks that share the tokens of a row, a slice each; for rows too long for one GPU"
    )
    tensor_parallel_size: Ranks = Field(
        1,
        description="ranks that divide the heads of Gated DeltaNet and attention, and for all else the tokens of a row",
    )
    token_exchange: TokenExchange = Field(
        "exact",
        description="which tokens travel to other ranks' experts: all (dense: no wait for the device, room for the "
        "experts' rows) or those that are needed (exact); auto: dense within a node over at most 4 ranks",
    )
    micro_batches_in_flight: Literal[1, 2] = Field(
        1,
        description="micro-batches that pass through the model together; with 2 one computes while the other's tokens "
        "travel (within a node of H100 no gain), and the activations of both are kept",
    )
    zero_stage: Literal[1, 2, 3] = Field(1, description="DeepSpeed ZeRO stage")
    recompute: list[RecomputePart] = Field(
        default_factory=list,
        description="what the backward pass computes again instead of keeping it: norms, activations (SwiGLU products, "
        "copies of tokens for their experts, output gates, gated norm), gdn_prologue (GDN convolution and gates), or "
        "layer (whole layers)",
    )
    gradient_dtype: GradientDtype = Field(
        "fp32",
        description="dtype in which gradients are summed over micro-batches and ranks; bf16 halves their memory and "
        "traffic and rounds every sum (only zero_stage 1 and 2, run.precision bf16, no offload)",
    )
    offload_optimizer: Literal["none", "cpu"] = Field(
        "none", description="where master weights and moments live and are updated; cpu frees the GPU of them, slower"
    )


class KernelsConfig(Section):
    """Backend of each operation; auto takes the reference on CPU and the fastest present on CUDA."""

    gated_delta_rule: Literal["auto", "reference", "fla", "flash_qla"] = Field(
        "auto",
        description="gated delta rule; auto takes flash_qla where that is installed and the model's heads have 128",
    )
    varlen_attention: Literal["auto", "reference", "flash"] = Field("auto", description="softmax attention")
    grouped_matmul: Literal["auto", "reference", "grouped_mm", "triton"] = Field(
        "auto", description="grouped GEMM of the experts"
    )
    fused: Literal["auto", "reference", "triton"] = Field(
        "auto", description="norms, activations, routing and other work between the large matrix products"
    )


class CheckpointConfig(Section):
    """Saving and resuming."""

    interval: StepsOrNone = Field(500, description="steps between checkpoints; 0: only the last step and on a stop")
    keep: Steps = Field(3, description="newest complete checkpoints kept")
    best: Text = Field(
        "",
        description="validation metric whose lowest value marks the best checkpoint, which is kept beside the newest: "
        "eval/loss, eval/bpb, eval/NAME/loss or eval/NAME/bpb; empty: none",
    )
    max_failures: Steps = Field(3, description="consecutive failed saves before the run stops with exit code 74")
    async_save: bool = Field(
        True,
        description="write checkpoints while training goes on, from a copy in host memory; where that does not fit, "
        "training waits for its saves",
    )
    init_from: PathText = Field(
        "",
        description="checkpoint or run directory whose weights a new run starts from (made by import-hf or by "
        "training); read only when run.dir has no checkpoint",
    )


class WandbConfig(Section):
    """Weights & Biases."""

    mode: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: WANDB_MODE if set, else online when a key is present, else offline"
    )
    project: Text = Field("qwen3next", description="project name; not given: WANDB_PROJECT, if set")
    entity: Text = Field("", description="team or user; empty: WANDB_ENTITY, or the account's default")
    name: Text = Field("", description="run name; empty: WANDB_NAME, or the run directory's name")
    tags: list[Text] = Field(default_factory=list, description="tags of the run; empty: WANDB_TAGS")


class ProfileConfig(Section):
    """Profiles of chosen steps, into RUN/profile."""

    steps: Text = Field(
        "",
        description='steps to profile, "10-12" or "10": trace for Perfetto and table of kernels, exposed '
        "communication, idle time and waits; empty: none",
    )
    all_ranks: bool = Field(False, description="profile all ranks; false: rank 0")
    memory: list[MemorySnapshot] = Field(
        default_factory=list,
        description="snapshots of GPU memory with the origin of every block, for pytorch.org/memory_viz: at the end of "
        "the profiled steps (steps), when memory runs out (out_of_memory), which records allocations all the time",
    )


class LoggingConfig(Section):
    """Console, metrics.jsonl and wandb."""

    interval: Steps = Field(1, description="steps between logged steps")
    layer_interval: StepsOrNone = Field(50, description="steps between per-layer MoE statistics, 0 for never")
    step_parts: bool = Field(
        False, description="log the time of forward, backward, optimizer, validation and saves beside that of the step"
    )
    loss_by: list[LossGrouping] = Field(
        default_factory=list,
        description="split the next-token loss of logged steps by source (loss/NAME, with data/share_NAME) or by "
        "position in the document (loss/position_N)",
    )
    tensorboard: bool = Field(False, description="write TensorBoard's event files into RUN/tensorboard, too")
    profile: ProfileConfig = Field(default_factory=ProfileConfig, description="profiles of chosen steps")
    wandb: WandbConfig = Field(default_factory=WandbConfig, description="Weights & Biases")


class SamplesConfig(Section):
    """Text that the model writes during training."""

    prompts: list[Text] = Field(
        default_factory=list,
        description="texts to go on from, shown in the log and kept in RUN/samples.jsonl and wandb; empty: none",
    )
    interval: Steps = Field(500, description="steps between samples; the last step has some too")
    max_new_tokens: NewTokens = Field(64, description="tokens that each prompt goes on with, at most")
    temperature: Temperature = Field(
        0.0, description="tokens are drawn from logits divided by it; 0: the likeliest is taken"
    )
    top_p: Probability = Field(1.0, description="draw from the fewest tokens that have this probability together")
    top_k: TopK = Field(0, description="draw from so many likeliest tokens; 0: from all")


class EvalConfig(Section):
    """Validation during training."""

    interval: StepsOrNone = Field(0, description="steps between validations, 0 for never")
    rows: Rows = Field(64, description="validation rows (of data.sequence_length tokens) per validation set")
    patience: StepsOrNone = Field(
        0, description="validations in a row without a new lowest eval.patience_metric that end the run; 0: none do"
    )
    patience_metric: Text = Field("eval/loss", description="validation metric that eval.patience looks at")
    samples: SamplesConfig = Field(default_factory=SamplesConfig, description="text written during training")


class Config(Section):
    """A whole run."""

    run: RunConfig = Field(default_factory=RunConfig, description="what is run, where, how long")
    model: ModelConfig = Field(default_factory=ModelConfig, description="shape and losses of the model")
    data: DataConfig = Field(default_factory=DataConfig, description="tokens and rows")
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig, description="AdamW")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="learning rate over steps")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="layout over processes")
    kernels: KernelsConfig = Field(default_factory=KernelsConfig, description="backend of each operation")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="saving and resuming")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="console, metrics.jsonl, wandb")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="validation during training")
