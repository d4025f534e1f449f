"""The proof of perceptual losses: its parts on very little work, and a verdict that can fail."""

import pytest
import torch

from foveate.learn.image_transform import TransformNet
from foveate.meter import Comparison
from foveate.proofs import ProofContext
from foveate.proofs.learn import perceptual_losses as proof

GOOD = {"psnr_y_db": 24.0, "feature_distance": 0.2, "gradient": 0.9}
PIXELS = {"psnr_y_db": 25.0, "feature_distance": 0.3, "gradient": 0.8}


def styled(untouched=4.0, passed=1.0, curve=None, speedup=3.0):
    clock = Comparison(("a", "b"), ((speedup,), (1.0,)), None, (None, None))
    curve = [4.0] * 25 + [0.9] if curve is None else curve
    return proof.Styled(untouched, passed, curve, clock, 1.0, torch.rand(8, 3, 8, 8))


def test_the_steps_are_those_until_the_optimisation_is_as_good():
    assert (styled().steps, styled().least_steps) == (25, 25)
    assert styled().advantage == pytest.approx(75)
    never = styled(curve=[4.0] * 40)
    assert (never.steps, never.least_steps) == (None, 40)


@pytest.mark.parametrize(
    ("ratio", "found", "pixels", "features"),
    [
        (499, styled(), PIXELS, GOOD),
        (900, styled(untouched=0.95), PIXELS, GOOD),
        (900, styled(curve=[4.0] * 19 + [0.5]), PIXELS, GOOD),
        (900, styled(speedup=1.1), PIXELS, GOOD),
        (900, styled(), PIXELS, {**GOOD, "psnr_y_db": 25.5}),
        (900, styled(), PIXELS, {**GOOD, "feature_distance": 0.4}),
        (900, styled(), PIXELS, {**GOOD, "gradient": 1.3}),
    ],
)
def test_the_verdict_can_fail(ratio, found, pixels, features):
    assert proof.verdict(900, styled(), PIXELS, GOOD)
    assert not proof.verdict(ratio, found, pixels, features)


def test_losses_relative_to_the_pictures_have_no_units():
    style, x = proof.stripes(32), torch.rand(2, 3, 32, 32)
    losses, grams = proof.relative_losses(style, x)
    empty = {name: torch.zeros_like(g) for name, g in grams.items()}
    terms = losses.terms(style, style=empty)
    assert float(terms.style) == pytest.approx(4, rel=1e-4)  # each of four layers misses all of it
    nothing = {name: torch.zeros_like(f) for name, f in losses.activations(x).items()}
    assert float(losses.terms(x, nothing).content) == pytest.approx(1, rel=1e-4)


def test_stripes_are_stripes():
    x = proof.stripes(40)
    assert x.shape == (1, 3, 40, 40)
    assert len(x.flatten(2)[0].T.unique(dim=0)) == 3


def test_a_step_lowers_the_loss_and_starts_at_the_picture():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 32, 32)
    losses, grams = proof.relative_losses(proof.stripes(32), x)
    step = proof._stepper(losses, x, grams, 0.05)
    first = step()
    assert first == pytest.approx(float(losses(x, x, grams)))
    assert [step() for _ in range(10)][-1] < first


def test_norms_settle_on_what_they_see():
    network = TransformNet((4,), 1, scale=2, norm="batch")
    proof.settle(network, lambda batch, side: (torch.rand(batch, 3, 8, 8), torch.empty(0)))
    assert int(network.in1.num_batches_tracked) == 20
    assert not network.training


def test_the_cost_is_that_of_a_step_and_a_pass():
    outcome = proof.published_cost(ProofContext(progress=False), 1, side=48)
    step, once = outcome.flops
    assert once > 0
    # Forward through VGG-16 up to relu4_3 and backward to the picture; each Gram matrix, and back on both its sides.
    macs = 2 * (1728 + 36864 + (73728 + 147456) / 4 + (294912 + 2 * 589824) / 16 + (1179648 + 2 * 2359296) / 64)
    grams = 3 * (64**2 + 128**2 / 4 + 256**2 / 16 + 512**2 / 64)
    assert step == pytest.approx(2 * (macs + grams) * 48 * 48, rel=0.01)
