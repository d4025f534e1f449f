import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from foveate.errors import InputError
from foveate.learn.crops import Crops


def smooth(h, w, seed=0):
    """A picture of soft blobs: reduction keeps nearly all of it, so a misplaced crop shows."""
    coarse = np.random.default_rng(seed).integers(0, 256, (h // 10 + 1, w // 10 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((w, h), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    smooth(203, 170).save(tmp_path / "a.png")
    smooth(150, 211, 1).save(tmp_path / "b.TIFF")
    (tmp_path / "notes.txt").write_text("not a picture")
    return tmp_path


@pytest.mark.parametrize("scale", [2, 3])
def test_the_two_crops_of_a_pair_show_the_same(folder, scale):
    low, high = Crops([folder], scale)(24, 20)
    assert low.shape == (24, 3, 20, 20)
    assert high.shape == (24, 3, 20 * scale, 20 * scale)
    assert low.dtype == high.dtype == torch.float32
    reduced = F.interpolate(high, scale_factor=1 / scale, mode="bicubic", antialias=True)
    inside = (..., slice(4, -4), slice(4, -4))  # at the edge of a crop the reduction lacks its neighbours
    assert (reduced - low)[inside].abs().mean((1, 2, 3)).max() < 1 / 255
    for axis in (2, 3):  # one pixel beside, no crop fits any more
        assert (reduced.roll(1, axis) - low)[inside].abs().mean((1, 2, 3)).min() > 2 / 255


def test_values_are_those_of_8_bit_pictures_in_0_to_1(folder):
    for crop in Crops([folder], 2)(8, 16):
        assert crop.min() >= 0
        assert crop.max() <= 1
        torch.testing.assert_close(crop * 255, (crop * 255).round(), atol=1e-4, rtol=0)


def test_the_same_seed_draws_the_same_and_another_seed_something_else(folder):
    first, again, other = (Crops([folder], 2, seed=s) for s in (1, 1, 2))
    one, same, different = (c(4, 16) for c in (first, again, other))
    assert torch.equal(one[0], same[0])
    assert torch.equal(one[1], same[1])
    assert not torch.equal(one[0], different[0])
    assert not torch.equal(first(4, 16)[0], one[0])


def test_crops_are_flipped_and_transposed_in_all_8_ways(tmp_path):
    y, x = np.mgrid[:120, :120]
    Image.fromarray(np.stack([y * 2, x, 0 * x], -1).astype(np.uint8)).save(tmp_path / "ramp.png")
    low, _ = Crops([tmp_path], 2, sizes=(1.0,))(80, 16)
    down, right = low[:, :2, -1, 0] - low[:, :2, 0, 0], low[:, :2, 0, -1] - low[:, :2, 0, 0]
    ways = {(*d, *r) for d, r in zip(down.sign().int().tolist(), right.sign().int().tolist(), strict=True)}
    assert len(ways) == 8


def test_each_picture_is_there_at_each_size_unless_it_gets_too_small(folder):
    sizes = [(small.shape[:2], large.shape[:2]) for small, large in Crops([folder], 2, sizes=(1.0, 0.6)).pairs]
    # 150 x 211 at 0.6 would be 90 rows, less than 48 low-resolution ones.
    assert sizes == [((101, 85), (202, 170)), ((61, 51), (122, 102)), ((75, 105), (150, 210))]


def test_larger_pictures_are_drawn_more_often(tmp_path):
    Image.new("RGB", (100, 100), "black").save(tmp_path / "small.png")
    Image.new("RGB", (300, 300), "white").save(tmp_path / "large.png")
    low, _ = Crops([tmp_path], 2, sizes=(1.0,))(200, 16)
    assert float(low.mean()) == pytest.approx(0.9, abs=0.08)


def test_the_list_of_files_passes_through_the_progress_bar(folder):
    seen = []
    Crops([folder], 2, track=lambda files: seen.extend(files) or files)
    assert [f.name for f in seen] == ["a.png", "b.TIFF"]


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("not a picture")
    with pytest.raises(InputError, match="no pictures in") as caught:
        Crops([tmp_path], 2)
    assert str(tmp_path) in str(caught.value)


def test_a_folder_of_pictures_that_are_all_too_small_is_refused(tmp_path):
    smooth(60, 60).save(tmp_path / "small.png")
    with pytest.raises(InputError):
        Crops([tmp_path], 4)


def test_crops_larger_than_a_picture_are_refused(folder):
    with pytest.raises(InputError, match="crops of 300 pixels do not fit a picture that is 51 "):
        Crops([folder], 2)(4, 300)
