"""Grouped expert linear: equal to a loop over items, in every mode, forward and backward, whatever the load."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from foveate.engine.route import Route
from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.ops import grouped_linear as module
from foveate.ops import use
from foveate.ops.grouped_linear import grouped_linear, grouped_linear_reference

MODES = ("items", "slots", "grouped")
"""How rows of x lie: one per item, one per slot, one per slot in expert order."""


def random(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def slot_by_slot(x, weight, bias, index, gate, mode, grouped_out):
    """One row at a time, straight from the definition."""
    t, k = index.shape
    flat = index.flatten().tolist()
    order = sorted(range(t * k), key=flat.__getitem__)
    place = {s: i for i, s in enumerate(order)}
    row = {"items": lambda s: s // k, "slots": lambda s: s, "grouped": place.__getitem__}[mode]
    y = [weight[e] @ x[row(s)] + (0 if bias is None else bias[e]) for s, e in enumerate(flat)]
    if grouped_out:
        return torch.stack([y[s] for s in order])
    if gate is None:
        return torch.stack(y)
    return torch.stack([sum(gate[i, j] * y[i * k + j] for j in range(k)) for i in range(t)])


@settings(deadline=None, max_examples=40)
@given(
    t=st.integers(1, 12),
    e=st.integers(1, 5),
    k=st.integers(1, 3),
    mode=st.sampled_from(MODES),
    out=st.sampled_from(["slots", "grouped", "gate"]),
    biased=st.booleans(),
    stacked=st.booleans(),
    tile=st.sampled_from([1, 3, 1024]),
    seed=st.integers(0, 999),
)
def test_every_mode_equals_the_definition_and_so_do_all_gradients(t, e, k, mode, out, biased, stacked, tile, seed):
    index = torch.randint(e, (t, k), generator=torch.Generator().manual_seed(seed))
    x = random(t if mode == "items" else t * k, 4, seed=seed).requires_grad_()
    weight, bias = random(e, 3, 4, seed=seed + 1).requires_grad_(), random(e, 3, seed=seed + 2).requires_grad_()
    gate = random(t, k, seed=seed + 3).requires_grad_() if out == "gate" else None
    expected = slot_by_slot(x, weight, bias if biased else None, index, gate, mode, out == "grouped")
    args = (
        x,
        weight if stacked else list(weight.unbind()),
        Route.of(index, e),
        (bias if stacked else list(bias.unbind())) if biased else None,
    )
    how = {"gate": gate, "grouped_in": mode == "grouped", "grouped_out": out == "grouped"}
    inputs = [x, weight, *([bias] if biased else []), *([] if gate is None else [gate])]
    upstream = random(*expected.shape, seed=seed + 4)
    wanted = torch.autograd.grad(expected, inputs, upstream, materialize_grads=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_TILE", tile)
        for compute in (grouped_linear, grouped_linear_reference):
            y = compute(*args, **how)
            torch.testing.assert_close(y, expected)
            torch.testing.assert_close(torch.autograd.grad(y, inputs, upstream, materialize_grads=True), wanted)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@settings(deadline=None, max_examples=25)
@given(
    t=st.integers(1, 200),
    e=st.integers(1, 9),
    k=st.integers(1, 4),
    c=st.integers(1, 40),
    o=st.integers(1, 40),
    mode=st.sampled_from(MODES),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_tiles_equal_the_reference_in_low_precision(dtype, tolerance, t, e, k, c, o, mode, gated, seed):
    index = torch.randint(e, (t, k), generator=torch.Generator().manual_seed(seed))
    x = random(t if mode == "items" else t * k, c, seed=seed)
    weight, bias = random(e, o, c, seed=seed + 1) / c**0.5, random(e, o, seed=seed + 2)
    gate = random(t, k, seed=seed + 3).softmax(1) if gated else None
    route, upstream = Route.of(index, e), random(t if gated else t * k, o, seed=seed + 4)

    def run(compute, own):
        leaves = [v.to(dtype).to(own).requires_grad_() for v in (x, weight, bias, *([gate] if gated else []))]
        y = compute(
            leaves[0],
            leaves[1],
            route,
            leaves[2],
            gate=leaves[3] if gated else None,
            grouped_in=mode == "grouped",
        )
        return [y.detach(), *torch.autograd.grad(y, leaves, upstream.to(dtype).to(own))]

    for fast, exact in zip(run(grouped_linear, dtype), run(grouped_linear_reference, torch.float64), strict=True):
        assert fast.dtype == dtype
        assert (fast.double() - exact).abs().max() <= tolerance * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("compute", [grouped_linear, grouped_linear_reference])
@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(compute, mode):
    index = torch.tensor([[0, 2], [2, 1], [0, 1]])
    x, weight = random(3 if mode == "items" else 6, 2).requires_grad_(), random(4, 3, 2, seed=1).requires_grad_()
    bias, gate = random(4, 3, seed=2).requires_grad_(), random(3, 2, seed=3).requires_grad_()
    route = Route.of(index, 4)

    def gated(x, weight, bias, gate):
        return compute(x, weight, route, bias, gate=gate, grouped_in=mode == "grouped")

    assert torch.autograd.gradcheck(gated, (x, weight, bias, gate))
    assert torch.autograd.gradcheck(
        lambda x, w: compute(x, w, route, grouped_in=mode == "grouped", grouped_out=True), (x, weight)
    )


def test_expert_without_rows_gets_a_gradient_of_zeros_and_one_may_take_all():
    weight, bias = random(3, 2, 4).requires_grad_(), random(3, 2, seed=1).requires_grad_()
    x = random(5, 4, seed=2)
    y = grouped_linear(x, weight, Route.of(torch.full((5,), 1), 3), bias)
    torch.testing.assert_close(y, F.linear(x, weight[1], bias[1]))
    y.sum().backward()
    assert torch.equal(weight.grad[[0, 2]], torch.zeros(2, 2, 4).double())
    assert torch.equal(bias.grad, torch.tensor([[0, 0], [5, 5], [0, 0]]).double())
    one = grouped_linear(x[:1], weight, Route.of(torch.tensor([2]), 3))
    torch.testing.assert_close(one, x[:1] @ weight[2].T)


def test_one_expert_is_a_linear_layer_bit_for_bit():
    x, weight, bias = (random(*s, dtype=torch.float32) for s in ((50, 16), (1, 8, 16), (1, 8)))
    route, gate = Route.of(torch.zeros(50, 1, dtype=torch.int64), 1), torch.ones(50, 1)
    assert torch.equal(grouped_linear(x, weight, route, bias, gate=gate), F.linear(x, weight[0], bias[0]))
    assert torch.equal(grouped_linear(x, weight, route), F.linear(x, weight[0]))


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 30), st.integers(1, 6), st.integers(1, 3), st.integers(0, 999))
def test_permuting_items_permutes_results_and_experts_have_no_order(t, e, k, seed):
    torch.manual_seed(seed)
    x, weight, gate, index = random(t, 4), random(e, 3, 4), torch.rand(t, k).double(), torch.randint(e, (t, k))
    y = grouped_linear(x, weight, Route.of(index, e), gate=gate)
    p, q = torch.randperm(t), torch.randperm(e)
    torch.testing.assert_close(grouped_linear(x[p], weight, Route.of(index[p], e), gate=gate[p]), y[p])
    relabelled = grouped_linear(x, weight[q], Route.of(torch.argsort(q)[index], e), gate=gate)
    torch.testing.assert_close(relabelled, y)


def test_grouped_results_are_the_others_in_expert_order():
    route = Route.of(torch.randint(3, (20, 2), generator=torch.Generator().manual_seed(0)), 3)
    x, weight = random(20, 4), random(3, 5, 4)
    grouped = grouped_linear(x, weight, route, grouped_out=True)
    slots = grouped_linear(x, weight, route)
    assert torch.equal(grouped[route.inverse], slots)
    torch.testing.assert_close(grouped_linear(x[route.items], weight, route, grouped_in=True), slots)


def test_only_what_came_in_is_kept_for_backward():
    t, k = 64, 4
    route = Route.of(torch.randint(8, (t, k), generator=torch.Generator().manual_seed(0)), 8)
    x, weight = random(t, 16).requires_grad_(), random(8, 32, 16).requires_grad_()
    gate, kept = torch.rand(t, k).double().requires_grad_(), []
    with saved_tensors_hooks(lambda v: (kept.append(v), v)[1], lambda v: v):
        grouped_linear(x, weight, route, gate=gate)
    assert {v.data_ptr() for v in kept} <= {v.data_ptr() for v in (x, weight, gate)}


def test_gradients_are_computed_where_they_are_asked_for_only():
    route = Route.of(torch.randint(3, (20, 2), generator=torch.Generator().manual_seed(0)), 3)
    flops = {}
    for asked in ("x", "weight", "gate", "x weight gate"):
        x, weight, gate = random(20, 4), random(3, 5, 4), torch.rand(20, 2).double()
        for name, value in (("x", x), ("weight", weight), ("gate", gate)):
            value.requires_grad_(name in asked)
        with FlopCounterMode(display=False) as counter:
            grouped_linear(x, weight, route, gate=gate).sum().backward()
        flops[asked] = counter.get_total_flops()
        assert [v.grad is not None for v in (x, weight, gate)] == [n in asked for n in ("x", "weight", "gate")]
    product = 2 * 20 * 2 * 4 * 5
    assert flops == {"x": 2 * product, "weight": 2 * product, "gate": 2 * product, "x weight gate": 3 * product}
    assert count_flops(grouped_linear, x.detach(), weight.detach(), route, gate=gate.detach()) == product


def test_no_items():
    route = Route.of(torch.zeros(0, 2, dtype=torch.int64), 3)
    x, weight = torch.zeros(0, 4, requires_grad=True), torch.zeros(3, 5, 4, requires_grad=True)
    y = grouped_linear(x, weight, route, gate=torch.zeros(0, 2))
    assert y.shape == (0, 5)
    y.sum().backward()
    assert torch.equal(weight.grad, torch.zeros(3, 5, 4))
    assert grouped_linear_reference(x, weight, route).shape == (0, 5)


def test_autocast_casts_as_it_does_for_a_linear_layer():
    route = Route.of(torch.tensor([0, 1, 1]), 2)
    x, weight = torch.rand(3, 4, requires_grad=True), torch.rand(2, 5, 4, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_linear(x, weight, route)
        assert y.dtype == F.linear(x, weight[0]).dtype == torch.bfloat16
    y.sum().backward()
    assert weight.grad.dtype == x.grad.dtype == torch.float32


def test_the_fast_path_can_be_switched_off(monkeypatch):
    taken = []
    monkeypatch.setattr(module._GroupedLinear, "apply", lambda *_: taken.append("fast"))
    x, weight, route = random(3, 4), random(2, 5, 4), Route.of(torch.tensor([0, 1, 1]), 2)
    with use("reference"):
        grouped_linear(x, weight, route)
    assert taken == []
    grouped_linear(x, weight, route)
    assert taken == ["fast"]


def test_errors_say_what_was_passed():
    x, weight, route = torch.zeros(3, 4), torch.zeros(2, 5, 4), Route.of(torch.tensor([[0, 1], [1, 1], [0, 0]]), 2)
    with pytest.raises(InputError, match=r"6 slots, 2 per item; x has shape \(4, 4\), not \[3, C\] or \[6, C\]"):
        grouped_linear(torch.zeros(4, 4), weight, route)
    with pytest.raises(InputError, match=r"x has shape \(3, 4\), not \[6, C\]"):
        grouped_linear(x, weight, route, grouped_in=True)
    with pytest.raises(InputError, match=r"x has shape \(3, 1, 4\)"):
        grouped_linear(x[:, None], weight, route)
    with pytest.raises(InputError, match=r"weight is \[2, O, 4\]; got 2 of shape \(4, 5\)"):
        grouped_linear(x, weight.mT, route)
    with pytest.raises(InputError, match=r"got 2 of shape \(5, 4\), \(6, 4\)"):
        grouped_linear(x, [torch.zeros(5, 4), torch.zeros(6, 4)], route)
    with pytest.raises(InputError, match=r"for 2 experts .* got 1 of shape"):
        grouped_linear(x, weight[:1], route)
    with pytest.raises(InputError, match=r"bias is \[2, 5\] .* got 2 of shape \(4,\)"):
        grouped_linear(x, weight, route, torch.zeros(2, 4))
    with pytest.raises(InputError, match=r"gate has shape \(3,\), needed is \[3, 2\]"):
        grouped_linear(x, weight, route, gate=torch.zeros(3))
    with pytest.raises(InputError, match="cannot stay in expert order"):
        grouped_linear(x, weight, route, gate=torch.zeros(3, 2), grouped_out=True)
    with pytest.raises(InputError, match=r"torch.bfloat16, torch.float32"):
        grouped_linear(x.bfloat16(), weight, route)
