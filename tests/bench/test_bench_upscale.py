import numpy as np
import pytest
import torch

from foveate.bench.upscale import CAPTION, CROP, GAP, ZOOM, hardest, measured, pair, sheet
from foveate.data.pictures import read_folder
from foveate.errors import InputError
from foveate.proofs import ProofContext
from foveate.restore.upscale import network


@pytest.fixture
def picture():
    y, x = torch.meshgrid(torch.linspace(0, 9, 48), torch.linspace(0, 9, 50), indexing="ij")
    return torch.stack([x.sin(), (x + y).cos(), y.sin()])[None] / 2 + 0.5


def test_every_method_stands_beside_bicubic(picture):
    entries = list(measured([picture], "waves", 2, ProofContext(), budgets=(1.0,)))
    methods = [entry["method"] for entry in entries]
    assert methods[0] == "bicubic"
    assert {"pcsr", "espcn", "scnet", "adaptive-patch-exiting"} <= set(methods)
    assert all(entry["pictures"] == "waves x2" and entry["count"] == 1 for entry in entries)
    assert all(20 < entry["psnr"] < 80 and 0.5 < entry["ssim"] <= 1 for entry in entries)


def test_budgets_below_the_floor_are_left_out_and_others_cost_their_share(picture):
    entries = list(measured([picture], "waves", 2, ProofContext(), ["pcsr", "espcn"], (1.0, 0.5)))
    assert [(e["method"], e["setting"]) for e in entries] == [("pcsr", "1"), ("pcsr", "0.5"), ("espcn", "1")]
    full, half, _ = entries
    assert half["gflops"] / full["gflops"] == pytest.approx(0.5, abs=0.03)
    assert full["gflops"] == pytest.approx(network("pcsr", 2).full_flops(24, 25) / 1e9)


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="no pictures"):
        read_folder(tmp_path)


def test_a_sheet_shows_the_crop_that_interpolation_does_worst() -> None:
    dice = torch.Generator().manual_seed(0)
    picture = torch.full((1, 3, 192, 192), 0.5)
    picture[..., 96:, :96] = torch.rand(1, 3, 96, 96, generator=dice)
    low, high = pair(picture, 2)
    assert hardest([(low[..., :24, :24], high[..., :48, :48]), (low, high)], 2)[2] == (0, 96)
    page = sheet([picture], 2, ProofContext(), ["espcn"])
    assert page.size == (4 * (ZOOM * CROP + GAP), ZOOM * CROP + CAPTION)
    shown = torch.from_numpy(np.array(page)).permute(2, 0, 1)[:, : ZOOM * CROP : ZOOM, : ZOOM * CROP : ZOOM]
    assert torch.equal(shown, (255 * picture[0, :, 96:, :96]).round().byte())
    with pytest.raises(InputError, match="smaller than 96 pixels"):
        sheet([picture[..., :90, :]], 2, ProofContext(), [])
