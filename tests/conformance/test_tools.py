"""Laws of tools: repeatable, and held to the checks of the library they sit beside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def specimen(x: Tensor) -> Tensor:
    """A loss."""
    return (x**2).mean()


def conformance_example() -> tuple[Callable[..., Any], tuple[Tensor]]:
    return specimen, (torch.rand(3, 2, dtype=torch.float64, requires_grad=True),)


SPECIMENS: list[Callable[..., Any]] = [specimen]


def test_the_same_seed_gives_the_same_result(tool: Any) -> None:
    results = []
    for _ in range(2):
        call, inputs = tool.example()
        if hasattr(call, "fit"):
            pytest.skip("an estimator, checked by scikit-learn")
        torch.manual_seed(1)
        results.append([leaf for leaf in tree_leaves(call(*inputs)) if isinstance(leaf, Tensor | float | int)])
    assert results[0]
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(*results, strict=True))


def test_gradients_are_those_of_finite_differences(tool: Any) -> None:
    call, inputs = tool.example()
    if not any(isinstance(x, Tensor) and x.requires_grad and x.dtype == torch.float64 for x in inputs):
        pytest.skip("not differentiable")
    assert torch.autograd.gradcheck(call, inputs)


def test_estimators_pass_the_checks_of_scikit_learn(tool: Any) -> None:
    estimator, _ = tool.example()
    if not hasattr(estimator, "fit"):
        pytest.skip("not an estimator")
    pytest.importorskip("sklearn.utils.estimator_checks").check_estimator(estimator)
