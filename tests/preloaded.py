"""What training imports, imported once by the process that others are forked from (:mod:`tests.forked`)."""

import gc
import os

# DeepSpeed chooses its accelerator when it is first imported; their process context is the CPU's.
os.environ["DS_ACCELERATOR"] = "cpu"
# A library asks for GPUs when it is imported. CUDA's own answer would keep forked processes from using one.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import tokenizers  # noqa: F401 - the text's; imported when a run reads it
import torch._dynamo  # noqa: F401 - what ZeRO stage 3 imports when it is built

import qwen3next_train.cli.outcome

# What a command line imports when it has come that far: a third of the time of a run of a few steps.
import qwen3next_train.cli.program
import qwen3next_train.engine.zero_engine
import qwen3next_train.train.build
import qwen3next_train.train.profiling
import qwen3next_train.train.run  # noqa: F401

# Of what is here nothing becomes garbage; looking through it would cost every process seconds and copies of all pages.
gc.freeze()
