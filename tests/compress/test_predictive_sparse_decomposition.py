"""Predictive sparse decomposition: the exact properties of the dossier, and the estimator's habits."""

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.compress.predictive_sparse_decomposition import (
    SHAPES,
    PredictiveSparseDecomposition,
    Predictor,
    contrast_normalised,
    energy,
    fista,
)
from foveate.errors import InputError


def _problem(seed: int = 0, patches: int = 30, n: int = 12, m: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Patches, atoms of unit norm, predictions, in double precision."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(patches, n, generator=g, dtype=torch.float64)
    atoms = F.normalize(torch.randn(m, n, generator=g, dtype=torch.float64), dim=1)
    return y, atoms, torch.randn(patches, m, generator=g, dtype=torch.float64)


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.floats(0.05, 2), st.sampled_from([0.0, 0.3, 1.0, 5.0]), st.integers(2, 40))
def test_fista_ends_where_the_subgradient_holds_zero(seed: int, penalty: float, pull: float, m: int) -> None:
    """|g| <= lambda where z = 0 and g = -lambda sign z elsewhere; m on both sides of 2n."""
    y, atoms, target = _problem(seed, m=m)
    z = fista(y, atoms, penalty, pull=pull, target=target, steps=1500)
    slope = 2 * (z @ atoms - y) @ atoms.T + 2 * pull * (z - target)
    assert (slope[z == 0].abs() <= penalty + 1e-3).all()
    assert torch.allclose(slope[z != 0], -penalty * z[z != 0].sign(), atol=1e-3)


def test_fista_agrees_with_coordinate_descent() -> None:
    """scikit-learn's lasso_cd by hand: minimise over one number after the other until nothing moves."""
    y, atoms, _ = _problem()
    z, gram = torch.zeros(len(y), len(atoms), dtype=torch.float64), atoms @ atoms.T
    for _ in range(400):
        for j in range(len(atoms)):
            rest = (y @ atoms[j]) - z @ gram[j] + z[:, j]
            z[:, j] = F.softshrink(rest, 0.25)
    assert torch.allclose(fista(y, atoms, 0.5, steps=2000), z, atol=1e-4)


def test_ista_never_rises_and_fista_is_ahead() -> None:
    y, atoms, _ = _problem()
    values = [energy(y, fista(y, atoms, 0.5, steps=k, momentum=False), atoms, 0.5) for k in range(0, 30, 3)]
    assert all((after <= before + 1e-9).all() for before, after in pairwise(values))
    assert energy(y, fista(y, atoms, 0.5, steps=27), atoms, 0.5).sum() < values[-1].sum()


def test_orthonormal_atoms_have_a_closed_form() -> None:
    y, atoms, target = _problem(n=12, m=12)
    basis = torch.linalg.qr(atoms)[0]
    plain = fista(y, basis, 0.6, steps=50)
    assert torch.allclose(plain, F.softshrink(y @ basis.T, 0.3), atol=1e-5)
    drawn = fista(y, basis, 0.6, pull=0.5, target=target, steps=50)
    expected = F.softshrink((y @ basis.T + 0.5 * target) / 1.5, 0.6 / 3)
    assert torch.allclose(drawn, expected, atol=1e-5)


def test_a_strong_pull_gives_the_prediction() -> None:
    y, atoms, target = _problem()
    assert torch.allclose(fista(y, atoms, 0.5, pull=1e6, target=target, steps=50), target, atol=1e-4)


@pytest.mark.parametrize("shape", list(SHAPES))
def test_the_predictor_by_convolution_is_the_predictor_by_patches(shape: str) -> None:
    torch.manual_seed(0)
    predictor = Predictor(9, 5, shape)
    with torch.no_grad():
        predictor.gain.mul_(torch.randn(5))
    x = torch.randn(2, 1, 6, 7)
    patches = F.unfold(x, 3).mT  # [2, 20, 9]
    assert torch.allclose(predictor.on_pictures(x), predictor(patches).mT.reshape(2, 5, 4, 5), atol=1e-6)
    if shape == "tanh":
        assert (predictor(100 * patches).abs() <= predictor.gain.abs() + 1e-6).all()
    with pytest.raises(InputError, match="'tanh'"):
        Predictor(9, 5, "relu")


def _sparse_data(count: int = 300) -> np.ndarray:
    """Vectors that truly are sums of two of 12 atoms."""
    random = np.random.default_rng(0)
    atoms = random.normal(size=(12, 10))
    atoms /= np.linalg.norm(atoms, axis=1, keepdims=True)
    codes = np.zeros((count, 12))
    for row in codes:
        row[random.choice(12, 2, replace=False)] = random.choice([-3, 3], 2)
    return (codes @ atoms).astype(np.float32)


SMALL = {"n_components": 16, "batch_size": 50, "inner_steps": 10, "learning_rate": 1e-2, "penalty": 0.3}


@pytest.mark.parametrize("couple", [True, False])
def test_learning_lowers_the_energy_and_teaches_the_predictor(couple: bool) -> None:
    data = _sparse_data()
    first = PredictiveSparseDecomposition(max_iter=1, couple=couple, **SMALL).fit(data)
    last = PredictiveSparseDecomposition(max_iter=10, couple=couple, **SMALL).fit(data)
    assert last.energy_ < 0.8 * first.energy_
    assert np.allclose(np.linalg.norm(last.components_, axis=1), 1, atol=1e-6)
    exact = last.set_params(transform_mode="exact").transform(data)
    predicted = last.set_params(transform_mode="predict").transform(data)
    warm = last.set_params(transform_mode="warm", steps=3).transform(data)
    y, atoms = torch.from_numpy(data), torch.from_numpy(last.components_)
    values = [float(energy(y, torch.from_numpy(z), atoms, 0.3).mean()) for z in (exact, warm, predicted)]
    assert values == sorted(values)
    assert np.corrcoef(exact.ravel(), predicted.ravel())[0, 1] > 0.5
    assert np.square(last.inverse_transform(exact) - data).mean() < 0.1 * np.square(data).mean()


def test_the_estimator_has_the_habits_of_its_neighbours() -> None:
    data = _sparse_data(100)
    model = PredictiveSparseDecomposition(max_iter=1, **SMALL)
    with pytest.raises(Exception, match="not fitted"):
        model.transform(data)
    assert model.fit(data) is model
    assert (model.n_features_in_, model.components_.shape, model.n_iter_) == (10, (16, 10), 1)
    again = PredictiveSparseDecomposition(**model.get_params())
    assert np.array_equal(again.fit_transform(data), model.transform(data))
    assert (
        repr(PredictiveSparseDecomposition(8, alpha=2.0)) == "PredictiveSparseDecomposition(n_components=8, alpha=2.0)"
    )
    assert len(model.get_feature_names_out()) == 16
    with pytest.raises(InputError, match="no setting 'lambda'"):
        model.set_params(**{"lambda": 1})


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (np.zeros(5), "Expected 2D array, got 1D"),
        (np.zeros((0, 3)), r"0 sample\(s\)"),
        (np.zeros((3, 0)), r"0 feature\(s\)"),
        (np.full((3, 3), np.nan), "NaN or infinity"),
        (np.zeros((3, 3), np.uint8), "raw samples"),
        (np.full((3, 3), 255.0), "raw samples"),
        (np.zeros((3, 3), complex), "Complex data not supported"),
        ([["a", "b"]], "no number"),
    ],
)
def test_unusable_data_are_refused(data: object, problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        PredictiveSparseDecomposition(4).fit(data)  # type: ignore[arg-type]


def test_features_must_match() -> None:
    model = PredictiveSparseDecomposition(max_iter=1, **SMALL).fit(_sparse_data(60))
    with pytest.raises(InputError, match=r"X has 3 features, but .* is expecting 10"):
        model.transform(np.zeros((2, 3)))


def test_patches_are_normalised_and_flat_ones_left_out() -> None:
    patches = torch.stack([torch.full((9,), 0.5), torch.linspace(0, 1, 9)])
    kept = contrast_normalised(patches, flat=0.01)
    assert kept.shape == (1, 9)
    assert kept.mean().abs() < 1e-6
    assert kept.square().mean().sqrt().item() == pytest.approx(
        1 / (1 + 0.05 / patches[1].std(correction=0).item()), rel=1e-4
    )
