"""The gated delta rule over packed documents with grouped value heads, in plain torch.

The chunked form is the contract of the backends; the recurrence as written is what it is compared with.

Per value head, with ``a_t = exp(g_t)`` and l2-normalised q, k (Gated DeltaNet, arXiv 2412.06464, eq. 10;
state kept as ``[K, V]``, the transpose of the paper's)::

    S_t = a_t S_{t-1} + beta_t k_t (v_t - a_t S_{t-1}^T k_t)^T        o_t = S_t^T q_t / sqrt(K)

The chunked form (DeltaNet, arXiv 2406.06484, section 3) solves one unit lower triangular system per chunk, so
that only the states at chunk borders are computed one after another.

Letters: T tokens, D documents, H key heads, N value heads, R = N / H value heads per key head, K key head
dim, V value head dim, M chunks, C tokens per chunk, X any columns.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from itertools import pairwise
from typing import NamedTuple

import torch

from qwen3next_train.kernels.varlen import ChunkLayout, VarlenMetadata, gather_rows, scatter_rows

GatedDeltaRule = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
"""A backend of :func:`gated_delta_rule_reference`."""

DeltaRuleSummary = Callable[..., torch.Tensor]
"""A backend of :func:`delta_rule_summary_reference`."""

DeltaStateGradient = Callable[..., torch.Tensor]
"""A backend of :func:`delta_state_gradient_reference`."""

CHUNK_SIZE = 32
"""Tokens per chunk: on CPU faster than 64 at head dim 32 and equal at 128."""


def recurrent_gated_delta_rule(
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
    """What :func:`gated_delta_rule_reference` computes, token by token as the recurrence is written, for comparison."""
    dtype = _compute_dtype(v_TNV)
    group = v_TNV.shape[1] // k_THK.shape[1]
    q_TNK = q_THK.to(dtype).repeat_interleave(group, dim=1) * q_THK.shape[-1] ** -0.5
    k_TNK = k_THK.to(dtype).repeat_interleave(group, dim=1)
    v_TNV, decay_TN, beta_TN = v_TNV.to(dtype), g_TN.to(dtype).exp(), beta_TN.to(dtype)
    outputs, finals = [], []
    for document, (start, end) in enumerate(_spans(sequences)):
        state_NKV = _initial_state(k_TNK, v_TNV, initial_state_DNKV, document)
        for t in range(start, end):
            out_NV, state_NKV = _recur(q_TNK[t], k_TNK[t], v_TNV[t], decay_TN[t], beta_TN[t], state_NKV)
            outputs.append(out_NV)
        finals.append(state_NKV)
    return torch.stack(outputs), torch.stack(finals) if output_final_state else None


def delta_rule_step(
    q_DHK: torch.Tensor,
    k_DHK: torch.Tensor,
    v_DNV: torch.Tensor,
    *,
    g_DN: torch.Tensor,
    beta_DN: torch.Tensor,
    state_DNKV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence for one more token of each document: no chunk to fill, and a cost that no length enters.

    Args:
        q_DHK: l2-normalised queries ``[D, H, K]``.
        k_DHK: l2-normalised keys ``[D, H, K]``.
        v_DNV: values ``[D, N, V]``.
        g_DN: log decay ``[D, N]``.
        beta_DN: write strength ``[D, N]``.
        state_DNKV: state before the token ``[D, N, K, V]``, zero when None.

    Returns:
        outputs ``[D, N, V]`` in the dtype of ``v_DNV``, and the states behind the token in the compute dtype.
    """
    dtype = _compute_dtype(v_DNV)
    group = v_DNV.shape[1] // k_DHK.shape[1]
    q_DNK = q_DHK.to(dtype).repeat_interleave(group, dim=1) * q_DHK.shape[-1] ** -0.5
    k_DNK = k_DHK.to(dtype).repeat_interleave(group, dim=1)
    if state_DNKV is None:
        state_DNKV = k_DNK.new_zeros(*k_DNK.shape, v_DNV.shape[-1])
    out_DNV, state_DNKV = _recur(q_DNK, k_DNK, v_DNV.to(dtype), g_DN.to(dtype).exp(), beta_DN.to(dtype), state_DNKV)
    return out_DNV.to(v_DNV.dtype), state_DNKV


def _recur(
    q_NK: torch.Tensor,
    k_NK: torch.Tensor,
    v_NV: torch.Tensor,
    decay_N: torch.Tensor,
    beta_N: torch.Tensor,
    state_NKV: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One token, q scaled: its output ``[N, V]`` and the state behind it; axes in front of N are carried along."""
    state_NKV = state_NKV * decay_N[..., None, None]
    error_NV = v_NV - torch.einsum("...nkv,...nk->...nv", state_NKV, k_NK)
    state_NKV = state_NKV + torch.einsum("...n,...nk,...nv->...nkv", beta_N, k_NK, error_NV)
    return torch.einsum("...nkv,...nk->...nv", state_NKV, q_NK), state_NKV


def _spans(sequences: VarlenMetadata) -> list[tuple[int, int]]:
    return list(pairwise(sequences.cu_seqlens_cpu.tolist()))


def _initial_state(
    k_TNK: torch.Tensor, v_TNV: torch.Tensor, initial_state_DNKV: torch.Tensor | None, document: int
) -> torch.Tensor:
    if initial_state_DNKV is not None:
        return initial_state_DNKV[document].to(v_TNV.dtype)
    return v_TNV.new_zeros(v_TNV.shape[1], k_TNK.shape[2], v_TNV.shape[2])


def gated_delta_rule_reference(
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
    """Run the rule over each document from ``initial_state_DNKV`` (zero when None), in its chunked form.

    Value head n uses key head ``n // (N / H)``. q is scaled by ``K ** -0.5`` inside. Computed in fp32 (fp64 for fp64
    input).

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
    dtype = _compute_dtype(v_TNV)
    num_tokens, num_value_heads, value_dim = v_TNV.shape
    num_key_heads, key_dim = k_THK.shape[1:]
    group = num_value_heads // num_key_heads
    layout = sequences.chunks(CHUNK_SIZE)
    shape = (layout.num_chunks, num_key_heads, group, layout.size)

    q_MH1CK = _to_chunks(q_THK.to(dtype) * key_dim**-0.5, layout).unsqueeze(2)
    k_MH1CK = _to_chunks(k_THK.to(dtype), layout).unsqueeze(2)
    v_MHRCV = _to_chunks(v_TNV.to(dtype), layout).view(*shape, value_dim)
    gates_MNC2 = _to_chunks(torch.stack((g_TN.to(dtype), beta_TN.to(dtype)), dim=-1), layout)
    log_decay_MHRC, decay_MHRCC = _decays(gates_MNC2[..., 0].reshape(shape))
    beta_MHRC1 = gates_MNC2[..., 1].reshape(*shape, 1)

    # Writes of a chunk as if the state before it were zero (u), and what they lack per unit of that state (w).
    system_MHRCC = (k_MH1CK @ k_MH1CK.mT) * decay_MHRCC * beta_MHRC1
    from_start_MHRC1 = log_decay_MHRC.exp().unsqueeze(-1)
    right_side = torch.cat((v_MHRCV * beta_MHRC1, k_MH1CK * (beta_MHRC1 * from_start_MHRC1)), dim=-1)
    u_MHRCV, w_MHRCK = (_UnitLowerInverse.apply(system_MHRCC) @ right_side).split((value_dim, key_dim), dim=-1)

    to_end_MHRC1 = decay_MHRCC[..., -1, :].unsqueeze(-1)
    writes_MNCV, reads_MNCV, final_sorted = _scan(
        readers=torch.cat((w_MHRCK, q_MH1CK * from_start_MHRC1), dim=-2).flatten(1, 2),
        writes=u_MHRCV.flatten(1, 2),
        keys=(k_MH1CK * to_end_MHRC1).mT.flatten(1, 2),
        decay=log_decay_MHRC[..., -1].exp().flatten(1, 2)[..., None, None],
        layout=layout,
        initial_state_DNKV=initial_state_DNKV,
    )
    scores_MNCC = ((q_MH1CK @ k_MH1CK.mT) * decay_MHRCC).flatten(1, 2)
    out_MNCV = reads_MNCV + scores_MNCC @ writes_MNCV
    out_TNV = gather_rows(out_MNCV.transpose(1, 2).reshape(-1, num_value_heads * value_dim), layout.slots_T)
    final_DNKV = gather_rows(final_sorted, torch.argsort(layout.document_order)) if output_final_state else None
    return out_TNV.view(num_tokens, num_value_heads, value_dim).to(v_TNV.dtype), final_DNKV


def delta_rule_summary_reference(
    k_THK: torch.Tensor,
    v_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: VarlenMetadata,
) -> torch.Tensor:
    """What each document does to the state: S and M of ``S_end = M S_begin + S``. Nobody differentiates it.

    S is the state after it when it begins empty; M is the state after it when it begins with the identity and all
    values are zero.

    Args:
        k_THK: l2-normalised keys ``[T, H, K]``.
        v_TNV: values ``[T, N, V]``.
        g_TN: log decay ``[T, N]``.
        beta_TN: write strength ``[T, N]``.
        sequences: document boundaries.

    Returns:
        ``[D, N, K, V + K]``, ``[S | M]``, in the compute dtype.
    """
    return summary_by(gated_delta_rule_reference)(k_THK, v_TNV, g_TN=g_TN, beta_TN=beta_TN, sequences=sequences)


def summary_by(rule: GatedDeltaRule) -> DeltaRuleSummary:
    """A summary by any backend of the rule, called twice; what its outputs cost is lost."""

    def summarize(
        k_THK: torch.Tensor,
        v_TNV: torch.Tensor,
        *,
        g_TN: torch.Tensor,
        beta_TN: torch.Tensor,
        sequences: VarlenMetadata,
    ) -> torch.Tensor:
        arguments = {"g_TN": g_TN, "beta_TN": beta_TN, "sequences": sequences, "output_final_state": True}
        _, state_DNKV = rule(k_THK, k_THK, v_TNV, **arguments)
        assert state_DNKV is not None
        num_documents, num_heads, key_dim, _ = state_DNKV.shape
        identity = torch.eye(key_dim, dtype=state_DNKV.dtype, device=state_DNKV.device)
        identity_DNKK = identity.repeat(num_documents, num_heads, 1, 1)
        zeros_TNK = v_TNV.new_zeros(*v_TNV.shape[:2], key_dim)
        _, transition_DNKK = rule(k_THK, k_THK, zeros_TNK, **arguments, initial_state_DNKV=identity_DNKK)
        assert transition_DNKK is not None
        return torch.cat((state_DNKV, transition_DNKK), dim=-1)

    return summarize


def delta_state_gradient_reference(
    q_THK: torch.Tensor,
    k_THK: torch.Tensor,
    grad_TNV: torch.Tensor,
    *,
    g_TN: torch.Tensor,
    beta_TN: torch.Tensor,
    sequences: VarlenMetadata,
) -> torch.Tensor:
    """Gradient of the state that each document begins with, by what its outputs are worth. Nobody differentiates it.

    The outputs are linear in that state and in the values apart, so the values are of no matter.

    Args:
        q_THK: l2-normalised queries ``[T, H, K]``.
        k_THK: l2-normalised keys ``[T, H, K]``.
        grad_TNV: gradient of the rule's outputs ``[T, N, V]``.
        g_TN: log decay ``[T, N]``.
        beta_TN: write strength ``[T, N]``.
        sequences: document boundaries.

    Returns:
        ``[D, N, K, V]`` in the compute dtype.
    """
    state_gradient = state_gradient_by(gated_delta_rule_reference)
    return state_gradient(q_THK, k_THK, grad_TNV, g_TN=g_TN, beta_TN=beta_TN, sequences=sequences)


def state_gradient_by(rule: GatedDeltaRule) -> DeltaStateGradient:
    """Such a gradient by any backend of the rule, called forward and backward."""

    def state_gradient(
        q_THK: torch.Tensor,
        k_THK: torch.Tensor,
        grad_TNV: torch.Tensor,
        *,
        g_TN: torch.Tensor,
        beta_TN: torch.Tensor,
        sequences: VarlenMetadata,
    ) -> torch.Tensor:
        shape = sequences.num_documents, grad_TNV.shape[1], k_THK.shape[2], grad_TNV.shape[2]
        with torch.enable_grad():
            state_DNKV = grad_TNV.new_zeros(shape, dtype=_compute_dtype(grad_TNV), requires_grad=True)
            out_TNV, _ = rule(
                q_THK.detach(),
                k_THK.detach(),
                torch.zeros_like(grad_TNV),
                g_TN=g_TN.detach(),
                beta_TN=beta_TN.detach(),
                sequences=sequences,
                initial_state_DNKV=state_DNKV,
            )
        (gradient_DNKV,) = torch.autograd.grad(out_TNV, state_DNKV, grad_TNV)
        return gradient_DNKV

    return state_gradient


class DeltaRule(NamedTuple):
    """The rule, and what passes its state from one slice of a document to the next.

    Args:
        scan: the rule.
        summary: what a slice does to a state.
        state_gradient: gradient of the state that arrives at a slice.
    """

    scan: GatedDeltaRule
    summary: DeltaRuleSummary
    state_gradient: DeltaStateGradient

    @classmethod
    def by(cls, rule: GatedDeltaRule) -> DeltaRule:
        """All by the rule itself, as the references are."""
        return cls(rule, summary_by(rule), state_gradient_by(rule))

    @classmethod
    def loaded_later(cls, rule: GatedDeltaRule, load: Callable[[], DeltaRule]) -> DeltaRule:
        """The rule, and what passes its state as ``load`` returns it when it is first called."""
        loaded = functools.cache(load)
        return cls(
            rule,
            lambda *inputs, **named: loaded().summary(*inputs, **named),
            lambda *inputs, **named: loaded().state_gradient(*inputs, **named),
        )


def _to_chunks(x_THX: torch.Tensor, layout: ChunkLayout) -> torch.Tensor:
    """``[T, heads, X]`` to contiguous ``[M, heads, C, X]``; padding is zero, which neither decays nor writes."""
    padded = scatter_rows(x_THX.flatten(1), layout.slots_T, layout.num_chunks * layout.size)
    return padded.view(layout.num_chunks, layout.size, *x_THX.shape[1:]).transpose(1, 2).contiguous()


def _decays(g_MHRC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Log decay from the chunk's start to each token, and the decay from token j to token i >= j (else 0).

    The running sum is kept in two fp32 parts: after gates near -20 it is in the hundreds, where its fp32
    rounding error alone would change the decay between later tokens by 1e-4.
    """
    exact = g_MHRC.double().cumsum(-1)
    total = exact.to(g_MHRC.dtype)
    rest = (exact - total).detach().to(g_MHRC.dtype)
    difference = (total.unsqueeze(-1) - total.unsqueeze(-2)) + (rest.unsqueeze(-1) - rest.unsqueeze(-2))
    size = g_MHRC.shape[-1]
    # The diagonal is a constant 0: as a difference its two gradients would cancel only up to rounding, which
    # drowns the gradient of strong gates.
    fixed = torch.full((size, size), float("-inf"), dtype=g_MHRC.dtype, device=g_MHRC.device).triu(1)
    past = torch.ones(size, size, dtype=torch.bool, device=g_MHRC.device).tril(-1)
    return total, torch.where(past, difference, fixed).exp()


class _UnitLowerInverse(torch.autograd.Function):
    """Inverse of ``I + strictly_lower(A)``; the backward needs two products where a solve needs two solves."""

    @staticmethod
    def forward(ctx, system):  # type: ignore[no-untyped-def]
        identity = torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
        inverse = torch.linalg.solve_triangular(system, identity.expand_as(system), upper=False, unitriangular=True)
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        (inverse,) = ctx.saved_tensors
        return (inverse.mT @ grad @ inverse.mT).tril_(-1).neg_()


def _scan(
    *,
    readers: torch.Tensor,
    writes: torch.Tensor,
    keys: torch.Tensor,
    decay: torch.Tensor,
    layout: ChunkLayout,
    initial_state_DNKV: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Carry the states over the chunks of all documents at once.

    Args:
        readers: ``[M, N, 2C, K]``, w above the decayed queries.
        writes: ``[M, N, C, V]``, u.
        keys: ``[M, N, K, C]``, keys decayed to the chunk's end.
        decay: ``[M, N, 1, 1]``, decay over the chunk.

    Returns:
        true writes ``[M, N, C, V]``, what the queries read from earlier chunks ``[M, N, C, V]``, and the
        documents' final states ``[D, N, K, V]`` in the layout's order of documents.
    """
    per_step, size = layout.chunks_per_step, layout.size
    if initial_state_DNKV is None:
        shape = (layout.document_order.numel(), keys.shape[1], keys.shape[2], writes.shape[3])
        state = writes.new_zeros(shape)
    else:
        state = initial_state_DNKV.to(writes.dtype).index_select(0, layout.document_order)
    all_writes, all_reads, finals = [], [], []
    # split, not slicing: its backward concatenates once instead of zero-filling the whole for every step.
    steps = zip(
        readers.split(per_step), writes.split(per_step), keys.split(per_step), decay.split(per_step), strict=True
    )
    for reader, write, key, chunk_decay in steps:
        if state.shape[0] != write.shape[0]:
            state, finished = state.split((write.shape[0], state.shape[0] - write.shape[0]))
            finals.append(finished)
        correction, read = (reader @ state).split(size, dim=2)
        write = write - correction
        state = state * chunk_decay + key @ write
        all_writes.append(write)
        all_reads.append(read)
    return torch.cat(all_writes), torch.cat(all_reads), torch.cat([state, *reversed(finals)])


def _compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32
