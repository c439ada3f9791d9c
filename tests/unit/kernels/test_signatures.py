"""Every backend is called as its reference is: names, order, defaults, annotations and result, in the syntax trees.

The types of operations (``SwiGlu`` and the like) say only what is returned, so this is where signatures are compared;
read, not imported, as most backends need CUDA or a package that is optional.
"""

from __future__ import annotations

import ast
from dataclasses import fields

import pytest

from qwen3next_train.kernels.selection import KernelSet
from tests.architecture.tree import PACKAGE

CLASSES = {"rms_norm": "RmsNorm", "token_permutation": "TokenPermutation"}
OPERATIONS = sorted({field.name for field in fields(KernelSet)} - {"choices"} - set(CLASSES))
REFERENCES = {"linear_cross_entropy": "linear_cross_entropy_chunked"}
SEVERAL = {
    "delta_rule_summary": {"delta_rule_summary_fla"},
    "delta_state_gradient": {"delta_state_gradient_fla"},
    "gated_delta_rule": {"gated_delta_rule_fla", "gated_delta_rule_fla_hopper", "gated_delta_rule_flash_qla"},
    "grouped_matmul": {"grouped_matmul_grouped_mm", "grouped_matmul_triton"},
    "varlen_attention": {"varlen_attention_flash"},
}
DEFINED = {
    node.name: node
    for path in (PACKAGE / "kernels").rglob("*.py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
}


def signature(function: ast.stmt) -> str:
    assert isinstance(function, ast.FunctionDef)
    assert function.returns is not None, function.name
    return f"({ast.unparse(function.args)}) -> {ast.unparse(function.returns)}"


def methods(name: str) -> dict[str, str]:
    """Signatures of a class's public methods."""
    found = [node for node in DEFINED[name].body if isinstance(node, ast.FunctionDef)]
    return {method.name: signature(method) for method in found if not method.name.startswith("_")}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_backends_have_the_signature_of_the_reference(operation: str) -> None:
    reference = REFERENCES.get(operation, f"{operation}_reference")
    backends = {name for name in DEFINED if name.startswith(f"{operation}_")} - {reference}
    assert backends == SEVERAL.get(operation, {f"{operation}_triton"})
    assert {name: signature(DEFINED[name]) for name in backends} == dict.fromkeys(
        backends, signature(DEFINED[reference])
    )


def test_the_recurrence_has_the_signature_of_the_chunked_rule() -> None:
    assert signature(DEFINED["recurrent_gated_delta_rule"]) == signature(DEFINED["gated_delta_rule_reference"])


@pytest.mark.parametrize("reference", CLASSES.values())
def test_backends_override_every_method(reference: str) -> None:
    """One that is missing would be plain torch on the GPU, without a word."""
    backend = DEFINED[f"{reference}Triton"]
    assert isinstance(backend, ast.ClassDef)
    assert [ast.unparse(base) for base in backend.bases] == [reference]
    assert methods(backend.name) == methods(reference)
