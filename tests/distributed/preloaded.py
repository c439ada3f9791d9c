"""What all ranks import, imported once by the process they are forked from (:mod:`tests.distributed.ranks`)."""

import gc
import os

# DeepSpeed chooses its accelerator when it is first imported; the ranks' context is the CPU's.
os.environ["DS_ACCELERATOR"] = "cpu"
# A library asks for GPUs when it is imported. CUDA's own answer would keep the forked ranks from using one.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"

import torch._dynamo  # noqa: F401 - what ZeRO stage 3 imports when it is built

import qwen3next_train.engine.zero_engine  # noqa: F401

# Of what is here nothing becomes garbage; looking through it would cost every rank seconds and copies of all pages.
gc.freeze()
