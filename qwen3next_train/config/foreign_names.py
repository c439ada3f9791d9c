"""Usual names of other trainers for our keys, for the hint of the error line; none of them is accepted.

From transformers' ``TrainingArguments`` and ``config.json`` files, and from the arguments of Megatron-LM that
:mod:`qwen3next_train.config.megatron` does not take.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

_WORLD = "the world size follows from the number of processes, see --nproc-per-node"
_ACCUMULATION = "it follows from run.global_batch_size, run.micro_batch_size and the number of processes"
_EPOCHS = "run.steps says how long a run is, in optimizer steps"
_NO_FP16 = "run.precision is bf16 or fp32"
_NO_BIAS = "Qwen3-Next has no biases, leave it out"
_NO_DROPOUT = "Qwen3-Next is trained without dropout, leave it out"
_LOAD = "a run goes on in its run.dir by itself, and a new one takes weights from checkpoint.init_from"
_WHOLE = "a checkpoint always holds the whole state, leave it out"
_WEIGHTS = "checkpoint.init_from takes the weights alone, run.dir the whole state, leave it out"
_SETTINGS = "the configuration alone says the settings of a run, leave it out"
_EXIT = "SIGTERM or SIGUSR1 saves and stops a run, and run.steps says how long it is"
_RESUME = "the newest checkpoint of run.dir is taken when the same line is run again"

_FUSED = "the kernels section chooses between implementations, leave it out"
_SENT = "what ranks send and when follows from the parallel section, leave it out"
_LOGGED = "what is logged stands in metrics.jsonl and wandb, leave it out"
_EVENT_FILES = "logging.tensorboard true writes event files into RUN/tensorboard, leave it out"
_ONE_FORMAT = "checkpoints have one format, leave it out"
_NO_PIPELINE = "layers are not divided over stages of a pipeline, leave it out"
_ROPE = "Qwen3-Next uses RoPE as it is, leave it out"
_ROUTER = "every token goes to its likeliest experts and none is dropped, leave it out"
_SWIGLU = "experts are SwiGLU, leave it out"
_SOFTMAX = "every softmax layer is Qwen3-Next's gated attention, leave it out"
_ALWAYS = "a run does what is right by itself there, leave it out"

_TEXT_FIELDS = ("text_column", "dataset_text_field", "text_key", "json_keys")

KEYS: Mapping[str, str] = {
    # TrainingArguments: optimizer and schedule.
    **dict.fromkeys(("learning_rate", "max_lr", "peak_lr", "base_lr", "init_lr"), "optimizer.lr"),
    **dict.fromkeys(("beta_1", "b1"), "optimizer.beta1"),
    **dict.fromkeys(("beta_2", "b2"), "optimizer.beta2"),
    **dict.fromkeys(("adam_epsilon", "epsilon", "adamw_eps", "optimizer_eps"), "optimizer.eps"),
    **dict.fromkeys(
        ("wd", "decay", "l2", "weight_decay_incr_style", "start_weight_decay", "end_weight_decay"),
        "optimizer.weight_decay",
    ),
    **dict.fromkeys(
        ("max_grad_norm", "grad_clip", "gradient_clipping", "gradient_clip_val", "clip_grad_norm", "max_norm"),
        "optimizer.clip_grad",
    ),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule", "decay_style"), "schedule.kind"),
    **dict.fromkeys(
        ("warmup", "warmup_iters", "num_warmup_steps", "lr_warmup_steps", "warmup_ratio", "lr_warmup_fraction"),
        "schedule.warmup_steps",
    ),
    **dict.fromkeys(("lr_warmup_samples", "warmup_samples"), "schedule.warmup_steps"),
    **dict.fromkeys(
        ("lr_decay_steps", "decay_iters", "lr_decay_samples", "lr_wsd_decay_samples"), "schedule.decay_steps"
    ),
    **dict.fromkeys(("lr_end", "final_lr", "lr_min", "eta_min", "min_learning_rate", "end_lr"), "schedule.min_lr"),
    # The run.
    **dict.fromkeys(
        ("max_steps", "max_iters", "total_steps", "num_steps", "train_steps", "num_iterations", "max_train_steps"),
        "run.steps",
    ),
    **dict.fromkeys(("train_samples", "num_train_samples"), "run.steps"),
    **dict.fromkeys(
        ("output_dir", "out_dir", "save_dir", "log_dir", "logging_dir", "save", "wandb_save_dir"), "run.dir"
    ),
    **dict.fromkeys(("data_seed", "random_seed", "manual_seed"), "run.seed"),
    **dict.fromkeys(("train_batch_size", "batch_size", "total_batch_size", "gbs"), "run.global_batch_size"),
    **dict.fromkeys(
        ("per_device_train_batch_size", "train_micro_batch_size_per_gpu", "micro_batch", "mbs"), "run.micro_batch_size"
    ),
    **dict.fromkeys(("use_cpu", "no_cuda"), "run.device"),
    **dict.fromkeys(
        ("torch_dtype", "dtype", "params_dtype", "mixed_precision", "fp32", "bf16_full_eval"), "run.precision"
    ),
    **dict.fromkeys(
        ("ddp_timeout", "distributed_timeout_minutes", "distributed_timeout_seconds"), "run.peer_timeout_s"
    ),
    # Data.
    **dict.fromkeys(
        (
            "train_file",
            "dataset",
            "datasets",
            "dataset_name",
            "dataset_path",
            "train_data_path",
            "data_dir",
            *("data_cache", "mock_data", "per_split_data_args_path", "data_args_path"),
        ),
        "data.sources",
    ),
    **dict.fromkeys(
        ("validation_file", "valid_data_path", "eval_dataset", "test_data_path", "valid_data"),
        "data.validation_sources",
    ),
    **dict.fromkeys(("validation_split", "validation_split_percentage", "val_fraction"), "data.validation_fraction"),
    **dict.fromkeys(
        (
            *("tokenizer_name", "tokenizer_name_or_path", "tokenizer_path", "vocab_file", "merge_file"),
            *("legacy_tokenizer", "tokenizer_metadata", "tiktoken_pattern", "vocab_extra_ids"),
        ),
        "data.tokenizer",
    ),
    **dict.fromkeys(
        ("max_seq_length", "max_length", "block_size", "seq_len", "context_length", "max_seq_len", "n_ctx"),
        "data.sequence_length",
    ),
    **dict.fromkeys(("data_cache_path", "hf_cache_dir"), "data.cache_dir"),
    **dict.fromkeys(
        ("dataloader_num_workers", "num_workers", "dataloader_prefetch_factor", "prefetch_factor"),
        "data.num_prefetch_steps",
    ),
    **dict.fromkeys(
        ("reset_position_ids", "reset_attention_mask", "packing", "eod_mask_loss"), "data.isolate_documents"
    ),
    **dict.fromkeys(_TEXT_FIELDS, "text_field"),
    # Checkpoints, validation, logging.
    **dict.fromkeys(("save_steps", "save_every", "checkpoint_interval", "checkpointing_steps"), "checkpoint.interval"),
    **dict.fromkeys(
        ("save_total_limit", "keep_last", "max_checkpoints", "checkpoints_total_limit", "save_retain_interval"),
        "checkpoint.keep",
    ),
    **dict.fromkeys(
        (
            "model_name_or_path",
            "pretrained_model_name_or_path",
            "pretrained_checkpoint",
            "finetune",
            "init_from_scratch",
        ),
        "checkpoint.init_from",
    ),
    **dict.fromkeys(("eval_steps", "eval_every", "validation_interval", "val_check_interval"), "eval.interval"),
    **dict.fromkeys(("eval_iters", "max_eval_samples", "limit_val_batches", "per_device_eval_batch_size"), "eval.rows"),
    **dict.fromkeys(("metric_for_best_model", "load_best_model_at_end", "monitor"), "checkpoint.best"),
    **dict.fromkeys(("early_stopping_patience", "early_stopping"), "eval.patience"),
    **dict.fromkeys(("logging_steps", "log_every", "log_every_n_steps", "log_steps"), "logging.interval"),
    **dict.fromkeys(
        ("profile", "profile_step_start", "profile_step_end", "use_pytorch_profiler"), "logging.profile.steps"
    ),
    **dict.fromkeys(("profile_ranks",), "logging.profile.all_ranks"),
    **dict.fromkeys(("record_memory_history", "memory_snapshot_path"), "logging.profile.memory"),
    **dict.fromkeys(("report_to", "wandb_mode", "use_wandb"), "logging.wandb.mode"),
    **dict.fromkeys(("run_name", "experiment_name", "wandb_name", "exp_name", "wandb_run_name"), "logging.wandb.name"),
    **dict.fromkeys(("wandb_tags",), "logging.wandb.tags"),
    # Parallelism and memory.
    **dict.fromkeys(("ep_size", "ep", "expert_parallel", "expert_model_parallel"), "parallel.expert_parallel_size"),
    **dict.fromkeys(
        (
            *("cp_size", "cp", "context_parallel", "sp_size", "sequence_parallel_size", "ring_degree"),
            *("ulysses_degree", "ulysses_size", "ulysses_sequence_parallel_size", "ulysses_parallel_size"),
        ),
        "parallel.context_parallel_size",
    ),
    **dict.fromkeys(("tp_size", "tp", "tensor_parallel", "autotp_size"), "parallel.tensor_parallel_size"),
    **dict.fromkeys(
        (
            *("zero", "stage", "zero_optimization", "deepspeed", "fsdp", "data_parallel_sharding_strategy"),
            *("use_torch_fsdp2", "use_custom_fsdp", "use_megatron_fsdp", "num_distributed_optimizer_instances"),
        ),
        "parallel.zero_stage",
    ),
    **dict.fromkeys(
        (
            *("gradient_checkpointing", "activation_checkpointing", "recompute_granularity", "recompute_method"),
            *("recompute_num_layers", "recompute_modules", "recompute_activations", "use_checkpoint"),
            "moe_layer_recompute",
        ),
        "parallel.recompute",
    ),
    **dict.fromkeys(
        ("cpu_offload", "offload", "optimizer_cpu_offload", "optimizer_offload_fraction"), "parallel.offload_optimizer"
    ),
    **dict.fromkeys(
        ("exp_avg_dtype", "exp_avg_sq_dtype", "optim_state_dtype", "use_precision_aware_optimizer"),
        "optimizer.moments_dtype",
    ),
    **dict.fromkeys(
        ("accumulate_allreduce_grads_in_fp32", "grad_reduce_in_bf16", "main_grads_dtype"), "parallel.gradient_dtype"
    ),
    **dict.fromkeys(
        ("attn_implementation", "attention_backend", "use_flash_attn", "use_flash_attention_2"),
        "kernels.varlen_attention",
    ),
    **dict.fromkeys(("use_liger_kernel", "torch_compile"), "kernels.fused"),
    # Shape of the model, as other models' config.json and Megatron-LM have it.
    **dict.fromkeys(("n_layer", "n_layers", "num_layer"), "model.num_hidden_layers"),
    **dict.fromkeys(("n_embd", "d_model", "dim", "n_embed", "model_dim"), "model.hidden_size"),
    **dict.fromkeys(("n_head", "n_heads", "num_heads"), "model.num_attention_heads"),
    **dict.fromkeys(("n_kv_heads", "num_kv_heads", "n_head_kv", "num_key_value_groups"), "model.num_key_value_heads"),
    **dict.fromkeys(("d_head", "head_size", "attention_head_dim"), "model.head_dim"),
    **dict.fromkeys(("padded_vocab_size", "n_vocab"), "model.vocab_size"),
    **dict.fromkeys(("max_seqlen", "n_positions", "max_sequence_length"), "model.max_position_embeddings"),
    **dict.fromkeys(("layer_norm_eps", "layer_norm_epsilon", "layernorm_epsilon", "norm_eps"), "model.rms_norm_eps"),
    **dict.fromkeys(("rope_base", "rotary_emb_base"), "model.rope_theta"),
    **dict.fromkeys(("rotary_pct", "rope_percent"), "model.partial_rotary_factor"),
    **dict.fromkeys(
        (
            *("init_std", "initializer_std", "init_method_std_dev"),
            *("embedding_init_method_std", "init_method_xavier_uniform"),
        ),
        "model.initializer_range",
    ),
    **dict.fromkeys(("tie_embeddings", "tied_embeddings", "weight_tying"), "model.tie_word_embeddings"),
    **dict.fromkeys(("n_routed_experts", "num_local_experts", "n_experts", "num_moe_experts"), "model.num_experts"),
    **dict.fromkeys(
        ("top_k", "topk", "num_selected_experts", "moe_top_k", "router_topk", "experts_per_token"),
        "model.num_experts_per_tok",
    ),
    **dict.fromkeys(("expert_intermediate_size", "moe_ffn_dim"), "model.moe_intermediate_size"),
    **dict.fromkeys(
        ("n_shared_experts", "shared_expert_size", "num_shared_experts"), "model.shared_expert_intermediate_size"
    ),
    **dict.fromkeys(
        ("aux_loss_coef", "aux_loss_alpha", "moe_aux_loss_coef", "load_balancing_loss_coef"),
        "model.router_aux_loss_coef",
    ),
    **dict.fromkeys(("z_loss_coef", "moe_z_loss_coef", "z_loss_weight"), "model.router_z_loss_coef"),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "mtp_depth", "num_mtp_layers", "mtp_num_hidden_layers"), "model.mtp_num_layers"
    ),
    **dict.fromkeys(("mtp_loss_weight", "mtp_loss_coef", "mtp_loss_coeff"), "model.mtp_loss_scaling_factor"),
    **dict.fromkeys(("conv_kernel", "conv_kernel_size", "d_conv", "conv_size"), "model.linear_conv_kernel_dim"),
    **dict.fromkeys(("attn_layer_period", "attn_interval"), "model.full_attention_interval"),
    **dict.fromkeys(
        (
            *("layer_type", "layer_pattern", "hybrid_override_pattern", "layers_block_type"),
            *("is_hybrid_model", "hybrid_attention_ratio", "hybrid_mlp_ratio"),
        ),
        "model.layer_types",
    ),
    **dict.fromkeys(("attn_output_gate",), "model.attention_output_gate"),
}
"""By foreign name, in lower case with underscores, without a section: our key, or the field of a source."""

_IN_STEPS = "which counts optimizer steps"
_IN_ROWS = "which counts rows"

UNITS: Mapping[str, str] = {
    **dict.fromkeys(("train_samples", "num_train_samples"), _IN_STEPS),
    **dict.fromkeys(("warmup_ratio", "lr_warmup_fraction", "lr_warmup_samples", "warmup_samples"), _IN_STEPS),
    **dict.fromkeys(("lr_decay_samples", "lr_wsd_decay_samples"), _IN_STEPS),
    **dict.fromkeys(("eval_iters", "limit_val_batches", "per_device_eval_batch_size"), _IN_ROWS),
    "distributed_timeout_minutes": "which is in seconds",
    "validation_split_percentage": "which is a fraction",
    "num_key_value_groups": "which counts heads, not the query heads of each",
    **dict.fromkeys(("n_shared_experts", "num_shared_experts"), "which is a width"),
}
"""By foreign name: what our key of :data:`KEYS` is in, where the number that was written means something else."""

ANSWERS: Mapping[str, str] = {
    **dict.fromkeys(_TEXT_FIELDS, "it is text_field of a source: data.sources [{source: NAME, text_field: FIELD}]"),
    **dict.fromkeys(("num_train_epochs", "epochs", "max_epochs", "num_epochs", "train_epochs"), _EPOCHS),
    **dict.fromkeys(("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"), _ACCUMULATION),
    **dict.fromkeys(
        ("num_gpus", "world_size", "nproc_per_node", "data_parallel_size", "dp_size", "num_processes"), _WORLD
    ),
    **dict.fromkeys(("local_rank", "rank"), _WORLD),
    **dict.fromkeys(("ddp_backend", "distributed_backend"), "it follows from run.device, leave it out"),
    **dict.fromkeys(("fp16_full_eval", "half", "loss_scale", "initial_loss_scale", "min_loss_scale", "tf32"), _NO_FP16),
    **dict.fromkeys(("use_bias", "mlp_bias", "qkv_bias", "bias", "add_bias_linear"), _NO_BIAS),
    **dict.fromkeys(("dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "hidden_dropout_prob"), _NO_DROPOUT),
    **dict.fromkeys(("resume_from_checkpoint", "resume", "auto_resume", "ckpt_step"), _RESUME),
    **dict.fromkeys(
        (
            "load",
            "load_dir",
            "load_from",
            "load_checkpoint",
            "load_path",
            "restore_from",
            "ckpt_path",
            "non_persistent_load",
        ),
        _LOAD,
    ),
    **dict.fromkeys(("no_load_optim", "no_load_rng", "load_optimizer", "load_weights_only"), _WEIGHTS),
    **dict.fromkeys(("no_save_optim", "no_save_rng", "save_only_model", "save_optimizer"), _WHOLE),
    **dict.fromkeys(
        (
            *("use_checkpoint_args", "use_checkpoint_opt_param_scheduler", "override_opt_param_scheduler"),
            *("use_mp_args_from_checkpoint_args", "exit_on_missing_checkpoint"),
        ),
        _SETTINGS,
    ),
    **dict.fromkeys(
        ("exit_interval", "exit_duration_in_mins", "exit_signal_handler", "exit_signal", "max_time"), _EXIT
    ),
    **dict.fromkeys(
        ("use_dist_ckpt", "save_safetensors", "auto_detect_ckpt_format", "async_strategy"),
        _ONE_FORMAT,
    ),
    "lr_warmup_init": "warm-up begins at 0, leave it out",
    "lr_wsd_decay_style": "wsd decays linearly, leave it out",
    "main_params_dtype": "master weights are fp32, leave it out",
    "iterations_to_skip": "steps whose gradients are not finite are skipped by themselves, leave it out",
    "split": "data.validation_fraction says how much is held out, split of a source which of its splits is read",
    **dict.fromkeys(
        ("dataloader_type", "shuffle", "no_shuffle"), "run.seed alone says the order of the data, leave it out"
    ),
    **dict.fromkeys(
        ("optim", "optimizer_type", "optimizer_name", "sgd_momentum", "decoupled_lr"),
        "the optimizer is AdamW, leave it out",
    ),
    **dict.fromkeys(
        ("trust_remote_code", "remote_code"), "no code of a checkpoint or a dataset is ever run, leave it out"
    ),
}
"""By foreign name, as in :data:`KEYS`: what to do where no one key is meant."""

FAMILIES: tuple[tuple[str, str], ...] = (
    (r"fp[48]_.*|.*_fp[48]_.*|(te|transformer_engine)_precision.*", _NO_FP16),
    (r".*_fusion(_impl)?|no_persist_layer_norm|apply_query_key_layer_scaling|.*_softmax_in_fp32", _FUSED),
    (r"(enable_|external_)?cuda_graph.*|moe_use_.*|use_kitchen.*|use_fused_.*", _FUSED),
    (r"(moe_)?(overlap|delay|defer|tp_comm|ddp|nccl|high_priority|moe_flex|moe_enable_deepep|cp_comm)_.*", _SENT),
    (r"moe_enable_deepep|moe_shared_expert_overlap|moe_extended_tp|moe_hybridep.*|.*_in_collective", _SENT),
    (r"log_.*|logging_level|timing_log_.*|one_logger.*|.*straggler.*|moe_per_layer_logging", _LOGGED),
    (r"tensorboard_.*", _EVENT_FILES),
    (r"(dist_)?ckpt_.*|non_persistent_.*", _ONE_FORMAT),
    (r".*pipeline.*|.*virtual_stage.*", _NO_PIPELINE),
    (r"(use_)?(rotary|rope|mrope|yarn)_.*|use_rotary_.*|no_position_embedding|no_rope_.*", _ROPE),
    (r"moe_(router_)?(num_groups|group_topk|topk_.*|bias_update_rate|force_.*)|moe_input_jitter_eps", _ROUTER),
    (r"moe_expert_capacity_.*|moe_pad_expert_.*|moe_token_drop.*|moe_apply_probs_.*", _ROUTER),
    (r"squared_relu|openai_gelu|gelu|quick_geglu|geglu|hidden_act|activation_func.*", _SWIGLU),
    (r"multi_latent_attention|(kv|q)_lora_rank|window_size|window_attn_.*|softmax_type|qk_clip.*|qk_l2_norm", _SOFTMAX),
    (r"(no_)?check_.*|manual_gc.*|empty_unused_.*|use_cpu_init.*|te_rng_.*|rerun_.*|inprocess_.*", _ALWAYS),
    (r"deterministic_mode|batch_invariant_mode|calculate_per_token_loss|enable_experimental|no_mmap_.*", _ALWAYS),
    (r"no_create_attention_mask.*|num_dataset_builder_.*|fp32_residual_connection|result_rejected_.*", _ALWAYS),
)
"""Patterns of whole names for Megatron-LM's many switches of one purpose, and what to do instead."""


def own_key(name: str, candidates: Collection[str]) -> str | None:
    """Our key for another trainer's name, or for a name of ours under another section; None when there is none.

    Args:
        name: as it was written, with or without section and leading dashes.
        candidates: the keys that may stand there, ``section.key``.
    """
    leaf = _leaf(name)
    alike = [key for key in candidates if key.rpartition(".")[2] == leaf]
    key = KEYS.get(leaf) or (alike[0] if len(alike) == 1 else None)
    return key if key in candidates else None


def unit_of_own_key(name: str) -> str:
    """What :func:`own_key` is in where the other trainer's number means something else; empty where it does not."""
    return UNITS.get(_leaf(name), "")


def answer(name: str) -> str | None:
    """What to do instead of giving another trainer's argument that no one key stands for; None when it is unknown."""
    return ANSWERS.get(_leaf(name))


def family_answer(name: str) -> str | None:
    """The same by the pattern of the name; None when it fits none of :data:`FAMILIES`."""
    leaf = _leaf(name)
    return next((text for names, text in FAMILIES if re.fullmatch(names, leaf)), None)


def _leaf(name: str) -> str:
    return name.strip("-").rpartition(".")[2].lower().replace("-", "_")
