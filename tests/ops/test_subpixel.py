import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.ops import fast_allowed, subpixel, use

SIDES, SEEDS = st.integers(0, 40), st.integers(0, 2**32 - 1)


def terms(n, s, h, seed):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, h, generator=random), torch.randn(s, h, generator=random)


@given(SIDES, st.integers(1, 16), st.integers(1, 33), SEEDS)
@settings(deadline=None, max_examples=40)
def test_hidden_values_are_those_of_the_reference(n, s, h, seed):
    a, b = terms(n, s, h, seed)
    index = torch.randint(max(1, n * s), (2 * n,), generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert torch.equal(subpixel.hidden(a, b), subpixel.hidden_reference(a, b))
        assert torch.equal(subpixel.hidden(a, b, index), subpixel.hidden_reference(a, b, index))
        assert torch.equal(subpixel.hidden(a, b, index), subpixel.hidden(a, b)[index])


@given(SIDES, st.integers(1, 16), st.integers(1, 33), st.integers(1, 6), SEEDS)
@settings(deadline=None, max_examples=40)
def test_two_layers_are_those_of_the_reference(n, s, h, outputs, seed):
    a, b = terms(n, s, h, seed)
    weight, bias = torch.randn(outputs, h), torch.randn(outputs)
    with torch.no_grad():
        fast = subpixel.two_layers(a, b, weight, bias)
    assert fast.shape == (n, s, outputs)
    torch.testing.assert_close(fast, subpixel.two_layers_reference(a, b, weight, bias), atol=1e-4, rtol=1e-5)
    exact = (a[:, None] + b).relu().double() @ weight.double().T + bias.double()
    torch.testing.assert_close(fast.double(), exact, atol=1e-4, rtol=1e-5)


def test_many_rows_are_shared_among_threads_without_gaps():
    a, b = terms(3001, 4, 5, 0)
    with torch.no_grad():
        assert torch.equal(subpixel.hidden(a, b), subpixel.hidden_reference(a, b))
        weight, bias = torch.randn(3, 5), torch.randn(3)
        fast, plain = subpixel.two_layers(a, b, weight, bias), subpixel.two_layers_reference(a, b, weight, bias)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_gradients_pass_where_they_are_asked_for():
    a, b = (t.double().requires_grad_() for t in terms(3, 2, 4, 0))
    weight, bias = torch.randn(2, 4).double().requires_grad_(), torch.randn(2).double().requires_grad_()
    assert torch.autograd.gradcheck(subpixel.two_layers, (a, b, weight, bias))
    assert torch.autograd.gradcheck(subpixel.hidden, (a, b))


def test_fast_paths_can_be_switched_off_and_on(monkeypatch):
    a, b = terms(3, 2, 4, 0)
    taken = []
    monkeypatch.setattr(subpixel, "in_parts", lambda *args: taken.append("fast"))
    with torch.no_grad():
        with use("reference"):
            subpixel.hidden(a, b)
            assert not fast_allowed()
        assert taken == []
        subpixel.hidden(a, b)
        subpixel.hidden(a.double(), b.double())
    subpixel.hidden(a, b)
    assert taken == ["fast"]


def test_an_unknown_path_is_refused():
    with pytest.raises(InputError, match="'quick'; use one of 'fast', 'reference'"):
        use("quick")
    assert fast_allowed()
