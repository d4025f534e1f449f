"""Predictive sparse decomposition: sparse codes of patches at the cost of one matrix product.

Kavukcuoglu, Ranzato, LeCun 2008, Fast Inference in Sparse Coding Algorithms with Applications to Object Recognition,
tech report CBLL-TR-2008-12-01, arXiv:1010.3467.

A patch y [n] is rebuilt from few rows of a dictionary B [m, n] of unit norm, m >= n. Sparse coding finds its code z [m]
by an optimisation for every patch; here a predictor F(y) = g * tanh(W y + d) is learned along with the dictionary:

    E(y, z) = |y - z B|^2 + lambda |z|_1 + alpha |z - F(y)|^2

    learning, per batch:  z*  =  argmin_z E          FISTA from F(y), all weights fixed
                          B  <-  B + 2 eta (y - z* B)^T z*, rows back to norm 1
                          W, d, g  <-  a step down alpha |z* - F(y)|^2, not through z*
    inference:            F(y); or F(y) and a few steps of FISTA at alpha = 0; or FISTA to convergence

alpha = 0 is plain sparse coding, and alpha -> infinity a sparse auto-encoder. With `couple=False` the inner FISTA
leaves the alpha term out and only starts at the prediction, as the first author's code does. (The paper writes B with
atoms as columns; here they are rows, as in scikit-learn.) As a codec: `foveate.compress.sparse_patches`.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.compress.codec import Codec
from foveate.errors import InputError

SHAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "linear": lambda x: x,
    "shrink": lambda x: x - torch.tanh(x),
}


FLOOR = 0.05
"""Added to a patch's standard deviation before dividing by it; in a picture of 0..1."""


class Predictor(nn.Module):
    """Predict sparse codes: F(y) = g * shape(W y + d).

    Args:
        inputs: n, numbers in a patch.
        atoms: m, numbers in a code.
        shape: "tanh", "linear", or "shrink" for x - tanh(x), a smooth shrinkage.

    Shape: y [..., n] -> [..., m].
    """

    def __init__(self, inputs: int, atoms: int, shape: str = "tanh") -> None:
        super().__init__()
        if shape not in SHAPES:
            raise InputError(f"shape={shape!r} is not known; use one of {', '.join(map(repr, SHAPES))}.")
        self.shape = shape
        self.linear = nn.Linear(inputs, atoms)
        self.gain = nn.Parameter(torch.ones(atoms))

    def forward(self, y: Tensor) -> Tensor:
        """Codes of patches."""
        return self.gain * SHAPES[self.shape](self.linear(y))

    def on_pictures(self, x: Tensor) -> Tensor:
        """Codes of all square patches of grey pictures at once, by convolution.

        Shape: x [B, 1, H, W] -> [B, m, H - s + 1, W - s + 1], s = sqrt(n).
        """
        side = round(self.linear.in_features**0.5)
        codes = F.conv2d(x, self.linear.weight.view(-1, 1, side, side), self.linear.bias)
        return self.gain[:, None, None] * SHAPES[self.shape](codes)


def energy(
    y: Tensor, z: Tensor, atoms: Tensor, penalty: float, pull: float = 0.0, target: Tensor | float = 0
) -> Tensor:
    """E of every patch. Shape: y [P, n], z [P, m], atoms [m, n], target [P, m] -> [P]."""
    fit = (y - z @ atoms).square().sum(-1) + penalty * z.abs().sum(-1)
    return fit + pull * (z - target).square().sum(-1) if pull else fit


def fista(
    y: Tensor,
    atoms: Tensor,
    penalty: float,
    *,
    start: Tensor | None = None,
    pull: float = 0.0,
    target: Tensor | None = None,
    steps: int = 100,
    momentum: bool = True,
) -> Tensor:
    """Minimise E over z by accelerated proximal gradient steps.

        x <- z - (gradient of the smooth part) / L,  L = 2 lambda_max(B B^T) + 2 alpha
        z <- soft(x, lambda / L), then Nesterov's extrapolation, started anew where it points uphill

    Args:
        penalty: lambda.
        start: z to begin with; 0 when None.
        pull, target: alpha and F(y).
        steps: iterations.
        momentum: False for ISTA, whose energy never rises.

    Shape: y [P, n], atoms [m, n], start and target [P, m] -> [P, m].
    Source: Beck, Teboulle 2009 (doi 10.1137/080716542); restart: O'Donoghue, Candes 2015.
    """
    m, n = atoms.shape
    small = atoms @ atoms.T if m < n else atoms.T @ atoms
    bound = torch.linalg.eigvalsh(small)[-1] * (1 + 1e-6) + pull
    correlation = y @ atoms.T
    if pull and target is not None:
        correlation = correlation + pull * target
    gram = atoms @ atoms.T if m < 2 * n else None  # else two thin products cost less
    z = y.new_zeros(len(y), m) if start is None else start
    ahead, t = z, 1.0
    for _ in range(steps):
        product = ahead @ gram if gram is not None else (ahead @ atoms) @ atoms.T
        x = ahead - (product - correlation + pull * ahead) / bound
        fresh = F.softshrink(x, float(penalty / (2 * bound)))
        if momentum:
            uphill = ((ahead - fresh) * (fresh - z)).sum(-1, keepdim=True) > 0
            following = (1 + (1 + 4 * t * t) ** 0.5) / 2
            ahead = torch.where(uphill, fresh, fresh + (t - 1) / following * (fresh - z))
            t = following
        else:
            ahead = fresh
        z = fresh
    return z


def contrast_normalised(patches: Tensor, floor: float = FLOOR, flat: float = 0.0) -> Tensor:
    """Patches less their mean, by their standard deviation plus a floor; flat ones left out.

    Args:
        patches: values in 0..1.
        flat: the least standard deviation of the patches kept.

    Shape: [P, n] -> [P', n].
    """
    centred = patches - patches.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True).sqrt()
    return (centred / (spread + floor))[spread[:, 0] >= flat]


class PredictiveSparseDecomposition:
    """Sparse codes of vectors by a learned predictor, with the habits of scikit-learn's estimators.

    Args:
        n_components: m, number of atoms.
        penalty: lambda, price of a code's magnitude.
        alpha: how strongly codes are drawn to their prediction while learning.
        couple: whether the inner optimisation knows alpha; else it only starts at the prediction.
        shape: of the predictor: "tanh", "linear" or "shrink".
        transform_mode: "predict" for F(y), "warm" for F(y) and `steps` steps of FISTA, "exact" for 200 from zero.
        steps: of "warm".
        max_iter: passes over the data.
        batch_size: vectors per update.
        inner_steps: of FISTA per batch.
        dictionary_rate: 2 eta, step of the dictionary.
        learning_rate: of Adam for the predictor.
        random_state: seed.

    Attributes: components_ [m, n] of unit norm, predictor_ (a `Predictor`), n_features_in_, n_iter_, energy_ (mean E at
        alpha = 0 of the last pass), active_ (share of the codes that is not 0 in the last pass).

    Raises: InputError for data that are no finite table of numbers, or are raw 8-bit samples: subtract means and divide
        by standard deviations first, as `contrast_normalised` does.
    """

    def __init__(
        self,
        n_components: int = 256,
        *,
        penalty: float = 0.5,
        alpha: float = 1.0,
        couple: bool = True,
        shape: str = "tanh",
        transform_mode: str = "predict",
        steps: int = 5,
        max_iter: int = 6,
        batch_size: int = 200,
        inner_steps: int = 20,
        dictionary_rate: float = 0.5,
        learning_rate: float = 1e-3,
        random_state: int | None = 0,
    ) -> None:
        self.n_components = n_components
        self.penalty = penalty
        self.alpha = alpha
        self.couple = couple
        self.shape = shape
        self.transform_mode = transform_mode
        self.steps = steps
        self.max_iter = max_iter
        self.batch_size = batch_size
        self.inner_steps = inner_steps
        self.dictionary_rate = dictionary_rate
        self.learning_rate = learning_rate
        self.random_state = random_state

    def fit(self, X: npt.ArrayLike, y: object = None) -> Self:
        """Learn dictionary and predictor. Shape: X [P, n]."""
        data = self._checked(X, fitting=True)
        generator = torch.Generator().manual_seed(0 if self.random_state is None else int(self.random_state))
        atoms = F.normalize(torch.randn(self.n_components, data.shape[1], generator=generator), dim=1)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator.initial_seed())
            predictor = Predictor(data.shape[1], self.n_components, self.shape)
        adam = torch.optim.Adam(predictor.parameters(), self.learning_rate)
        for _ in range(self.max_iter):
            used = torch.zeros(self.n_components)
            total = 0.0
            for batch in torch.randperm(len(data), generator=generator).split(self.batch_size):
                codes, value = self._update(data[batch], atoms, predictor, adam)
                used += (codes != 0).float().sum(0)
                total += value
            self._revive(atoms, used, data, predictor)
            self.energy_, self.active_ = total / len(data), float(used.sum() / (len(data) * self.n_components))
        self.predictor_ = predictor.eval()
        self.components_ = atoms.numpy()
        self.n_features_in_, self.n_iter_ = data.shape[1], self.max_iter
        return self

    def _update(
        self, y: Tensor, atoms: Tensor, predictor: Predictor, adam: torch.optim.Optimizer
    ) -> tuple[Tensor, float]:
        predicted = predictor(y)
        pull = self.alpha if self.couple else 0.0
        kept = predicted.detach()
        codes = fista(y, atoms, self.penalty, start=kept, pull=pull, target=kept, steps=self.inner_steps)
        value = float(energy(y, codes, atoms, self.penalty).sum())
        atoms += self.dictionary_rate / len(y) * codes.T @ (y - codes @ atoms)
        atoms.copy_(F.normalize(atoms, dim=1))
        adam.zero_grad(set_to_none=True)
        (max(self.alpha, 1e-3) * (codes - predicted).square().sum(-1).mean()).backward()
        adam.step()
        return codes, value

    def _revive(self, atoms: Tensor, used: Tensor, data: Tensor, predictor: Predictor) -> None:
        """Replace atoms that no code used by the vectors that were rebuilt worst."""
        dead = (used == 0).nonzero()[:, 0]
        if not len(dead):
            return
        some = data[: 20 * self.batch_size]
        with torch.no_grad():
            lost = (some - predictor(some) @ atoms).square().sum(-1)
        worst = some[lost.topk(min(len(dead), len(some))).indices]
        fresh = F.normalize(worst, dim=1)
        ok = fresh.square().sum(-1) > 0.5
        atoms[dead[: len(worst)][ok]] = fresh[ok]

    def transform(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Codes of vectors. Shape: [P, n] -> [P, m]."""
        y = self._checked(X)
        atoms = torch.from_numpy(self.components_)
        if self.transform_mode not in ("predict", "warm", "exact"):
            raise InputError(f'transform_mode={self.transform_mode!r}; use "predict", "warm" or "exact".')
        with torch.no_grad():
            if self.transform_mode == "exact":
                codes = fista(y, atoms, self.penalty, steps=200)
            else:
                codes = self.predictor_(y)
            if self.transform_mode == "warm":
                codes = fista(y, atoms, self.penalty, start=codes, steps=self.steps)
        return codes.numpy()

    def fit_transform(self, X: npt.ArrayLike, y: object = None) -> npt.NDArray[np.float32]:
        """Learn, then give the codes."""
        return self.fit(X).transform(X)

    def inverse_transform(self, X: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Vectors of codes. Shape: [P, m] -> [P, n]."""
        self._check_fitted()
        return np.asarray(X, np.float32) @ self.components_

    def get_feature_names_out(self, input_features: object = None) -> npt.NDArray[np.object_]:
        """Names of the numbers in a code."""
        self._check_fitted()
        return np.array([f"atom{i}" for i in range(self.n_components)], dtype=object)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Settings by name."""
        return {name: getattr(self, name) for name in list(signature(type(self)).parameters)}

    def set_params(self, **params: Any) -> Self:
        """Change settings. Raises: InputError for one that does not exist."""
        known = self.get_params()
        for name, value in params.items():
            if name not in known:
                raise InputError(f"There is no setting {name!r}; use one of {', '.join(known)}.")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = type(self)().get_params()
        changed = [f"{name}={value!r}" for name, value in self.get_params().items() if value != defaults[name]]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import Tags, TargetTags, TransformerTags  # type: ignore[import-untyped, import-not-found, unused-ignore]

        tags = Tags(estimator_type=None, target_tags=TargetTags(required=False))
        tags.transformer_tags = TransformerTags(preserves_dtype=["float32"])
        return tags

    def _check_fitted(self) -> None:
        if not hasattr(self, "components_"):
            raise _not_fitted(f"This {type(self).__name__} is not fitted yet; call fit with patches first.")

    def _checked(self, X: npt.ArrayLike, fitting: bool = False) -> Tensor:
        if not fitting:
            self._check_fitted()
        if hasattr(X, "toarray"):
            raise InputError("Sparse data were passed; give a dense array, with X.toarray() say.")
        given = np.asarray(X)
        if given.dtype.kind == "c":
            raise InputError(f"Complex data not supported: got {given.dtype}; give real numbers.")
        try:
            values = given.astype(np.float32)
        except (TypeError, ValueError) as error:
            raise InputError(f"X holds {given.dtype} that is no number ({error}); give a table of numbers.") from error
        if values.ndim != 2:
            hint = "Reshape your data: X.reshape(-1, 1) or X.reshape(1, -1)."
            raise InputError(f"Expected 2D array, got {values.ndim}D array of shape {values.shape} instead. {hint}")
        for axis, what in enumerate(("sample", "feature")):
            if values.shape[axis] < 1:
                raise InputError(f"0 {what}(s) (shape={values.shape}) while a minimum of 1 is required. Give more.")
        if not np.isfinite(values).all():
            raise InputError("X contains NaN or infinity; replace them first.")
        if not fitting and values.shape[1] != self.n_features_in_:
            name, wanted = type(self).__name__, self.n_features_in_
            raise InputError(f"X has {values.shape[1]} features, but {name} is expecting {wanted} features as input.")
        if given.dtype == np.uint8 or np.abs(values).max() > 128:
            peak = np.abs(values).max()
            raise InputError(f"X has values up to {peak:g}: raw samples? Normalise them, with contrast_normalised say.")
        return torch.from_numpy(np.ascontiguousarray(values))


def _not_fitted(message: str) -> Exception:
    """scikit-learn's own error where it is there, for its tools look for that."""
    try:
        from sklearn.exceptions import NotFittedError  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError:
        return InputError(message)
    return NotFittedError(message)


def codec(**settings: Any) -> Codec:
    """The codec that stands on such a dictionary: `foveate.compress.sparse_patches.SparsePatches`."""
    from foveate.compress.sparse_patches import SparsePatches

    return SparsePatches(**settings)


def conformance_example() -> tuple[PredictiveSparseDecomposition, tuple[()]]:
    """A small estimator."""
    return PredictiveSparseDecomposition(8, max_iter=2, inner_steps=5, batch_size=20), ()
