"""What a token plug-in hands back: report, map, and removal."""

import gc

import numpy as np
import pytest
import torch
from PIL import Image

from foveate import hosts
from foveate.errors import InputError
from foveate.hosts.drawing import draw
from foveate.hosts.picture import IMAGENET, Pixels
from foveate.hosts.plugin import Look, Report, Spent, TokenHandle
from foveate.layers.transformer import VisionTransformer


@pytest.fixture
def model():
    torch.manual_seed(0)
    return VisionTransformer(32, 8, 24, 2, 3, num_classes=4).eval()


def halved(model):
    """Only the upper half of the picture goes through the second block."""
    host = hosts.vit(model)
    handle = host.blocks[1].patch(lambda run, x: run(x[:, :9]))

    def look(pixels):
        effort = torch.ones(len(pixels), 4, 4)
        effort[:, 2:] = 0.25
        return Look((8,) * len(pixels), 16, effort)

    return TokenHandle(handle, host, look)


def test_a_report_counts_the_host_with_and_without(model):
    x = torch.rand(2, 3, 32, 32)
    handle = halved(model.train())
    model.blocks[0].eval()
    report = handle.report(x)
    assert [p.tokens for p in report.pictures] == [8, 8]
    assert all(p.gflops < p.full_gflops and p.ms > 0 and p.full_ms > 0 for p in report.pictures)
    assert report.flop_reduction == pytest.approx(report.pictures[0].full_gflops / report.pictures[0].gflops)
    assert "8 of 16" in str(report)
    assert model.training
    assert not model.blocks[0].training


def test_a_report_of_the_last_call_needs_its_pictures_to_be_there(model):
    handle = halved(model)
    with pytest.raises(InputError, match="pass report"):
        handle.report()
    x = torch.rand(1, 3, 32, 32)
    model(x)
    assert len(handle.report().pictures) == 1
    del x
    gc.collect()
    with pytest.raises(InputError, match="are gone"):
        handle.report()
    handle.remove()
    with pytest.raises(InputError, match="was removed"):
        handle.report(torch.rand(1, 3, 32, 32))


def test_sums_are_over_all_pictures():
    report = Report((Spent(1, 4, 1.0, 4.0, 2.0, 4.0), Spent(3, 4, 3.0, 4.0, 2.0, 8.0)), "windows")
    assert (report.flop_reduction, report.speedup) == (2.0, 3.0)
    assert report.to_dict()["pictures"][1]["tokens"] == 3
    assert "windows" in str(report)


def test_a_map_is_dark_where_little_is_spent(model):
    handle = halved(model)
    drawn = handle.map(np.full((32, 32, 3), 200, np.uint8))
    pixels = np.asarray(drawn)
    assert drawn.size == (640, 640 + 28)
    assert pixels[100, 100, 0] == 200
    assert pixels[500, 100, 0] == round(200 * (0.25 + 0.75 * 0.5))


def test_cells_are_outlined():
    drawn = draw(torch.zeros(3, 640, 640), torch.ones(4, 4), torch.tensor([[320, 0, 640, 320]]), "one cell")
    lit = np.asarray(drawn)[:640, :, 0] > 0
    assert lit[10, 320]
    assert lit[320, 400]
    assert lit[0, 639]
    assert not lit[10, 300]
    assert not lit[400].any()


def test_pictures_are_cut_around_their_middle_to_the_hosts_size():
    pixels = Pixels(*IMAGENET, (32, 32), 8)
    picture = np.zeros((64, 128, 3), np.uint8)
    picture[:, 32:96] = 255
    assert pixels.restore(pixels.prepare(picture))[0].min() > 0.9
    assert pixels.prepare(Image.new("L", (20, 10))).shape == (1, 3, 32, 32)


def test_pictures_keep_their_shape_when_a_side_is_asked_for():
    pixels = Pixels(*IMAGENET, (32, 32), 8)
    assert pixels.prepare(np.zeros((50, 100, 3), np.uint8), side=64).shape == (1, 3, 32, 64)
    assert pixels.prepare(np.zeros((100, 3, 3), np.uint8), side=64).shape == (1, 3, 64, 8)
    with pytest.raises(InputError, match="less than one patch"):
        pixels.prepare(np.zeros((50, 100, 3), np.uint8), side=7)


def test_normalising_is_undone():
    pixels, x = Pixels(*IMAGENET, (32, 32), 8), torch.rand(2, 3, 4, 4)
    torch.testing.assert_close(pixels.restore(pixels.normalise(x)), x)
    assert pixels.normalise(x)[0, 1, 0, 0] == (x[0, 1, 0, 0] - 0.456) / 0.224
