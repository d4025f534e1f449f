"""xT: regions in their places, context between them, and no more memory than some regions need."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.encode.xt import XT, nest, unnest
from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers.region_context import Context, sincos
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops, stored_bytes
from small_hosts import filled, output, swins, vits

pytest.importorskip("transformers")
HOSTS = vits(32, 8, 16, 1, 2) | swins(depths=(1, 1))


class Coarse(nn.Module):
    """A map of means of 8 x 8 pixels, and a pyramid of two."""

    def __init__(self, pyramid=False):
        super().__init__()
        self.gain, self.pyramid = nn.Parameter(torch.ones(())), pyramid

    def forward(self, x):
        fine = self.gain * F.avg_pool2d(x, 4)
        return [fine, F.avg_pool2d(fine, 2)] if self.pyramid else F.avg_pool2d(fine, 2)


@pytest.fixture(
    params=[
        "ours", "ViTModel", "ViTForImageClassification", "Dinov2ForImageClassification", "CLIPVisionModel",
        "SwinModel", "Swinv2ForImageClassification",
    ]
)  # fmt: skip
def host(request):
    return filled(HOSTS[request.param]())


def pixels(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def woken(handle):
    """Let the context have a say."""
    with torch.no_grad():
        handle.context.output_proj.weight.normal_(0, 0.5)
    return handle


# ------------------------------------------------------------------------------------------------- places


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.integers(1, 3))
@settings(deadline=None, max_examples=30)
def test_regions_come_back_to_their_places(batch, rows, columns, side):
    x = pixels(batch, 2, rows * side, columns * side)
    regions = nest(x, (rows, columns))
    assert regions.shape == (batch * rows * columns, 2, side, side)
    assert torch.equal(regions[rows * columns - 1], x[0, :, -side:, -side:])
    assert torch.equal(unnest(regions, batch, (rows, columns)), x)


@pytest.mark.parametrize("pyramid", [False, True])
def test_features_lie_where_their_pixels_do(pyramid):
    model, x = Coarse(pyramid), pixels(2, 3, 64, 96)
    with torch.no_grad():
        whole = model(x)
        XT(model, region=32, channels=3)
        seen = model(x)
    for a, b in zip(whole, seen, strict=True) if pyramid else ((whole, seen),):
        torch.testing.assert_close(a, b)


def test_one_region_is_the_backbone(host):
    x = pixels(2, 3, 32, 32)
    before, keys = output(host, x), list(host.state_dict())
    handle = XT(host)
    torch.testing.assert_close(output(host, x), before, atol=1e-5, rtol=1e-5)
    assert any(key.startswith("context.") for key in host.state_dict())
    handle.remove()
    assert torch.equal(output(host, x), before)
    assert list(host.state_dict()) == keys


def test_larger_pictures_give_outputs_of_the_hosts_kind(host):
    small = output(host, pixels(2, 3, 32, 32))
    alone = type(host(pixels(1, 3, 32, 32)))
    XT(host)
    for size in ((64, 64), (96, 32), (70, 45)):
        y = output(host, pixels(2, 3, *size))
        assert y.shape[::2] == small.shape[::2]
        assert y.isfinite().all()
        assert isinstance(host(pixels(1, 3, *size)), alone)


def test_regions_are_independent_before_the_context():
    model = filled(HOSTS["SwinModel"]())
    handle = XT(model, at_once=1)
    x = pixels(1, 3, 64, 64)
    y = output(model, x).mT.unflatten(2, (8, 8))
    x[:, :, :32, 32:] = 0
    z = output(model, x).mT.unflatten(2, (8, 8))
    same = torch.ones(8, 8, dtype=torch.bool)
    same[:4, 4:] = False
    assert torch.equal(y[..., same], z[..., same])
    assert not torch.equal(y, z)
    woken(handle)
    assert not torch.equal(output(model, x).mT.unflatten(2, (8, 8))[..., 7, 7], z[..., 7, 7])


def test_a_batch_is_its_pictures(host):
    woken(XT(host, at_once=3))
    x = pixels(3, 3, 64, 32)
    torch.testing.assert_close(output(host, x), torch.cat([output(host, p[None]) for p in x]), atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- context


@pytest.mark.parametrize("kind", ["hyper", "mamba"])
def test_the_class_token_sees_all(kind):
    context = filled(Context(6, 8, kind=kind, num_classes=3))
    x = pixels(1, 6, 3, 4).requires_grad_()
    context(x)[1].sum().backward()
    assert bool((x.grad.abs().sum(1) > 0).all())


def test_a_place_sees_those_before_it_only():
    context, x = filled(Context(6, 8)), pixels(1, 6, 3, 4)
    with torch.no_grad():
        before = context(x)[0]
        x[:, :, 1, 2] = 9
        after = context(x)[0]
    changed = (before != after).any(1).flatten()
    assert changed.tolist() == [False] * 6 + [True] * 6


def test_positions_are_sines_of_rows_then_columns_then_cosines():
    angles = torch.tensor([2, 0.02, 4, 0.04])
    torch.testing.assert_close(sincos((3, 5), 8)[2 * 5 + 4], torch.cat([angles.sin(), angles.cos()]))


def test_official_weights_are_taken_by_their_names():
    context = Context(6, 16, depth=1, num_classes=3)
    shapes = {
        "input_proj.weight": (16, 6), "input_proj.bias": (16,), "cls_token": (1, 1, 16),
        "layers.0.attn.qkv.weight": (48, 16), "layers.0.attn.qkv.bias": (48,),
        "layers.0.attn.proj.weight": (16, 16), "layers.0.attn.proj.bias": (16,),
        "layers.0.input_layernorm.weight": (16,), "layers.0.post_attention_layernorm.weight": (16,),
        "layers.0.mlp.gate_proj.weight": (64, 16), "layers.0.mlp.up_proj.weight": (64, 16),
        "layers.0.mlp.down_proj.weight": (16, 64), "cls.0.weight": (16,), "cls.0.bias": (16,),
        "cls.1.weight": (3, 16), "cls.1.bias": (3,),
    }  # fmt: skip
    state = {f"decoder.{name}": torch.randn(shape) for name, shape in shapes.items()} | {"encoder.x": torch.ones(1)}
    context.load_official(state)
    own = context.state_dict()
    assert all(torch.equal(own[name], state[f"decoder.{name}"]) for name in shapes)
    del state["decoder.cls_token"]
    with pytest.raises(WeightsError, match="cls_token"):
        context.load_official(state)


def test_a_head_of_its_own_reads_the_class_token():
    model = filled(HOSTS["SwinModel"]())
    handle = XT(model, num_classes=5)
    x = pixels(2, 3, 64, 64)
    y = output(model, x)
    assert y.shape == (2, 5)
    features, token = handle.encode(x[0])
    assert features.shape == (1, 16, 8, 8)
    expected = handle.context.cls(handle.encode(handle.pixels.restore(x[:1]).clamp(0, 1))[1])
    assert expected.shape == (1, 5)
    assert token.shape == (1, handle.context.input_proj.out_features)


# ------------------------------------------------------------------------------------------------- memory, gradients


def test_a_share_of_gradients_changes_no_value():
    model, x = filled(HOSTS["SwinModel"]()), pixels(1, 3, 128, 96)
    with woken(XT(model)) as handle:
        expected = output(model, x)
        for share in (0.1, 0.5, 1.0):
            handle.nest.gradients = share
            torch.testing.assert_close(model(x)[0].detach(), expected, atol=1e-4, rtol=1e-4)


def test_so_many_regions_carry_gradients():
    model, x = Coarse(), pixels(2, 3, 64, 64).requires_grad_()
    XT(model, region=16, channels=3, gradients=0.3, at_once=2)
    model(x).sum().backward()
    touched = nest(x.grad, (4, 4)).flatten(1).any(1)
    assert int(touched.sum()) == 10


def test_checkpoints_keep_less_and_give_the_same_gradients():
    made = [filled(VisionTransformer(32, 8, 16, 2, 2, num_classes=4)) for _ in range(2)]
    x = pixels(1, 3, 128, 128)
    kept = []
    for model, at_once in zip(made, (16, 1), strict=True):
        torch.manual_seed(0)
        woken(XT(model, at_once=at_once))
        model(x).square().sum().backward()
        kept.append(stored_bytes(model, x))
    assert kept[1] < 0.25 * kept[0]
    for a, b in zip(*(m.parameters() for m in made), strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-3)


def test_no_more_regions_are_in_work_than_asked_for():
    model, seen = Coarse(), []
    with XT(model, region=8, channels=3, at_once=3) as handle:
        original = handle.nest._forward
        handle.nest._forward = lambda x: seen.append(len(x)) or original(x)
        handle.encode(pixels(3, 32, 24))
    assert seen == [3, 3, 3, 3]


def test_a_picture_read_by_parts_is_the_picture():
    model = filled(HOSTS["SwinModel"]())
    handle = woken(XT(model, at_once=2))
    x = pixels(1, 3, 70, 100)
    with torch.no_grad():
        by_parts = handle.encode(x)[0]
        whole = output(model, handle.pixels.normalise(x))
    torch.testing.assert_close(by_parts.flatten(2).mT, whole, atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------------------------------------- budget, errors


@pytest.mark.parametrize("budget", [0.2, 0.5, 0.9])
def test_a_budget_buys_regions(budget):
    model, x = filled(HOSTS["SwinModel"]()), pixels(1, 3, 128, 128)
    handle = XT(model, budget)
    rows, columns = handle.nest.grid((128, 128))
    full = handle.nest.flops((4, 4))
    assert handle.nest.flops((rows, columns)) <= budget * full
    assert rows * columns >= 0.3 * budget * 16
    assert output(model, x).shape == (1, rows * columns * 16, 16)
    look = handle.look(x)
    assert look.tokens == (rows * columns,)
    assert look.full == 16
    assert look.boxes[0].shape == (rows * columns, 4)
    assert look.boxes[0][-1].tolist()[2:] == [128, 128]


def test_predicted_flops_are_those_that_are_counted():
    model, x = filled(HOSTS["SwinModel"]()), pixels(1, 3, 64, 128)
    handle = XT(model)
    assert count_flops(output, model, x) == pytest.approx(handle.nest.flops((2, 4)), rel=0.01)


def test_a_copy_works_by_itself():
    model, x = filled(HOSTS["SwinModel"]()), pixels(1, 3, 64, 64)
    woken(XT(model))
    other, expected = copy.deepcopy(model), output(model, x)
    woken_again = other.context.output_proj.weight
    with torch.no_grad():
        model.context.output_proj.weight.zero_()
    assert torch.equal(output(other, x), expected)
    assert woken_again.any()


def test_what_does_not_fit_is_refused(host):
    for wrong in ({"region": 0}, {"at_once": 0}, {"gradients": 0}, {"dim": 6}, {"kind": "xl"}, {"depth": 0}):
        with pytest.raises(InputError):
            XT(host, **wrong)
    with pytest.raises(BudgetError):
        XT(host, "64 tokens")
    assert not any(key.startswith("context.") for key in host.state_dict())
    with pytest.raises(InputError, match="channels="):
        XT(nn.Conv2d(3, 8, 3))
    XT(host, "1 FLOPs")
    with pytest.raises(BudgetError, match="no region"):
        output(host, pixels(1, 3, 64, 64))
    with pytest.raises(InputError):
        output(host, pixels(3, 64, 64))
