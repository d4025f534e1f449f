"""Laws of models: train, save, load, and spend less when told to."""

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foveate.engine.budget import Budget
from foveate.errors import BudgetError, FoveateError, InputError
from foveate.meter import count_flops


class Specimen(nn.Module, PyTorchModelHubMixin):
    """The mean of a linear map of the first tokens, as many as the budget allows."""

    def __init__(self, dim: int = 4) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)

    def forward(self, x: Tensor, budget: float = 1.0) -> Tensor:
        if x.dim() != 3 or not x.numel():
            raise InputError(f"expected tokens [B, N, C], got {tuple(x.shape)}.")
        keep = max(1, round(Budget.parse(budget).share_of() * x.shape[1]))
        return self.linear(x[:, :keep]).mean(1)

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["Specimen", tuple[Tensor]]:
        return cls(), (torch.rand(2, 12 if larger else 8, 4),)


SPECIMENS = [Specimen]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def _equal(first: Any, second: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_tensors(first), _tensors(second), strict=True))


def _adaptive(module: nn.Module) -> bool:
    return "budget" in inspect.signature(module.forward).parameters


@pytest.mark.parametrize("larger", [False, True])
def test_the_same_input_gives_the_same_finite_output(model: Any, larger: bool) -> None:
    module, inputs = model.example(larger=larger)
    with torch.no_grad():
        first, second = module.eval()(*inputs), module(*inputs)
    assert _tensors(first)
    assert _equal(first, second)
    assert all(torch.isfinite(t).all() for t in _tensors(first) if t.is_floating_point())


def test_gradients_reach_every_parameter(model: Any) -> None:
    module, inputs = model.example()
    outputs = [t for t in _tensors(module.train()(*inputs)) if t.requires_grad]
    sum((t * torch.rand_like(t)).sum() for t in outputs).backward()
    learning = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert [name for name, gradient in learning.items() if gradient is None or not gradient.any()] == []


def test_saved_and_loaded_it_is_the_same(model: Any, tmp_path: Path) -> None:
    module, inputs = model.example()
    module.eval().save_pretrained(tmp_path)
    again = type(module).from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert _equal(module(*inputs), again(*inputs))


def test_bfloat16(model: Any) -> None:
    module, inputs = model.example()
    low = [x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs]
    with torch.no_grad():
        exact, rough = _tensors(module.eval()(*inputs)), _tensors(module.bfloat16()(*low))
    for a, b in zip(exact, rough, strict=True):
        if a.is_floating_point() and a.shape == b.shape:
            assert (a - b.float()).abs().mean() <= 0.05 * a.abs().mean() + 0.01


def test_cost_falls_with_the_budget_and_budget_1_is_dense(model: Any) -> None:
    module, inputs = model.example()
    if not _adaptive(module):
        pytest.skip("has no budget")
    with torch.no_grad():
        dense, whole = _tensors(module.eval()(*inputs)), _tensors(module(*inputs, budget=1.0))
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(dense, whole, strict=True))
    assert count_flops(module, *inputs, budget=0.5) < count_flops(module, *inputs, budget=1.0)
    with pytest.raises(BudgetError):
        module(*inputs, budget=-1)


@pytest.mark.parametrize("damage", ["empty", "wrong rank"])
def test_unusable_inputs(model: Any, damage: str) -> None:
    module, (first, *rest) = model.example()
    wrong = first[:0] if damage == "empty" else first[None, None, None]
    with pytest.raises(FoveateError):
        module(wrong, *rest)
