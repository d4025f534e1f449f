import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.encode.wavemix import SIZES, WaveBlock, WaveMix, WaveMixDense, levels_for
from foveate.errors import InputError
from foveate.meter import count_flops, count_parameters


def small(**settings):
    """A classifier whose batch norms have seen something, in eval mode."""
    torch.manual_seed(0)
    model = WaveMix(**{"num_classes": 5, "dim": 8, "depth": 2, "levels": 2} | settings)
    return seasoned(model, torch.rand(4, model.in_chans, 16, 16))


def seasoned(model, x):
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("size", "published"),
    [  # by the authors, for networks that reach an accuracy: MNIST 99, Fashion 90, CIFAR-10 80 and 90
        ("lite-8/10", 3566),
        ("lite-8/5", 7156),
        ("lite-32/7", 37_058),
        ("lite-64/6", 520_106),
    ],
)
def test_small_networks_have_the_published_parameters(size, published):
    assert count_parameters(WaveMix(**SIZES[size])) == published


@pytest.mark.parametrize(
    ("size", "millions"),
    [("192/16", 27.86), ("lite-192/16", 12.5), ("cifar-144/7", 3.04)],
)
def test_large_networks_have_the_published_parameters(size, millions):
    with torch.device("meta"):
        model = WaveMix(**SIZES[size])
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.01)


@pytest.mark.parametrize(("levels", "parameters", "gmacs"), [(1, 83_344, 0.088), (3, 190_416, 0.109)])
def test_a_block_costs_what_it_should(levels, parameters, gmacs):
    block = WaveBlock(64, levels).eval()
    assert count_parameters(block) == parameters
    assert count_flops(block, torch.zeros(1, 64, 64, 64)) / 2e9 == pytest.approx(gmacs, abs=5e-4)


def test_cityscapes_has_28_million_parameters():
    with torch.device("meta"):
        model = WaveMixDense(20, dim=192, levels=3, dropout=0.5, stem="patch", widths=[128, 64])
    assert count_parameters(model) / 1e6 == pytest.approx(28.19, abs=0.01)


# ---------------------------------------------------------------------- the block


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 4), st.sampled_from(["transposed", "bilinear"]))
@settings(deadline=None, max_examples=25)
def test_a_block_keeps_every_size(height, width, levels, upsample):
    x = torch.rand(1, 8, height, width)
    with torch.no_grad():
        assert WaveBlock(8, levels, upsample=upsample).eval()(x).shape == x.shape


def reach(first, last, levels):
    """The pixels from..to that outputs first..last may depend on: the two cells that a 4x4 transposed convolution
    of stride 2 reads per output, at every level, and all pixels of a cell."""
    pixels = []
    for level in range(1, levels + 1):
        first, last = (first - 1) // 2, (last + 1) // 2
        pixels += [first * 2**level, (last + 1) * 2**level - 1]
    return min(pixels), max(pixels)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_a_block_sees_the_cells_it_reads_and_no_more(levels):
    torch.manual_seed(0)
    block = WaveBlock(8, levels).eval()
    x = torch.randn(1, 8, 64, 64)
    with torch.no_grad():
        before = block(x)
        for place in ((33, 30), (40, 23)):
            changed = x.clone()
            changed[..., place[0], place[1]] += 1
            moved = (block(changed) != before).any(1)[0]
            inside = torch.tensor(
                [
                    [all(a <= p <= b for p, (a, b) in zip(place, bounds, strict=True)) for bounds in row]
                    for row in [[(reach(y, y, levels), reach(x, x, levels)) for x in range(64)] for y in range(64)]
                ]
            )
            assert not moved[~inside].any()
            assert moved[inside].float().mean() > 0.95


def test_each_level_doubles_what_a_block_sees():
    spans = [reach(32, 32, levels) for levels in (1, 2, 3, 4)]
    widths = [last - first + 1 for first, last in spans]
    assert widths == [4, 8, 16, 32]


@pytest.mark.parametrize("upsample", ["transposed", "bilinear"])
def test_folded_batch_norms_change_nothing(upsample):
    model = small(upsample=upsample)
    x = torch.rand(2, 3, 19, 22)
    with torch.no_grad():
        expected = model(x)
        fused = model.fuse()
        torch.testing.assert_close(fused(x), expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(fused.fuse()(x), expected, atol=1e-5, rtol=1e-5)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.blocks.modules())


def test_gradients_reach_every_parameter_at_every_level():
    model = WaveMix(4, dim=8, depth=1, levels=4, dropout=0.0)
    (model(torch.rand(2, 3, 70, 66)) * torch.rand(2, 4)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    block, x = WaveBlock(8, dropout=0.5), torch.rand(2, 8, 8, 8)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))


# ---------------------------------------------------------------------- the networks


def test_a_classifier_in_timms_words():
    model, x = small(), torch.rand(2, 3, 18, 23)
    with torch.no_grad():
        features = model.forward_features(x)
        assert features.shape == (2, 8, 5, 6)
        assert torch.equal(model.forward_head(features), model(x))
        pooled = model.forward_head(features, pre_logits=True)
        torch.testing.assert_close(pooled, features.mean((2, 3)))
        model.reset_classifier(9)
        assert model(x).shape == (2, 9)
        model.reset_classifier(0)
        assert torch.equal(model(x), pooled)


def test_grey_digits_are_classified_by_the_smallest():
    assert WaveMix(**SIZES["lite-8/10"]).eval()(torch.rand(1, 1, 28, 28)).shape == (1, 10)


@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"patch": 4}, (5, 6)),
        ({"patch": 8}, (3, 3)),
        ({"stem": "strided"}, (18, 23)),
        ({"stem": "strided", "stride": 2}, (5, 6)),
    ],
)
def test_stems_shrink(settings, size):
    with torch.no_grad():
        assert small(**settings).forward_features(torch.rand(1, 3, 18, 23)).shape == (1, 8, *size)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [
        ({}, 1),
        ({"stem": "patch"}, 1),
        ({"stem": "patch", "patch": 2}, 2),
        ({"stride": 1, "widths": [6]}, 2),
        ({"stride": 1, "widths": []}, 1),
    ],
)
@pytest.mark.parametrize("size", [(16, 16), (9, 14), (1, 1)])
def test_dense_outputs_lie_on_the_pixels(settings, scale, size):
    model = WaveMixDense(3, dim=8, depth=1, levels=2, **settings).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, *size)).shape == (1, 3, scale * size[0], scale * size[1])


def test_a_dense_network_changes_its_outputs_and_is_saved_with_them(tmp_path):
    model, x = WaveMixDense(3, dim=8, depth=1, levels=1), torch.rand(1, 3, 10, 10)
    model.reset_classifier(7)
    model.eval().save_pretrained(tmp_path)
    again = WaveMixDense.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        assert model(x).shape == (1, 7, 10, 10)
        assert torch.equal(again(x), model(x))
        model.reset_classifier(0)
        assert torch.equal(model(x), model.forward_features(x))


def test_levels_grow_with_the_picture():
    assert [levels_for(side) for side in (1, 32, 63, 64, 128, 224, 256, 4000)] == [1, 1, 1, 2, 3, 3, 4, 4]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: WaveMix(dim=30), "multiple of 4, got 30"),
        (lambda: WaveMix(dim=8, levels=0), "levels=0"),
        (lambda: WaveMix(dim=8, upsample="nearest"), "'nearest'; use 'transposed' or 'bilinear'"),
        (lambda: WaveMix(dim=8, stem="conv"), "stem='conv'"),
        (lambda: WaveMix(dim=8, patch=0), "patch=0"),
        (lambda: WaveMixDense(2, dim=8, depth=1, widths=[4]), "1 doublings.*shrinks 4 times; give 2 widths"),
        (lambda: WaveMixDense(2, dim=8, depth=1, stem="patch", patch=3), "shrinks 3 times"),
        (lambda: levels_for(0), "got 0"),
        (lambda: small()(torch.rand(1, 1, 8, 8)), r"\[B, 3, H, W\]"),
        (lambda: small()(torch.rand(1, 3, 0, 8)), "empty"),
        (lambda: small()(torch.full((1, 3, 8, 8), float("nan"))), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()
