"""The update behind a step's gradients: their norm, clipping, the skipping of a non-finite step and AdamW.

Nothing waits for the device: the norm and whether the step counts stay there, where AdamW
(:class:`~qwen3next_train.optim.adamw.OnePassAdamW`) reads them, and are on their way to the host meanwhile.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from qwen3next_train.engine.host_copy import HostCopy
from qwen3next_train.optim.adamw import OnePassAdamW


class ClippedUpdate:
    """One update; the optimizer's gradients are those that ``gradients`` names.

    Args:
        optimizer: with its ``gradients`` and ``published`` filled.
        clip_grad: global norm to clip to; 0 not to clip.
        group: ranks whose gradients are parts of one whole.
    """

    def __init__(self, optimizer: OnePassAdamW, clip_grad: float, group: dist.ProcessGroup) -> None:
        self._outcome = HostCopy(torch.zeros(2))
        self._optimizer = optimizer
        self._clip_grad = clip_grad
        self._group = group

    def run(self) -> torch.Tensor:
        """Update, or change nothing where a gradient is not finite.

        Returns:
            norm over all ranks, fp32 ``[]``, infinite if it is not finite.
        """
        norm = self._gradient_norm()
        non_finite = (~torch.isfinite(norm)).float()
        reported = norm.masked_fill(~torch.isfinite(norm), torch.inf)
        # On its way before the update is launched, so that the host can prepare the next step during the update.
        self._outcome = HostCopy(torch.stack([reported, non_finite]))
        clip = self._clip_grad
        scale = torch.clamp((norm + 1e-6) / clip, min=1.0) if clip > 0 else torch.ones_like(norm)
        self._optimizer.grad_scale, self._optimizer.found_inf = scale, non_finite
        self._optimizer.step()
        return reported

    def outcome(self) -> tuple[float, bool]:
        """Gradient norm of the last update, infinite if it is not finite, and whether it was therefore skipped."""
        norm, non_finite = self._outcome.read().tolist()
        return norm, bool(non_finite)

    def _gradient_norm(self) -> torch.Tensor:
        """Over the parts of all ranks; fp32 ``[]``."""
        norms = [_norm(gradient) for gradient in self._optimizer.gradients.values()]
        squares = torch.stack(norms).square().sum().float()
        dist.all_reduce(squares, group=self._group)
        return squares.sqrt()


def _norm(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.device.type == "cpu":
        # A sum of a million fp32 numbers in a row is off by 1e-4 there; CUDA adds them up as a tree.
        gradient = gradient.double()
    return torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
