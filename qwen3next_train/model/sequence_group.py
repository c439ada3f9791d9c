"""Context parallelism as the mixers see it: this rank has a slice of every row, the others of its group have the rest.

Everything but the two mixers takes a slice's tokens for its own. A mixer needs what is before them:

* softmax attention exchanges tokens for heads, so that each rank has all tokens of some heads (:func:`attend_by_heads`,
  DeepSpeed-Ulysses, arXiv 2309.14509); where there are fewer key and value heads than ranks, they are repeated;
* the convolution of Gated DeltaNet reads the last positions of the slice before (:meth:`SlicedSequences.extended`);
* its delta rule takes the state that the tokens before leave behind (:func:`pass_state`).

Letters: T tokens of this rank, U = P T tokens of its group, X tokens of the extended slices (``row_slices``), r rows,
P ranks, D hidden; in attention N query heads, G key/value heads, H head dim; in the delta rule H key heads, N value
heads, K key head dim, V value head dim, D pieces.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks

from qwen3next_train.batch import BatchSlices
from qwen3next_train.kernels.attention import VarlenAttention
from qwen3next_train.kernels.gated_delta_rule import DeltaRule, DeltaRuleSummary, GatedDeltaRule
from qwen3next_train.kernels.varlen import VarlenMetadata
from qwen3next_train.model.recompute import recomputed
from qwen3next_train.row_slices import SlicePlan


class SequenceGroup(Protocol):
    """The ranks that share the tokens of a row, in the order of their slices.

    All of them have to call the same methods in the same order, forward and backward.
    """

    rank: int
    size: int

    def exchange(self, parts_PX: torch.Tensor) -> torch.Tensor:
        """Part p of every rank to rank p: ``[P, ...]`` to ``[P, ...]``, part s from rank s; differentiable."""

    def from_previous(self, rows_X: torch.Tensor) -> torch.Tensor:
        """``[X, ...]`` of the rank before, zeros on the first; differentiable."""

    def gather(self, values: torch.Tensor) -> torch.Tensor:
        """``[...]`` of every rank to ``[P, ...]``; not differentiable."""


@dataclass(frozen=True, eq=False)
class SlicedSequences:
    """The documents of a cut micro-batch, as each operation needs them.

    Args:
        group: this rank among those that have the rest.
        plan: the cuts.
        whole: documents of the uncut micro-batch, U tokens.
        convolved: documents of the extended slices, X tokens.
        scanned: their pieces, halos apart.
        first: the first piece of each slice, one after the other.
        last: the last piece of each slice, likewise.
    """

    group: SequenceGroup
    plan: SlicePlan
    whole: VarlenMetadata
    convolved: VarlenMetadata
    scanned: VarlenMetadata
    first: VarlenMetadata
    last: VarlenMetadata

    @classmethod
    def of(cls, slices: BatchSlices, group: SequenceGroup) -> SlicedSequences:
        """Of a batch on its device."""
        plan = slices.plan
        assert (plan.part.index, plan.part.count) == (group.rank, group.size), "the batch is another rank's"
        host = BatchSlices.of(plan)
        names = ("whole", "convolved", "scanned", "first", "last")
        return cls(group, plan, *(VarlenMetadata(getattr(slices, name), getattr(host, name)) for name in names))

    def extended(self, x_TD: torch.Tensor) -> torch.Tensor:
        """``[T, D]`` to ``[X, D]``: before each row's slice the last positions of the slice before."""
        rows = self.plan.num_rows
        x_TD, tails_rhD = _WithTails.apply(x_TD, rows, self.plan.part.halo)
        before_rhD = self.group.from_previous(tails_rhD)

        def join(x_TD: torch.Tensor, before_rhD: torch.Tensor) -> torch.Tensor:
            return torch.cat((before_rhD, x_TD.unflatten(0, (rows, -1))), dim=1).flatten(0, 1)

        # With the norm that makes x, on which it depends; what has travelled is kept.
        return recomputed("norms", join, x_TD, before_rhD)

    def first_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[X, ...]`` the first piece of each slice."""
        return _ranges(x, self.plan.first_ranges)

    def last_pieces(self, x: torch.Tensor) -> torch.Tensor:
        """Of ``[X, ...]`` the last piece of each slice."""
        return _ranges(x, self.plan.last)

    def own(self, y_XD: torch.Tensor) -> torch.Tensor:
        """``[X, D]`` to ``[T, D]``: without the halos."""
        return y_XD.unflatten(0, (self.plan.num_rows, -1))[:, self.plan.part.halo :].flatten(0, 1)


class _WithTails(torch.autograd.Function):
    """A tensor ``[T, D]`` and besides the last positions of each of its rows ``[r, halo, D]``, contiguous.

    Their gradient is added where they stand: that of a slice is as large as the tensor, and zero elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, x_TD: torch.Tensor, num_rows: int, halo: int) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.num_rows, ctx.halo = num_rows, halo
        return x_TD.view_as(x_TD), x_TD.unflatten(0, (num_rows, -1))[:, -halo:].contiguous()

    @staticmethod
    def backward(ctx: Any, grad_TD: torch.Tensor, grad_rhD: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        total_TD = grad_TD.clone(memory_format=torch.contiguous_format)
        total_TD.unflatten(0, (ctx.num_rows, -1))[:, -ctx.halo :] += grad_rhD
        return total_TD, None, None


def _ranges(x: torch.Tensor, ranges: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The ranges one after the other; of one a view."""
    parts = [x[start:stop] for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend_by_heads(
    attention: VarlenAttention,
    q_TNH: torch.Tensor,
    k_TGH: torch.Tensor,
    v_TGH: torch.Tensor,
    *,
    slices: SlicedSequences,
) -> torch.Tensor:
    """Attention over whole documents: every rank computes some of the heads for all tokens of the group.

    Args:
        attention: selected backend.
        q_TNH: queries of this rank's tokens ``[T, N, H]``; P divides N.
        k_TGH: keys ``[T, G, H]``; one of P and G divides the other.
        v_TGH: values ``[T, G, H]``.
        slices: the micro-batch.

    Returns:
        ``[T, N, H]``.
    """
    size, rows = slices.group.size, slices.plan.num_rows
    repeats = max(1, size // k_TGH.shape[1])
    # The heads of each rank next to each other: query heads, then their key heads, then their value heads. Runs of
    # ``repeats`` ranks have the same of these, which are repeated as they are copied.
    by_run = (
        q_TNH.unflatten(1, (size // repeats, repeats, -1)),
        *(_repeated(x, size, repeats) for x in (k_TGH, v_TGH)),
    )
    heads = [part.shape[3] for part in by_run]
    packed = torch.cat([part.permute(1, 2, 0, 3, 4) for part in by_run], dim=3).flatten(0, 1)
    # Rank p sends slice p of every row: [P, r L, ...] arrives, and [r, P L, ...] are the rows.
    arrived = slices.group.exchange(packed).unflatten(1, (rows, -1))
    q_UNH, k_UGH, v_UGH = arrived.transpose(0, 1).flatten(0, 2).split(heads, dim=1)
    out_UNH = attention(q_UNH, k_UGH, v_UGH, sequences=slices.whole)
    by_rank = out_UNH.unflatten(0, (rows, size, -1)).transpose(0, 1).flatten(1, 2)
    return slices.group.exchange(by_rank).transpose(0, 1).flatten(1, 2)


def _repeated(x_TGH: torch.Tensor, size: int, repeats: int) -> torch.Tensor:
    """Key or value heads ``[T, P / repeats, repeats, G', H]``, a view: G' heads for each of P ranks."""
    return x_TGH.unflatten(1, (size // repeats, 1, -1)).expand(-1, -1, repeats, -1, -1)


def pass_state(
    rule: DeltaRule,
    q_XHK: torch.Tensor,
    k_XHK: torch.Tensor,
    v_XNV: torch.Tensor,
    *,
    g_XN: torch.Tensor,
    beta_XN: torch.Tensor,
    slices: SlicedSequences,
) -> torch.Tensor:
    """The delta rule over whole documents: each slice takes the state that the slices before it leave.

    One gather of every slice's summary (the state it leaves when it begins empty, and the matrix that takes an arriving
    state to its end) lets every rank compute the state that arrives there, and the rule starts from it. Backward, the
    gradient of an arriving state is what the slice's outputs say of it, and what arrives from the slice behind, taken
    through the same matrix: a second gather, and the chain from the other end. Nothing is differentiated through the
    matrices.

    Args:
        rule: selected backends.
        q_XHK: queries of the extended slices, as of the rule.
        k_XHK: keys.
        v_XNV: values.
        g_XN: log decays.
        beta_XN: write strengths.
        slices: the micro-batch.

    Returns:
        ``[X, N, V]``; of halos what means nothing, and has no gradient if nobody reads it.
    """
    operands = (q_XHK, k_XHK, v_XNV, g_XN, beta_XN)
    arriving_rNKV, transition_rNKK = _arriving_state(rule.summary, *operands[1:], slices=slices)
    if not torch.is_grad_enabled():
        return _scan(rule.scan, operands, _initial(arriving_rNKV, slices), slices)[0]
    return _PassedState.apply(rule, slices, arriving_rNKV, transition_rNKK, *operands)


def arriving_states(
    states_PrNKV: torch.Tensor, transitions_PrNKK: torch.Tensor, plan: SlicePlan, *, rank: int
) -> torch.Tensor:
    """The state that arrives at the slices of ``rank`` ``[r, N, K, V]``, zero where they begin with a document.

    Args:
        states_PrNKV: what each rank's slices leave when they begin empty ``[P, r, N, K, V]``.
        transitions_PrNKK: what takes an arriving state to a slice's end ``[P, r, N, K, K]``, where the slice lies in
            one document.
        plan: the cuts.
        rank: whose.
    """
    arriving = []
    for row in range(plan.num_rows):
        state_NKV = None
        for before in range(rank):
            if not plan.continues[before + 1][row]:
                state_NKV = None
            elif plan.passes[before][row] and state_NKV is not None:
                state_NKV = torch.baddbmm(states_PrNKV[before, row], transitions_PrNKK[before, row], state_NKV)
            else:
                state_NKV = states_PrNKV[before, row]
        arriving.append(state_NKV)
    return _stacked(arriving, like=states_PrNKV)


def leaving_gradients(
    grads_PrNKV: torch.Tensor, transitions_PrNKK: torch.Tensor, plan: SlicePlan, *, rank: int
) -> torch.Tensor:
    """The gradient of the state that the slices of ``rank`` leave ``[r, N, K, V]``; adjoint of :func:`arriving_states`.

    Args:
        grads_PrNKV: gradients of the states that arrive at each rank's slices, by their own outputs
            ``[P, r, N, K, V]``.
        transitions_PrNKK: as of :func:`arriving_states`.
        plan: the cuts.
        rank: whose.
    """
    leaving = []
    for row in range(plan.num_rows):
        grad_NKV = None
        for behind in range(plan.part.count - 1, rank, -1):
            if not plan.continues[behind][row]:
                grad_NKV = None
            elif plan.passes[behind][row] and grad_NKV is not None:
                grad_NKV = torch.baddbmm(grads_PrNKV[behind, row], transitions_PrNKK[behind, row].mT, grad_NKV)
            else:
                grad_NKV = grads_PrNKV[behind, row]
        leaving.append(grad_NKV)
    return _stacked(leaving, like=grads_PrNKV)


def _stacked(rows_NKV: Sequence[torch.Tensor | None], *, like: torch.Tensor) -> torch.Tensor:
    """``[r, N, K, V]``, zero where there is None; by itself in memory, unlike what ranks have gathered."""
    if len(rows_NKV) > 1:
        return torch.stack([like.new_zeros(like.shape[2:]) if row is None else row for row in rows_NKV])
    (row_NKV,) = rows_NKV
    return like.new_zeros(like.shape[1:]) if row_NKV is None else row_NKV.unsqueeze(0).contiguous()


@torch.no_grad()
def _arriving_state(
    summary: DeltaRuleSummary,
    k_XHK: torch.Tensor,
    v_XNV: torch.Tensor,
    g_XN: torch.Tensor,
    beta_XN: torch.Tensor,
    *,
    slices: SlicedSequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The state that arrives here ``[r, N, K, V]``, and this rank's transitions ``[r, N, K, K]``."""
    last = slices.last_pieces
    own_rNKX = summary(last(k_XHK), last(v_XNV), g_TN=last(g_XN), beta_TN=last(beta_XN), sequences=slices.last)
    dims = v_XNV.shape[-1], k_XHK.shape[-1]
    states_PrNKV, transitions_PrNKK = slices.group.gather(own_rNKX).split(dims, dim=-1)
    arriving_rNKV = arriving_states(states_PrNKV, transitions_PrNKK, slices.plan, rank=slices.group.rank)
    return arriving_rNKV, own_rNKX[..., dims[0] :].contiguous()


def _scan(
    rule: GatedDeltaRule,
    operands: Sequence[torch.Tensor],
    initial_DNKV: torch.Tensor,
    slices: SlicedSequences,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs ``[X, N, V]`` and the states at the pieces' ends ``[D, N, K, V]``."""
    q_XHK, k_XHK, v_XNV, g_XN, beta_XN = operands
    out_XNV, final_DNKV = rule(
        q_XHK,
        k_XHK,
        v_XNV,
        g_TN=g_XN,
        beta_TN=beta_XN,
        sequences=slices.scanned,
        initial_state_DNKV=initial_DNKV,
        output_final_state=True,
    )
    assert final_DNKV is not None
    return out_XNV, final_DNKV


def _initial(arriving_rNKV: torch.Tensor, slices: SlicedSequences) -> torch.Tensor:
    """The state with which each piece begins ``[D, N, K, V]``."""
    return _spread(arriving_rNKV, slices.plan.first, slices.scanned.num_documents)


def _spread(states_rNKV: torch.Tensor, pieces: Sequence[int], num_pieces: int) -> torch.Tensor:
    """One state by row to one by piece, zero for those that are not named."""
    states_DNKV = states_rNKV.new_zeros(num_pieces, *states_rNKV.shape[1:])
    for row, piece in enumerate(pieces):
        states_DNKV[piece] = states_rNKV[row]
    return states_DNKV


class _PassedState(torch.autograd.Function):
    """:func:`_scan` and, for its gradient, what travels between the ranks.

    The gradient of the state at a slice's end is made of those of the states that arrive at the ranks behind, and must
    be there before the rule's backward begins: so another operation computes the gradient of an arriving state alone.
    The rule's own graph is kept here without tensors; those it saves are saved as this function's, so that whoever
    recomputes or counts saved tensors meets each of them once.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rule: DeltaRule,
        slices: SlicedSequences,
        arriving_rNKV: torch.Tensor,
        transition_rNKK: torch.Tensor,
        *operands: torch.Tensor,
    ) -> torch.Tensor:
        initial_DNKV = _initial(arriving_rNKV, slices)
        saved = _Saved(initial_DNKV)
        with torch.enable_grad():
            anchor = torch.zeros((), requires_grad=True)
            inputs = _Roots.apply(anchor, *(x.detach() for x in operands))
            with saved_tensors_hooks(saved.pack, saved.unpack):
                out_XNV, final_DNKV = _scan(rule.scan, inputs, initial_DNKV, slices)
        ctx.rule, ctx.slices, ctx.saved = rule, slices, saved
        ctx.inputs = list(map(get_gradient_edge, inputs))
        ctx.outputs = get_gradient_edge(out_XNV), get_gradient_edge(final_DNKV)
        q_XHK, k_XHK, _, g_XN, beta_XN = operands
        ctx.save_for_backward(arriving_rNKV, transition_rNKK, q_XHK, k_XHK, g_XN, beta_XN, *saved.take())
        return out_XNV.detach()

    @staticmethod
    def backward(ctx: Any, grad_XNV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        arriving_rNKV, transition_rNKK, q_XHK, k_XHK, g_XN, beta_XN, *tensors = ctx.saved_tensors
        rule: DeltaRule = ctx.rule
        slices: SlicedSequences = ctx.slices
        first = slices.first_pieces
        of_arriving_rNKV = rule.state_gradient(
            first(q_XHK),
            first(k_XHK),
            first(grad_XNV),
            g_TN=first(g_XN),
            beta_TN=first(beta_XN),
            sequences=slices.first,
        )
        # One message: it takes hardly longer than its latency.
        message = torch.cat((of_arriving_rNKV, transition_rNKK.to(of_arriving_rNKV.dtype)), dim=-1)
        dims = of_arriving_rNKV.shape[-1], transition_rNKK.shape[-1]
        grads_PrNKV, transitions_PrNKK = slices.group.gather(message).split(dims, dim=-1)
        leaving_rNKV = leaving_gradients(grads_PrNKV, transitions_PrNKK, slices.plan, rank=slices.group.rank)
        leaving_DNKV = _spread(leaving_rNKV, slices.plan.last_pieces, slices.scanned.num_documents)
        ctx.saved.put(tensors, _initial(arriving_rNKV, slices))
        grads = torch.autograd.grad(ctx.outputs, ctx.inputs, (grad_XNV, leaving_DNKV))
        ctx.saved.take()
        return None, None, None, None, *grads


class _Roots(torch.autograd.Function):
    """Where a graph begins that is to hold none of its inputs."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        return (None,) * (1 + len(grads))


class _Saved:
    """What a graph has saved, kept elsewhere between its forward and its backward pass.

    Args:
        initial_DNKV: is not kept: one state by row is, of which it is made again; there may be many more documents.
    """

    def __init__(self, initial_DNKV: torch.Tensor) -> None:
        self._tensors: list[torch.Tensor] = []
        self._initial_DNKV: torch.Tensor | None = initial_DNKV.detach()

    def pack(self, tensor: torch.Tensor) -> int | None:
        """What the graph keeps of a tensor."""
        initial_DNKV = self._initial_DNKV
        assert initial_DNKV is not None
        if tensor.data_ptr() == initial_DNKV.data_ptr() and tensor.shape == initial_DNKV.shape:
            return None
        # Not to hold the graph. What needs no gradient stays the object it is: a kernel may know the document starts by
        # it, with what it has derived from them, and would else derive it again in every layer, waiting for the device.
        self._tensors.append(tensor.detach() if tensor.requires_grad else tensor)
        return len(self._tensors) - 1

    def unpack(self, index: int | None) -> torch.Tensor:
        """The tensor, while it is there."""
        tensor = self._initial_DNKV if index is None else self._tensors[index]
        assert tensor is not None
        return tensor

    def take(self) -> list[torch.Tensor]:
        """All of them, forgotten here."""
        tensors, self._tensors, self._initial_DNKV = self._tensors, [], None
        return tensors

    def put(self, tensors: list[torch.Tensor], initial_DNKV: torch.Tensor) -> None:
        """Bring them back."""
        self._tensors, self._initial_DNKV = tensors, initial_DNKV
