"""Grouped expert linear as Triton kernels: equal to the reference in every mode, forward and backward."""

from contextlib import nullcontext

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveate.engine.route import Route
from foveate.ops import use
from foveate.ops.grouped_linear import grouped_linear, grouped_linear_reference
from foveate.ops.tile import interpreting

MODES = ("items", "slots", "grouped")
TOLERANCE = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}


@pytest.fixture
def kernels(interpreted, monkeypatch):
    """The kernels' module with tiles so small that every loop runs; where its tensors lie; and what ran."""
    from foveate.ops import _grouped_triton as module

    ran, launch = [], module.launch
    monkeypatch.setattr(module, "BLOCKS", {2: (16, 16, 16), 4: (16, 16, 16)})
    monkeypatch.setattr(module, "launch", lambda kernel, *a, **k: (ran.append(kernel), launch(kernel, *a, **k))[1])
    with nullcontext() if interpreted == "cuda" else interpreting():
        yield module, interpreted, ran


def results(compute, values, route, dtype, device, how, stacked):
    leaves = {name: v.to(device, dtype).requires_grad_() for name, v in values.items()}
    many = {n: leaves[n] if stacked else list(leaves[n].unbind()) for n in ("weight", "bias") if n in leaves}
    y = compute(leaves["x"], many["weight"], route, many.get("bias"), gate=leaves.get("gate"), **how)
    towards = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(device, dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), towards, materialize_grads=True)]


@settings(deadline=None, max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    t=st.integers(1, 12),
    e=st.integers(1, 3),
    k=st.integers(1, 3),
    c=st.integers(1, 20),
    o=st.integers(1, 20),
    mode=st.sampled_from(MODES),
    out=st.sampled_from(["slots", "grouped", "gate"]),
    biased=st.booleans(),
    stacked=st.booleans(),
    dtype=st.sampled_from(list(TOLERANCE)),
    seed=st.integers(0, 999),
)
def test_products_and_gradients_are_those_of_the_reference(
    kernels, t, e, k, c, o, mode, out, biased, stacked, dtype, seed
):
    module, device, ran = kernels
    torch.manual_seed(seed)
    index = torch.randint(e, (t, k))
    values = {"x": torch.randn(t if mode == "items" else t * k, c), "weight": torch.randn(e, o, c) / c**0.5}
    if biased:
        values["bias"] = torch.randn(e, o)
    if out == "gate":
        values["gate"] = torch.rand(t, k)
    how = {"grouped_in": mode == "grouped", "grouped_out": out == "grouped"}
    route, ran[:] = Route.of(index.to(device), e), []
    found = results(grouped_linear, values, route, dtype, device, how, stacked)
    assert ran == [module._product, module._product, module._outer]
    rounded = {name: v.to(dtype) for name, v in values.items()}
    with use("reference"):
        exact = results(grouped_linear_reference, rounded, route, torch.float64, device, how, stacked)
    assert len(ran) == 3
    for fast, wanted in zip(found, exact, strict=True):
        assert fast.dtype == dtype
        assert (fast.double() - wanted).abs().max() <= TOLERANCE[dtype] * max(1.0, float(wanted.abs().max()))


def test_what_is_not_asked_for_is_not_computed_and_no_expert_needs_rows(kernels):
    module, device, ran = kernels
    route = Route.of(torch.tensor([2, 2, 0], device=device), 4)
    x, weight = torch.randn(3, 5, device=device), torch.randn(4, 7, 5, device=device, requires_grad=True)
    grouped_linear(x, weight, route).sum().backward()
    assert ran == [module._product, module._outer]
    torch.testing.assert_close(weight.grad[2], x[:2].sum(0).expand(7, 5))
    assert not weight.grad[[1, 3]].any()
    grouped_linear(x.requires_grad_(), weight.detach(), route).sum().backward()
    assert ran[2:] == [module._product, module._product]
    empty = grouped_linear(x[:0], weight, Route.of(torch.zeros(0, dtype=torch.int64, device=device), 4))
    assert empty.shape == (0, 7)


def test_double_precision_and_the_reference_go_other_ways(kernels):
    _, device, ran = kernels
    route = Route.of(torch.tensor([1, 0], device=device), 2)
    x, weight = torch.randn(2, 3, device=device), torch.randn(2, 4, 3, device=device)
    x, weight = x.double(), weight.double()
    expected = torch.stack([weight[1] @ x[0], weight[0] @ x[1]])
    torch.testing.assert_close(grouped_linear(x, weight, route), expected)
    with use("reference"):
        torch.testing.assert_close(grouped_linear(x.float(), weight.float(), route), expected.float())
    assert ran == []
