"""The table of errors against transformers, as Markdown: ``python scripts/goldens/parity_table.py > docs/parity.md``.

The configurations and the comparison are the tests' own (``tests/unit/model/test_huggingface_parity.py``).
"""

from __future__ import annotations

import datetime
import sys
from importlib.metadata import version
from pathlib import Path

# The tests are not installed with the package.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.unit.model.huggingface_parity import Errors, compare, largest
from tests.unit.model.parity_cases import SEED, ParityCase, random_cases

_PAGE = """\
# Parity with transformers

Logits, loss and the gradient of every parameter of `Qwen3NextForCausalLM`, ours against transformers' torch path, on
CPU with the same random weights. Written by `scripts/goldens/parity_table.py` on {date} with transformers
{transformers} and torch {torch}; the configurations are drawn from seed {seed} (`tests/unit/model/parity_cases.py`) and
`tests/unit/model/test_huggingface_parity.py` holds every figure to a bound. Where the two differ on purpose:
[0008](decisions/0008-where-we-differ-from-transformers.md).

* An error is the norm of the difference over the norm of the expected tensor. transformers computes the loss itself
  from `labels`. For rows of a single token the label is given from outside.
* **fp32**: both in fp32, `A_log` shifted by -4, so that decays are 0.02 to 0.3 per unit of dt. Bound 1e-5. Widths
  are such that fp32 is well-conditioned. It stays a matter of rounding: of 150 configurations from ten seeds two
  exceeded the bound, with 1.2e-5 and 1.6e-5, each in one gradient of `A_log` or `dt_bias`.
* **float64**: both in float64 throughout, decays as initialised (1 to 16). transformers asks for fp32 in its norms,
  softmaxes, angles and delta rule; these requests are answered with float64. Bound 1e-8: what is left in the fp32
  columns is rounding.
* **rounding**: fp32 with decays as initialised, each against a third implementation written out in float64
  (`tests/unit/model/written_model.py`), largest error of any gradient. Gradients of `A_log` and `dt_bias` are small
  differences of large terms there; how each sums the decays is what tells the two columns apart.

| | layers | rows x length | heads key:value, dims key/value | heads q:kv, dim, rotary | experts, top-k | \
tied | fp32 logits | fp32 loss | fp32 largest gradient | float64 largest | rounding ours | rounding transformers' |
|---|---|---|---|---|---|---|---|---|---|---|---|---|
{rows}
"""


def main() -> None:
    """Measure every configuration and print the page."""
    cases = random_cases()
    rows = []
    for index, (case, result) in enumerate(zip(cases, compare(cases), strict=True)):
        name, error = largest(_gradients(result.fp32))
        figures = (
            f"{result.fp32['logits']:.1e}",
            f"{result.fp32['loss']:.1e}",
            f"{error:.1e} `{name.removeprefix('grad ').removeprefix('model.')}`",
            f"{largest(result.float64)[1]:.1e}",
            f"{largest(_gradients(result.our_rounding))[1]:.1e}",
            f"{largest(_gradients(result.their_rounding))[1]:.1e}",
        )
        rows.append(f"| r{index} | {' | '.join((*_describe(case), *figures))} |")
    versions = {name: version(name) for name in ("transformers", "torch")}
    print(_PAGE.format(date=datetime.date.today(), seed=SEED, rows="\n".join(rows), **versions), end="")


def _gradients(errors: Errors) -> Errors:
    return {name: error for name, error in errors.items() if name.startswith("grad ")}


def _describe(case: ParityCase) -> tuple[str, ...]:
    model = case.changes
    renormalized = "" if model["norm_topk_prob"] else " plain"
    return (
        f"{model['num_hidden_layers']}, {case.pattern}",
        f"{case.num_rows} x {case.length}",
        f"{model['linear_num_key_heads']}:{model['linear_num_value_heads']}, "
        f"{model['linear_key_head_dim']}/{model['linear_value_head_dim']}",
        f"{model['num_attention_heads']}:{model['num_key_value_heads']}, {model['head_dim']}, "
        f"{model['partial_rotary_factor']}",
        f"{model['num_experts']}, {model['num_experts_per_tok']}{renormalized}",
        "yes" if model["tie_word_embeddings"] else "no",
    )


if __name__ == "__main__":
    main()
