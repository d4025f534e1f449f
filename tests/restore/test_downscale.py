"""The verb `downscale`, upscaling to any size, and round trips, on filters and small networks of our own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from foveate import catalog, ops, weights
from foveate.data import pictures
from foveate.errors import BudgetError, InputError, PictureError, WeightsError
from foveate.layers.resample import resize, wholes
from foveate.layers.rescaler import quantise
from foveate.restore.bidirectional_rescaling import BAIRNet
from foveate.restore.downscale import downscale, downscale_file, rescale_cycle
from foveate.restore.iarn import IARN
from foveate.restore.rescaling import methods, rescaler
from foveate.restore.upscale import network, upscale


@pytest.fixture(autouse=True)
def reference():
    """No compiled kernels: sampling has tests of its own, and compiling takes longer than all of these."""
    with ops.use("reference"):
        yield


ENTRIES = {
    "iarn": "foveate.restore.iarn:IARN",
    "bidirectional-rescaling": "foveate.restore.bidirectional_rescaling:BAIRNet",
}


@pytest.fixture
def cards(tmp_path_factory, monkeypatch):
    """A catalogue in which both networks have code, and an empty folder of weights."""
    cards = catalog.load()
    cards |= {slug: replace(cards[slug], entry=entry) for slug, entry in ENTRIES.items()}
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    folder = tmp_path_factory.mktemp("weights")
    monkeypatch.setattr(weights, "FOLDER", folder)
    for kept in (network, rescaler):
        kept.cache_clear()
    yield folder
    for kept in (network, rescaler):
        kept.cache_clear()


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def bicubic(x, size):
    return resize(x, wholes(tuple(x.shape[2:]), size))


# ---------------------------------------------------------------------- downscale


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        (noise(12, 9, 3), np.ndarray),
        (noise(12, 9), np.ndarray),
        (noise(12, 9, 4), np.ndarray),
        (noise(12, 9, 3).astype(np.uint16) * 257, np.ndarray),
        (torch.rand(3, 12, 9), torch.Tensor),
        (torch.rand(1, 2, 12, 9, dtype=torch.float64), torch.Tensor),
        (Image.fromarray(noise(12, 9, 4)), Image.Image),
    ],
)
def test_the_same_kind_comes_out(given, kind):
    found = downscale(given, scale=3).image
    assert isinstance(found, kind)
    if kind is Image.Image:
        assert (found.mode, found.size) == ("RGBA", (3, 4))
    elif kind is np.ndarray:
        assert (found.dtype, found.shape) == (given.dtype, (4, 3, *given.shape[2:]))
    else:
        assert (found.dtype, found.shape) == (given.dtype, (*given.shape[:-2], 4, 3))


@pytest.mark.parametrize("method", ["lanczos", "bicubic"])
@pytest.mark.parametrize("tile", [None, 4])
def test_filters_are_pillows(method, tile):
    picture = np.asarray(pictures.samples()["astronaut"][:, 90:131, 190:230].permute(1, 2, 0) * 255).round()
    given = picture.astype(np.uint8)
    found = downscale(given, size=(17, 9), method=method, tile=tile).image
    filter = {"lanczos": Image.Resampling.LANCZOS, "bicubic": Image.Resampling.BICUBIC}[method]
    channels = [Image.fromarray(given[..., c].astype(np.float32)).resize((17, 9), filter) for c in range(3)]
    assert np.abs(found - np.stack(channels, 2).clip(0, 255)).max() <= 0.51


def test_area_is_the_mean_of_blocks_of_alpha_the_bicubic():
    given = torch.rand(1, 4, 12, 8)
    found = downscale(given, scale=4, method="area").image
    torch.testing.assert_close(found[:, :3], nn.functional.avg_pool2d(given[:, :3], 4), atol=1e-6, rtol=0)
    torch.testing.assert_close(found[:, 3:], bicubic(given[:, 3:], (3, 2)).clamp(0, 1), atol=1e-6, rtol=0)


def test_the_report_says_what_was_done(tmp_path):
    pictures.save(tmp_path / "in.png", noise(30, 40, 3))
    seen = []
    path, report = downscale(
        tmp_path / "in.png", tmp_path / "out.png", scale=2.5, tile=8, progress=lambda y, all: seen.append((y, all))
    )
    assert path == tmp_path / "out.png"
    assert pictures.load(path).pixels.shape == (12, 16, 3)
    assert (report.method, report.scale, report.shrunk) == ("lanczos", 2.5, True)
    assert (report.width, report.height, report.share) == (16, 12, 1)
    assert report.flops > 0
    assert seen[-1] == (12, 12)
    assert str(report).startswith("16x12 by lanczos /2.5: ")
    json.dumps(report.to_dict())
    assert downscale_file(tmp_path / "in.png", tmp_path / "two.png", size=(10, 15))["scale"] == "4x2"


def test_networks_of_ones_own_shrink():
    class Halves(nn.Module):
        slug, scale = "halves", 2

        def reduce(self, x, size):
            return nn.functional.avg_pool2d(nn.functional.pad(x, (0, 1, 0, 1), mode="replicate"), 2)[
                ..., : size[0], : size[1]
            ]

    given = torch.rand(3, 7, 9)
    found, report = downscale(given, method=Halves())
    assert (tuple(found.shape), report.method) == ((3, 4, 5), "halves")
    with pytest.raises(InputError, match=r"halves shrinks by 2, got scale 3"):
        downscale(given, method=Halves(), scale=3)
    with pytest.raises(InputError, match="halves only shrinks pictures"):
        upscale(given, method=Halves(), scale=2)


BAD = {
    "scale below 1": ({"scale": 0.5}, InputError, "a number from 1 on.*got 0.5"),
    "scale nan": ({"scale": float("nan")}, InputError, "got nan"),
    "scale of text": ({"scale": "2"}, InputError, "got '2'"),
    "larger": ({"size": (20, 4)}, InputError, "20x4 is larger on a side"),
    "no size": ({"size": (0, 4)}, InputError, "both 1 or more"),
    "size and scale": ({"size": (4, 4), "scale": 2}, InputError, "not both"),
    "tile 0": ({"tile": 0}, InputError, "at least one pixel"),
    "unknown method": ({"method": "lancsoz"}, LookupError, "lancsoz"),
    "method that enlarges": ({"method": "pcsr"}, InputError, "no method of downscale; use one of .*bicubic"),
    "a module": ({"method": nn.Linear(1, 1)}, InputError, "a Linear is no method"),
    "device": ({"device": "abacus"}, InputError, "abacus"),
    "extension": ({"out": "out.bmp"}, PictureError, "extension"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_argument_gets_one_error_and_leaves_nothing(tmp_path, monkeypatch, what):
    changes, kind, message = BAD[what]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=message) as caught:
        downscale(noise(9, 12, 3), **({"out": "out.png"} | changes))
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------- to any size


def test_filters_enlarge_to_any_size():
    given = torch.rand(1, 4, 6, 9)
    found, report = upscale(given, size=(20, 13), method="bicubic", tile=4, map=True)
    torch.testing.assert_close(found[:, :3], bicubic(given[:, :3], (13, 20)).clamp(0, 1), atol=1e-5, rtol=0)
    assert (report.scale, report.share, report.map.size) == ("2.222x2.167", 1, (9, 6))
    assert upscale(noise(10, 10), scale=2.7, method="lanczos").image.shape == (27, 27)
    assert upscale(noise(4, 4, 3), method="area", budget="1000 s").image.shape == (16, 16, 3)


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        (
            {"scale": 2.7},
            InputError,
            r"whole number.*got 2\.7; for any other scale use method .*bicubic, lanczos, area",
        ),
        ({"size": (40, 40)}, InputError, "pcsr takes a scale, not a size; for any size use one of .*bicubic"),
        ({"size": (40, 40), "scale": 2, "method": "bicubic"}, InputError, "not both"),
        ({"size": (4, 40), "method": "bicubic"}, InputError, "4x40 is smaller on a side"),
        ({"scale": 0.9, "method": "bicubic"}, InputError, r"a number from 1 on.*got 0\.9"),
        (
            {"scale": 2, "method": "bicubic", "budget": 0.5},
            BudgetError,
            r"bicubic takes shares from 1\.00 to 1.*got 0\.5",
        ),
        ({"scale": 2, "method": "iarn"}, WeightsError, r"no weights of 'iarn'.*recipes/rescale\.py iarn"),
    ],
)
def test_what_fits_no_size_is_refused(cards, changes, kind, message):
    with pytest.raises(kind, match=message):
        upscale(noise(9, 12, 3), **changes)


@pytest.mark.parametrize(
    ("network_class", "config"),
    [(IARN, {"blocks": 1, "growth": 2, "layers": 2}), (BAIRNet, {"channels": 4, "blocks": 1, "every": 0})],
)
def test_networks_with_weights_are_methods_of_both_verbs(cards, network_class, config):
    torch.manual_seed(0)
    model, slug = network_class(**config), network_class.slug
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert slug not in methods()
    model.keep({"config": config})
    assert methods()[slug] == methods("reduce")[slug] == []
    given = torch.rand(1, 3, 13, 17)
    with torch.no_grad():
        low = model.reduce(given, (5, 6)).clamp(0, 1)
        high = model.enlarge(given, (20, 30)).clamp(0, 1)
    assert (low - bicubic(given, (5, 6))).abs().max() > 1e-3
    for tile in (None, 6):
        found, report = downscale(given, size=(6, 5), method=slug, tile=tile)
        torch.testing.assert_close(found, low, atol=1e-5, rtol=0)
        found = upscale(given, size=(30, 20), method=slug, tile=tile).image
        torch.testing.assert_close(found, high, atol=1e-5, rtol=0)
    assert report.method == slug
    assert report.flops > 0
    with pytest.raises(InputError, match=f"'espcn' is no method of downscale; use one of {slug}, bicubic"):
        downscale(given, method="espcn")


# ---------------------------------------------------------------------- round trips


def test_a_cycle_is_two_turns_with_8_bits_between(tmp_path):
    x = quantise(pictures.samples()["coffee"][None, :, 100:140, 100:130])
    rounds = list(rescale_cycle(x, scale=2.5, method="area+lanczos", times=3, out=tmp_path))
    now = x
    for cycle in rounds:
        before, small = now, quantise(torch.as_tensor(downscale(now, scale=2.5, method="area").image))
        now = quantise(torch.as_tensor(upscale(small, size=(30, 40), method="lanczos").image))
        assert cycle.psnr == pytest.approx(float(-10 * (now - x).square().mean().log10()), abs=1e-3)
        assert cycle.change == pytest.approx(float(-10 * (now - before).square().mean().log10()), abs=1e-2)
    assert [c.number for c in rounds] == [1, 2, 3]
    assert {c.method for c in rounds} == {"area+lanczos"}
    assert 1 > rounds[0].ssim > rounds[2].ssim > 0
    names = [f"picture-area+lanczos-{n}{end}.png" for n in (1, 2, 3) for end in ("", "-small")]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*names, "picture-area+lanczos-difference.png"])
    assert np.array_equal(pictures.load(tmp_path / names[4]).pixels, (255 * now[0]).round().byte().permute(1, 2, 0))
    shown = pictures.load(tmp_path / "picture-area+lanczos-difference.png").pixels / 255
    assert np.abs(shown - (8 * (now - x).abs()).clamp(0, 1)[0].permute(1, 2, 0).numpy()).max() < 0.01


def test_networks_go_round_alone_and_in_pairs():
    x, model = torch.rand(3, 20, 20), IARN(1, 2, 2)
    (alone,) = rescale_cycle(x, scale=1, method=model)
    assert alone.psnr == float("inf")  # untrained and at scale 1 it changes nothing
    (pair,) = rescale_cycle(x, scale=2, method=(model, BAIRNet(4, 1, 0)))
    assert pair.method == "iarn+bidirectional-rescaling"
    (upscaled,) = rescale_cycle(x, scale=2, method="bicubic+espcn")
    assert 5 < upscaled.psnr < 40


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"times": 0}, "at least once, got times=0"),
        ({"method": "a+b+c"}, "one that enlarges, got 'a\\+b\\+c'"),
        ({"method": "lanczos+espcn", "scale": 3}, "multiples of 3"),
        ({"scale": 0.1}, "from 1 on"),
    ],
)
def test_a_cycle_that_cannot_be_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        list(rescale_cycle(noise(20, 20, 3), **changes))
