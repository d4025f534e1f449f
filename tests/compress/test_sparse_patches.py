"""The codec of sparse patches: what its stream holds, and what its knobs do."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("constriction")

from foveate.compress import sparse_patches
from foveate.compress.container import Container
from foveate.compress.entropy import Decoder
from foveate.compress.sparse_patches import SparsePatches, _Reader, _walk, _Writer
from foveate.compress.verbs import measured
from foveate.data import pictures
from foveate.errors import BitstreamError, BudgetError, InputError


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return pictures.samples()["astronaut"][None, :, 40:80, 180:228]


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 6), st.sampled_from([0, 0.02, 0.3, 1.0]))
def test_means_and_codes_come_back(seed: int, rows: int, columns: int, density: float) -> None:
    random = np.random.default_rng(seed)
    shape = (rows * columns, 24)
    codes = random.integers(-2000, 2000, shape) * (random.random(shape) < density)
    means = random.integers(0, 30000, rows * columns)
    writer = _Writer()
    _walk(writer, rows, columns, means.copy(), codes.copy())
    reader = _Reader(Decoder(writer.coder.finish()))
    found_means, found_codes = np.zeros_like(means), np.zeros_like(codes)
    _walk(reader, rows, columns, found_means, found_codes)
    reader.coder.end()
    assert np.array_equal(found_means, means)
    assert np.array_equal(found_codes, codes)


def test_finer_steps_cost_more_and_give_more(photo: torch.Tensor) -> None:
    codec = SparsePatches()
    made = [codec.at_step(photo, step) for step in (32, 8, 2)]
    sizes = [len(one.to_bytes()) for one in made]
    decibels = [measured(codec.decode(one), photo, 8) for one in made]
    assert sizes == sorted(sizes)
    assert decibels == sorted(decibels)
    assert decibels[1] > 34
    assert decibels[2] > 41


def test_descent_pays(photo: torch.Tensor) -> None:
    """Coordinate descent over whole codes lowers bits and loss together, against rounding alone."""
    rounded, refined = SparsePatches(sweeps=0), SparsePatches()
    first, second = rounded.at_step(photo, 12), refined.at_step(photo, 12)
    price = 0.12 * 12**2 / 255**2

    def cost(container: Container) -> float:
        loss = (rounded.decode(container) - photo).square().sum().item()
        return loss + price * 8 * len(container.to_bytes())

    assert cost(second) < 0.97 * cost(first)


def test_a_quality_is_reached_with_little_to_spare(photo: torch.Tensor) -> None:
    codec = SparsePatches()
    made = codec.encode_to(photo, 33.0)
    assert 33.0 <= measured(codec.decode(made), photo, 8) < 33.2
    with pytest.raises(BudgetError, match="asked 120 dB"):
        codec.encode_to(photo[..., :8, :8], 120.0)


def test_luminance_comes_first(photo: torch.Tensor) -> None:
    codec = SparsePatches()
    data = codec.at_step(photo, 8).to_bytes()
    grey = codec.decode(Container.read(data[:-1], allow_prefix=True))
    assert torch.equal(grey[:, 0], grey[:, 2])
    luminance = (photo * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdim=True)
    assert measured(grey[:, :1], luminance, 8) > 34


def test_decoding_is_arithmetic_on_whole_numbers(photo: torch.Tensor) -> None:
    """A different order of summation, as other machines have, gives the same pixels."""
    codec = SparsePatches()
    data = codec.at_step(photo, 8)
    expected = codec.decode(data)
    atoms, _ = sparse_patches.dictionary()
    order = np.random.default_rng(0).permutation(64)
    values = np.random.default_rng(1).integers(-(2**15), 2**15, (50, len(atoms))).astype(float)
    assert np.array_equal((values @ atoms.astype(float))[:, order], values @ atoms[:, order].astype(float))
    assert torch.equal(expected, codec.decode(Container.read(data.to_bytes())))


@pytest.mark.parametrize(
    "sections",
    [
        {"head": b"", "y": b"", "c": b""},
        {"head": b"\x00\x00", "y": b"", "c": b""},
        {"head": b"\x10\x02", "y": b"", "c": b""},
        {"head": b"\x10\x00", "c": b""},
        {"head": b"\x10\x00", "y": b"\xff" * 4000, "c": b""},
    ],
)
def test_sections_that_make_no_sense_are_refused(sections: dict[str, bytes]) -> None:
    with pytest.raises(BitstreamError):
        SparsePatches().decode(Container("predictive-sparse-decomposition", 16, 16, 3, sections))


def test_negative_settings_are_refused() -> None:
    with pytest.raises(InputError, match="steps=-1"):
        SparsePatches(steps=-1)


def test_the_weights_are_small_and_the_atoms_of_unit_norm() -> None:
    files = list(sparse_patches.FOLDER.glob("predictive-sparse-decomposition.*"))
    assert sum(file.stat().st_size for file in files) < 200_000
    atoms, _ = sparse_patches.dictionary()
    assert np.allclose(np.linalg.norm(atoms / 2**14, axis=1), 1, atol=1e-3)
