"""Measure where transformers' Qwen3-Next computes something else than this model does.

Use :func:`measure` from a test; the measurements run in a process of their own.
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwen3next_train.kernels.norms import gated_rms_norm_reference, rotate
from qwen3next_train.kernels.routing import top_k_routing_reference
from qwen3next_train.model.moe import TopKRouter
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.model.rope import rotary_table
from qwen3next_train.selftest.case import relative_error
from tests.transformers_apart import transformers_apart
from tests.unit.model.huggingface_parity import slow_down, transformers_twin
from tests.unit.model.small_models import batch_of, build, scales_of, small_config

_TOKENS = 400


def measure() -> dict[str, Any]:
    """All measurements by name; pairs are (ours, transformers')."""
    with transformers_apart() as process:
        result: dict[str, Any] = process.call(_everything)
    return result


def _everything() -> dict[str, Any]:
    return {
        "balance": _balance(),
        "gated_norm": _gated_norm(),
        "rotary": _rotary(),
        "router": _router(),
        "packed": {kind: _packed(kind) for kind in ("linear_attention", "full_attention")},
        "single_token": _single_token(),
        **_loaded_in_bf16(),
    }


def _plain(**changes: object) -> Qwen3NextForCausalLM:
    return build(small_config(**({"mtp_num_layers": 0} | changes)))


def _balance() -> dict[str, Any]:
    """Load-balancing losses of two layers, and the routers' logits they follow from, seen by transformers."""
    model = _plain(router_aux_loss_scope="micro_batch", num_experts_per_tok=2)
    with torch.no_grad():
        # The layers prefer different experts, so that pooled over layers the load looks even.
        for layer, favoured in enumerate(([0, 1, 2], [3, 4, 5])):
            model.model.layers[layer].mlp.gate.weight[favoured] *= 10.0
    batch = batch_of([[40], [40]], mtp_depths=0)
    ours = model([batch], scales_of(batch))[0].aux_L
    theirs = transformers_twin(model)(input_ids=batch.input_ids_T.view(2, -1), output_router_logits=True)
    logits = [layer.detach().tolist() for layer in theirs.router_logits]
    return {"ours": ours.tolist(), "theirs": float(theirs.aux_loss.detach()), "router_logits": logits}


def _gated_norm() -> tuple[float, float]:
    """Largest relative error of one bf16 element against float64."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

    generator = torch.Generator().manual_seed(0)
    x, gate, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((500, 64), (500, 64), (64,)))
    wide, wide_gate = x.double(), gate.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
    exact = exact * wide_gate * wide_gate.sigmoid()
    theirs = Qwen3NextRMSNormGated(64).bfloat16()
    theirs.weight.data = weight
    values = gated_rms_norm_reference(x, gate, weight, eps=1e-6), theirs(x, gate)
    ours, their = (float(((value.double() - exact) / exact).abs().max()) for value in values)
    return ours, their


def _rotary() -> tuple[float, float]:
    """Error of rotated bf16 queries against float64, relative by norm."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding, apply_rotary_pos_emb

    model = _plain(head_dim=64, partial_rotary_factor=1.0)
    positions, x = torch.arange(_TOKENS), torch.randn(_TOKENS, 1, 64, generator=torch.Generator().manual_seed(0))
    x = x.bfloat16()
    angle = positions.double()[:, None, None] * model.config.rope_theta ** (-torch.arange(32).double() / 32)
    turned = torch.complex(x[..., :32].double(), x[..., 32:].double()) * torch.exp(1j * angle)
    exact = torch.cat((turned.real, turned.imag), dim=-1)
    cos, sin = Qwen3NextRotaryEmbedding(transformers_twin(model).config)(x, positions[None])
    theirs, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    table = rotary_table(positions, head_dim=64, fraction=1.0, theta=model.config.rope_theta)
    ours = rotate(x, table.cos_T1r, table.sin_T1r)
    return relative_error(ours, exact), relative_error(theirs[0].transpose(0, 1), exact)


def _router() -> tuple[float, float]:
    """Share of bf16 tokens that get other experts than in float64 with the same fp32 router weights."""
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextTopKRouter

    model = _plain(hidden_size=64, num_experts=64, num_experts_per_tok=8)
    ours, theirs = (
        TopKRouter(model.config, top_k_routing_reference),
        Qwen3NextTopKRouter(transformers_twin(model).config).bfloat16(),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = ours.weight.normal_(std=0.1, generator=generator)
        theirs.weight.copy_(weight)
        x = torch.randn(2000, 64, generator=generator).bfloat16()
        exact = (x.double() @ weight.double().T).topk(8).indices.sort().values
        chosen = ours(x, 1)[1], theirs(x)[2]
    our, their = (float((ids.sort().values != exact).any(1).double().mean()) for ids in chosen)
    return our, their


def _packed(kind: str) -> tuple[float, float]:
    """Error of a packed document's logits against the document alone, position ids starting again at 0."""
    model = _plain(num_hidden_layers=2, layer_types=[kind, kind])
    slow_down(model)
    packed = batch_of([[20, 30]], mtp_depths=0)
    theirs = transformers_twin(model)
    ids = packed.input_ids_T.unsqueeze(0)
    together = theirs(input_ids=ids, position_ids=packed.positions_U.unsqueeze(0)).logits[0, 20:].detach()
    alone = theirs(input_ids=ids[:, 20:]).logits[0].detach()
    ours = model.forward_logits(packed)[20:].detach()
    return relative_error(ours, alone), relative_error(together, alone)


def _single_token() -> tuple[float, float]:
    """Loss of a row without any target."""
    model = _plain(router_aux_loss_coef=0.0)
    batch = batch_of([[1]], mtp_depths=0)
    ids = batch.input_ids_T.view(1, 1)
    theirs = transformers_twin(model)(input_ids=ids, labels=ids).loss
    return float(model([batch], scales_of(batch))[0].total.detach()), float(theirs.detach())


def _loaded_in_bf16() -> dict[str, Any]:
    """What transformers makes of a saved model, asked for bf16."""
    from transformers.models.qwen3_next import Qwen3NextForCausalLM as HuggingFaceModel

    with TemporaryDirectory() as folder:
        transformers_twin(_plain()).save_pretrained(folder)
        loaded = HuggingFaceModel.from_pretrained(folder, dtype=torch.bfloat16)
    names = ("linear_attn.A_log", "linear_attn.dt_bias", "mlp.gate.weight")
    layer = loaded.model.layers[0]
    return {
        "bf16": {name: str(layer.get_parameter(name).dtype) for name in names},
        "dropped": sorted(loaded._keys_to_ignore_on_load_unexpected),
    }
