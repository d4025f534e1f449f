"""The codec of global tokens, on a network with random weights so that its laws do not hang on a training."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress import quantised_global_autoencoder as qg
from foveate.compress.container import Container
from foveate.compress.global_tokens import GlobalAutoencoder
from foveate.compress.quantised_global_autoencoder import LEVELS, Cover, QuantisedGlobalAutoencoder
from foveate.data import pictures
from foveate.engine.budget import Budget
from foveate.errors import BitstreamError, BudgetError, InputError, WeightsError

CONFIG = {"size": 32, "tokens": 64, "words": 16, "dim": 4, "heads": 8, "halvings": 2, "widths": [4, 4, 8]}


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    torch.manual_seed(0)
    network = GlobalAutoencoder(**CONFIG)  # type: ignore[arg-type]
    with torch.no_grad():
        network.quantiser.start(network.vectors(torch.rand(40, 3, 32, 32)), torch.Generator().manual_seed(0), 2)
    qg.save_weights(network, torch.randint(0, 50, (64, 16)), {"config": CONFIG}, tmp_path)
    monkeypatch.setattr(qg, "FOLDER", tmp_path)
    qg.trained.cache_clear()
    yield tmp_path
    qg.trained.cache_clear()


@pytest.fixture
def photo() -> torch.Tensor:
    return pictures.samples()["astronaut"][None, :, 40:100, 180:250].contiguous()


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 8))
def test_windows_cover_and_their_shares_sum_to_one(height: int, width: int, margin: int) -> None:
    cover = Cover(height, width, 32, margin)
    for starts, length in ((cover.rows, height), (cover.columns, width)):
        assert starts[0] == 0
        assert starts[-1] + 32 == max(length, 32)
        assert all(b - a <= 32 - 2 * margin for a, b in pairwise(starts))
        total = torch.zeros(starts[-1] + 32, dtype=torch.float64)
        for start, share in zip(starts, cover.shares(starts), strict=True):
            assert (share > 0).all()
            total[start : start + 32] += share
        assert torch.allclose(total, torch.ones_like(total))


def test_a_file_holds_the_tokens_that_were_chosen(photo: torch.Tensor) -> None:
    codec = QuantisedGlobalAutoencoder()
    plan = codec.plan(photo)
    for price in (0.0, 0.01, 100.0):
        container = Container.read(codec.at_price(plan, price).to_bytes())
        cover, codes, kept = codec._read(container)
        assert cover == plan.cover
        best = (plan.lost + price * plan.bits).argmin(1)
        assert kept.tolist() == [LEVELS[int(i)] for i in best]
        present = np.arange(64) < kept[:, None]
        assert np.array_equal(codes[present], plan.codes[present])
        assert not codes[~present].any()


def test_the_plan_knows_bits_and_loss(photo: torch.Tensor) -> None:
    """One window without neighbours: its loss is the picture's, and its bits are the file's but for the header."""
    codec, piece = QuantisedGlobalAutoencoder(), photo[..., :32, :32].contiguous()
    plan = codec.plan(piece)
    container = codec.at_price(plan, 0.0)
    level = int(plan.lost.argmin())
    exact = (codec.decode(container).double() - piece).square().sum()
    assert float(exact) == pytest.approx(float(plan.lost[0, level]), rel=1e-3)
    coded = sum(len(data) for name, data in container.sections.items() if name != "head")
    assert coded == pytest.approx(float(plan.bits[0, level]) / 8, abs=14)


def test_higher_prices_give_smaller_files_of_larger_error(photo: torch.Tensor) -> None:
    codec = QuantisedGlobalAutoencoder()
    plan = codec.plan(photo)
    made = [codec.at_price(plan, price) for price in (1e-6, 3e-3, 3e-2, 100.0)]
    sizes = [len(one.to_bytes()) for one in made]
    lost = [[plan.lost[i, LEVELS.index(k)] for i, k in enumerate(codec._read(one)[2])] for one in made]
    assert sizes == sorted(sizes, reverse=True)
    assert [float(sum(one)) for one in lost] == sorted(float(sum(one)) for one in lost)


def test_budgets_are_kept_and_used(photo: torch.Tensor) -> None:
    codec = QuantisedGlobalAutoencoder()
    plan = codec.plan(photo)
    # As after training: each further token brings less than the one before.
    codec.plan = lambda *_: plan._replace(lost=100 / (1 + plan.bits))  # type: ignore[method-assign]
    for budget in (180, 210, 250):
        size = len(codec.encode(photo, budget=Budget.parse(f"{budget} B")).to_bytes())
        assert 0.9 * budget <= size <= budget
    with pytest.raises(BudgetError, match="at least"):
        codec.encode(photo, budget=Budget.parse("60 B"))


def test_a_window_costs_only_its_windows(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = QuantisedGlobalAutoencoder(margin=4)
    container = codec.encode(photo)
    whole = codec.decode(container)
    exact, drawn = qg.trained().exact, []
    decode = exact.decode
    monkeypatch.setattr(exact, "decode", lambda codes, kept: drawn.append(len(codes)) or decode(codes, kept))
    assert torch.equal(codec.decode(container, window=(3, 5, 9, 8)), whole[..., 5:13, 3:12])
    assert sum(drawn) == 1
    assert torch.equal(codec.decode(container, window=(20, 11, 41, 40)), whole[..., 11:51, 20:61])


def test_a_file_cut_off_is_a_coarser_picture(photo: torch.Tensor) -> None:
    codec = QuantisedGlobalAutoencoder()
    plan = codec.plan(photo)
    container = codec.at_price(plan._replace(lost=-plan.bits), 0.0)  # all tokens
    data, sections = container.to_bytes(), container.sections
    for missing, kept in ((1, 32), (2, 16), (3, 4)):
        short = data[: len(data) - sum(len(sections[name]) for name in list(sections)[-missing:])]
        prefix = Container.read(short, allow_prefix=True)
        assert len(prefix.missing) == missing
        assert (codec._read(prefix)[2] == kept).all()
        assert codec.decode(prefix).shape == photo.shape
    coded = sum(len(part) for name, part in sections.items() if name != "head")
    with pytest.raises(BitstreamError, match="without its section 't0'"):
        codec.decode(Container.read(data[: len(data) - coded], allow_prefix=True))


def test_a_stop_leaves_the_rest_at_the_average(photo: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qg, "_BATCH", 2)
    shares: list[float] = []
    plan = QuantisedGlobalAutoencoder().plan(photo, lambda share, _: bool(shares.append(share)) or True)
    assert len(plan.codes) == 6
    assert shares == [2 / 6]
    assert torch.allclose(plan.lost[2:], plan.lost[:2].mean(0).expand(4, -1))


@pytest.mark.parametrize("head", [b"", b"\x09", b"\x02" + b"\xff" * 400])
def test_heads_that_make_no_sense_are_refused(head: bytes) -> None:
    sections = {"head": head, **{f"t{i}": b"" for i in range(4)}}
    with pytest.raises(BitstreamError):
        QuantisedGlobalAutoencoder().decode(Container(qg.SLUG, 64, 64, 3, sections))


def test_a_thin_picture_of_too_many_windows_is_refused_at_once() -> None:
    with pytest.raises(InputError, match="windows, above"):
        QuantisedGlobalAutoencoder().decode(Container(qg.SLUG, 1, 2**30, 3, {"head": b"\x02"}), window=(0, 0, 1, 1))


def test_settings_and_weights_that_do_not_fit(folder: Path) -> None:
    with pytest.raises(InputError, match="margin is"):
        QuantisedGlobalAutoencoder(margin=9)
    (folder / f"{qg.SLUG}.safetensors").write_bytes(b"nothing")
    qg.trained.cache_clear()
    with pytest.raises(WeightsError, match="install foveate anew"):
        qg.trained()
