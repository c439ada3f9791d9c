"""What the kernels' self-test tries each operation on: inputs, the backend and the definition."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from qwen3next_train.kernels.varlen import VarlenMetadata

LENGTHS = (65, 1, 64, 62)
NUM_TOKENS = sum(LENGTHS)
EPS = 1e-6

Outputs = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Case:
    """One operation on one set of inputs.

    Args:
        inputs: fp64, on the device; each gets a gradient.
        kernel: the backend, called with the inputs by name.
        reference: the definition, called likewise.
        fp32_inputs: inputs that the model keeps in fp32 when activations are narrower.
        cancelling: inputs whose gradient is a small difference of large terms, see :data:`CANCELLATION`.
    """

    inputs: Mapping[str, torch.Tensor]
    kernel: Callable[..., Outputs]
    reference: Callable[..., Outputs]
    fp32_inputs: frozenset[str] = frozenset()
    cancelling: frozenset[str] = frozenset()


CANCELLATION = 5
"""How much more of a cancelling gradient may be wrong in bf16 than of others.

The decay's is a running sum over a document of ``<q, dq> - <k, dk>``. Rounding the true dq and dk to bf16 once changes
it by 1.2e-2 for the cases' heads, up to 5e-2 for a single head, where it changes dq and dk by 2e-3 themselves.
"""


@dataclass(frozen=True)
class RandomInputs:
    """fp64 values drawn on the host, so that every device gets the same."""

    generator: torch.Generator
    device: torch.device

    def normal(self, *shape: int) -> torch.Tensor:
        """Standard normal."""
        return torch.randn(shape, dtype=torch.float64, generator=self.generator).to(self.device)

    def uniform(self, *shape: int) -> torch.Tensor:
        """Between 0 and 1."""
        return torch.rand(shape, dtype=torch.float64, generator=self.generator).to(self.device)

    def packings(self) -> Iterator[VarlenMetadata]:
        """Documents of odd lengths, then one document."""
        for lengths in (LENGTHS, (NUM_TOKENS,)):
            yield VarlenMetadata.from_lengths(lengths, self.device)


def capped(size: int, limit: int = 1024) -> int:
    """A size of matrices that is quick to multiply and as aligned as ``size``."""
    return size if size <= limit else limit + size % 128
