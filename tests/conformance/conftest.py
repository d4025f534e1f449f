"""Conformance: what every system must do, from its card alone.

A test asks for systems by the name of an argument, and runs once per working card of the catalogue:

    card     every working card
    job      jobs that give a picture for a picture, as a `Job` (codecs have laws of their own: tests/compress)
    model, plugin, tool     systems of that kind, as a `Subject` with an example to try them on

So a new system is tested by adding its card. Jobs need nothing more, where their wing is in `JOBS` below. A system of
another kind offers `conformance_example()`, as a static or class method of its entry or as a function beside it in the
entry's module. It returns a small instance and its inputs, the same at every call after the same `torch.manual_seed`:

    model    (module, inputs)   takes `larger: bool`, for bigger inputs of the same module. An adaptive model's forward
                                takes `budget`, a share; without it, the dense computation runs.
    plugin   (host, inputs)     a real class of the host library, built from a small configuration, in eval mode.
    tool     (call, inputs)     a function or module to be called with the inputs; double inputs that require gradients
                                are put through gradcheck. Or (estimator, ()), put through scikit-learn's own checks.

A test file of such a kind also lists SPECIMENS, small systems that obey the laws, so that the laws themselves are
exercised while the catalogue has no working system of the kind.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

import foveate
from foveate import catalog, weights
from foveate.catalog import KINDS, Card
from foveate.layers.upscaler import Rendered, Upscaler


@dataclass(frozen=True)
class Job:
    """A job as a user calls it: run(picture, [target], budget=...) -> (picture, report).

    Attributes:
        size: (rows, columns) of a picture to those of the result.
        network: a new network, with `floor` and `upscale(x, share)`.
        budgets: whether `run` knows budgets.
    """

    slug: str
    run: Callable[..., Any]
    size: Callable[[int, int], tuple[int, int]]
    network: Callable[[], Any]
    budgets: bool = True


@dataclass(frozen=True)
class Subject:
    """A system of another kind: what its card's entry names, and its example."""

    target: Any
    example: Callable[..., tuple[Any, tuple[Any, ...]]]


class Resized(nn.Module):
    """A network of any scale, or one that shrinks, with the face of those that enlarge by a fixed scale."""

    floor = 1.0

    def __init__(self, network: Any, size: Callable[[int, int], tuple[int, int]]) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size = self.size(*x.shape[2:])
        turn = self.network.reduce if size[0] < x.shape[2] else self.network.enlarge
        result: torch.Tensor = turn(x.to(next(self.parameters()).dtype), size)
        return result

    def upscale(self, x: torch.Tensor, share: float = 1.0) -> Rendered:
        return Rendered(self(x), x[:, :1], 0.0)


def _resizing(slug: str) -> Job:
    """Twice, or for systems that shrink half the size; systems without weights run a small network of random ones."""
    target: Any = catalog.card(slug).target()
    fixed, shrinks = issubclass(target, Upscaler), not hasattr(target, "enlarge") and not issubclass(target, Upscaler)
    own = 2 in weights.available().get(slug, []) or weights.place(slug).exists()

    def network() -> Any:
        if own:
            return target.pretrained(2) if fixed or shrinks else target.pretrained()
        torch.manual_seed(0)
        if hasattr(target, "conformance_example"):
            return target.conformance_example()[0].eval()
        return target(scale=2).eval()

    def size(height: int, width: int) -> tuple[int, int]:
        return (-(-height // 2), -(-width // 2)) if shrinks else (2 * height, 2 * width)

    method = slug if own else network()

    def run(*pictures: Any, **budget: Any) -> Any:
        return (foveate.downscale if shrinks else foveate.upscale)(*pictures, scale=2, method=method, **budget)

    return Job(slug, run, size, network if fixed else lambda: Resized(network(), size), not shrinks)


JOBS = {"restore": _resizing}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test once per working card of the kind that its arguments ask for, and once per specimen."""
    asked = metafunc.fixturenames
    if "card" in asked:
        cards = catalog.search(works=True)
        metafunc.parametrize("card", cards, ids=[card.slug for card in cards])
    for kind in (kind for kind in KINDS if kind in asked):
        found = [*catalog.search(kind=kind, works=True), *getattr(metafunc.module, "SPECIMENS", [])]
        found = [one for one in found if kind != "job" or one.wing != "compress"]
        metafunc.parametrize(kind, found, ids=[getattr(one, "slug", "specimen") for one in found], indirect=True)


def _subject(request: pytest.FixtureRequest) -> Subject:
    target = request.param.target() if isinstance(request.param, Card) else request.param
    example = getattr(target, "conformance_example", None)
    if example is None:
        example = getattr(inspect.getmodule(target), "conformance_example", None)
    assert example is not None, f"{target} offers no conformance_example(); see tests/conformance/conftest.py"

    def seeded(**options: Any) -> Any:
        torch.manual_seed(0)
        return example(**options)

    return Subject(target, seeded)


@pytest.fixture
def model(request: pytest.FixtureRequest) -> Subject:
    return _subject(request)


@pytest.fixture
def plugin(request: pytest.FixtureRequest) -> Subject:
    return _subject(request)


@pytest.fixture
def tool(request: pytest.FixtureRequest) -> Subject:
    return _subject(request)


@pytest.fixture
def job(request: pytest.FixtureRequest) -> Job:
    wing = request.param.wing
    assert wing in JOBS, f"say in JOBS of tests/conformance/conftest.py how a job of the wing {wing} is called"
    return JOBS[wing](request.param.slug)
