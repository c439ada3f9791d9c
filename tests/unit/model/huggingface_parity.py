"""Compare the model with transformers' Qwen3NextForCausalLM: logits, loss and every gradient.

transformers must take its torch path, which it decides at import; so the comparison runs in a process of its
own, where FLA and causal-conv1d cannot be imported. Use :func:`compare` from a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from qwen3next_train.batch import PackedBatch
from qwen3next_train.config.schema import ModelConfig
from qwen3next_train.model.qwen3_next import Qwen3NextForCausalLM
from tests.unit.model.parity_cases import ParityCase
from tests.unit.model.small_models import batch_of, build, relative_error, scales_of, small_config
from tests.unit.model.written_model import written_logits

_ROOT = Path(__file__).parents[3]
_ZERO = 1e-7

Values = dict[str, torch.Tensor]
Errors = dict[str, float]


@dataclass(frozen=True)
class ParityResult:
    """Relative errors by name: ``logits``, ``loss``, ``grad <parameter>``.

    Args:
        between: ours against transformers', both fp32.
        ours: ours in fp32 against the model written out in float64; empty unless asked for.
        theirs: transformers' in fp32 against the same.
        ours_fp64: ours in float64 against the same.
    """

    between: Errors
    ours: Errors
    theirs: Errors
    ours_fp64: Errors


def compare(cases: Sequence[ParityCase], *, with_truth: bool = False) -> list[ParityResult]:
    """Run the cases in one child process, where transformers finds no kernels of other packages.

    Args:
        cases: what to compare.
        with_truth: also measure both against the model written out in float64.
    """
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.huggingface_parity"],
        input=json.dumps({"cases": [asdict(case) for case in cases], "with_truth": with_truth}),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [ParityResult(**result) for result in json.loads(done.stdout.splitlines()[-1])]


def _measure(case: ParityCase, *, with_truth: bool) -> ParityResult:
    config = small_config(**({"mtp_num_layers": 0, "router_aux_loss_coef": 0.0} | case.changes))
    model = build(config, seed=case.seed)
    if case.slow_decay:
        _slow_down(model)
    # A single token has no next one inside the row: there the label is given from outside.
    batch = batch_of(
        [[case.length]] * case.num_rows,
        vocab_size=config.vocab_size,
        seed=case.seed,
        mtp_depths=0,
        continues=case.length == 1,
    )
    weights = {name: tensor.detach().clone() for name, tensor in model.named_parameters()}
    ours, theirs = _ours(model, batch), _transformers(config, dict(model.state_dict()), batch)
    assert ours.keys() == theirs.keys()
    between = _errors(ours, theirs)
    if not with_truth:
        return ParityResult(between, {}, {}, {})
    truth = _written(config, weights, batch)
    assert ours.keys() == truth.keys()
    return ParityResult(
        between, _errors(ours, truth), _errors(theirs, truth), _errors(_ours(model.double(), batch), truth)
    )


def _ours(model: Qwen3NextForCausalLM, batch: PackedBatch) -> Values:
    model.zero_grad()
    output = model(batch, scales_of(batch))
    output.total.backward()
    loss = output.nll_lm_sum / batch.num_targets[0]
    assert torch.equal(loss, output.total.detach()), "without MTP and router losses the total is loss/lm"
    logits = model.forward_logits(batch).detach()
    return {"logits": logits, "loss": loss} | _gradients(model)


def _transformers(config: ModelConfig, weights: Values, batch: PackedBatch) -> Values:
    """transformers' own forward pass with ``labels``: its shift and its mean."""
    from transformers.models.qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next import Qwen3NextForCausalLM as HuggingFaceModel

    fields = config.model_dump()
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    rope["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
    model = HuggingFaceModel(Qwen3NextConfig(**fields, rope_parameters=rope, use_cache=False))
    model.set_attn_implementation("eager")
    model.load_state_dict(weights, strict=True)
    ids = batch.input_ids_T.view(batch.num_rows, -1)
    outside = {"shift_labels": batch.labels_T.view_as(ids)} if ids.shape[1] == 1 else {}
    output = model(input_ids=ids, labels=ids, **outside)
    output.loss.backward()
    return {"logits": output.logits.detach().flatten(0, 1), "loss": output.loss.detach()} | _gradients(model)


def _written(config: ModelConfig, weights: Values, batch: PackedBatch) -> Values:
    leaves = {name: tensor.double().requires_grad_() for name, tensor in weights.items()}
    logits = torch.cat([written_logits(leaves, config, ids) for ids in batch.input_ids_T.view(batch.num_rows, -1)])
    loss = torch.nn.functional.cross_entropy(logits, batch.labels_T)
    gradients = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    named = {f"grad {name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}
    return {"logits": logits.detach(), "loss": loss.detach()} | named


def _gradients(model: torch.nn.Module) -> Values:
    gradients = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradients[f"grad {name}"] = parameter.grad
    return gradients


def _errors(values: Values, truth: Values) -> Errors:
    """Norm of the difference over the norm of the truth; where that is 0 but for rounding, over the largest norm.

    A row of one token is such a place: there is no earlier state to decay and no earlier key to look at, so the
    gradients of A_log, dt_bias, the key projection and the q/k norms are 0.
    """
    largest = max(tensor.double().norm() for name, tensor in truth.items() if name.startswith("grad "))
    errors = {}
    for name, expected in truth.items():
        if name.startswith("grad ") and expected.double().norm() < _ZERO * largest:
            errors[name] = float((values[name].double() - expected.double()).norm() / largest)
        else:
            errors[name] = relative_error(values[name], expected)
    return errors


def _slow_down(model: Qwen3NextForCausalLM) -> None:
    """Let the delta rule remember.

    Strong decays leave A_log and dt_bias a gradient that is a small difference of large terms, of which fp32 keeps
    three digits; nothing could be compared to 1e-5 there.
    """
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter -= 4.0


def _main() -> None:
    for module in ("fla", "causal_conv1d"):
        sys.modules[module] = None  # type: ignore[assignment]
    torch.set_num_threads(1)
    request = json.load(sys.stdin)
    results = [_measure(ParityCase(**case), with_truth=request["with_truth"]) for case in request["cases"]]
    print(json.dumps([asdict(result) for result in results]))


if __name__ == "__main__":
    _main()
