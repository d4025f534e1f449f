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

import foveate
from foveate import catalog
from foveate.catalog import KINDS, Card


@dataclass(frozen=True)
class Job:
    """A job as a user calls it: run(picture, [target], budget=...) -> (picture, report); sides grow by `growth`."""

    slug: str
    run: Callable[..., Any]
    growth: int
    network: Callable[[], Any]


@dataclass(frozen=True)
class Subject:
    """A system of another kind: what its card's entry names, and its example."""

    target: Any
    example: Callable[..., tuple[Any, tuple[Any, ...]]]


def _upscaling(slug: str) -> Job:
    def run(*pictures: Any, budget: Any = 1.0) -> Any:
        return foveate.upscale(*pictures, scale=2, method=slug, budget=budget)

    return Job(slug, run, 2, lambda: foveate.create(slug, pretrained=True, scale=2))


JOBS = {"restore": _upscaling}


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
