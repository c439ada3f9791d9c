"""Activation checkpointing by parts: what is cheap to compute is computed again in the backward pass, not kept.

A plain checkpoint around a norm saves nothing, because the linear layer behind it keeps the norm's output. Here a
function's outputs are replaced wherever anyone saves them for the backward pass, whoever that is: by a reference that
computes them again from the function's inputs, once, when the first of them is asked for
(``torch.autograd.graph.saved_tensors_hooks``). The same holds for what is saved inside the function. The autograd
graph is the one that there is without recompute, so gradients are the same bit for bit; but a norm that is recomputed
is not fused with the sum before it, which another kernel then computes; in bf16 they are the same within rounding.

A part of a layer is marked where it is computed: ``recomputed("norms", function, *inputs)``. Marks do nothing outside
of :func:`recomputing`, under ``no_grad`` and inside another function that is being recomputed. Do not mark what makes
the residual stream: its recomputation would reach back through all layers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

from qwen3next_train.config.schema import RecomputePart
from qwen3next_train.model.router_losses import RouterStats

R = TypeVar("R")

# Of the thread that runs the forward pass; backward passes run without one.
_active: ContextVar[_ForwardPass | None] = ContextVar("recompute", default=None)


@contextmanager
def recomputing(parts: Collection[RecomputePart], *, weights_stay: bool = True) -> Iterator[None]:
    """Recompute the marked ``parts`` of what is computed inside; to be put around one forward pass of a model.

    Args:
        parts: what is recomputed.
        weights_stay: parameters are whole whenever a backward pass runs. Under ZeRO-3 they are not where another
            module's backward asks for the recomputation, so the few small ones that are read are copied.
    """
    token = _active.set(_ForwardPass(frozenset(parts), weights_stay=weights_stay) if parts else None)
    try:
        current = _active.get()
        if current is None or current.parts == {"layer"}:
            yield
        else:
            with saved_tensors_hooks(current.pack, _unpack):
                yield
    finally:
        _active.reset(token)


def recomputed(part: RecomputePart, function: Callable[..., R], *inputs: torch.Tensor) -> R:
    """``function(*inputs)``, its tensors recomputed in the backward pass if ``part`` is recomputed.

    Args:
        part: what the function belongs to.
        function: pure and deterministic, without random numbers, communication or calls of modules (whose hooks
            must run once). It may read constants besides its inputs.
        inputs: what it is computed from again, small parameters included; they are kept, or recomputed themselves.

    Returns:
        The function's result, a tensor or a tuple of tensors.
    """
    current = _active.get()
    if current is None or not is_recomputed(part):
        return function(*inputs)
    return current.run(function, inputs)


def is_recomputed(part: RecomputePart) -> bool:
    """Whether :func:`recomputed` does more for ``part`` than to call the function."""
    current = _active.get()
    return current is not None and part in current.parts and torch.is_grad_enabled()


def recomputed_layer(
    layer: Callable[..., tuple[*tuple[torch.Tensor, ...], list[RouterStats]]],
    contexts: Sequence[Any],
    *xs_TD: torch.Tensor,
) -> tuple[list[torch.Tensor], list[RouterStats]]:
    """``layer(contexts, *xs)``: its activations, and its routers' statistics.

    If ``layer`` is recomputed, of all it computes only its inputs are kept. All of it runs again, its collectives in
    their order on every rank, before anything of it runs backward: under ZeRO-3 a module's weights are gathered before
    its backward and released after its forward, which must not lie within it.

    Args:
        layer: pure and deterministic, without random numbers.
        contexts: what it needs to know of the micro-batches, without gradients.
        xs_TD: ``[T, D]``, the micro-batches in flight.
    """
    current = _active.get()
    if current is None or "layer" not in current.parts or not torch.is_grad_enabled():
        *outs_TD, stats = layer(contexts, *xs_TD)
        return outs_TD, stats
    if not any(x_TD.requires_grad for x_TD in xs_TD):
        # Behind weights that are held fixed: without a node, which sees no weights, the layer would get no gradients.
        xs_TD = tuple(x_TD.detach().requires_grad_() for x_TD in xs_TD)
    token = _active.set(None)
    try:
        results = _RecomputedLayer.apply(layer, contexts, *xs_TD)
    finally:
        _active.reset(token)
    return list(results[: len(xs_TD)]), _joined_stats(results[len(xs_TD) :])


class _RecomputedLayer(torch.autograd.Function):
    """A layer without a graph until its backward, which computes it again with one and runs backward through that.

    ``torch.utils.checkpoint`` would build the graph twice and call a hook for each tensor that is saved in either, at
    a host's time that a GPU notices where its micro-batches are small. Parameters get their gradients in the inner
    backward pass, while ZeRO-3 has their weights together; ``torch.autograd.grad`` of a loss finds none of them.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: Callable[..., Any], contexts: Sequence[Any], *xs_TD: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.layer, ctx.contexts = layer, contexts
        ctx.save_for_backward(*xs_TD)
        *outs_TD, stats = layer(contexts, *xs_TD)
        ctx.mark_non_differentiable(*(tensor for each in stats for tensor in (each.counts_rE, each.entropy)))
        return (*outs_TD, *_tensors_of(stats))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        xs_TD = [x_TD.detach().requires_grad_(x_TD.requires_grad) for x_TD in ctx.saved_tensors]
        with torch.enable_grad():
            *outs_TD, stats = ctx.layer(ctx.contexts, *xs_TD)
        results = (*outs_TD, *_tensors_of(stats))
        given = [(y, grad) for y, grad in zip(results, grads, strict=True) if grad is not None and y.requires_grad]
        torch.autograd.backward([y for y, _ in given], [grad for _, grad in given])
        return None, None, *(x_TD.grad for x_TD in xs_TD)


def _tensors_of(stats: Sequence[RouterStats]) -> list[torch.Tensor]:
    return [tensor for each in stats for tensor in (each.mean_prob_rE, each.counts_rE, each.z, each.entropy)]


def _joined_stats(tensors: Sequence[torch.Tensor]) -> list[RouterStats]:
    """The inverse of :func:`_tensors_of`."""
    return [RouterStats(*tensors[start : start + 4]) for start in range(0, len(tensors), 4)]


@dataclass(frozen=True, eq=False)
class _Kept:
    """A tensor that stays, and the version it must still have when something is recomputed from it."""

    tensor: torch.Tensor
    version: int

    def get(self) -> torch.Tensor:
        assert self.tensor._version == self.version, "modified in place before it was used to recompute"
        return self.tensor


@dataclass(frozen=True, eq=False)
class _Intermediate:
    """What the ``position``-th tensor saved inside a function will be."""

    function_call: _CheckpointedFunction
    position: int

    def get(self) -> torch.Tensor:
        return self.function_call.recompute().intermediates[self.position]


@dataclass(frozen=True, eq=False)
class _Output:
    """What a view of a function's output will be."""

    function_call: _CheckpointedFunction
    index: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def get(self) -> torch.Tensor:
        return self.function_call.recompute().outputs[self.index].as_strided(self.size, self.stride, self.offset)


class _Recomputed:
    """Tensors that were computed again, for use on any CUDA stream: a layer's backward pass may have several.

    Args:
        intermediates: what was saved inside the function.
        outputs: what it returned.
    """

    def __init__(self, intermediates: list[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> None:
        self.intermediates = intermediates
        self.outputs = outputs
        self._made_on: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None
        if outputs[0].is_cuda:
            stream = torch.cuda.current_stream(outputs[0].device)
            self._made_on = stream, stream.record_event()

    def wait(self) -> None:
        """Make the current stream wait for the tensors, and the allocator for the current stream."""
        if self._made_on is None:
            return
        stream, done = self._made_on
        current = torch.cuda.current_stream(self.outputs[0].device)
        if current != stream:
            current.wait_event(done)
            for tensor in (*self.intermediates, *self.outputs):
                tensor.record_stream(current)


class _CheckpointedFunction:
    """How to compute a function's tensors again.

    Alive as long as the graph refers to one of them, and so is the memo of the backward pass.

    Args:
        function: the function.
        inputs: references to its inputs and whether each requires a gradient.
    """

    def __init__(self, function: Callable[..., Any], inputs: list[tuple[_Kept | _Output, bool]]) -> None:
        self.num_intermediates = 0
        self._function = function
        self._inputs = inputs
        self._memo: _Recomputed | None = None

    def recompute(self) -> _Recomputed:
        """The tensors, computed at the first call."""
        if self._memo is None:
            inputs = [ref.get().detach().requires_grad_(grad) for ref, grad in self._inputs]
            own = {_storage_id(tensor) for tensor in inputs}
            intermediates: list[torch.Tensor] = []

            def record(tensor: torch.Tensor) -> None:
                if not _stays(tensor, own):
                    intermediates.append(tensor.detach())

            with torch.enable_grad(), saved_tensors_hooks(record, _never):
                outputs = _as_tuple(self._function(*inputs))
            assert len(intermediates) == self.num_intermediates, "recomputed another graph than in the forward pass"
            self._memo = _Recomputed(intermediates, tuple(output.detach() for output in outputs))
            self._inputs.clear()
        self._memo.wait()
        return self._memo


@dataclass(frozen=True, eq=False)
class _Entry:
    """An output that can be recomputed, for as long as its storage is alive.

    The weak reference keeps the storage's address from being used again.
    """

    storage: StorageWeakRef
    function_call: _CheckpointedFunction
    index: int
    version: int
    dtype: torch.dtype


class _ForwardPass:
    """One forward pass.

    Args:
        parts: what is recomputed.
        weights_stay: parameters need no copy.
    """

    def __init__(self, parts: frozenset[RecomputePart], *, weights_stay: bool) -> None:
        self.parts = parts
        self._weights_stay = weights_stay
        self._outputs: dict[int, _Entry] = {}
        self._under_way: _CheckpointedFunction | None = None
        self._own: set[int] = set()

    def run(self, function: Callable[..., R], inputs: tuple[torch.Tensor, ...]) -> R:
        """``function(*inputs)``, remembering how to do it again."""
        if self._under_way is not None:
            return function(*inputs)
        refs = [(self._ref(tensor) or self._keep(tensor), tensor.requires_grad) for tensor in inputs]
        self._under_way = _CheckpointedFunction(function, refs)
        self._own = {_storage_id(tensor) for tensor in inputs}
        try:
            result = function(*inputs)
            self._remember(self._under_way, _as_tuple(result))
        finally:
            self._under_way = None
        return result

    def pack(self, tensor: torch.Tensor) -> object:
        """What autograd keeps in place of ``tensor``."""
        function_call = self._under_way
        if function_call is not None and not _stays(tensor, self._own):
            function_call.num_intermediates += 1
            return _Intermediate(function_call, function_call.num_intermediates - 1)
        return self._ref(tensor) or tensor

    def _keep(self, tensor: torch.Tensor) -> _Kept:
        if isinstance(tensor, torch.nn.Parameter) and not self._weights_stay:
            tensor = tensor.detach().clone()
        return _Kept(tensor, tensor._version)

    def _ref(self, tensor: torch.Tensor) -> _Output | None:
        """How to recompute ``tensor``; None if it is no output, or was changed since."""
        entry = self._outputs.get(_storage_id(tensor))
        if entry is None or (entry.version, entry.dtype) != (tensor._version, tensor.dtype):
            return None
        return _Output(entry.function_call, entry.index, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

    def _remember(self, function_call: _CheckpointedFunction, outputs: tuple[torch.Tensor, ...]) -> None:
        self._outputs = {key: entry for key, entry in self._outputs.items() if not entry.storage.expired()}
        for index, output in enumerate(outputs):
            key = _storage_id(output)
            # Several outputs in one storage are all reached from the first; an input handed through is not new.
            if key not in self._own and key not in self._outputs:
                storage = StorageWeakRef(output.untyped_storage())
                self._outputs[key] = _Entry(storage, function_call, index, output._version, output.dtype)


def _unpack(packed: Any) -> torch.Tensor:
    return packed if isinstance(packed, torch.Tensor) else packed.get()


def _never(packed: object) -> torch.Tensor:
    raise AssertionError("nobody runs backward through the recomputation itself")


def _stays(tensor: torch.Tensor, own: set[int]) -> bool:
    """Whether a tensor saved inside a function is one of its inputs or a parameter, which are there anyway."""
    return (tensor.is_leaf and tensor.requires_grad) or _storage_id(tensor) in own


def _storage_id(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return (result,) if isinstance(result, torch.Tensor) else tuple(result)
