"""How long an optimizer step takes on a rank, for any layout, from the table of rates.

A step of ZeRO-1 is its micro-batches' forward and backward passes, the part of the exchange of tokens that nothing
hides, and the update. Gradients are reduced to their owners during the last backward pass and weights gathered during
the next forward pass (``engine.gradient_buckets``): what does not fit behind them lies open, what does makes their
products slower. ZeRO-2 reduces in every backward pass, which the next forward pass hides as well. ZeRO-3 gathers and
reduces in every micro-batch, of which a smaller share hides, and between nodes, where that is not measured, nothing;
what nobody shares costs what it does under stage 1. No step is shorter than the host takes to launch it, which is what
small models and short slices of rows wait for. Where gradients go DeepSpeed's own way, with an offloaded
optimizer, nothing is hidden.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields, replace

from qwen3next_train.accounting.activations import (
    kv_heads_exchanged,
    passed_state_bytes,
    rows_sent_per_token,
    saved_tensors,
)
from qwen3next_train.accounting.flops import PARTS_OUTSIDE_LAYERS, TRAINING_PASSES, count_mixers, forward_flops
from qwen3next_train.accounting.hardware import Device
from qwen3next_train.accounting.layout import FP32_BYTES, Layout, bytes_of
from qwen3next_train.accounting.memory import ParameterKind, host_bytes_per_gpu, num_shares
from qwen3next_train.config.schema import Config, RecomputePart
from qwen3next_train.planner.rates import LONG_ROW, Rates, rates_of

_NOT_PRODUCTS = frozenset({"attention_scores", "mtp_attention_scores", "gdn_conv", "gdn_delta_rule"})
"""Parts whose time is not that of their FLOPs at the rate of matrix products."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step on one rank, by part; they follow one another and add up to the step.

    Args:
        model_s: forward and backward passes.
        recompute_s: what they compute again.
        exchange_s: tokens to experts and back as far as nothing hides it, the host's waits, work on tokens of other
            ranks, and what products lose to what is hidden.
        context_s: heads of attention, states of Gated DeltaNet and tokens of the mixers between ranks that share rows;
            nothing hides them.
        gradients_s: adding them up.
        reduction_s: reducing gradients and gathering weights as far as nothing hides it, and what products lose.
        update_s: norm and AdamW.
        host_s: of an offloaded optimizer: gradients down, update in host memory, weights up.
        idle_s: the device waits for launches.
    """

    model_s: float
    recompute_s: float
    exchange_s: float
    context_s: float
    gradients_s: float
    reduction_s: float
    update_s: float
    host_s: float
    idle_s: float

    @property
    def total_s(self) -> float:
        """Seconds of the step."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, float]:
        """Seconds by part, without the unit at the end of their names."""
        return {each.name.removesuffix("_s"): getattr(self, each.name) for each in fields(self)}


@dataclass(frozen=True)
class _Elements:
    """Elements of the model under a layout's sizes, whatever else is chosen.

    Args:
        held: on a rank.
        owned: whose optimizer state a rank holds when it is sharded.
        dense: of those held, no expert's.
        dense_alone: of these, what no other rank holds.
        shared: of those held, what other ranks hold too.
        sent: that a rank sends when every element moves once between the ranks that share it.
        seconds_per_byte: that this takes, for elements of one byte.
    """

    held: float
    owned: float
    dense: float
    dense_alone: float
    shared: float
    sent: float
    seconds_per_byte: float


class StepClock:
    """Times of steps of one configuration on one kind of device.

    Args:
        config: its model, global batch and sequence length.
        device: what it runs on.
        kinds: :func:`~qwen3next_train.accounting.memory.parameter_kinds` of the model.
        rates: other ones than the device's.
    """

    def __init__(
        self, config: Config, device: Device, kinds: Counter[ParameterKind], *, rates: Rates | None = None
    ) -> None:
        self.rates = rates_of(device, config.run.precision) if rates is None else rates
        self._config = config
        self._device = device
        self._kinds = kinds
        gdn, attention = count_mixers(config.model)
        depths = config.model.mtp_num_layers
        self._num_layers = config.model.num_hidden_layers + depths
        of_kind = {"gdn": gdn, "attention": attention + depths, "moe": self._num_layers, "other": 1}
        # The search asks for thousands of layouts, of a few sizes.
        self._elements_of: dict[tuple[int, int, int], _Elements] = {}
        self._kept_bytes = sum(
            of_kind[kind] * sum(tensor.bytes_per_token for tensor in tensors if not tensor.only_as_source)
            for kind, tensors in saved_tensors(config.model, config.run.precision).items()
        )

    def step(self, layout: Layout) -> StepTime:
        """One step under a layout whose micro-batches make up the global batch."""
        rates = self.rates
        micro_batches = layout.num_micro_batches(self._config.run.global_batch_size)
        layers_s, scores_s, head_s = self._micro_batch(layout)
        again_s = sum(_recompute_share(rates, part) * layers_s for part in layout.recompute)
        # Scores are computed again with whole layers alone.
        again_s += rates.recompute_layer * scores_s if "layer" in layout.recompute else 0.0
        layers_s += scores_s
        passes_s = layers_s + again_s + head_s
        exchange_s = self._exchange(layout, micro_batches, (layers_s + again_s) * micro_batches)
        gradients_s, update_s = self._gradients(layout, micro_batches)
        host_bytes = 2 * host_bytes_per_gpu(self._config.model, layout, kinds=self._kinds)
        time = StepTime(
            model_s=micro_batches * (layers_s + head_s),
            recompute_s=micro_batches * again_s,
            exchange_s=exchange_s,
            context_s=self._context(layout, micro_batches),
            gradients_s=gradients_s,
            reduction_s=self._reduction(layout, micro_batches, passes_s),
            update_s=update_s,
            # All that lies there is read and written once a step.
            host_s=host_bytes / rates.host_bytes_per_s,
            idle_s=micro_batches * passes_s * rates.idle_fraction + rates.idle_step_s,
        )
        missing_s = micro_batches * self._launching(layout) - time.total_s
        return replace(time, idle_s=time.idle_s + missing_s) if missing_s > 0 else time

    def _launching(self, layout: Layout) -> float:
        """Seconds in which the host launches a micro-batch; it runs ahead of the device where that takes longer."""
        rates = self.rates
        again = sum(
            rates.launch_recompute_layer if part == "layer" else rates.launch_recompute_part
            for part in layout.recompute
        )
        slices_s = rates.launch_slices_s if layout.context_parallel_size > 1 else 0.0
        return self._num_layers * (rates.launch_layer_s * (1 + again) + slices_s)

    def _micro_batch(self, layout: Layout) -> tuple[float, float, float]:
        """Seconds of layers but for attention scores, of these, and of head and loss, without recompute."""
        model, rates, tokens = self._config.model, self.rates, layout.num_tokens
        squared = tokens * layout.sequence_length
        forward = forward_flops(model, num_tokens=tokens, sum_squared_lengths=squared)
        products = {part: TRAINING_PASSES * flops for part, flops in forward.items() if part not in _NOT_PRODUCTS}
        outside = sum(products[part] for part in PARTS_OUTSIDE_LAYERS)
        scores = TRAINING_PASSES * (forward["attention_scores"] + forward["mtp_attention_scores"])
        logits = tokens * model.vocab_size * (1 + model.mtp_num_layers)
        experts = sum(count * kind.numel for kind, count in self._kinds.items() if kind.num_experts)
        layers_s = (
            (sum(products.values()) - outside) / rates.products_flops
            + tokens * self._kept_bytes / rates.kept_bytes_per_s
            + experts / layout.expert_parallel_size / rates.expert_weights_per_s
        )
        is_long = layout.sequence_length >= LONG_ROW
        scores_s = scores / (rates.long_attention_flops if is_long else rates.attention_flops)
        return layers_s, scores_s, outside / rates.products_flops + logits / rates.logits_per_s

    def _exchange(self, layout: Layout, micro_batches: int, layers_s: float) -> float:
        """Seconds that the exchange adds to a step whose layers take ``layers_s``."""
        size, rates = layout.expert_parallel_size, self.rates
        if size == 1:
            return 0.0
        passes = 3 if "layer" in layout.recompute else 2
        crossings = 2 * passes * self._num_layers * micro_batches
        to_rank = layout.num_tokens * rows_sent_per_token(self._config.model, layout) / size
        to_rank *= self._config.model.hidden_size * layout.element_bytes
        near = min(size, self._device.domain_size) - 1
        far = size - 1 - near
        dense = layout.exchanges_densely
        to_peer, to_all = (
            (rates.dense_peer_bytes_per_s, rates.dense_bytes_per_s)
            if dense
            else (rates.exact_peer_bytes_per_s, rates.exact_bytes_per_s)
        )
        # Both ways at a time.
        near_s = max(to_rank / to_peer, to_rank * near / to_all)
        seconds = crossings * max(near_s, to_rank * far / self._network_rate(1))
        alone = rates.dense_exposed if dense else rates.exact_exposed
        paired = (micro_batches - micro_batches % 2) / micro_batches if layout.micro_batches_in_flight > 1 else 0.0
        exposed = seconds * (paired * rates.exposed_in_flight + (1 - paired) * alone)
        exposed = max(exposed, seconds - layers_s)
        sent = crossings * to_rank * (near + far)
        slower_s = sent * (1 - exposed / seconds) / rates.beside_bytes_per_s
        # Of the crossings of a forward and a backward pass, half bring tokens and half what became of them.
        work_s = sent / (2 * passes) / rates.received_bytes_per_s
        waits_s = 0.0 if dense else (passes - 1) * self._num_layers * micro_batches * rates.exact_wait_s
        return exposed + slower_s + work_s + waits_s

    def _context(self, layout: Layout, micro_batches: int) -> float:
        """Seconds of what travels between the ranks that share rows, and of what is computed to pass states.

        Heads there and back, each one's states to all; in a tensor group tokens to the mixers and outputs back.
        """
        size, tensor, model = layout.context_parallel_size, layout.tensor_parallel_size, self._config.model
        gdn_layers, attention_layers = count_mixers(model)
        heads = 2 * (model.num_attention_heads + kv_heads_exchanged(model, size, tensor))
        head_bytes = layout.num_tokens * heads * model.head_dim * layout.element_bytes / size
        state_bytes = passed_state_bytes(model, layout.micro_batch_size, tensor)
        to_slice = (attention_layers + model.mtp_num_layers) * head_bytes + gdn_layers * state_bytes
        to_share = 2 * self._num_layers * layout.num_tokens * model.hidden_size * layout.element_bytes
        between_slices_s = self._to_all(to_slice, size, max(1, self._device.domain_size // tensor))
        between_shares_s = self._to_all(to_share, tensor, self._device.domain_size)
        passes = 3 if "layer" in layout.recompute else 2
        passing_s = 0.0
        if size > 1:
            # In a tensor group a share of the heads, of as many times the tokens.
            values = gdn_layers * layout.num_tokens * model.linear_num_value_heads * model.linear_value_head_dim
            passing_s = values * layout.element_bytes / self.rates.passed_bytes_per_s
        return micro_batches * (passes * (between_slices_s + between_shares_s) + passes / 2 * passing_s)

    def _to_all(self, to_rank: float, size: int, domain_size: int) -> float:
        """Seconds to send so many bytes to each other of ``size`` ranks, ``domain_size`` of which share fast links."""
        near = min(size, domain_size) - 1
        near_s = max(to_rank / self.rates.exact_peer_bytes_per_s, to_rank * near / self.rates.exact_bytes_per_s)
        far_s = to_rank * (size - 1 - near) / self._network_rate(1)
        return max(near_s, far_s) if size > 1 else 0.0

    def _gradients(self, layout: Layout, micro_batches: int) -> tuple[float, float]:
        """Seconds of summing gradients, and of the update on the device."""
        rates, elements = self.rates, self._elements(layout)
        if not layout.updates_in_one_pass:
            # Of an offloaded optimizer, which updates on the host.
            return micro_batches * elements.held * rates.deepspeed_bytes / rates.memory_bytes_per_s, 0.0
        update_s = elements.owned / rates.norm_per_s + elements.owned / rates.adamw_per_s
        if layout.sums_in_buckets:
            return micro_batches * elements.dense / rates.summed_per_s, update_s
        shared_s = elements.shared * rates.stage3_bytes / rates.memory_bytes_per_s
        return micro_batches * (elements.dense_alone / rates.summed_per_s + shared_s), update_s

    def _reduction(self, layout: Layout, micro_batches: int, passes_s: float) -> float:
        """Seconds that reducing gradients and gathering weights add."""
        weights, rates = layout.element_bytes, self.rates
        first = min(layout.micro_batches_in_flight, micro_batches)
        num_passes = -(-micro_batches // layout.micro_batches_in_flight)
        gathered = self._state(layout, weights)
        if layout.sums_in_buckets:
            reduced = self._state(layout, max(bytes_of(layout.gradient_dtype), weights))
            # A backward pass is two thirds of a micro-batch, or of all that are in flight.
            last = first if micro_batches % layout.micro_batches_in_flight == 0 else 1
            windows = [(reduced, last * passes_s * 2 / 3), (gathered, first * passes_s / 3)]
            if layout.zero_stage == 2:
                windows += [(reduced, first * passes_s)] * (num_passes - 1)
            return sum(self._open(*moved, window_s, rates.reduction_hidden) for moved, window_s in windows)
        if layout.zero_stage == 3:
            reduced = self._state(layout, FP32_BYTES)
            # Gathered for the forward and for the backward pass.
            windows = [(gathered, first * passes_s / 3), (gathered, first * passes_s * 2 / 3)]
            windows.append((reduced, first * passes_s))
            # Measured within a node only.
            hidden = rates.stage3_hidden if layout.world_size <= self._device.domain_size else 0.0
            return num_passes * sum(self._open(*moved, window_s, hidden) for moved, window_s in windows)
        # DeepSpeed all-reduces under stages 1 and 2.
        times = micro_batches if layout.zero_stage == 2 else 1
        return self._state(layout, 2 * FP32_BYTES * times + weights)[0]

    def _open(self, seconds: float, sent: float, window_s: float, hidden: float) -> float:
        """What is seen of a transfer, a share ``hidden`` of which hides behind passes of ``window_s``."""
        if not seconds:
            return 0.0
        exposed = max(seconds * (1 - hidden), seconds - window_s)
        return exposed + sent * (1 - exposed / seconds) / self.rates.beside_bytes_per_s

    def _state(self, layout: Layout, bytes_per_element: int) -> tuple[float, float]:
        """Seconds, and bytes that a rank sends, to move every element once between the ranks that share it."""
        elements = self._elements(layout)
        return bytes_per_element * elements.seconds_per_byte, bytes_per_element * elements.sent

    def _elements(self, layout: Layout) -> _Elements:
        sizes = (layout.world_size, layout.expert_parallel_size, layout.tensor_parallel_size)
        if sizes not in self._elements_of:
            self._elements_of[sizes] = self._count(layout)
        return self._elements_of[sizes]

    def _count(self, layout: Layout) -> _Elements:
        held, owned, dense, dense_alone, shared, sent, seconds = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        spans_domains = layout.world_size > self._device.domain_size
        for kind, count in self._kinds.items():
            sets = num_shares(kind, layout)
            ranks = layout.world_size // sets
            of_kind = count * kind.numel / sets
            held, owned = held + of_kind, owned + of_kind * sets / layout.world_size
            dense += 0 if kind.num_experts else of_kind
            dense_alone += 0 if kind.num_experts or ranks > 1 else of_kind
            shared += of_kind if ranks > 1 else 0
            # The members of a group within one domain reduce among themselves first and share their network links.
            links = max(1, self._device.domain_size // sets)
            rate = self._network_rate(links) if spans_domains else self.rates.state_bytes_per_s
            moved = of_kind * (ranks - 1) / ranks
            sent, seconds = sent + moved, seconds + moved / rate
        return _Elements(held, owned, dense, dense_alone, shared, sent, seconds)

    def _network_rate(self, num_links: int) -> float:
        """Bytes per second between domains through the network links of ``num_links`` GPUs."""
        return min(num_links * self.rates.network_bytes_per_s, self.rates.state_bytes_per_s)


def _recompute_share(rates: Rates, part: RecomputePart) -> float:
    """Of the layers' time."""
    shares: dict[RecomputePart, float] = {
        "norms": rates.recompute_norms,
        "activations": rates.recompute_activations,
        "gdn_prologue": rates.recompute_gdn_prologue,
        "layer": rates.recompute_layer,
    }
    return shares[part]
