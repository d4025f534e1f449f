"""The recipe of shallow-ntc: it starts as a block transform, and gives the linear synthesis a good start."""

import importlib.util
from pathlib import Path

import pytest
import torch

from foveate.compress.transform_coder import TransformCoder, small
from foveate.data import pictures

_spec = importlib.util.spec_from_file_location("ntc", Path(__file__).parents[2] / "recipes" / "shallow_ntc.py")
assert _spec is not None
assert _spec.loader is not None
recipe = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(recipe)


class Pieces:
    """Random crops of one photograph."""

    def __init__(self) -> None:
        self.picture = pictures.samples()["coffee"]
        self.random = torch.Generator().manual_seed(0)

    def __call__(self, batch: int, side: int) -> tuple[None, torch.Tensor]:
        corners = torch.randint(0, 300 - side, (batch, 2), generator=self.random).tolist()
        return None, torch.stack([self.picture[:, y : y + side, x : x + side] for y, x in corners])


@pytest.fixture(scope="module")
def network() -> TransformCoder:
    torch.manual_seed(0)
    made = small()
    recipe.begin(made, Pieces(), 4)
    return made


def test_it_starts_as_a_block_transform(network: TransformCoder) -> None:
    x = Pieces()(2, 64)[1]
    with torch.no_grad():
        y = network.eval().analysis(x - 0.5)
        error = (network.synthesis(y) + 0.5 - x).square().mean()
        z = network.prior.down(y)
    assert error < 2e-3
    assert 1 < z.std() < 9


def test_the_cost_has_a_gradient_for_everything_but_what_starts_at_zero(network: TransformCoder) -> None:
    network.train()
    recipe.lagrangian(network, Pieces()(2, 64)[1], torch.tensor([0.0, 4.6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_the_linear_twin_answers_like_the_two_layers(network: TransformCoder) -> None:
    twin = recipe.linear_twin(network, Pieces(), 0, 64)
    network.requires_grad_(True)
    y = 3 * torch.randn(1, 320, 3, 3)
    with torch.no_grad():
        expected, found = network.synthesis(y), twin(y)
    assert float((found - expected).square().mean() / expected.square().mean()) < 0.05
