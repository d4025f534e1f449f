import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.ops import subpixel, use

SIDES, SEEDS = st.integers(0, 40), st.integers(0, 2**32 - 1)


def terms(n, s, h, seed=0):
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, h, generator=random), torch.randn(s, h, generator=random)


def layer(outputs, h, seed=0):
    random = torch.Generator().manual_seed(seed + 1)
    return torch.randn(outputs, h, generator=random), torch.randn(outputs, generator=random)


@pytest.fixture
def taken(monkeypatch):
    """The names of the kernels that ran on a fast path, in order."""
    names = []
    kernels, two = subpixel._kernels(), subpixel._two

    def noting(name, run):
        return lambda *args: (names.append(name), run(*args))

    monkeypatch.setattr(subpixel, "_kernels", lambda: {name: noting(name, run) for name, run in kernels.items()})
    monkeypatch.setattr(subpixel, "_two", lambda outputs: noting(f"two {outputs}", two(outputs)))
    return names


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
    weight, bias = layer(outputs, h, seed)
    with torch.no_grad():
        fast = subpixel.two_layers(a, b, weight, bias)
    assert fast.shape == (n, s, outputs)
    torch.testing.assert_close(fast, subpixel.two_layers_reference(a, b, weight, bias), atol=1e-5, rtol=1e-5)
    exact = (a[:, None] + b).relu().double() @ weight.double().T + bias.double()
    torch.testing.assert_close(fast.double(), exact, atol=1e-5, rtol=1e-5)


def test_queries_are_numbered_feature_by_feature():
    a, b = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5], [1.5], [3.0]])
    with torch.no_grad():
        assert subpixel.hidden(a, b).flatten().tolist() == [1.5, 2.5, 4.0, 0.0, 0.0, 1.0]
        assert subpixel.hidden(a, b, torch.tensor([5, 0, 5, 2])).flatten().tolist() == [1.0, 1.5, 1.0, 4.0]
        out = subpixel.two_layers(a, b, torch.tensor([[2.0], [-1.0]]), torch.tensor([0.0, 10.0]))
    assert out.tolist() == [[[3.0, 8.5], [5.0, 7.5], [8.0, 6.0]], [[0.0, 10.0], [0.0, 10.0], [2.0, 9.0]]]


def test_many_rows_are_shared_among_threads_without_gaps(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    (a, b), (weight, bias) = terms(3001, 4, 5), layer(3, 5)
    index = torch.randperm(12004, generator=torch.Generator().manual_seed(0))[:5001]
    with torch.no_grad():
        assert torch.equal(subpixel.hidden(a, b), subpixel.hidden_reference(a, b))
        assert torch.equal(subpixel.hidden(a, b, index), subpixel.hidden_reference(a, b, index))
        fast, plain = subpixel.two_layers(a, b, weight, bias), subpixel.two_layers_reference(a, b, weight, bias)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_the_memory_layout_does_not_matter():
    a, b = terms(5, 6, 14)
    a, b = a.T[:7].T, b[:, ::2]  # neither is contiguous
    weight, bias = layer(3, 14)[0][:, ::2], torch.randn(6)[::2]
    index = torch.arange(30)[::3]
    with torch.no_grad():
        assert torch.equal(subpixel.hidden(a, b), subpixel.hidden_reference(a, b))
        assert torch.equal(subpixel.hidden(a, b, index), subpixel.hidden_reference(a, b, index))
        fast, plain = subpixel.two_layers(a, b, weight, bias), subpixel.two_layers_reference(a, b, weight, bias)
    torch.testing.assert_close(fast, plain, atol=1e-5, rtol=1e-5)


def test_gradients_pass_where_they_are_asked_for():
    a, b = (t.double().requires_grad_() for t in terms(3, 2, 4))
    weight, bias = (t.double().requires_grad_() for t in layer(2, 4))
    assert torch.autograd.gradcheck(subpixel.two_layers, (a, b, weight, bias))
    assert torch.autograd.gradcheck(subpixel.hidden, (a, b))
    assert torch.autograd.gradcheck(lambda a, b: subpixel.hidden(a, b, torch.tensor([5, 0, 0, 2])), (a, b))


def test_single_precision_parameters_get_gradients_too(taken):
    (a, b), (weight, bias) = terms(3, 2, 4), layer(2, 4)
    leaves = [t.requires_grad_() for t in (a, b, weight, bias)]
    subpixel.two_layers(*leaves).sum().backward()
    assert all(t.grad is not None and t.grad.abs().sum() > 0 for t in leaves)
    assert taken == []


def test_the_fast_path_is_for_single_precision_without_gradients(taken):
    a, b = terms(3, 2, 4)
    weight, bias = (t.requires_grad_() for t in layer(2, 4))  # as the parameters of a layer do

    def both(dtype):
        subpixel.hidden(a.to(dtype), b.to(dtype))
        subpixel.hidden(a.to(dtype), b.to(dtype), torch.tensor([1]))
        return subpixel.two_layers(a.to(dtype), b.to(dtype), weight.to(dtype), bias.to(dtype))

    both(torch.float32)
    assert taken == []
    for switch in (torch.no_grad, torch.inference_mode):
        with switch():
            assert both(torch.float64).dtype == torch.float64
            assert both(torch.bfloat16).dtype == torch.bfloat16
            with use("reference"):
                both(torch.float32)
            assert taken == []
            both(torch.float32)
        assert taken == ["all", "some", "two 2"]
        taken.clear()


def test_more_outputs_than_registers_take_the_reference(taken):
    a, b = terms(3, 2, 4)
    with torch.no_grad():
        for outputs in range(1, 7):
            assert subpixel.two_layers(a, b, *layer(outputs, 4)).shape == (3, 2, outputs)
    assert taken == ["two 1", "two 2", "two 3", "two 4"]


def test_no_features_give_no_values(taken):
    a, b = terms(0, 4, 5)
    with torch.no_grad():
        assert subpixel.hidden(a, b).shape == (0, 5)
        assert subpixel.two_layers(a, b, *layer(3, 5)).shape == (0, 4, 3)
        assert subpixel.hidden(terms(2, 4, 5)[0], b, torch.zeros(0, dtype=torch.int64)).shape == (0, 5)
    assert taken == []


@given(SIDES, st.integers(1, 33), st.integers(1, 6), SEEDS)
@settings(deadline=None, max_examples=40)
def test_a_last_layer_writes_its_rows_where_they_belong(m, h, outputs, seed):
    x = terms(m, 1, h, seed)[0]
    weight, bias = layer(outputs, h, seed)
    index = torch.randperm(2 * m, generator=torch.Generator().manual_seed(seed))[:m]
    out = torch.full((2 * m, outputs), torch.nan)
    expected = x.relu().double() @ weight.double().T + bias.double()
    with torch.no_grad():
        torch.testing.assert_close(subpixel.last_layer(x, weight, bias).double(), expected, atol=1e-5, rtol=1e-5)
        assert subpixel.last_layer(x, weight, bias, out, index) is out
        assert torch.equal(out[index], subpixel.last_layer(x, weight, bias))
        assert int(out.isnan().all(1).sum()) == m
        with use("reference"):
            torch.testing.assert_close(out[index], subpixel.last_layer(x, weight, bias), atol=1e-5, rtol=1e-5)


def test_a_last_layer_refuses_places_that_do_not_fit():
    x, (weight, bias) = torch.randn(5, 4), layer(3, 4)
    for out, index in ((torch.empty(4, 3), None), (torch.empty(5, 2), None), (None, torch.arange(5))):
        with pytest.raises(ValueError, match="need"):
            subpixel.last_layer(x, weight, bias, out, index)


@pytest.mark.parametrize("outputs", [2, 6])
def test_results_can_be_written_to_memory_of_the_caller(outputs):
    (a, b), (weight, bias) = terms(7, 4, 6), layer(outputs, 6)
    out = torch.full((7, 4, outputs), torch.nan)
    with torch.no_grad():
        assert subpixel.two_layers(a, b, weight, bias, out) is out
        assert torch.equal(out, subpixel.two_layers(a, b, weight, bias))
        for wrong in (out[:6], out.double(), out.transpose(0, 1).contiguous().transpose(0, 1)):
            with pytest.raises(ValueError, match="out needs shape"):
                subpixel.two_layers(a, b, weight, bias, wrong)


def test_a_value_that_is_not_a_number_stays_one():
    a, b = torch.tensor([[float("nan"), 1.0]]), torch.zeros(2, 2)
    with torch.no_grad():
        assert subpixel.hidden(a, b).isnan().tolist() == [[True, False], [True, False]]
        assert subpixel.two_layers(a, b, torch.ones(1, 2), torch.zeros(1)).isnan().all()


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_widths_that_do_not_fit_are_refused(path):
    (a, _), (_, b) = terms(3, 2, 6), terms(3, 2, 4)
    with use(path), torch.no_grad():
        with pytest.raises((ValueError, RuntimeError)):
            subpixel.hidden(a, b)
        with pytest.raises((ValueError, RuntimeError)):
            subpixel.two_layers(a, a[:2], *layer(3, 4))
