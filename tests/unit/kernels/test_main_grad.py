"""Sums of gradients of a step: the first is written, placeholders are passed over, nothing is zero."""

from __future__ import annotations

import math

import torch

from qwen3next_train.kernels.main_grad import MainGrad, main_grad_of


def test_the_first_gradient_is_written_and_others_are_added_unrounded() -> None:
    main_grad = MainGrad(torch.full((2,), math.nan))
    for value in (256.0, 1.0, 1.0):
        main_grad.add(torch.full((2,), value, dtype=torch.bfloat16))
    assert main_grad.values.tolist() == [258.0, 258.0]


def test_what_a_kernel_added_is_not_added_again() -> None:
    main_grad, weight = MainGrad(torch.full((2,), math.nan)), torch.zeros(2, dtype=torch.bfloat16)
    main_grad.values.fill_(3)
    placeholder = main_grad.added_directly(weight)
    assert placeholder is not None
    assert (placeholder.shape, placeholder.dtype) == (weight.shape, weight.dtype)
    assert main_grad.added_directly(weight) is None, "autograd would add two placeholders"
    main_grad.add(placeholder.fill_(math.nan))
    main_grad.add(torch.ones(2))
    assert main_grad.values.tolist() == [4.0, 4.0]


def test_a_step_without_gradients_sums_to_zero_and_one_with_stays() -> None:
    main_grad = MainGrad(torch.full((2,), math.nan))
    main_grad.finish()
    assert main_grad.values.tolist() == [0.0, 0.0]
    main_grad.is_empty = True
    main_grad.add(torch.ones(2))
    main_grad.finish()
    assert main_grad.values.tolist() == [1.0, 1.0]


def test_parameters_have_none_unless_they_were_given_one() -> None:
    weight = torch.zeros(2)
    assert main_grad_of(weight) is None


def test_products_are_added_unrounded() -> None:
    main_grad = MainGrad(torch.full((1, 1), math.nan))
    ones = torch.ones(1, 1, dtype=torch.bfloat16)
    main_grad.add_product(torch.full((1, 3), 256.0, dtype=torch.bfloat16), torch.ones(3, 1, dtype=torch.bfloat16))
    main_grad.add_product(ones, ones)
    assert main_grad.values.tolist() == [[769.0]]


def test_scaled_gradients_are_written_then_added() -> None:
    main_grad = MainGrad(torch.full((2,), math.nan))
    for value in (1.0, 2.0):
        main_grad.add_scaled(torch.full((2,), value), torch.tensor(0.5))
    assert main_grad.values.tolist() == [1.5, 1.5]
