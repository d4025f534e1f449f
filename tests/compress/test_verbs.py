"""The verbs: what is common to all codecs, tried with codecs made for the purpose."""

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import foveate
from foveate.compress import alpha, verbs
from foveate.compress.container import Container
from foveate.compress.search import smallest
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError


class Coarse:
    """Keeps a small version of a picture in colour, as many samples as the budget has bytes; renders at any size."""

    slug: ClassVar[str] = "coarse"
    planes: ClassVar[tuple[int, ...]] = (3,)
    units: ClassVar[tuple[str, ...]] = ("bytes", "gaussians")
    any_size: ClassVar[bool] = True
    random_access: ClassVar[bool] = True
    asked: ClassVar[list[Any]] = []

    def encode(self, image: Tensor, *, bits: int = 8, budget: Any = None, progress: Any = None) -> Container:
        self.asked.append((tuple(image.shape), bits, budget))
        amount = budget.amount if budget else 300
        side = max(1, int(((amount - 60) / 3) ** 0.5)) if amount > 63 else 1
        side = min(side, min(image.shape[2:]))
        small = F.interpolate(image, (side, side), mode="area")
        if progress:
            progress(1.0, 20.0)
        return Container(self.slug, image.shape[3], image.shape[2], 3, {"s": (small * 255).byte().numpy().tobytes()})

    def decode(self, container: Container, size: Any = None, window: Any = None) -> Tensor:
        self.asked.append((container.channels, size, window))
        raw = np.frombuffer(container.sections["s"], np.uint8)
        side = round((raw.size / 3) ** 0.5)
        small = torch.from_numpy(raw.reshape(1, 3, side, side) / 255).float()
        w, h = size or (container.width, container.height)
        x, y, ww, hh = window or (0, 0, w, h)
        return F.interpolate(small, (h, w), mode="nearest")[..., y : y + hh, x : x + ww]


@pytest.fixture
def coarse(monkeypatch: pytest.MonkeyPatch) -> type[Coarse]:
    monkeypatch.setattr(verbs, "resolve", lambda method, **settings: Coarse(**settings))
    monkeypatch.setattr(verbs, "resolve_for", lambda container: Coarse())
    Coarse.asked.clear()
    return Coarse


GRID = np.indices((12, 16)).sum(0).astype(np.uint8) * 9


def test_the_package_is_the_verb(coarse: type[Coarse]) -> None:
    data = foveate.compress(np.repeat(GRID[..., None], 3, 2))
    assert Container.read(data).method == "coarse"
    assert foveate.compress.container.Container is Container  # type: ignore[attr-defined]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_grey_and_alpha_are_seen_to(coarse: type[Coarse], channels: int) -> None:
    picture = np.repeat(GRID[..., None], channels, 2)
    data = foveate.compress(picture[..., 0] if channels == 1 else picture)
    assert coarse.asked[-1][0] == (1, 3, 12, 16)
    container = Container.read(data)
    assert container.channels == channels
    assert ("alpha" in container.sections) == (channels in (2, 4))
    back = foveate.decompress(data, kind="array")
    assert coarse.asked[-1][0] == 3
    assert back.shape == ((12, 16) if channels == 1 else (12, 16, channels))
    if channels in (2, 4):
        assert np.array_equal(back[..., -1], GRID)
        part = foveate.decompress(data, kind="array", window=(3, 2, 5, 4))
        assert np.array_equal(part[..., -1], GRID[2:6, 3:8])
        assert foveate.decompress(data, kind="array", size=(32, 24)).shape == (24, 32, channels)


def test_budgets_become_bytes(coarse: type[Coarse]) -> None:
    picture = np.repeat(GRID[..., None], 3, 2)
    for given, amount in [("20 bpp", 480), ("0.5 kB", 500), (0.5, 288), ("50%", 288)]:
        foveate.compress(picture, budget=given)
        assert coarse.asked[-1][2] == Budget(amount, "bytes")
    foveate.compress(picture, budget="7 gaussians")
    assert coarse.asked[-1][2] == Budget(7, "gaussians")
    with pytest.raises(BudgetError, match=r"takes no budget such as 3000 ms; give '0.5 bpp' or '20 kB' or '2000 g"):
        foveate.compress(picture, budget="3 s")
    with pytest.raises(BudgetError, match="needs at least"):
        foveate.compress(picture, budget="20 B")
    transparent = np.repeat(GRID[..., None], 4, 2)
    data = foveate.compress(transparent, budget="400 B")
    assert len(data) <= 400
    bare = Container("coarse", 16, 12, 3, {"s": Container.read(data).sections["s"]})
    assert coarse.asked[-1][2].amount == 400 - (len(data) - len(bare.to_bytes()))
    with pytest.raises(BudgetError, match="alpha alone"):
        foveate.compress(transparent, budget="30 B")


def test_quality_is_searched(coarse: type[Coarse]) -> None:
    picture = np.repeat(GRID[..., None], 3, 2)
    few, many = (foveate.compress(picture, quality=dB) for dB in (16, 22))
    assert len(few) < len(many)
    back = foveate.decompress(many, kind="array").astype(float)
    assert 10 * np.log10(255**2 / np.square(back - picture).mean()) >= 22
    with pytest.raises(BudgetError, match="at most on this picture, asked 99 dB"):
        foveate.compress(picture, quality=99)
    with pytest.raises(InputError, match="not both"):
        foveate.compress(picture, quality=30, budget=0.5)
    with pytest.raises(InputError, match="PSNR in dB"):
        foveate.compress(picture, quality=-3)


def test_a_wish_to_stop_ends_the_search(coarse: type[Coarse]) -> None:
    calls: list[float] = []

    def progress(share: float, psnr: float | None) -> bool:
        calls.append(share)
        return True

    foveate.compress(np.repeat(GRID[..., None], 3, 2), quality=60, progress=progress)
    assert len(calls) == 1


def test_the_search_returns_what_suffices() -> None:
    tried: list[float] = []

    def attempt(amount: float, progress: Any) -> tuple[float, float]:
        tried.append(amount)
        if amount < 2:
            raise BudgetError("too little")
        return amount, amount

    assert 5 <= smallest(attempt, 5, 1, 100, close=0.2) <= 5.2
    assert len(tried) <= 12
    with pytest.raises(BudgetError, match="no file"):
        smallest(attempt, 5, 0.1, 1)


@pytest.mark.parametrize(("kind", "expected"), [("pil", "Image"), ("array", "ndarray"), ("tensor", "Tensor")])
def test_kinds_of_result(coarse: type[Coarse], kind: str, expected: str) -> None:
    data = foveate.compress(torch.rand(3, 9, 11))
    assert type(foveate.decompress(data, kind=kind)).__name__ == expected
    with pytest.raises(InputError, match="kind='jpg'"):
        foveate.decompress(data, kind="jpg")


def test_files_and_limits(coarse: type[Coarse], tmp_path: Path) -> None:
    data = foveate.compress(np.repeat(GRID[..., None], 3, 2))
    file = verbs.write_file(tmp_path / "a.fov", data)
    assert foveate.decompress(file, tmp_path / "a.png") == tmp_path / "a.png"
    assert foveate.decompress(str(file), kind="array").shape == (12, 16, 3)
    with pytest.raises(InputError, match="above the limit of 100"):
        foveate.decompress(data, limit=100)
    assert foveate.decompress(data, limit=100, window=(0, 0, 10, 10)).size == (10, 10)
    with pytest.raises(BitstreamError, match="Cannot open"):
        foveate.decompress(tmp_path / "absent.fov")
    with pytest.raises(InputError, match=r"ends in \.fov"):
        verbs.write_file(tmp_path / "a.png", data)
    (tmp_path / "bad.fov").write_bytes(data[:-1])
    with pytest.raises(BitstreamError):
        foveate.decompress(tmp_path / "bad.fov", tmp_path / "bad.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.fov", "a.png", "bad.fov"]


def test_a_file_is_written_in_strips_where_windows_are_cheap(
    coarse: type[Coarse], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = foveate.compress(np.repeat(GRID[..., None], 3, 2))
    monkeypatch.setattr(verbs, "_STRIP", 5)
    coarse.asked.clear()
    foveate.decompress(data, tmp_path / "a.png")
    assert [window for _, _, window in coarse.asked] == [(0, 0, 16, 5), (0, 5, 16, 5), (0, 10, 16, 2)]
    assert np.array_equal(
        np.asarray(verbs.pictures.load(tmp_path / "a.png").pixels), foveate.decompress(data, kind="array")
    )


def test_alpha_that_makes_no_sense_is_refused() -> None:
    good = Container("m", 4, 3, 4, {"alpha": alpha.pack(torch.rand(1, 1, 3, 4), 8)})
    assert alpha.unpack(good).shape == (1, 1, 3, 4)
    for raw in (b"", b"BZh9", good.sections["alpha"][:-3], alpha.pack(torch.rand(1, 1, 99, 99), 8)):
        with pytest.raises(BitstreamError, match="alpha"):
            alpha.unpack(good.with_sections(alpha=raw))
