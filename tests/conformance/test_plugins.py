"""Laws of plugins: they change a host as far as the budget says, and give it back bit for bit."""

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from foveate.engine.budget import Budget
from foveate.errors import BudgetError
from foveate.meter import count_flops
from foveate.ops.scatter_experts import scatter_experts


def specimen(model: nn.Module, budget: Budget) -> Any:
    """Let the host see only the first tokens."""
    share = budget.share_of()

    def cut(_: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
        keep = max(1, round(share * inputs[0].shape[1]))
        return (inputs[0][:, :keep],)

    return model.register_forward_pre_hook(cut)


def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
    return nn.Linear(4, 4).eval(), (torch.rand(2, 8, 4),)


SPECIMENS: list[Callable[..., Any]] = [specimen, *([scatter_experts] if find_spec("transformers") else [])]


def _tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def test_removing_gives_the_host_back_bit_for_bit(plugin: Any) -> None:
    host, inputs = plugin.example()
    state, modules = {key: value.clone() for key, value in host.state_dict().items()}, list(host.modules())
    with torch.no_grad():
        before = _tensors(host(*inputs))
        handle = plugin.target(host, budget=Budget.parse(0.5))
        during = _tensors(host(*inputs))
        handle.remove()
        after = _tensors(host(*inputs))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(before, during, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert list(host.modules()) == modules
    assert list(host.state_dict()) == list(state)
    assert all(torch.equal(host.state_dict()[key], value) for key, value in state.items())


def test_measured_flops_fall_with_the_budget(plugin: Any) -> None:
    host, inputs = plugin.example()
    spent = []
    with torch.no_grad():
        for budget in (0.5, 1.0):
            handle = plugin.target(host, budget=Budget.parse(budget))
            spent.append(count_flops(host, *inputs))
            handle.remove()
        assert spent[0] < spent[1] <= 1.05 * count_flops(host, *inputs)


def test_the_same_seed_gives_the_same_result(plugin: Any) -> None:
    results = []
    for _ in range(2):
        host, inputs = plugin.example()
        plugin.target(host, budget=Budget.parse(0.5))
        torch.manual_seed(1)
        with torch.no_grad():
            results.append(_tensors(host(*inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_budget_it_cannot_weigh_is_refused_and_the_host_left_alone(plugin: Any) -> None:
    host, inputs = plugin.example()
    with torch.no_grad():
        before = _tensors(host(*inputs))
        with pytest.raises(BudgetError):
            plugin.target(host, budget=Budget.parse("3 bpp"))
        assert all(torch.equal(a, b) for a, b in zip(before, _tensors(host(*inputs)), strict=True))
