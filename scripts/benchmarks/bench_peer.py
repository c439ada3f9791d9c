"""transformers' Qwen3-Next on the shapes of ``bench_step.py``, on the same GPU and the same tokens.

``python scripts/benchmarks/bench_peer.py [CONFIG ...]``: forward and backward of one micro-batch of dense rows, loss
from labels, bf16 weights, no recompute, with grouped matrix products for the experts, SDPA and FLA's kernels
where transformers finds them. FLA is given the same kernel configurations as ours, so that it need not search either.
"""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import torch
from bench_shapes import model_flops, random_batch
from device_timing import GIB, device_name, measure

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.huggingface import model_config_to_hf
from qwen3next_train.config.load import load_config
from qwen3next_train.config.presets import shipped_folder
from qwen3next_train.config.schema import Config
from qwen3next_train.kernels.fla.process import use_tuned_configs

SHAPES = ("bench_slice4_e512.yaml", "bench_ep8_proxy.yaml")
ITERATIONS = 8


def peer_model(config: Config, device: torch.device) -> torch.nn.Module:
    """With its own initial weights, drawn on the device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    described = model_config_to_hf(config.model)
    hf_config = AutoConfig.for_model(described.pop("model_type"), **described)
    hf_config._experts_implementation = "grouped_mm"
    with device:
        model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.train()


def time_step(config: Config, batch: PackedBatch, device: torch.device) -> str:
    """One line: milliseconds, rate, memory."""
    model = peer_model(config, device)
    rows = config.run.micro_batch_size
    tokens = batch.input_ids_T.view(rows, -1).to(device)
    labels = batch.labels_T.view(rows, -1).to(device)

    def step() -> None:
        model(input_ids=tokens, labels=labels, shift_labels=labels, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    timing = measure(step, device, iterations=ITERATIONS)
    rate = model_flops(config, batch) / timing.median / 1e9
    return (
        f"{timing.median:8.2f} ms (min {min(timing.ms):.2f}, max {max(timing.ms):.2f})  {rate:6.1f} TFLOP/s  "
        f"{batch.num_tokens / timing.median * 1e3:,.0f} tokens/s  {timing.peak_bytes / GIB:.1f} GiB  "
        f"first run {timing.first_s:.1f} s"
    )


def main(names: list[str]) -> None:
    """Print a line for each shape."""
    device = torch.device("cuda")
    use_tuned_configs(torch.cuda.get_device_capability(device), ())
    print(f"transformers {importlib.metadata.version('transformers')} on {device_name(device)}")
    for name in names or SHAPES:
        config = load_config([shipped_folder() / name]).config
        print(f"{Path(name).stem:<20}{time_step(config, random_batch(config, packed=False), device)}", flush=True)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main(sys.argv[1:])
