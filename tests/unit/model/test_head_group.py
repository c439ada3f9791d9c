from __future__ import annotations

import pytest
import torch

from qwen3next_train.model.head_group import mixed_by_heads


class TwoRanks:
    """Both ranks of a group in turn: the other's tokens are known, and its term is ten times this one's."""

    size = 2

    def __init__(self, rank: int, tokens: list[torch.Tensor]) -> None:
        self.rank = rank
        self._tokens = tokens

    def gather(self, x_TD: torch.Tensor) -> torch.Tensor:
        assert torch.equal(x_TD, self._tokens[self.rank])
        return torch.cat(self._tokens)

    def add_up(self, y_UD: torch.Tensor) -> torch.Tensor:
        return 11 * y_UD.chunk(2)[self.rank]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("num_rows", [1, 2, 3])
def test_a_mixer_sees_whole_rows_and_a_rank_keeps_its_shares(rank: int, num_rows: int) -> None:
    rows = torch.arange(num_rows * 4.0).view(num_rows, 4, 1)
    shares = [share.flatten(0, 1) for share in rows.chunk(2, dim=1)]
    seen = []

    def mixer(x_UD: torch.Tensor) -> torch.Tensor:
        seen.append(x_UD)
        return x_UD + 0.5

    found = mixed_by_heads(mixer, shares[rank], group=TwoRanks(rank, shares), num_rows=num_rows)
    assert torch.equal(seen[0], rows.flatten(0, 1))
    assert torch.equal(found, 11 * (shares[rank] + 0.5))
