"""The gated delta rule over packed documents with grouped value heads: contract of its backends.

Letters: T tokens, D documents, H key heads, N value heads (a multiple of H), K key head dim, V value head dim.
"""

from __future__ import annotations

from typing import Protocol

import torch

from qwen3next_train.kernels.varlen import VarlenMetadata


class GatedDeltaRule(Protocol):
    """What every backend computes."""

    def __call__(
        self,
        q_THK: torch.Tensor,
        k_THK: torch.Tensor,
        v_TNV: torch.Tensor,
        *,
        g_TN: torch.Tensor,
        beta_TN: torch.Tensor,
        sequences: VarlenMetadata,
        initial_state_DNKV: torch.Tensor | None = None,
        output_final_state: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Run the rule over each document from ``initial_state_DNKV`` (zero when None).

        Value head n uses key head ``n // (N / H)``. q is scaled by ``K ** -0.5`` inside. Computed in fp32 (fp64
        for fp64 input).

        Args:
            q_THK: l2-normalised queries ``[T, H, K]``.
            k_THK: l2-normalised keys ``[T, H, K]``.
            v_TNV: values ``[T, N, V]``.
            g_TN: log decay ``[T, N]``, at most 0.
            beta_TN: write strength ``[T, N]`` in [0, 1].
            sequences: document boundaries.
            initial_state_DNKV: state before each document's first token ``[D, N, K, V]``.
            output_final_state: training reads none; a backend that writes none is spared reading its gradient.

        Returns:
            outputs ``[T, N, V]`` in the dtype of ``v_TNV``, and, if asked for, the state after each document's last
            token ``[D, N, K, V]`` in the compute dtype.
        """
