"""The face of networks that rescale: windows, errors, weights, and filters that wear it."""

import json

import pytest
import torch
from torch import nn

from foveate import weights
from foveate.errors import InputError, WeightsError
from foveate.layers.rescaler import (
    FILTERS,
    Adapted,
    Filter,
    Rescaler,
    as_rescaler,
    check_direction,
    quantise,
    whole_box,
)
from foveate.layers.upscaler import window_reader
from foveate.meter import count_flops


class Near(Rescaler):
    """Bicubic, window by window as if each were a picture, with a constant added."""

    slug, halo, largest = "near", 4, 32

    def __init__(self, add: float = 0.0) -> None:
        super().__init__()
        self.add = nn.Parameter(torch.tensor(add))

    def enlarge(self, x, size):
        return Filter("bicubic")(x, size) + self.add


def picture(height=50, width=37):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def streamed(model, x, size, **options):
    with torch.no_grad():
        return torch.cat(list(model.strips(window_reader(x), tuple(x.shape[2:]), size, **options)), 2)


@pytest.mark.parametrize("kernel", FILTERS)
@pytest.mark.parametrize("size", [(50, 37), (21, 30), (101, 80), (1, 1), (100, 74)])
@pytest.mark.parametrize("tile", [None, 9])
def test_a_filter_by_windows_is_the_filter(kernel, size, tile):
    x, model = picture(), Filter(kernel)
    torch.testing.assert_close(streamed(model, x, size, tile=tile), model(x, size), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(100, 74), (125, 111)])
def test_windows_of_their_own_are_exact_where_edges_lie_on_pixels(size):
    x, model = picture(), Near()
    whole = model.enlarge(x, size)
    torch.testing.assert_close(streamed(model, x, size), whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(streamed(model, x, size, tile=5), whole, atol=1e-5, rtol=0)


def test_windows_of_their_own_are_near_elsewhere():
    x = torch.linspace(0, 1, 300)[None, None, None].expand(1, 3, 8, 300).contiguous()
    model, size = Near(), (8, 601)
    assert (streamed(model, x, size, tile=24) - model.enlarge(x, size)).abs().max() <= 0.5 / 600


def test_a_direction_that_a_network_has_not_is_said():
    with pytest.raises(InputError, match="near only enlarges pictures"):
        Near().reduce(picture(), (4, 4))
    with pytest.raises(InputError, match="near only enlarges pictures"):
        streamed(Near(), picture(), (4, 4))


def test_flops_are_those_of_the_whole_picture():
    x, model = picture(48, 32), Near()
    assert model.flops((48, 32), (96, 64)) == pytest.approx(count_flops(model.enlarge, x, (96, 64)))
    assert Filter("bicubic").flops((40, 40), (20, 20)) == 2 * 3 * 8 * (20 * 40 + 20 * 20)


def test_modules_with_the_right_methods_are_adapted():
    class Halves(nn.Module):
        scale = 2

        def reduce(self, x, size):
            return nn.functional.avg_pool2d(x, 2)

    model = as_rescaler(Halves())
    assert (model.slug, model.scale) == ("Halves", 2)
    x = picture(10, 8)
    torch.testing.assert_close(streamed(model, x, (5, 4), tile=3), nn.functional.avg_pool2d(x, 2))
    with pytest.raises(InputError, match="only shrinks"):
        model.enlarge(x, (20, 16))
    assert as_rescaler(model) is model
    with pytest.raises(InputError, match="a Linear is no method"):
        Adapted(nn.Linear(1, 1))


def test_weights_are_kept_and_found_without_a_scale_in_their_name(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "FOLDER", tmp_path)
    assert not Near.has_weights()
    with pytest.raises(WeightsError, match=r"no weights of 'near'.*recipes/rescale\.py --data.*network of your own"):
        Near.pretrained()
    Near(0.25).keep({"config": {"add": 1.0}, "scores": {}})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["near.json", "near.safetensors"]
    assert json.loads((tmp_path / "near.json").read_text())["system"] == "near"
    assert Near.has_weights()
    assert Near.pretrained().add.item() == 0.25
    (tmp_path / "near.safetensors").write_bytes(b"no weights")
    with pytest.raises(WeightsError, match="weights of near cannot be read"):
        Near.pretrained()


def test_the_quantiser_is_idempotent_and_its_gradient_is_one_inside_and_zero_outside():
    x = torch.linspace(-0.5, 1.5, 101, requires_grad=True)
    y = quantise(x)
    assert torch.equal(quantise(y), y)
    levels = torch.arange(256) / 255
    assert torch.equal(quantise(levels), levels)
    assert (y - x.clamp(0, 1)).abs().max() <= 0.5 / 255 + 1e-7
    y.sum().backward()
    assert torch.equal(x.grad, ((x >= 0) & (x <= 1)).float())


@pytest.mark.parametrize(
    ("source", "size", "shrink", "message"),
    [
        ((4, 6), (5, 3), True, "6x4 is to be shrunk, but 3x5 is larger on a side"),
        ((4, 6), (5, 3), False, "6x4 is to be enlarged, but 3x5 is smaller on a side"),
        ((4, 6), (0, 3), True, "both 1 or more"),
        ((4, 6), (2.0, 3), True, "whole pixels"),
    ],
)
def test_sizes_that_go_the_other_way_are_refused(source, size, shrink, message):
    with pytest.raises(InputError, match=message):
        check_direction(source, size, shrink)


def test_the_box_of_a_picture():
    assert whole_box((3, 5)) == (0, 0, 5, 3)
