"""Compare the model with transformers' Qwen3NextForCausalLM: logits, loss and every gradient.

transformers must take its torch path, which it decides at import; so the comparison runs in a process of its
own, where FLA and causal-conv1d cannot be imported. Use :func:`parity_errors` from a test.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[3]


@dataclass(frozen=True)
class ParityCase:
    """One comparison.

    Args:
        changes: fields of the model section that differ from ``small_config``; MTP is left out.
        num_rows: sequences, each one document.
        length: tokens of each.
        seed: of weights and tokens.
    """

    changes: dict[str, Any]
    num_rows: int = 2
    length: int = 70
    seed: int = 0


def parity_errors(cases: Sequence[ParityCase]) -> list[dict[str, float]]:
    """Relative errors by name (``logits``, ``loss``, ``grad <parameter>``) for each case, from one child process."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.unit.model.huggingface_parity"],
        input=json.dumps([asdict(case) for case in cases]),
        cwd=_ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def _compare(case: ParityCase) -> dict[str, float]:
    import torch
    from transformers.models.qwen3_next import Qwen3NextConfig
    from transformers.models.qwen3_next import Qwen3NextForCausalLM as HuggingFaceModel

    from tests.unit.model.small_models import batch_of, build, relative_error, scales_of, small_config

    config = small_config(**({"mtp_num_layers": 0, "router_aux_loss_coef": 0.0} | case.changes))
    ours = build(config, seed=case.seed)
    _slow_down(ours)
    fields = config.model_dump()
    rope = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    rope["partial_rotary_factor"] = fields.pop("partial_rotary_factor")
    theirs = HuggingFaceModel(Qwen3NextConfig(**fields, rope_parameters=rope, use_cache=False))
    theirs.set_attn_implementation("eager")
    theirs.load_state_dict(dict(ours.state_dict()), strict=True)

    batch = batch_of(
        [[case.length]] * case.num_rows, vocab_size=config.vocab_size, seed=case.seed, mtp_depths=0, continues=True
    )
    shape = (case.num_rows, case.length)
    logits = theirs(input_ids=batch.input_ids_T.view(shape)).logits.flatten(0, 1)
    loss = torch.nn.functional.cross_entropy(logits, batch.labels_T)
    loss.backward()
    output = ours(batch, scales_of(batch))
    output.total.backward()

    errors = {
        "logits": relative_error(ours.forward_logits(batch).detach(), logits.detach()),
        "loss": abs(float(output.total) / float(loss) - 1),
    }
    expected = dict(theirs.named_parameters())
    assert expected.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        assert parameter.grad is not None, name
        truth = expected[name].grad
        assert truth is not None, name
        errors[f"grad {name}"] = relative_error(parameter.grad, truth)
    return errors


def _slow_down(model: Any) -> None:
    """Decays of 0.02 to 0.3 per unit of dt instead of 1 to 16.

    Strong decays leave A_log a gradient that is a small difference of large terms, of which transformers'
    fp32 keeps three digits (against our fp64); nothing could be compared to 1e-5 there.
    """
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter -= 4.0


def _main() -> None:
    for module in ("fla", "causal_conv1d"):
        sys.modules[module] = None  # type: ignore[assignment]
    cases = [ParityCase(**case) for case in json.load(sys.stdin)]
    print(json.dumps([_compare(case) for case in cases]))


if __name__ == "__main__":
    _main()
