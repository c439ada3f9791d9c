"""Where the Triton kernels' tests run: on the GPU, or without one on the CPU, by Triton's interpreter (conftest.py)."""

from __future__ import annotations

import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
