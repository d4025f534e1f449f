from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.errors import InputError, WeightsError
from foveate.layers.quantise import quantise, weight_bytes
from foveate.ops import use
from foveate.recognize.deformable_codesign import RUNGS, DeformableDecoder, DeformConv, conformance_example

FORMS = st.tuples(st.sampled_from(RUNGS), st.booleans())


def conv(rung, depthwise=False, strength=0.0, bias=0.0, **settings):
    """A layer from 4 to 4 or 6 channels, its predictor with weights of its own."""
    torch.manual_seed(0)
    layer = DeformConv(4, 4 if depthwise else 6, rung, depthwise=depthwise, **settings)
    if rung != "fixed":
        nn.init.normal_(layer.conv_offset.weight, std=strength) if strength else None
        nn.init.constant_(layer.conv_offset.bias, bias)
    return layer


def plain(layer, x, dilation=1):
    return F.conv2d(x, layer.weight, padding=dilation, dilation=dilation, groups=layer.groups)


@given(FORMS, st.booleans(), st.integers(1, 8), st.integers(1, 8))
@settings(deadline=None, max_examples=25)
def test_a_fresh_layer_is_a_plain_convolution(form, rounded, height, width):
    rung, depthwise = form
    x, layer = torch.randn(2, 4, height, width), conv(rung, depthwise, rounded=rounded)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("depthwise", [False, True])
def test_no_freedom_is_a_plain_convolution_and_enough_is_free(depthwise):
    x = torch.randn(2, 4, 9, 8)
    free, none = conv("free", depthwise, 1.5), conv("bound", depthwise, 1.5, bound=0)
    enough = conv("free", depthwise, 1.5)
    enough.rung, enough.bound = "bound", 1 + int(free.offset(x).abs().max())
    with torch.no_grad():
        torch.testing.assert_close(none(x), plain(none, x), atol=1e-6, rtol=1e-5)
        assert torch.equal(enough(x), free(x))
        assert not torch.allclose(free(x), plain(free, x), atol=0.1)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("s", [0, 1, 3])
def test_a_constant_square_is_a_dilation(depthwise, s):
    x, layer = torch.randn(2, 4, 9, 10), conv("square", depthwise, bias=float(s))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(layer, x, 1 + s), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("rung", ["bound", "square"])
def test_offsets_stay_within_the_bound(rung):
    x, layer = torch.randn(1, 4, 9, 9), conv(rung, strength=5.0, bound=2)
    offset = layer.offset(x)
    assert offset.abs().max() == 2
    if rung == "square":
        s = offset[:, :, 8, 0]  # of the tap (1, 1)
        assert s.min() == 0
        taps = torch.tensor([(x, y) for y in (-1, 0, 1) for x in (-1, 0, 1)])[:, :, None, None]
        assert torch.equal(offset[0, 0], taps * s[0])


@pytest.mark.parametrize("rung", RUNGS[1:])
@pytest.mark.parametrize("depthwise", [False, True])
def test_rounded_offsets_gather_whole_pixels(rung, depthwise):
    x, layer = torch.randn(1, 4, 7, 8), conv(rung, depthwise, 1.0, rounded=True, bound=4)
    with torch.no_grad():
        offset = layer.offset(x)
        assert torch.equal(offset, offset.round())
        expected = torch.zeros(1, len(layer.weight), 7, 8)
        for t in range(9):
            dy, dx = t // 3 - 1, t % 3 - 1
            rows = torch.arange(7)[:, None] + dy + offset[0, 0, t, 1].long()
            columns = torch.arange(8) + dx + offset[0, 0, t, 0].long()
            inside = (rows >= 0) & (rows < 7) & (columns >= 0) & (columns < 8)
            sample = x[:, :, rows.clamp(0, 6), columns.clamp(0, 7)] * inside
            weight = layer.weight.flatten(2)[:, :, t]
            expected += (
                sample * weight.view(1, -1, 1, 1) if depthwise else torch.einsum("oc,bchw->bohw", weight, sample)
            )
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)


def test_predicted_offsets_are_down_then_across_per_tap():
    layer = conv("free", depthwise=True)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[:, 0, 0, 2] = 1  # tap 2 alone, up and to the right
        layer.conv_offset.bias[4:6] = torch.tensor([3.0, -1.0])  # moved 3 down, 1 to the left
        x = torch.randn(1, 4, 8, 8)
        assert torch.equal(layer(x)[:, :, :6], x[:, :, 2:])


@given(st.sampled_from(["free", "bound", "square"]), st.integers(0, 3), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=20)
def test_bounded_rungs_read_rows_near_their_own(rung, bound, rounded, depthwise):
    x = torch.randn(1, 4, 17, 6, requires_grad=True)
    layer = conv(rung, depthwise, 4.0, rounded=rounded, bound=bound)
    with torch.no_grad():
        offset = layer.offset(x)
    layer.offset = lambda _: offset  # the sampling alone
    gradient = torch.autograd.grad(layer(x)[:, :, 8].square().sum(), x)[0]
    rows = gradient.abs().sum((0, 1, 3)).nonzero().flatten()
    far = int((rows - 8).abs().max())
    assert far > 4 if rung == "free" else far <= 1 + bound


def test_a_square_predicts_one_number_and_the_others_eighteen():
    assert [conv(rung).conv_offset.out_channels for rung in RUNGS[1:]] == [18, 18, 1]
    kernels = {(r, d): conv(r, d).conv_offset.kernel_size[0] for r in RUNGS[1:] for d in (False, True)}
    assert [k for (r, d), k in kernels.items() if k == 3] == [3, 3]
    assert {(r, d) for (r, d), k in kernels.items() if k == 3} == {("bound", False), ("square", False)}


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("depthwise", [False, True])
def test_gradients_are_right(rung, depthwise):
    layer, x = conv(rung, depthwise, 0.7, 0.3, bound=2).double(), torch.randn(1, 4, 3, 3).double().requires_grad_()
    with use("reference"):
        assert torch.autograd.gradcheck(layer, (x,), atol=1e-6)


def test_rounding_passes_gradients_to_the_predictor():
    layer = conv("square", True, 0.5, 1.0, rounded=True)
    layer(torch.randn(2, 4, 6, 6)).square().sum().backward()
    assert layer.conv_offset.weight.grad.any()


# ---------------------------------------------------------------------- the decoder


def seasoned():
    decoder, (x,) = conformance_example()
    for module in decoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return decoder.eval(), x


def test_a_decoder_doubles_its_map_per_stage_and_folds():
    decoder, x = seasoned()
    with torch.no_grad():
        expected = decoder(x)
        assert expected.shape == (2, 6, 20, 28)
        assert decoder.fuse() is decoder
        torch.testing.assert_close(decoder(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decoder.fuse()(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in decoder.modules())


def test_offsets_can_be_rounded_after_training():
    decoder, x = seasoned()
    with torch.no_grad():
        before = decoder(x)
        assert not torch.equal(decoder.round_offsets()(x), before)
        assert torch.equal(decoder.round_offsets(False)(x), before)


def test_a_folded_and_quantised_decoder_is_close_at_an_eighth_of_the_bytes():
    decoder, x = seasoned()
    with torch.no_grad():
        expected = decoder(x)
        whole = weight_bytes(decoder.fuse())
        quantise(decoder, 8, 8).train()(x)
        close = decoder.eval()(x)
        assert (close - expected).norm() / expected.norm() < 0.1
    assert whole == weight_bytes(seasoned()[0].fuse())
    convs = sum(m.weight.numel() for m in decoder.modules() if isinstance(m, nn.Conv2d))
    assert whole - weight_bytes(decoder) == 3 * convs


def official(depthwise, rung, widths=(12, 8, 6)):
    """A made-up checkpoint with the names and shapes of the released ones."""
    shapes = {"backbone.stem.weight": (3, 3)}
    for i, (a, b) in enumerate(pairwise(widths)):
        name, seen = f"decoder.{4 * i}", b if depthwise else a
        if depthwise:
            shapes[f"{name}.point_wise.weight"] = (b, a, 1, 1)
        shapes[f"{name}.weight"] = (b, 1 if depthwise else a, 3, 3)
        k = 3 if rung in ("bound", "square") and not depthwise else 1
        outputs = 1 if rung == "square" else 18
        shapes |= {f"{name}.conv_offset.weight": (outputs, seen, k, k), f"{name}.conv_offset.bias": (outputs,)}
        if rung == "square":
            shapes[f"{name}.offset_template"] = (1, 18, 1, 1)
        for key in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"decoder.{4 * i + 1}.{key}"] = (b,)
    dice = torch.Generator().manual_seed(0)
    return {key: torch.rand(shape, generator=dice) for key, shape in shapes.items()}


@pytest.mark.parametrize(
    ("depthwise", "rung"), [(True, "square"), (True, "free"), (False, "square"), (False, "bound"), (False, "free")]
)
def test_an_official_checkpoint_gives_the_published_decoder(depthwise, rung):
    state, x = official(depthwise, rung), torch.rand(1, 12, 5, 4)
    decoder = DeformableDecoder.load_official({"model": state}, bound=7)
    stage = decoder.stages[0]
    assert (stage.conv.rung, stage.conv.bound, stage.conv.groups) == (rung, 7, 8 if depthwise else 1)
    with torch.no_grad():
        y = F.conv2d(x, state["decoder.0.point_wise.weight"]) if depthwise else x
        y = stage.conv(y)
        values = (state[f"decoder.1.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        y = F.relu(F.batch_norm(y, *values)).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(stage(x), y)
    assert torch.equal(stage.conv.weight, state["decoder.0.weight"])
    assert torch.equal(decoder.stages[1].conv.conv_offset.bias, state["decoder.4.conv_offset.bias"])


@pytest.mark.parametrize("gone", ["decoder.0.weight", "decoder.5.bias", "decoder.4.conv_offset.bias"])
def test_checkpoints_of_something_else_are_refused(gone):
    state = official(True, "square")
    state.pop(gone)
    with pytest.raises(WeightsError, match=r"no checkpoint of a deformable decoder.*backbone.stem.weight"):
        DeformableDecoder.load_official(state)
    with pytest.raises(WeightsError, match="no checkpoint"):
        DeformableDecoder.load_official({"fc.weight": torch.zeros(2)})


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: DeformConv(4, 4, "round"), "'round'; use one of 'fixed'"),
        (lambda: DeformConv(4, 4, bound=-1), "got -1"),
        (lambda: DeformConv(4, 6, depthwise=True), "got 4 and 6"),
        (lambda: DeformableDecoder(4, (3,))(torch.rand(1, 5, 4, 4)), r"\[B, 4, H, W\]"),
        (lambda: DeformableDecoder(4, (3,))(torch.rand(1, 4, 0, 4)), "something in it"),
        (lambda: DeformableDecoder(4, (3,))(torch.ones(1, 4, 2, 2).int()), "int32"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
