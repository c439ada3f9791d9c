"""Qwen3-Next's next-token logits written out in float64, sharing no code with the package or with transformers.

The recurrence runs token by token, attention is a softmax of a score matrix, the convolution a sum over its taps and
every expert sees every token. Slow, and there to be the reference that two fp32 implementations are measured against.

Letters: T tokens of one document, D hidden, N heads, K key head dim, V value head dim, H head dim.
"""

from __future__ import annotations

import torch

from qwen3next_train.config.schema import ModelConfig

Weights = dict[str, torch.Tensor]


def written_logits(weights: Weights, config: ModelConfig, ids_T: torch.Tensor) -> torch.Tensor:
    """Logits ``[T, vocabulary]`` of one document.

    Args:
        weights: float64 tensors by Hugging Face name.
        config: model section with ``layer_types``, output gate and shared expert.
        ids_T: int64 ``[T]``.
    """
    x_TD = weights["model.embed_tokens.weight"][ids_T]
    for index, kind in enumerate(config.layer_types):
        layer = {
            name.removeprefix(prefix): tensor
            for prefix in (f"model.layers.{index}.",)
            for name, tensor in weights.items()
            if name.startswith(prefix)
        }
        normed = _norm(x_TD, layer["input_layernorm.weight"], config)
        x_TD = x_TD + (_delta_net if kind == "linear_attention" else _attention)(layer, config, normed)
        x_TD = x_TD + _experts(layer, config, _norm(x_TD, layer["post_attention_layernorm.weight"], config))
    x_TD = _norm(x_TD, weights["model.norm.weight"], config)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    return x_TD @ weights[head].T


def _norm(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return (1 + weight) * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1 + (-x).exp())


def _unit(x: torch.Tensor) -> torch.Tensor:
    return x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def _delta_net(layer: Weights, config: ModelConfig, x_TD: torch.Tensor) -> torch.Tensor:
    groups, heads = config.linear_num_key_heads, config.linear_num_value_heads
    key_dim, value_dim, ratio = config.linear_key_head_dim, config.linear_value_head_dim, heads // groups
    rows = layer["linear_attn.in_proj_qkvz.weight"].view(groups, -1, x_TD.shape[1])
    sizes = (key_dim, key_dim, ratio * value_dim, ratio * value_dim)
    q, k, v, z = (torch.einsum("td,gcd->tgc", x_TD, part) for part in rows.split(sizes, dim=1))
    rows = layer["linear_attn.in_proj_ba.weight"].view(groups, 2, ratio, x_TD.shape[1])
    b, a = (torch.einsum("td,grd->tgr", x_TD, part).flatten(1) for part in rows.unbind(1))

    channels = torch.cat([part.flatten(1) for part in (q, k, v)], dim=1)
    taps = layer["linear_attn.conv1d.weight"].squeeze(1)
    mixed = torch.zeros_like(channels)
    for back in range(min(taps.shape[1], len(channels))):
        shifted = torch.cat((torch.zeros_like(channels[:back]), channels[: len(channels) - back]))
        mixed = mixed + shifted * taps[:, taps.shape[1] - 1 - back]
    q, k, v = _silu(mixed).split((groups * key_dim, groups * key_dim, heads * value_dim), dim=1)
    q = _unit(q.view(-1, groups, key_dim)).repeat_interleave(ratio, dim=1) / key_dim**0.5
    k = _unit(k.view(-1, groups, key_dim)).repeat_interleave(ratio, dim=1)
    v = v.view(-1, heads, value_dim)
    decay = (-layer["linear_attn.A_log"].exp() * (1 + (a + layer["linear_attn.dt_bias"]).exp()).log()).exp()
    strength = 1 / (1 + (-b).exp())

    state_NVK, outputs = x_TD.new_zeros(heads, value_dim, key_dim), []
    # Taken apart at once: the gradient of each token taken by itself would be as large as the document.
    for q_NK, k_NK, v_NV, decay_N, strength_N in zip(
        *(each.unbind() for each in (q, k, v, decay, strength)), strict=True
    ):
        kept = state_NVK * decay_N[:, None, None]
        surprise = v_NV - (kept * k_NK[:, None, :]).sum(-1)
        state_NVK = kept + (strength_N[:, None] * surprise)[:, :, None] * k_NK[:, None, :]
        outputs.append((state_NVK * q_NK[:, None, :]).sum(-1))
    out = torch.stack(outputs)
    out = out / (out.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * layer["linear_attn.norm.weight"]
    out = out * _silu(z.reshape(-1, heads, value_dim))
    return out.flatten(1) @ layer["linear_attn.out_proj.weight"].T


def _attention(layer: Weights, config: ModelConfig, x_TD: torch.Tensor) -> torch.Tensor:
    heads, groups, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, gate = (x_TD @ layer["self_attn.q_proj.weight"].T).view(-1, heads, 2, size).unbind(2)
    k = (x_TD @ layer["self_attn.k_proj.weight"].T).view(-1, groups, size)
    v = (x_TD @ layer["self_attn.v_proj.weight"].T).view(-1, groups, size)
    q = _turned(_norm(q, layer["self_attn.q_norm.weight"], config), config)
    k = _turned(_norm(k, layer["self_attn.k_norm.weight"], config), config)
    future = torch.ones(len(x_TD), len(x_TD), dtype=torch.bool).triu(1)
    outputs = []
    for head in range(heads):
        group = head * groups // heads
        scores = (q[:, head] @ k[:, group].T / size**0.5).masked_fill(future, float("-inf"))
        outputs.append(scores.softmax(-1) @ v[:, group])
    out = torch.stack(outputs, dim=1) / (1 + (-gate).exp())
    return out.flatten(1) @ layer["self_attn.o_proj.weight"].T


def _turned(x_TNH: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    """The first dimensions of each head as complex numbers, real parts before imaginary ones, times e^(i angle)."""
    half = int(config.head_dim * config.partial_rotary_factor) // 2
    frequency = config.rope_theta ** (-torch.arange(half, dtype=torch.float64) / half)
    angle = torch.arange(len(x_TNH), dtype=torch.float64)[:, None, None] * frequency
    turned = torch.complex(x_TNH[..., :half], x_TNH[..., half : 2 * half]) * torch.exp(1j * angle)
    return torch.cat((turned.real, turned.imag, x_TNH[..., 2 * half :]), dim=-1)


def _experts(layer: Weights, config: ModelConfig, x_TD: torch.Tensor) -> torch.Tensor:
    probs = (x_TD @ layer["mlp.gate.weight"].T).softmax(-1)
    chosen = torch.zeros_like(probs).scatter(1, probs.topk(config.num_experts_per_tok).indices, 1.0)
    weight_TE = probs * chosen
    if config.norm_topk_prob:
        weight_TE = weight_TE / weight_TE.sum(-1, keepdim=True)
    gate = layer["mlp.shared_expert_gate.weight"]
    total = _swiglu(x_TD, *(layer[f"mlp.shared_expert.{part}_proj.weight"] for part in ("gate", "up", "down")))
    total = total / (1 + (-(x_TD @ gate.T)).exp())
    for expert in range(config.num_experts):
        up = layer["mlp.experts.gate_up_proj"][expert].chunk(2)
        total = total + weight_TE[:, expert, None] * _swiglu(x_TD, *up, layer["mlp.experts.down_proj"][expert])
    return total


def _swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    return (_silu(x @ gate.T) * (x @ up.T)) @ down.T
