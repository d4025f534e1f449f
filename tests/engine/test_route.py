import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.engine.route import Route, dispatch
from foveate.errors import InputError


def layers(experts, c_in, c_out):
    return nn.ModuleList([nn.Linear(c_in, c_out) for _ in range(experts)]).double()


def dense(x, expert, experts, gate):
    """Every expert on every item, then the gates choose."""
    everything = torch.stack([f(x) for f in experts], 1)
    chosen = everything.gather(1, expert[..., None].expand(*expert.shape, everything.shape[-1]))
    return (chosen * gate[..., None]).sum(1)


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(1, 40),
    e=st.integers(1, 6),
    k=st.integers(1, 3),
    chunk=st.sampled_from([None, 1, 3, 7]),
    seed=st.integers(0, 999),
)
def test_dispatch_equals_the_dense_choice_and_so_do_its_gradients(n, e, k, chunk, seed):
    torch.manual_seed(seed)
    experts = layers(e, 4, 3)
    x = torch.randn(n, 4, dtype=torch.float64, requires_grad=True)
    gate = torch.rand(n, k, dtype=torch.float64, requires_grad=True)
    expert = torch.randint(0, e, (n, k))
    y, expected = dispatch(x, expert, experts, gate=gate, chunk=chunk), dense(x, expert, experts, gate)
    torch.testing.assert_close(y, expected)
    with torch.no_grad():
        torch.testing.assert_close(dispatch(x, expert, experts, gate=gate, chunk=chunk), expected)
    upstream = torch.randn_like(y)
    wanted = [x, gate, *(p for i in expert.unique().tolist() for p in experts[i].parameters())]
    ours = torch.autograd.grad(y, wanted, upstream)
    theirs = torch.autograd.grad(expected, wanted, upstream)
    torch.testing.assert_close(ours, theirs)


@pytest.fixture
def grouped(monkeypatch):
    """How many experts each call of the grouped linear layer had."""
    calls = []
    original = dispatch.__globals__["grouped_linear"]
    monkeypatch.setitem(
        dispatch.__globals__, "grouped_linear", lambda *a, **k: (calls.append(len(a[1])), original(*a, **k))[1]
    )
    return calls


def test_linear_experts_run_as_one_grouped_layer(grouped):
    x, expert, experts = torch.randn(6, 4).double(), torch.tensor([0, 2, 0, 2, 2, 0]), layers(3, 4, 5)
    expected = torch.stack([experts[e](row) for e, row in zip(expert.tolist(), x, strict=True)])
    torch.testing.assert_close(dispatch(x, expert, experts), expected)
    torch.testing.assert_close(dispatch(x, expert, experts, gate=torch.full((6,), 0.5).double()), expected / 2)
    dispatch(x, expert, experts, out_channels=5).sum().backward()
    assert grouped == [3, 3, 3]
    assert torch.equal(experts[1].weight.grad, torch.zeros(5, 4).double())
    plain = nn.ModuleList([nn.Linear(4, 5, bias=False) for _ in range(2)]).double()
    torch.testing.assert_close(dispatch(x, expert // 2, plain)[:1], plain[0](x[:1]))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def hooked(experts):
    experts[0].register_forward_hook(lambda *_: None)
    return experts


def patched(experts):
    experts[1].forward = lambda x: x.sin()
    return experts


@pytest.mark.parametrize(
    "build",
    [
        lambda: [nn.Linear(4, 4), Doubled(4, 4)],
        lambda: [nn.Linear(4, 4), nn.Linear(4, 4, bias=False)],
        lambda: [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))],
        lambda: hooked([nn.Linear(4, 4), nn.Linear(4, 4)]),
        lambda: patched([nn.Linear(4, 4), nn.Linear(4, 4)]),
    ],
)
def test_experts_that_do_more_than_a_linear_layer_are_called(build, grouped):
    experts, x, expert = build(), torch.randn(6, 4), torch.tensor([0, 1, 0, 1, 1, 0])
    y = dispatch(x, expert, experts)
    assert grouped == []
    torch.testing.assert_close(
        y, torch.stack([experts[e](v[None])[0] for e, v in zip(expert.tolist(), x, strict=True)])
    )


def test_linear_experts_on_patches_and_in_mixed_types_are_called(grouped):
    experts, expert = [nn.Linear(4, 3), nn.Linear(4, 3)], torch.tensor([0, 1])
    assert dispatch(torch.randn(2, 5, 4), expert, experts).shape == (2, 5, 3)
    assert dispatch(torch.randn(2, 4), expert, experts, gate=torch.ones(2).double()).dtype == torch.float64
    assert grouped == []


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 299), max_size=60), st.sampled_from([300, 301]), st.integers(1, 9))
def test_route_is_a_stable_sort_with_its_inverse(numbers, experts, chunk):
    route = Route.of(torch.tensor(numbers, dtype=torch.int64), experts)
    assert route.order.tolist() == sorted(range(len(numbers)), key=numbers.__getitem__)
    assert route.order[route.inverse].tolist() == list(range(len(numbers)))
    assert route.counts == tuple(numbers.count(e) for e in range(experts))
    seen = [(e, i) for e, a, b in route.runs(chunk) for i in range(a, b)]
    assert seen == [(numbers[s], i) for i, s in enumerate(route.order.tolist())]
    assert all(b - a <= chunk for _, a, b in route.runs(chunk))


def test_route_of_more_experts_than_a_byte_holds():
    numbers = torch.tensor([256, 0, 255, 511, 1])
    assert Route.of(numbers, 512).order.tolist() == [1, 4, 2, 0, 3]
    assert Route.of(numbers.to(torch.int32), 512).order.tolist() == [1, 4, 2, 0, 3]


def test_without_gate_each_item_gets_its_expert_bit_for_bit():
    torch.manual_seed(0)
    x, flag = torch.randn(50, 4), torch.rand(50) > 0.7
    light, heavy = (lambda v: v * 2 - 1), (lambda v: v.sin())
    expected = torch.where(flag[:, None], heavy(x), light(x))
    assert torch.equal(dispatch(x, flag, [light, heavy]), expected)
    route = Route.of(flag, 2)
    assert torch.equal(dispatch(x, route, [light, heavy], chunk=8), expected)
    with torch.no_grad():
        assert torch.equal(dispatch(x, route, [light, heavy], chunk=8), expected)


def test_patches_and_windows_keep_their_shape():
    x = torch.randn(6, 3, 5, 4)
    expert = torch.tensor([2, 0, 2, 1, 0, 2])
    experts = [lambda v, s=s: v[..., :2, :] * s for s in (1.0, 2.0, 3.0)]
    expected = x[..., :2, :] * (expert + 1.0).view(-1, 1, 1, 1)
    assert torch.equal(dispatch(x, expert, experts), expected)
    with torch.no_grad():
        assert torch.equal(dispatch(x, expert, experts, gate=torch.full((6,), 0.5)), expected / 2)


@pytest.mark.parametrize("grad", [True, False])
def test_expert_without_items_is_not_called_and_one_may_take_all(grad):
    def never(v):
        raise AssertionError("called without items")

    with torch.set_grad_enabled(grad):
        y = dispatch(torch.ones(5, 2), torch.full((5,), 1), [never, torch.neg, never], chunk=2)
    assert torch.equal(y, -torch.ones(5, 2))


def test_calls_are_chunked_runs_in_expert_order():
    calls = []
    experts = [lambda v, e=e: (calls.append((e, len(v))), v)[1] for e in range(2)]
    dispatch(torch.zeros(9, 1), torch.tensor([1, 0, 1, 1, 0, 1, 1, 0, 1]), experts, chunk=2)
    assert calls == [(0, 2), (0, 1), (1, 2), (1, 2), (1, 2)]


def test_no_items():
    empty = torch.zeros(0, dtype=torch.int64)
    assert dispatch(torch.zeros(0, 4), empty, [nn.Linear(4, 3)]).shape == (0, 3)
    assert dispatch(torch.zeros(0, 4), empty, [None], out_channels=7).shape == (0, 7)


def test_permuting_items_permutes_results():
    torch.manual_seed(0)
    experts, x, expert = layers(3, 4, 4), torch.randn(20, 4).double(), torch.randint(0, 3, (20,))
    p = torch.randperm(20)
    torch.testing.assert_close(dispatch(x[p], expert[p], experts), dispatch(x, expert, experts)[p])


def test_errors_say_what_was_passed():
    x, expert, same = torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]), [torch.neg, torch.neg]
    with pytest.raises(InputError, match=r"experts 0 to 1, but the route names 0 to 2"):
        dispatch(x, torch.tensor([0, 2, 0, 1]), same)
    with pytest.raises(InputError, match="names -1 to 1"):
        dispatch(x, torch.tensor([0, -1, 0, 1]), same)
    with pytest.raises(InputError, match="float32"):
        dispatch(x, expert.float(), same)
    with pytest.raises(InputError, match=r"4 slots, 1 per item; x has shape \(3, 2\)"):
        dispatch(x[:3], expert, same)
    with pytest.raises(InputError, match=r"gate \[N, 2\]"):
        dispatch(x, torch.stack([expert, expert], 1), same)
    with pytest.raises(InputError, match=r"gate has shape \(3,\)"):
        dispatch(x, expert, same, gate=torch.ones(3))
    with pytest.raises(InputError, match="for 2 experts, but 1"):
        dispatch(x, Route.of(expert, 2), same[:1])
    with pytest.raises(InputError, match="at least 1 item, got 0"):
        dispatch(x, expert, same, chunk=0)
    with pytest.raises(InputError, match=r"Expert 1 returns items of shape \(1,\)"):
        dispatch(x, expert, [torch.neg, lambda v: v[:, :1]])
    with pytest.raises(InputError, match="Expert 0 was given 2 items"):
        dispatch(x, expert, [torch.sum, torch.neg])
    with pytest.raises(InputError, match="out_channels is 5"):
        dispatch(x, expert, same, out_channels=5)
