"""The table of rates that the time of a step is computed from, and where each was measured.

``H100`` and ``H200`` are NVIDIA H100 80GB HBM3 and H200, both on NVLink in nodes of eight, with the software of the
records: torch 2.11.0+cu130, NCCL 2.28.9, Triton 3.7.1, flash-linear-attention 0.6.0, DeepSpeed 0.19.8. A rate of
another device is that of the H100 times the ratio of their peak FLOP/s, or of their links for what travels by them: an
estimate. Nothing has been measured between nodes; those figures say where they are from.

``docs/benchmarks`` has the records: *steps* is ``whole-steps.md``, *micro-batches* ``one-hopper-gpu.md``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from qwen3next_train.accounting.hardware import Device, Precision, find_device

_PROFILED = "steps, 2026-11-27, one H100, slice4_e512 with 128 experts, four micro-batches, by kernel"
_FOUR = "steps, 2026-11-27, four H100 of one host, slice4_e512"
_TWO = "steps, 2026-11-28, two H200 of one host, slice4_e512, EP 2, dense, four micro-batches"
_PARTS = "micro-batches, 2026-11-26, one H200, ep8_proxy, share of the layers' time"


LONG_ROW = 16384
"""Tokens of a row from which on attention runs at its full rate."""


class Rate(NamedTuple):
    """One row of the table.

    Args:
        h100: on an H100.
        h200: on an H200.
        scales: with which figure of another device it grows: its peak FLOP/s, its link, or none.
        source: where and when it was measured, or what it is taken from.
    """

    h100: float
    h200: float
    scales: Literal["peak", "link", "no"]
    source: str


def _of_memory(h100: float, source: str) -> Rate:
    """A rate that memory bounds, 1.22 times as high on an H200: layers of ep8_proxy, products and attention left out,
    take 95.7 ms there and 78.5 ms here.
    """
    return Rate(h100, 1.22 * h100, "peak", f"{source}; H200: micro-batches, 2026-11-26, ep8_proxy")


def _alike(value: float, scales: Literal["peak", "link", "no"], source: str) -> Rate:
    """One value for both."""
    return Rate(value, value, scales, source)


TABLE: dict[str, Rate] = {
    # The model.
    "products_flops": _alike(750e12, "peak", f"{_PROFILED}; the head alone is as fast on an H200"),
    "attention_flops": _alike(307e12, "peak", f"{_PROFILED} (cuDNN)"),
    "long_attention_flops": _alike(
        370e12,
        "peak",
        "long rows, 2026-11-28, one H200, cuDNN, 16,384 to 65,536 tokens: 611 to 663 forward, 382 to 387 back",
    ),
    "logits_per_s": _of_memory(437e9, f"{_PROFILED}: cross entropy"),
    "kept_bytes_per_s": _of_memory(360e9, f"{_PROFILED}: all that is neither product, attention, loss nor optimizer"),
    "expert_weights_per_s": _of_memory(
        224e9, f"{_FOUR}, experts' products with 256 against 128 experts a rank, four micro-batches"
    ),
    "recompute_norms": _alike(0.012, "no", _PARTS),
    "recompute_activations": _alike(0.027, "no", _PARTS),
    "recompute_gdn_prologue": _alike(0.011, "no", _PARTS),
    "recompute_layer": _alike(0.33, "no", f"{_PARTS}, slice4_e512 alike"),
    "idle_fraction": _alike(0.013, "no", f"{_PROFILED}: gaps between kernels"),
    "idle_step_s": _alike(0.5e-3, "no", "steps, 2026-11-28, one H100: the next step is launched during the update"),
    # The host, which launches while the device computes.
    "launch_layer_s": _alike(7.0e-3, "no", "small models, 2026-11-28, one H200: 5.8 to 8.5 ms"),
    "launch_slices_s": _alike(
        14.5e-3,
        "no",
        "long rows, 2026-11-28, four H200, EP 4, dense, CP 2 and 4: what a layer takes longer, exchange and all",
    ),
    "launch_recompute_part": _alike(0.08, "no", "small models, 2026-11-28, one H200: a third of what three parts take"),
    "launch_recompute_layer": _alike(0.4, "no", "small models, 2026-11-28, one H200: the forward pass's share"),
    # Tokens to experts and back.
    "exact_peer_bytes_per_s": _alike(126e9, "link", f"{_FOUR}, EP 2 x DP 2: uneven all-to-all to one peer"),
    "exact_bytes_per_s": _alike(191e9, "link", f"{_FOUR}, EP 4, alone: uneven all-to-all to three peers"),
    "dense_peer_bytes_per_s": _alike(111e9, "link", f"{_FOUR}, EP 2 x DP 2: gather and even all-to-all to one peer"),
    "dense_bytes_per_s": _alike(325e9, "link", f"{_FOUR}, EP 4: gather and even all-to-all to three peers"),
    "received_bytes_per_s": _of_memory(
        215e9, f"{_FOUR}, EP 4, dense: sorting, gathering and adding up other ranks' tokens, forward and backward"
    ),
    "exact_exposed": _alike(0.77, "no", f"{_FOUR}, EP 4, exact, four micro-batches"),
    "dense_exposed": _alike(0.6, "no", f"{_FOUR}, EP 4 and EP 2 x DP 2, dense, four micro-batches"),
    "exposed_in_flight": _alike(0.6, "no", "steps, 2026-11-28, four H100, EP 4, dense: as much as with one in flight"),
    "exact_wait_s": _alike(0.5e-3, "no", f"{_FOUR}, EP 4, one micro-batch: the host's wait in a layer's forward pass"),
    # Slices of rows.
    "passed_bytes_per_s": _of_memory(
        56e9, "long rows, 2026-11-28, one H200: summary and state gradient of a layer's slice of 16,384 tokens, 1.97 ms"
    ),
    # What runs beside products takes memory and multiprocessors from them.
    "beside_bytes_per_s": _alike(610e9, "link", f"{_FOUR}: six products of 8192 x 4096 beside a gather of tokens"),
    # Gradients, weights, optimizer under ZeRO-1; a parameter counts once.
    "summed_per_s": _of_memory(
        7.8e12, "steps, 2026-11-28, one H100, slice4_e512: what autograd still brings, as dense parameters a second"
    ),
    "norm_per_s": _of_memory(617e9, _PROFILED),
    "adamw_per_s": _of_memory(100e9, _PROFILED),
    "state_bytes_per_s": _alike(205e9, "link", f"{_FOUR}, EP 2 x DP 2: reduce-scatter in fp32 and gathering in bf16"),
    "reduction_hidden": _alike(0.91, "no", f"{_FOUR}, EP 2 x DP 2, dense, four micro-batches"),
    "network_bytes_per_s": _alike(
        45e9, "no", "not measured: 400 Gbit/s a GPU as DeepEP's users report it on two nodes"
    ),
    # DeepSpeed's own path: an offloaded optimizer.
    "deepspeed_bytes": _alike(
        17,
        "no",
        f"{_TWO}: DeepSpeed's ZeRO-2 against ZeRO-1, as bytes a parameter and micro-batch (counted they are 43)",
    ),
    "stage3_bytes": _alike(
        10,
        "no",
        "counted, 2026-11-28: of a gradient shared by R ranks, 6 bytes to lay it out and 12 / R to add it up",
    ),
    "stage3_hidden": _alike(
        0.62, "no", "four H200, 2026-11-28, EP 4: ZeRO-3 has 90 ms of NCCL more than ZeRO-1, 34 of them exposed"
    ),
    "memory_bytes_per_s": _of_memory(3.0e12, "expected of an H100's memory"),
    "host_bytes_per_s": _alike(30e9, "no", "not measured: a GPU's share of its host's memory and PCIe"),
}
"""Every rate, by the name that :class:`Rates` has for it."""


@dataclass(frozen=True)
class Rates:
    """The rates of one device. Their sources are in :data:`TABLE`.

    Args:
        products_flops: FLOP/s of matrix products: linear layers, experts, head.
        attention_flops: FLOP/s of attention scores, forward and backward.
        long_attention_flops: the same in rows of at least :data:`LONG_ROW` tokens.
        logits_per_s: logits a second through the loss, apart from the head's products.
        kept_bytes_per_s: the rest of the layers, forward and backward, in bytes that are kept for the backward pass.
        expert_weights_per_s: what experts' products take beside their FLOPs, in expert parameters of a rank and
            micro-batch: weights are read twice and gradients added.
        recompute_norms: share of the layers' time that recomputing norms takes.
        recompute_activations: the same of activations.
        recompute_gdn_prologue: the same of the GDN prologue.
        recompute_layer: the same of whole layers.
        idle_fraction: share of the model's time in which the device waits for launches.
        idle_step_s: seconds a step in which it does.
        launch_layer_s: seconds in which the host launches a layer's forward and backward pass.
        launch_slices_s: what it takes longer where ranks share rows.
        launch_recompute_part: share of a layer's launches that recomputing a part of it adds.
        launch_recompute_layer: the same of whole layers.
        exact_peer_bytes_per_s: of the exact exchange, to one other rank.
        exact_bytes_per_s: to all other ranks of a node.
        dense_peer_bytes_per_s: of the dense exchange, to one other rank.
        dense_bytes_per_s: to all other ranks of a node.
        received_bytes_per_s: bytes of tokens that arrive from other ranks, in seconds of work on them.
        exact_exposed: share of the exact exchange beside which nothing runs.
        dense_exposed: the same of the dense exchange.
        exposed_in_flight: the same of either with two micro-batches in flight.
        exact_wait_s: of the host, in each layer and forward pass.
        passed_bytes_per_s: what context parallelism computes in a Gated DeltaNet layer beside the rule, forward and
            backward, in bytes of its values.
        beside_bytes_per_s: bytes sent beside products, in seconds that these take longer.
        summed_per_s: gradients that a kernel of its own adds.
        norm_per_s: parameters a rank updates, through the gradient norm.
        adamw_per_s: through the update.
        state_bytes_per_s: gradients and weights of ZeRO within a node.
        reduction_hidden: share of it behind backward and forward passes, as far as they are long enough.
        network_bytes_per_s: of one GPU's network link, one direction.
        deepspeed_bytes: of memory, a parameter and micro-batch, that DeepSpeed's own path takes longer for.
        stage3_hidden: as ``reduction_hidden``, of what stage 3 gathers and reduces in every micro-batch.
        stage3_bytes: of memory, a micro-batch and parameter that several ranks share, for its gradient under stage 3.
        memory_bytes_per_s: of device memory.
        host_bytes_per_s: of an offloaded optimizer.
        is_estimate: nothing was measured on this device, or in this precision.
    """

    products_flops: float
    attention_flops: float
    long_attention_flops: float
    logits_per_s: float
    kept_bytes_per_s: float
    expert_weights_per_s: float
    recompute_norms: float
    recompute_activations: float
    recompute_gdn_prologue: float
    recompute_layer: float
    idle_fraction: float
    idle_step_s: float
    launch_layer_s: float
    launch_slices_s: float
    launch_recompute_part: float
    launch_recompute_layer: float
    exact_peer_bytes_per_s: float
    exact_bytes_per_s: float
    dense_peer_bytes_per_s: float
    dense_bytes_per_s: float
    received_bytes_per_s: float
    exact_exposed: float
    dense_exposed: float
    exposed_in_flight: float
    exact_wait_s: float
    passed_bytes_per_s: float
    beside_bytes_per_s: float
    summed_per_s: float
    norm_per_s: float
    adamw_per_s: float
    state_bytes_per_s: float
    reduction_hidden: float
    network_bytes_per_s: float
    deepspeed_bytes: float
    stage3_bytes: float
    stage3_hidden: float
    memory_bytes_per_s: float
    host_bytes_per_s: float
    is_estimate: bool


def rates_of(device: Device, precision: Precision) -> Rates:
    """What was measured on the device in bf16, else the H100's figures scaled.

    Args:
        device: a row of the table of devices.
        precision: of weights and activations.
    """
    measured = find_device("h100")
    assert measured is not None
    is_h200 = device.name == "h200"
    is_estimate = precision != "bf16" or device.name not in ("h100", "h200")
    factors = {
        "peak": device.peak_flops(precision) / measured.bf16_flops,
        "link": device.link_bytes_per_s / measured.link_bytes_per_s,
        "no": 1.0,
    }
    values = {
        name: (rate.h200 if is_h200 else rate.h100) * factors[rate.scales if is_estimate else "no"]
        for name, rate in TABLE.items()
    }
    return Rates(**values, is_estimate=is_estimate)
