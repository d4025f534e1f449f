"""A small host of every class that is known."""

import pytest
from torch import nn

from small_hosts import filled, swins, vits

VITS, SWINS = vits(32, 8, 24, 2, 3), swins()


@pytest.fixture(params=VITS.values(), ids=VITS)
def a_vit(request: pytest.FixtureRequest) -> nn.Module:
    """A vision transformer of each class that is known, for 32 x 32 pixels, patches of 8, width 24, two blocks."""
    return filled(request.param())


@pytest.fixture(params=SWINS.values(), ids=SWINS)
def a_swin(request: pytest.FixtureRequest) -> nn.Module:
    """A Swin of each class that is known, for 32 x 32 pixels, two stages of two blocks, windows of 4."""
    return filled(request.param())
