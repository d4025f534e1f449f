import io

import numpy as np
import pytest
from PIL import Image

from foveate.bench.codecs import REPORT, Way, baselines, measured, once, ours, pillow
from foveate.errors import BudgetError, InputError
from foveate.proofs import ProofContext


@pytest.fixture
def folder(tmp_path, photo):
    photo.save(tmp_path / "photo.png")
    return tmp_path


@pytest.fixture
def photo():
    y, x = np.mgrid[:176, :180]
    return Image.fromarray(np.stack([x, y, (x + y) // 2], -1).astype(np.uint8))


def test_a_rate_is_the_size_of_the_file(photo):
    way = pillow("JPEG", "quality 50", quality=50)
    stream = io.BytesIO()
    photo.save(stream, "JPEG", quality=50)
    found = once(way, photo)
    assert found["bpp"] == 8 * len(stream.getvalue()) / (176 * 180)
    assert 25 < found["psnr"] < 60
    assert 0.9 < found["ms_ssim"] < 1


def test_what_loses_nothing_has_no_distortion(photo):
    for way in baselines():
        if way.setting == "lossless":
            assert once(way, photo)["psnr"] is None, way.method


def test_every_way_is_an_entry_and_impossible_rates_are_named(folder):
    def never(_):
        raise BudgetError("too little")

    ways, skipped = [pillow("PNG", "lossless"), Way("broken", "1 bpp", never, never)], []
    (entry,) = measured(ways, folder, ProofContext(), skipped=skipped)
    assert (entry["method"], entry["pictures"], entry["count"]) == ("PNG", folder.name, 1)
    assert skipped == ["broken at 1 bpp: too little"]
    assert REPORT.cells(entry)[:2] == ["PNG", "lossless"]


def test_a_folder_without_pictures_is_refused(tmp_path):
    with pytest.raises(InputError, match="no pictures"):
        list(measured(baselines(), tmp_path, ProofContext()))


def test_our_codecs_run_at_every_rate(photo):
    low, high = ours("predictive-sparse-decomposition", ("0.5 bpp", "1 bpp"))
    assert len(low.encode(photo)) < len(high.encode(photo)) <= 176 * 180 / 8
    assert high.decode(high.encode(photo)).size == photo.size
