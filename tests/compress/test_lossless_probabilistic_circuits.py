"""The codec of circuits: every sample back, whatever the picture."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress import lossless_probabilistic_circuits as module
from foveate.compress.codec import Codec
from foveate.compress.container import Container
from foveate.compress.lossless_probabilistic_circuits import CIRCUITS, STRIP, CircuitCodec, circuit, save_circuit
from foveate.data import pictures
from foveate.errors import BitstreamError, InputError, WeightsError


def planes(samples: np.ndarray, bits: int) -> torch.Tensor:
    if bits == 32:
        return torch.from_numpy(samples).float()[None]
    return torch.from_numpy(np.divide(samples, 2**bits - 1, dtype=np.float32))[None]


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return pictures.samples()["astronaut"][None, :, 40:100, 180:250]


@settings(deadline=None, max_examples=30)
@given(
    st.integers(0, 2**32 - 1), st.sampled_from([1, 3]), st.integers(1, 9), st.integers(1, 9), st.sampled_from([8, 16])
)
def test_every_sample_comes_back(seed: int, channels: int, height: int, width: int, bits: int) -> None:
    image = planes(np.random.default_rng(seed).integers(0, 2**bits, (channels, height, width)), bits)
    assert torch.equal(CircuitCodec().decode(CircuitCodec().encode(image, bits=bits)), image)


@pytest.mark.parametrize("channels", [1, 3])
def test_floats_come_back_to_the_last_bit(channels: int) -> None:
    samples = np.random.default_rng(0).random((channels, 12, 9), np.float32)
    samples[:, 0, :4] = [0, 1, 1e-30, np.nextafter(np.float32(1), np.float32(0))]
    image = planes(samples, 32)
    assert torch.equal(CircuitCodec().decode(CircuitCodec().encode(image, bits=32)), image)


@pytest.mark.parametrize("bits", [8, 16])
def test_strips_fit_together_and_windows_are_parts(bits: int) -> None:
    slope = np.add.outer(np.arange(2 * STRIP + 3), np.arange(11)) % 256 * (1 if bits == 8 else 256)
    image = planes(slope[None], bits)
    made = CircuitCodec().encode(image, bits=bits)
    assert torch.equal(CircuitCodec().decode(made), image)
    for y, h in ((0, 3), (STRIP - 1, 2), (STRIP, STRIP), (2 * STRIP + 2, 1), (5, 2 * STRIP - 3)):
        assert torch.equal(CircuitCodec().decode(made, None, (2, y, 7, h)), image[..., y : y + h, 2:9])


def test_a_window_decodes_only_its_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    made = CircuitCodec().encode(torch.zeros(1, 1, 3 * STRIP, 4))
    decoded = []
    monkeypatch.setattr(module, "to_pixels", lambda symbols: decoded.append(1) or symbols)
    CircuitCodec().decode(made, None, (0, STRIP, 4, STRIP + 1))
    assert len(decoded) == 2


def test_a_photograph_is_smaller_than_as_png(photo: torch.Tensor) -> None:
    import io

    from PIL import Image

    for part in (photo, photo[:, :1]):
        pixels = (part[0] * 255).round().byte().permute(1, 2, 0).squeeze().numpy()
        png = io.BytesIO()
        Image.fromarray(pixels).save(png, "PNG", optimize=True)
        assert len(CircuitCodec().encode(part).to_bytes()) < len(png.getvalue())


def test_samples_stretched_from_8_to_16_bits_cost_no_more(photo: torch.Tensor) -> None:
    sizes = [len(CircuitCodec().encode(photo, bits=bits).to_bytes()) for bits in (8, 16)]
    assert sizes[0] < sizes[1] < sizes[0] + 64


def test_the_best_circuit_is_taken_unless_one_is_named(photo: torch.Tensor) -> None:
    sizes = [len(CircuitCodec(name).encode(photo).to_bytes()) for name in ("photo", "thumbnail")]
    assert sizes[0] != sizes[1]
    assert len(CircuitCodec().encode(photo).to_bytes()) == min(sizes)
    with pytest.raises(InputError, match="one of grey, photo"):
        CircuitCodec("best")
    with pytest.raises(InputError, match="3 channels"):
        CircuitCodec("grey").encode(photo)


def test_it_is_a_lossless_codec_that_tells_its_progress(photo: torch.Tensor) -> None:
    told: list[float] = []
    assert isinstance(CircuitCodec(), Codec)
    assert CircuitCodec.units == ()
    CircuitCodec().encode(photo, progress=lambda share, psnr: told.append(share))
    assert told == sorted(told)
    assert told[-1] == 1


def test_damage_is_refused(photo: torch.Tensor) -> None:
    made = CircuitCodec().encode(photo, bits=16)
    circuit_bytes, low = made.sections["circuit"], made.sections["low0"]
    changed = bytearray(circuit_bytes)
    changed[40] ^= 16
    wrong = [
        {"circuit": b"\x07" + circuit_bytes[1:]},
        {"circuit": bytes([CIRCUITS.index("grey")]) + circuit_bytes[1:]},
        {"circuit": circuit_bytes[:-4]},
        {"circuit": circuit_bytes + b"x"},
        {"circuit": bytes(changed)},
        {"low0": b""},
        {"low0": low[:1] + b"\x09" + low[2:]},
    ]
    for sections in wrong:
        with pytest.raises(BitstreamError, match="damaged"):
            CircuitCodec().decode(made.with_sections(**sections))
    for size in ({"width": 71}, {"height": 61}, {"width": 60, "height": 70}):
        with pytest.raises(BitstreamError):
            CircuitCodec().decode(dataclasses.replace(made, **size))


def test_floats_above_one_are_refused() -> None:
    made = CircuitCodec().encode(torch.ones(1, 1, 4, 4), bits=32)
    above = CircuitCodec().encode(torch.full((1, 1, 4, 4), 3.5), bits=32)
    assert torch.equal(CircuitCodec().decode(made), torch.ones(1, 1, 4, 4))
    with pytest.raises(BitstreamError, match="above 1"):
        CircuitCodec().decode(above)


def test_the_shipped_circuits_are_small_and_know_their_surroundings() -> None:
    files = list(module.FOLDER.glob(f"{module.SLUG}-*.safetensors"))
    assert {file.stem.rpartition("-")[2] for file in files} == set(CIRCUITS)
    assert sum(file.stat().st_size for file in files) < 4e6
    for name, channels in zip(CIRCUITS, (1, 3, 3), strict=True):
        made = circuit(name)
        assert made.channels == channels
        assert (made.places[:, 1:] < 0).any(1).sum() > 0


def test_weights_are_written_and_read_and_missing_ones_are_named(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FOLDER", tmp_path)
    made = circuit.__wrapped__
    with pytest.raises(WeightsError, match="grey cannot be read"):
        made("grey")
    shipped = circuit("photo")
    save_circuit(shipped, "photo", {"data": "none"}, tmp_path)  # type: ignore[arg-type]
    back = made("photo")
    for name in ("places", "parents", "prior", "transitions", "emissions"):
        assert np.array_equal(getattr(back, name), getattr(shipped, name))


def test_flat_pictures_cost_next_to_nothing() -> None:
    for channels, level in itertools.product((1, 3), (0.0, 1.0)):
        made = CircuitCodec().encode(torch.full((1, channels, 120, 200), level))
        assert 8 * len(made.to_bytes()) < 0.1 * 120 * 200 * channels + 8 * 72


def test_a_container_of_the_wrong_kind_is_refused() -> None:
    with pytest.raises(BitstreamError, match="section"):
        CircuitCodec().decode(Container(module.SLUG, 4, 4, 3, {"other": b""}))
