"""Compare the model with transformers' Qwen3NextForCausalLM: logits, loss and every gradient.

Use :func:`compare` from a test; the comparison itself runs in a process of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from qwen3next_train.batch import PackedBatch
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from qwen3next_train.selftest.case import relative_error
from tests.transformers_apart import transformers_apart
from tests.unit.model.parity_cases import ParityCase
from tests.unit.model.small_models import batch_of, build, scales_of, small_config
from tests.unit.model.written_model import written_logits

_NOISE = 1e-7

Values = dict[str, torch.Tensor]
Errors = dict[str, float]


@dataclass(frozen=True)
class ParityResult:
    """Relative errors by name: ``logits``, ``loss``, ``grad <parameter>``.

    Args:
        fp32: ours against transformers', both in fp32, decays slowed down (:func:`slow_down`).
        float64: ours against transformers', both in float64 throughout, decays as initialised.
        written: ours against the model written out, both in float64, decays as initialised.
        our_rounding: ours in fp32 against the model written out in float64, decays as initialised.
        their_rounding: transformers' in fp32 against the same.
    """

    fp32: Errors
    float64: Errors
    written: Errors
    our_rounding: Errors
    their_rounding: Errors


class _EverythingInFloat64(TorchFunctionMode):
    """Make every request for fp32 one for float64, in anybody's code.

    transformers computes its norms, softmaxes, angles and the delta rule in fp32 whatever the weights are.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide_args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        wide_kwargs = {key: torch.float64 if arg is torch.float32 else arg for key, arg in (kwargs or {}).items()}
        return func(*wide_args, **wide_kwargs)


def compare(cases: Sequence[ParityCase]) -> list[ParityResult]:
    """Run the cases in one child process, where transformers finds no kernels of other packages."""
    with transformers_apart() as process:
        return [process.call(_measure, case) for case in cases]


def largest(errors: Errors) -> tuple[str, float]:
    """Name and size of the largest error."""
    return max(errors.items(), key=lambda item: item[1])


def _measure(case: ParityCase) -> ParityResult:
    config = small_config(**({"mtp_num_layers": 0, "router_aux_loss_coef": 0.0} | case.changes))
    model = build(config, seed=case.seed)
    # A single token has no next one inside the row: there the label is given from outside.
    batch = batch_of(
        [[case.length]] * case.num_rows,
        vocab_size=config.vocab_size,
        seed=case.seed,
        mtp_depths=0,
        continues=case.length == 1,
    )
    ours, theirs = _ours(model, batch), _transformers(model, batch)
    with _EverythingInFloat64():
        model.double()
        exact, their_exact = _ours(model, batch), _transformers(model, batch)
    reference = _written(model, batch)
    model.float()
    slow_down(model)
    return ParityResult(
        fp32=_errors(_ours(model, batch), _transformers(model, batch)),
        float64=_errors(exact, their_exact),
        written=_errors(exact, reference),
        our_rounding=_errors(ours, reference),
        their_rounding=_errors(theirs, reference),
    )


def _ours(model: Qwen3NextForCausalLM, batch: PackedBatch) -> Values:
    model.zero_grad()
    output = model([batch], scales_of(batch))[0]
    output.total.backward()
    loss = output.nll_lm_sum / batch.num_targets[0]
    assert torch.equal(loss, output.total.detach()), "without MTP and router losses the total is loss/lm"
    return _values(model, model.forward_logits(batch), loss)


def _transformers(model: Qwen3NextForCausalLM, batch: PackedBatch) -> Values:
    """transformers' own forward pass with ``labels``: its shift and its mean."""
    theirs = transformers_twin(model)
    ids = batch.input_ids_T.view(batch.num_rows, -1)
    outside = {"shift_labels": batch.labels_T.view_as(ids)} if ids.shape[1] == 1 else {}
    output = theirs(input_ids=ids, labels=ids, **outside)
    output.loss.backward()
    return _values(theirs, output.logits.flatten(0, 1), output.loss)


def transformers_twin(model: Qwen3NextForCausalLM) -> Any:
    """transformers' model with the same configuration, weights and dtype; to be called in the child process."""
    from transformers.models.qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next import Qwen3NextForCausalLM as HuggingFaceModel

    fields = model.config.model_dump()
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    rope["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
    theirs = HuggingFaceModel(Qwen3NextConfig(**fields, rope_parameters=rope, use_cache=False))
    theirs.set_attn_implementation("eager")
    theirs.set_experts_implementation("eager")
    theirs.to(next(model.parameters()).dtype)
    theirs.load_state_dict(model.state_dict(), strict=True)
    return theirs


def _written(model: Qwen3NextForCausalLM, batch: PackedBatch) -> Values:
    weights = {name: tensor.detach().clone().requires_grad_() for name, tensor in model.named_parameters()}
    rows = batch.input_ids_T.view(batch.num_rows, -1)
    logits = torch.cat([written_logits(weights, model.config, ids) for ids in rows])
    loss = torch.nn.functional.cross_entropy(logits, batch.labels_T)
    gradients = torch.autograd.grad(loss, list(weights.values()), materialize_grads=True)
    named = {f"grad {name}": gradient for name, gradient in zip(weights, gradients, strict=True)}
    return {"logits": logits.detach(), "loss": loss.detach()} | named


def _values(model: nn.Module, logits: torch.Tensor, loss: torch.Tensor) -> Values:
    values = {"logits": logits.detach(), "loss": loss.detach()}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        values[f"grad {name}"] = parameter.grad.detach().clone()
    return values


def _errors(values: Values, reference: Values) -> Errors:
    """Norm of the difference over the norm of the reference.

    Where a gradient is 0 but for rounding, over the largest gradient's norm. A row of one token is such a place: there
    is no earlier state to decay and no earlier key to look at; and a single expert whose weight is normalised to 1.
    """
    assert values.keys() == reference.keys()
    scale = max(tensor.double().norm() for name, tensor in reference.items() if name.startswith("grad "))
    errors = {}
    for name, expected in reference.items():
        if name.startswith("grad ") and expected.double().norm() < _NOISE * scale:
            errors[name] = float((values[name].double() - expected.double()).norm() / scale)
        else:
            errors[name] = relative_error(values[name], expected)
    return errors


def slow_down(model: Qwen3NextForCausalLM) -> None:
    """Decays of 0.02 to 0.3 per unit of dt instead of 1 to 16.

    Strong decays leave A_log and dt_bias a gradient that is a small difference of large terms, of which transformers'
    fp32 keeps three digits; nothing could be compared to 1e-5 there.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter -= 4.0
