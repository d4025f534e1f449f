import pytest
import torch
from torch import nn

from foveate.encode.replknet import LargeDepthwise, RepLargeKernel, RepLKNet
from foveate.errors import InputError, WeightsError
from foveate.meter import count_flops, count_parameters
from foveate.meter.flops import by_module
from foveate.ops import use


def small(**settings):
    """A classifier whose norms have seen something and do something, in eval mode."""
    torch.manual_seed(0)
    options = {"num_classes": 5, "widths": (8, 12), "depths": (1, 2), "kernels": (13, 7), "small": 5}
    return seasoned(RepLKNet(**options | settings), 3)


def seasoned(module, channels, side=40):
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.weight.uniform_(0.5, 1.5)
                m.bias.normal_(0, 0.3)
        for _ in range(3):
            module.train()(torch.rand(4, channels, side, side))
    return module.eval()


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("size", "side", "millions", "merged", "gmacs"),
    # 31B is published as 79 M and 15.3 G (79.9 and 79.5 M, 15.6 and 15.4 G by mmpretrain, which counts norms too).
    [("31b", 224, 79.86, 79.39, 15.3), ("31l", 384, 172, 172, 96.0), ("xl", 320, 335, 335, 128.7)],
)
def test_published_sizes(size, side, millions, merged, gmacs):
    with torch.device("meta"):
        model, x = RepLKNet(size).eval(), torch.zeros(1, 3, side, side)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, rel=0.005)
    with torch.no_grad():
        model.fuse()
        assert count_parameters(model) / 1e6 == pytest.approx(merged, rel=0.005)
        assert count_flops(model, x) / 2e9 == pytest.approx(gmacs, rel=0.005)


def test_large_kernels_are_a_sixth_of_the_products():
    with torch.device("meta"):
        large, plain = RepLKNet(), RepLKNet(kernels=(3, 3, 3, 3), small=0)
        x = torch.zeros(1, 3, 224, 224)
    with torch.no_grad():
        counts = by_module(large.eval().fuse(), x)
        kernels = [name for name, m in large.named_modules() if isinstance(m, LargeDepthwise)]
        assert sum(counts[name] for name in kernels) / 2e9 == pytest.approx(2.44, abs=0.01)
        assert counts[""] / count_flops(plain.eval(), x) == pytest.approx(1.18, abs=0.01)


# ---------------------------------------------------------------------- folding


@pytest.mark.parametrize(("kernel", "branch"), [(31, 5), (13, 13), (7, 0), (3, 1)])
def test_two_branches_are_one_kernel(kernel, branch):
    module = seasoned(RepLargeKernel(6, kernel, branch), 6, 14)
    x = torch.randn(2, 6, 14, 9)
    with torch.no_grad():
        merged = module.folded()
        torch.testing.assert_close(merged(x), module(x), atol=1e-5, rtol=1e-4)
    assert isinstance(merged, LargeDepthwise)
    assert merged.weight.shape == (6, 1, kernel, kernel)


def test_kernels_are_not_merged_in_training():
    with pytest.raises(InputError, match="eval"):
        RepLargeKernel(4, 7, 3).train().folded()


@pytest.mark.parametrize("settings", [{}, {"small": 0, "ratio": 1.5}])
def test_a_folded_network_gives_the_same_from_fewer_layers(settings):
    model, x = small(**settings), torch.rand(2, 3, 43, 38)
    with torch.no_grad():
        expected = model(x)
        fused = model.fuse()
        torch.testing.assert_close(fused(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(fused.fuse()(x), expected, atol=1e-4, rtol=1e-4)
    assert [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)] == ["norm"]


def test_fast_and_plain_kernels_give_the_same_network():
    model, x = small(), torch.rand(2, 3, 60, 50)
    found = []
    for path in ("fast", "reference"):
        with use(path):
            model.zero_grad()
            y = model(x)
            y.square().sum().backward()
            found.append([y.detach(), *(p.grad.clone() for p in model.parameters())])
    for fast, plain in zip(*found, strict=True):
        torch.testing.assert_close(fast, plain, atol=1e-4 * float(plain.abs().max()) + 1e-5, rtol=1e-3)


# ---------------------------------------------------------------------- the network


def test_maps_of_all_stages():
    model, x = small(), torch.rand(1, 3, 45, 30)
    with torch.no_grad():
        maps = model.forward_intermediates(x)
        assert [tuple(m.shape) for m in maps] == [(1, 8, 12, 8), (1, 12, 6, 4)]
        assert torch.equal(model.norm(maps[-1]), model.forward_features(x))


def test_one_large_kernel_reaches_its_whole_window_and_no_further():
    layer = LargeDepthwise(1, 31)
    nn.init.ones_(layer.weight)
    x = torch.zeros(1, 1, 63, 63)
    x[..., 31, 31] = 1
    with torch.no_grad():
        seen = layer(x)[0, 0] > 0.5
    assert seen.sum() == 31 * 31
    assert seen[16:47, 16:47].all()


def test_branches_drop_more_often_the_deeper_they_are():
    model = RepLKNet(widths=(8, 8), depths=(1, 2), kernels=(7, 7), drop_path=0.4)
    assert [block.drop for stage in model.stages for block in stage] == pytest.approx([0, 0, 0.2, 0.2, 0.4, 0.4])


def test_saved_it_remembers_its_settings(tmp_path):
    model, x = small(ratio=1.5), torch.rand(1, 3, 40, 40)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(RepLKNet.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: RepLKNet("31s"), "'31s'; use one of '31b', '31l', 'xl'"),
        (lambda: RepLKNet(widths=(8, 8)), "as many"),
        (lambda: small(kernels=(12, 7)), "odd; got 12"),
        (lambda: small(small=4), "got a small kernel of 4"),
        (lambda: small(small=9), "fit into the large one; got 9 and 7"),
        (lambda: small()(torch.rand(1, 1, 40, 40)), r"\[B, 3, H, W\]"),
        (lambda: small()(torch.full((1, 3, 40, 40), float("nan"))), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


# ---------------------------------------------------------------------- official checkpoints


def conv_norm(name, outputs, inputs, kernel):
    shapes = {f"{name}.conv.weight": (outputs, inputs, kernel, kernel), f"{name}.bn.num_batches_tracked": ()}
    return shapes | {f"{name}.bn.{k}": (outputs,) for k in ("weight", "bias", "running_mean", "running_var")}


def norm(name, channels):
    keys = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{k}": (channels,) for k in keys} | {f"{name}.num_batches_tracked": ()}


def official(widths, depths, kernels, small, ratio, merged=False, classes=7):
    """A state dict of the official names and shapes."""
    first = widths[0]
    shapes = conv_norm("stem.0", first, 3, 3) | conv_norm("stem.1", first, 1, 3)
    shapes |= conv_norm("stem.2", first, first, 1) | conv_norm("stem.3", first, 1, 3)
    for i, (width, depth, kernel) in enumerate(zip(widths, depths, kernels, strict=True)):
        inner = int(width * ratio)
        for j in range(depth):
            block = f"stages.{i}.blocks.{2 * j}"
            shapes |= norm(f"{block}.prelkb_bn", width) | conv_norm(f"{block}.pw1", inner, width, 1)
            shapes |= conv_norm(f"{block}.pw2", width, inner, 1)
            if merged:
                reparam = f"{block}.large_kernel.lkb_reparam"
                shapes |= {f"{reparam}.weight": (inner, 1, kernel, kernel), f"{reparam}.bias": (inner,)}
            else:
                shapes |= conv_norm(f"{block}.large_kernel.lkb_origin", inner, 1, kernel)
                shapes |= conv_norm(f"{block}.large_kernel.small_conv", inner, 1, small) if small else {}
            block = f"stages.{i}.blocks.{2 * j + 1}"
            shapes |= norm(f"{block}.preffn_bn", width)
            shapes |= conv_norm(f"{block}.pw1", 4 * width, width, 1) | conv_norm(f"{block}.pw2", width, 4 * width, 1)
        if i + 1 < len(widths):
            after = widths[i + 1]
            shapes |= conv_norm(f"transitions.{i}.0", after, width, 1) | conv_norm(f"transitions.{i}.1", after, 1, 3)
    shapes |= norm("norm", widths[-1]) | {"head.weight": (classes, widths[-1]), "head.bias": (classes,)}
    torch.manual_seed(0)
    return {
        key: torch.tensor(1) if not shape else torch.rand(shape) + 0.5 if "running_var" in key else torch.randn(shape)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(("small", "ratio"), [(5, 1.0), (0, 1.5)])
def test_official_checkpoints_load(merged, small, ratio):
    state = official((8, 16), (1, 2), (13, 7), small, ratio, merged)
    model = RepLKNet.load_official({"model": state})
    assert count_parameters(model) == sum(v.numel() for k, v in state.items() if k.endswith(("weight", "bias")))
    block = "stages.1.blocks.2"
    ours = model.stages[1][2].m
    assert torch.equal(ours[5].c.weight, state[f"{block}.pw2.conv.weight"])
    assert torch.equal(ours[0].running_var, state[f"{block}.prelkb_bn.running_var"])
    large = ours[3] if merged else ours[3].large.c
    name = "lkb_reparam" if merged else "lkb_origin.conv"
    assert torch.equal(large.weight, state[f"{block}.large_kernel.{name}.weight"])
    assert torch.equal(model.stages[1][3].m[3].bn.bias, state["stages.1.blocks.3.pw2.bn.bias"])
    assert torch.equal(model.transitions[0][2].c.weight, state["transitions.0.1.conv.weight"])
    assert torch.equal(model.stem[4].c.weight, state["stem.2.conv.weight"])
    assert model(torch.rand(1, 3, 40, 40)).shape == (1, 7)


@pytest.mark.parametrize("damage", ["missing", "unknown", "strange"])
def test_other_checkpoints_are_refused(damage):
    state = official((8, 16), (1, 1), (13, 7), 5, 1.0)
    if damage == "missing":
        del state["stages.0.blocks.0.pw2.conv.weight"]
    elif damage == "unknown":
        state["stages.0.extra"] = torch.zeros(1)
    else:
        state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="no checkpoint of RepLKNet"):
        RepLKNet.load_official(state)
