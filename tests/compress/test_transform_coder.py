"""The network of a learned codec: costs agree with the forward pass, weights come back, agreed numbers make sense."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from foveate.compress import latent_contexts, transform_coder
from foveate.compress.hyperprior import OCTAVE, MeanScaleHyperprior
from foveate.compress.transform_coder import (
    LEVELS,
    REACH,
    TransformCoder,
    Trial,
    agree,
    blocks,
    price,
    save,
    shipped,
    small,
)
from foveate.compress.transforms import Analysis, JpegLike, Stage, TwoLayer
from foveate.compress.whole import UNIT
from foveate.errors import WeightsError

NONE = np.zeros((latent_contexts.COUNT, 2 * latent_contexts.REACH + 2), np.int64)


@pytest.fixture
def coder() -> TransformCoder:
    torch.manual_seed(0)
    analysis = Analysis((Stage(8, 16, 16, 1, 0),), 12)
    return TransformCoder(analysis, TwoLayer(12), MeanScaleHyperprior(12, (3, 4, 5), rates=2)).eval()


def test_a_trial_by_rounding_is_the_forward_pass(coder: TransformCoder) -> None:
    x, rate = torch.rand(1, 3, 64, 128), torch.tensor([0.5])
    with torch.no_grad():
        decoded, coded = coder(x, rate)
        a, b = coder.prior.at(rate)
        y = coder.analysis(x - 0.5)
        trial = Trial(coder.prior, coder.synthesis, x, torch.exp2(-a), torch.exp2(-b), OCTAVE * a)
        bits, error = trial(torch.round, y * torch.exp2(a), coder.prior.down(y) * torch.exp2(b))
    assert float(bits) == pytest.approx(float(coded.bits + coded.side_bits), rel=1e-5)
    assert float(error) == pytest.approx(255**2 * float((decoded - x).square().mean()), rel=1e-4)


def test_padding_is_free(coder: TransformCoder) -> None:
    """Of 64x128 pixels, latents outside a picture of 20x70 cost nothing and change nothing."""
    a, b = coder.prior.at(torch.tensor([1.0]))
    y, z = 5 * torch.randn(1, 12, 4, 8), torch.randn(1, 3, 1, 2)
    trial = Trial(coder.prior, coder.synthesis, torch.rand(1, 3, 20, 70), torch.exp2(-a), torch.exp2(-b), OCTAVE * a)
    other = y.clone()
    rows, columns = blocks(20, 70)
    assert (rows, columns) == (2, 5)
    other[..., rows:, :] += 9
    other[..., columns:] -= 9
    with torch.no_grad():
        assert [float(v) for v in trial(torch.round, y, z)] == [float(v) for v in trial(torch.round, other, z)]
        other[..., 0, 0] += 1
        assert [float(v) for v in trial(torch.round, y, z)] != [float(v) for v in trial(torch.round, other, z)]


def test_agreed_numbers_follow_the_gains() -> None:
    torch.manual_seed(0)
    prior = MeanScaleHyperprior(4, (3, 4, 5), rates=6)
    agreed = agree(prior, NONE)
    assert agreed.steps.shape == (LEVELS, 4)
    assert agreed.side_tables.shape == (LEVELS, 3, 2 * REACH + 2)
    assert agreed.steps[10].tolist() == [UNIT] * 4
    assert agreed.steps[18].tolist() == [round(UNIT / 2)] * 4  # two rates on, twice as fine
    assert agreed.shifts[18].tolist() == [OCTAVE * UNIT] * 4
    tables = agreed.tables(3)
    assert len(tables) == 3
    k = torch.arange(-3, 4)
    b = prior.at(torch.tensor([0.75]))[1]
    with torch.no_grad():
        bits = prior.side_bits(k.float().expand(1, 3, 1, -1), b)[0, :, 0]
    for table, expected in zip(tables, bits, strict=True):
        assert table.bits(k.numpy()) == pytest.approx(float(expected.sum()), rel=0.01)


def test_weights_come_back_as_they_were_rounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    coder, linear = small(), JpegLike(320)
    save(coder, linear, NONE, {"data": "none"}, tmp_path)
    monkeypatch.setattr(transform_coder, "FOLDER", tmp_path)
    found = shipped.__wrapped__()
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) < 4_000_000
    worst = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-6))
        for own, other in ((found.coder, coder), (found.linear, linear))
        for a, b in zip(own.state_dict().values(), other.state_dict().values(), strict=True)
    )
    assert 0 < worst < 0.005
    again = agree(found.coder.prior, NONE)
    assert all(torch.equal(a.int(), b.int()) for a, b in zip(again, found.agreed, strict=True))
    (tmp_path / "shallow-ntc.safetensors").write_bytes(b"nothing")
    with pytest.raises(WeightsError, match="cannot be read"):
        shipped.__wrapped__()


def test_shipped_weights_are_small_and_say_where_they_come_from() -> None:
    folder = transform_coder.FOLDER
    assert (folder / "shallow-ntc.safetensors").stat().st_size < 4_000_000
    assert "bsds300" in (folder / "shallow-ntc.json").read_text()
    kinds = {str(t.dtype) for t in load_file(folder / "shallow-ntc.safetensors").values()}
    assert kinds <= {"torch.int8", "torch.float16", "torch.float32", "torch.int32", "torch.uint16"}


def test_a_step_of_rate_doubles_the_price() -> None:
    assert price(3.0) == 2 * price(2.0) == 0.01
