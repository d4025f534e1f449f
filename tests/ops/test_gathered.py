import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

from foveate.errors import InputError
from foveate.meter import count_flops
from foveate.ops import gathered as module
from foveate.ops import use
from foveate.ops.gathered import gathered, kernel_taps, round_offset, square_offset
from foveate.ops.tile import interpreting

CASES = st.fixed_dictionaries(
    {
        "b": st.integers(1, 3),
        "groups": st.sampled_from([1, 2, 4]),
        "each": st.sampled_from([1, 2, 4]),
        "kernel": st.tuples(st.integers(1, 4), st.integers(1, 5)),
        "stride": st.tuples(st.integers(1, 3), st.integers(1, 3)),
        "dilation": st.integers(1, 2),
        "padding": st.sampled_from([None, 0, 2, (3, 1)]),
        "size": st.tuples(st.integers(8, 11), st.integers(9, 12)),
        "interleaved": st.booleans(),
        "own": st.booleans(),  # weights of each picture
        "fixed": st.booleans(),
        "offsets": st.sampled_from([None, 1, 2, "all"]),
        "seed": st.integers(0, 2**20),
    }
)


def draw(case, dtype=torch.float32):
    """x, weight, offset and settings of a case."""
    dice = torch.Generator().manual_seed(case["seed"])
    (kh, kw), d = case["kernel"], case["dilation"]
    c = case["groups"] * case["each"]
    settings = {k: case[k] for k in ("stride", "dilation", "padding", "interleaved")} | {"kernel_size": (kh, kw)}
    pads = case["padding"]
    pads = (d * (kh - 1) // 2, d * (kw - 1) // 2) if pads is None else (pads, pads) if isinstance(pads, int) else pads
    size = [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, p, k, s in zip(case["size"], pads, (kh, kw), case["stride"], strict=True)
    ]
    x = torch.randn(case["b"], c, *case["size"], generator=dice, dtype=dtype)
    plane = (1, 1) if case["fixed"] else size
    owners = case["b"] if case["own"] else 1
    weight = torch.randn(owners, case["groups"], kh * kw, *plane, generator=dice, dtype=dtype)
    offset = None
    if case["offsets"] is not None:
        groups = c if case["offsets"] == "all" else case["offsets"] if c % case["offsets"] == 0 else 1
        offset = 3 * torch.randn(owners, groups, kh * kw, 2, *size, generator=dice, dtype=dtype)
    return x, weight, offset, settings


def run(x, weight, offset, settings, up=None):
    """The result, and the gradients of all that is given for what flows in (drawn when None)."""
    given = [t.detach().clone().requires_grad_() for t in (x, weight, offset) if t is not None]
    y = gathered(*given, **settings)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype) if up is None else up
    return [y.detach(), *torch.autograd.grad(y, given, up)]


def unfolded(x, weight, kernel, interleaved=False):
    """What code does without such an operator: copy each pixel's neighbours, multiply, sum."""
    b, c = x.shape[:2]
    g, (h, w) = weight.shape[1], weight.shape[3:]
    copies = F.unfold(x, kernel, padding=kernel // 2).view(b, c, kernel**2, h, w)
    if interleaved:
        return (copies.view(b, c // g, g, kernel**2, h, w) * weight[:, None]).sum(3).flatten(1, 2)
    return (copies.view(b, g, c // g, kernel**2, h, w) * weight[:, :, None]).sum(3).flatten(1, 2)


# ---------------------------------------------------------------------- values


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize(("stride", "dilation", "padding"), [(1, 1, None), (2, 1, 1), (1, 2, 0), (3, 2, (1, 3))])
def test_weights_that_no_place_changes_are_a_depthwise_convolution(path, stride, dilation, padding):
    x, kernel = torch.randn(2, 6, 9, 8), torch.randn(6, 1, 3, 3)
    pads = dilation if padding is None else padding
    expected = F.conv2d(x, kernel, None, stride, pads, dilation, groups=6)
    settings = {"kernel_size": 3, "stride": stride, "dilation": dilation, "padding": padding}
    weight = kernel.view(1, 6, 9, 1, 1)
    everywhere = weight.expand(1, 6, 9, *expected.shape[2:])
    still = torch.zeros(1, 1, 9, 2, *expected.shape[2:])
    with use(path):
        for result in (
            gathered(x, weight, **settings),
            gathered(x, everywhere, **settings),
            gathered(x, weight, still, **settings),
            gathered(x, everywhere, still, **settings),
        ):
            torch.testing.assert_close(result, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kernel", [3, 5])
def test_weights_of_places_are_what_unfolding_gives(path, kernel, interleaved):
    x, weight = torch.randn(2, 8, 7, 9), torch.randn(2, 4, kernel**2, 7, 9)
    with use(path):
        y = gathered(x, weight, kernel_size=kernel, interleaved=interleaved)
    torch.testing.assert_close(y, unfolded(x, weight, kernel, interleaved), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_a_centre_of_one_is_the_identity_bit_for_bit(path):
    x, weight = torch.randn(2, 8, 7, 9), torch.zeros(1, 2, 9, 7, 9)
    weight[:, :, 4] = 1
    with use(path):
        assert torch.equal(gathered(x, weight, kernel_size=3, interleaved=True), x)
        assert torch.equal(gathered(x, weight, torch.zeros(1, 4, 9, 2, 7, 9), kernel_size=3), x)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_interleaved_channels_of_a_class_may_change_places(path):
    x, weight = torch.randn(1, 12, 5, 5), torch.randn(1, 4, 9, 5, 5)
    within = torch.arange(12).view(3, 4).flip(0).flatten()
    with use(path):
        y = gathered(x, weight, kernel_size=3, interleaved=True)
        assert torch.equal(gathered(x[:, within], weight, kernel_size=3, interleaved=True), y[:, within])
        across = torch.tensor([1, 0, *range(2, 12)])
        assert not torch.allclose(gathered(x[:, across], weight, kernel_size=3, interleaved=True), y[:, across])


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_whole_offsets_gather_exactly(path):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 5, 6, generator=dice, dtype=torch.float64)
    offset = torch.randint(-7, 8, (1, 1, 1, 2, 5, 6), generator=dice).double()
    with use(path):
        y = gathered(x, torch.ones(1, 1, 1, 1, 1, dtype=torch.float64), offset)
    for i in range(5):
        for j in range(6):
            column, row = j + int(offset[0, 0, 0, 0, i, j]), i + int(offset[0, 0, 0, 1, i, j])
            inside = 0 <= row < 5 and 0 <= column < 6
            expected = x[0, :, row, column] if inside else torch.zeros(2, dtype=torch.float64)
            assert torch.equal(y[0, :, i, j], expected)


@pytest.mark.parametrize("path", ["fast", "reference"])
def test_samples_are_those_of_grid_sample(path):
    dice = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 6, 7, generator=dice)
    offset = 4 * torch.randn(2, 2, 3, 2, 6, 7, generator=dice)
    weight = torch.randn(2, 2, 3, 6, 7, generator=dice)
    places = offset.clone()
    places[:, :, :, 0] += torch.arange(7)
    places[:, :, :, 1] += torch.arange(6)[:, None]
    grid = (2 * places.permute(0, 1, 4, 5, 2, 3) + 1) / torch.tensor([7, 6]) - 1
    samples = F.grid_sample(
        x.view(4, 2, 6, 7), grid.reshape(4, 42, 3, 2), "bilinear", "zeros", align_corners=False
    ).view(2, 2, 2, 6, 7, 3)
    expected = (samples * weight.permute(0, 1, 3, 4, 2)[:, :, None]).sum(-1).flatten(1, 2)
    with use(path):
        torch.testing.assert_close(gathered(x, weight, offset), expected, atol=2e-5, rtol=1e-5)


def test_square_offsets_of_a_constant_are_a_dilation():
    x, kernel = torch.randn(1, 3, 12, 11), torch.randn(3, 1, 3, 3)
    for spread in (0, 1, 2):
        offset = square_offset(torch.full((1, 1, 12, 11), float(spread)), 3)
        y = gathered(x, kernel.view(1, 3, 9, 1, 1), offset, kernel_size=3)
        expected = F.conv2d(x, kernel, padding=1 + spread, dilation=1 + spread, groups=3)
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_rounded_offsets_are_whole_and_let_gradients_through():
    offset = (5 * torch.randn(50)).requires_grad_()
    rounded = round_offset(offset)
    assert torch.equal(rounded, offset.round())
    (slope,) = torch.autograd.grad(rounded.sum(), offset)
    assert torch.equal(slope, torch.ones(50))


def test_taps_may_be_listed():
    x, weight = torch.randn(1, 2, 6, 6), torch.randn(1, 1, 9, 6, 6)
    listed = gathered(x, weight, taps=kernel_taps(3, dilation=2))
    assert torch.equal(listed, gathered(x, weight, kernel_size=3, dilation=2))
    transposed = [(y, x_) for x_, y in kernel_taps(3)]
    swapped = weight.unflatten(2, (3, 3)).transpose(2, 3).flatten(2, 3)
    torch.testing.assert_close(gathered(x, swapped, taps=transposed), gathered(x, weight, kernel_size=3))
    still = torch.zeros(1, 1, 9, 2, 6, 6)
    torch.testing.assert_close(gathered(x, weight, still, taps=transposed), gathered(x, swapped, kernel_size=3))


def test_places_far_away_or_nowhere_give_nothing():
    x, weight = torch.ones(1, 1, 4, 4), torch.ones(1, 1, 1, 4, 4)
    for far in (1e9, -1e9, float("inf"), float("nan")):
        offset = torch.full((1, 1, 1, 2, 4, 4), far, requires_grad=True)
        for path in ("fast", "reference"):
            with use(path):
                y = gathered(x, weight, offset)
                assert not y.any()
                (slope,) = torch.autograd.grad(y.sum(), offset)
                assert not slope.any()


# ---------------------------------------------------------------------- the fast paths


@pytest.mark.parametrize("offsets", [False, True])
@given(CASES)
@settings(deadline=None, max_examples=40)
def test_the_compiled_path_is_the_reference(offsets, case):
    own = {"offsets": case["offsets"] or 1} if offsets else {"offsets": None, "fixed": False}
    given = draw(case | own)
    with use("reference"):
        expected = run(*given)
    for ours, theirs in zip(run(*given), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5 * (1 + theirs.abs().max().item()), rtol=1e-5)


def kinds():
    """A case of each way through the kernels."""
    base = {"b": 2, "groups": 2, "each": 2, "kernel": (2, 3), "stride": (2, 1), "dilation": 1, "padding": None}
    base |= {"size": (4, 5), "interleaved": False, "own": False, "fixed": False, "offsets": None, "seed": 0}
    return {
        "positions": base,
        "content, interleaved": base | {"own": True, "interleaved": True},
        "offsets and weights of the content": base | {"own": True, "offsets": 2},
        "offsets shared by all channels": base | {"own": True, "offsets": 1},
        "fixed weights, one offset for all": base | {"fixed": True, "offsets": 1, "each": 1},
        "fixed weights, interleaved": base | {"fixed": True, "offsets": 2, "interleaved": True},
    }


@pytest.mark.parametrize("kind", kinds())
def test_the_triton_kernels_are_the_reference(kind, interpreted):
    x, weight, offset, settings = draw(kinds()[kind])
    with use("reference"):
        expected = run(x, weight, offset, settings)
    device = torch.device(interpreted)
    given = [None if t is None else t.to(device) for t in (x, weight, offset)]
    up = torch.randn(expected[0].shape, generator=torch.Generator().manual_seed(1)).to(device)
    if interpreted == "cpu":
        with interpreting():
            found = run(*given, settings, up)
    else:
        found = run(*given, settings, up)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, atol=1e-5 * (1 + theirs.abs().max().item()), rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_through_triton(dtype, interpreted):
    x, weight, offset, settings = draw(kinds()["offsets and weights of the content"])
    with use("reference"):
        expected = gathered(x, weight, offset, **settings)
    low = [t.to(interpreted, dtype) for t in (x, weight)]
    if interpreted == "cpu":
        with interpreting():
            y = gathered(*low, offset.to(interpreted), **settings)
    else:
        y = gathered(*low, offset.to(interpreted), **settings)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float().cpu(), expected, atol=5e-2, rtol=2e-2)


@pytest.mark.parametrize("offsets", [None, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_the_cpu(dtype, offsets):
    x, weight, offset, settings = draw(kinds()["positions"] | {"offsets": offsets, "own": True})
    expected = run(x, weight, offset, settings)
    found = run(
        x.to(dtype), weight.to(dtype), offset, settings, torch.randn(1).new_ones(()).to(dtype).expand_as(expected[0])
    )
    assert found[0].dtype == found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0].float(), expected[0], atol=5e-2, rtol=2e-2)


def test_threads_share_the_work_without_gaps(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for kind, case in kinds().items():
        given = draw(case)
        with use("reference"):
            expected = run(*given)
        for ours, theirs in zip(run(*given), expected, strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5, msg=kind)


def test_views_are_read_right():
    x, weight = torch.randn(2, 4, 6, 7), torch.randn(2, 2, 9, 6, 7)
    packed = torch.randn(2, 6, 7, 2, 20)
    offset = packed[..., 1:19].unflatten(-1, (9, 2)).permute(0, 3, 4, 5, 1, 2)
    expected = gathered(x, weight, offset.contiguous(), kernel_size=3)
    last = x.to(memory_format=torch.channels_last)
    assert torch.equal(gathered(last, weight, offset, kernel_size=3), expected)
    assert torch.equal(gathered(x, weight.permute(2, 0, 1, 3, 4).contiguous().permute(1, 2, 0, 3, 4), offset,
                                kernel_size=3), expected)  # fmt: skip
    still = gathered(x, weight, kernel_size=3)
    assert torch.equal(gathered(last, weight.mT.contiguous().mT, kernel_size=3), still)


@pytest.mark.parametrize("offsets", [False, True])
def test_only_what_is_given_is_kept_for_the_gradient(offsets):
    x, weight = torch.randn(2, 8, 6, 6, requires_grad=True), torch.randn(2, 2, 9, 6, 6, requires_grad=True)
    offset = torch.randn(2, 2, 9, 2, 6, 6, requires_grad=True) if offsets else None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        gathered(x, weight, offset, kernel_size=3)
    assert set(kept) <= {t.data_ptr() for t in (x, weight, offset) if t is not None}


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize("path", ["fast", "reference"])
@pytest.mark.parametrize("kind", kinds())
def test_gradients_are_those_of_finite_differences(kind, path):
    x, weight, offset, settings = draw(kinds()[kind], torch.float64)
    given = [t.requires_grad_() for t in (x, weight, offset) if t is not None]
    with use(path):
        assert gradcheck(lambda *given: gathered(*given, **settings), given, fast_mode=True)


def test_of_what_needs_no_gradient_none_is_given():
    x, weight, offset, settings = draw(kinds()["offsets and weights of the content"])
    weight.requires_grad_()
    gathered(x, weight, offset, **settings).sum().backward()
    assert weight.grad is not None
    assert x.grad is None
    assert offset.grad is None


# ---------------------------------------------------------------------- the rest


def test_the_fast_path_is_taken_where_it_can(monkeypatch):
    taken = []
    monkeypatch.setattr(module, "_on_cpu", lambda x, *_: taken.append(1) or x)
    x, weight = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 9, 4, 4)
    with use("reference"):
        gathered(x, weight, kernel_size=3)
    assert taken == []
    gathered(x, weight, kernel_size=3)
    assert taken == [1]


X, W = torch.zeros(2, 4, 6, 6), torch.zeros(1, 2, 9, 6, 6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: gathered(X[0], W, kernel_size=3), r"x \[B, C, H, W\]"),
        (lambda: gathered(X, W[0], kernel_size=3), r"weight \[B, G, T, Ho, Wo\]"),
        (lambda: gathered(X, W, kernel_size=5), r"25 taps the weight is \[2 or 1, G, 25, 6, 6\]"),
        (lambda: gathered(X, W, kernel_size=3, stride=2), r"\[2 or 1, G, 9, 3, 3\]"),
        (lambda: gathered(X, W.expand(3, -1, -1, -1, -1), kernel_size=3), r"\[2 or 1, G, 9, 6, 6\]"),
        (lambda: gathered(X, W[:, :1].expand(-1, 3, -1, -1, -1), kernel_size=3), "G divides 4"),
        (lambda: gathered(X, W, torch.zeros(2, 3, 9, 2, 6, 6), kernel_size=3), "G' divides 4"),
        (lambda: gathered(X, W, torch.zeros(2, 2, 9, 6, 6), kernel_size=3), r"\[2 or 1, G', 9, 2, 6, 6\]"),
        (lambda: gathered(X, W), "pass one of the three"),
        (lambda: gathered(X, W, kernel_size=3, taps=[(0, 0)] * 9), "not both"),
        (lambda: gathered(X, W, taps=[(0.5, 0)] * 9), "whole numbers"),
        (lambda: gathered(X.int(), W, kernel_size=3), "int32.*use .float"),
        (lambda: gathered(X[:0], W, kernel_size=3), "Nothing comes out"),
        (lambda: gathered(X, W, kernel_size=9, padding=0), "Nothing comes out"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


def test_the_meter_counts_two_per_product_and_eight_per_bilinear_sample():
    x, weight, offset = torch.zeros(2, 4, 5, 6), torch.zeros(1, 2, 9, 5, 6), torch.zeros(2, 1, 9, 2, 5, 6)
    values = 2 * 4 * 5 * 6 * 9
    assert count_flops(gathered, x, weight, kernel_size=3) == 2 * values
    assert count_flops(gathered, x, weight.expand(2, -1, -1, -1, -1), kernel_size=3) == 2 * values
    assert count_flops(gathered, x, weight, offset, kernel_size=3) == 10 * values
