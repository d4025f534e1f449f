"""Training ACM: layers learn apart from each other, labels come from errors, and loads follow the budget."""

import pytest
import torch
from torch import nn

from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules, Choice
from foveate.encode.adaptive_computation_training import (
    distil,
    distillation_loss,
    fine_tune,
    gate_loss,
    labels,
    lessons,
    penalties,
    place_gates,
)
from foveate.layers.learners import Learners
from foveate.layers.transformer import VisionTransformer

SIDE, PATCH, WIDTH, DEPTH, HEADS = 16, 4, 24, 2, 3
QUIET = {"log": lambda line: None, "average": 0.5}


@pytest.fixture
def handle():
    torch.manual_seed(0)
    host = VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=3).eval()
    with torch.no_grad():
        for p in host.parameters():
            p.normal_(0, 0.3)
    made = AdaptiveComputationModules(host, budget=0.8, gate=2)
    for layer in made.layers:
        nn.init.trunc_normal_(layer.w1, std=0.2)
        nn.init.trunc_normal_(layer.w2, std=0.2)
    return made


def pictures(step):
    return torch.randn(8, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(step))


def test_lessons_are_what_the_old_layers_did(handle):
    x = pictures(0)
    taken = lessons(handle, x)
    assert [layer for layer, _, _ in taken] == list(handle.layers)
    assert len(taken) == 5 * DEPTH
    with torch.no_grad(), handle.paused():
        host = handle.host.model
        z = host._pos_embed(host.patch_embed(x))
        block = host.blocks[0]
        z = z + block.attn(block.norm1(z))
        expected = {
            "mlp": block.mlp(block.norm2(z)),
            "v": block.attn.qkv(block.norm1(host._pos_embed(host.patch_embed(x)))),
        }
        assert "forward" not in vars(block.mlp)  # nothing was left behind
    torch.testing.assert_close(taken[0][2], expected["mlp"])
    torch.testing.assert_close(taken[3][2], expected["v"][..., 2 * WIDTH :])


def test_a_layers_lesson_does_not_reach_another(handle):
    taken = lessons(handle, pictures(0))
    distillation_loss(taken[:1]).backward()
    assert handle.layers[0].w1.grad.any()
    assert all(layer.w1.grad is None for layer in handle.layers[1:])
    layer, x, y = taken[0]
    by_hand = sum((layer.sums(x)[k] - y).square().mean() for k in range(4)) / 4
    torch.testing.assert_close(distillation_loss(taken[:1]), by_hand)


def test_distillation_lowers_the_error_at_every_number_of_learners(handle):
    def errors():
        with torch.no_grad():
            each = [(layer.sums(x) - y).square().mean((1, 2, 3)) for layer, x, y in lessons(handle, pictures(99))]
        return torch.stack(each).mean(0)

    before, gates = errors(), [layer.gate[0].weight.clone() for layer in handle.layers]
    distil(handle, pictures, 40, lr=1e-2, **QUIET)
    after = errors()
    assert (after < 0.7 * before).all()
    assert (after.diff() <= 0).all()  # more learners, less error
    assert all(torch.equal(a, layer.gate[0].weight) for a, layer in zip(gates, handle.layers, strict=True))


@pytest.mark.parametrize(
    ("errors", "least", "runs"),
    [
        ((8.0, 4.0, 2.0, 1.0, 0.5), 0, 4),  # every learner helps
        ((8.0, 4.0, 3.9, 1.0, 0.5), 0, 2),  # the second does not; it still counts
        ((8.0, 4.0, 2.0, 1.9, 0.5), 1, 3),
        ((8.0, 7.9, 2.0, 1.0, 0.5), 0, 0),  # not even the first
        ((8.0, 7.9, 2.0, 1.0, 0.5), 1, 1),
        ((8.0, 4.0, 2.0, 1.0, 1.5), 0, 4),
    ],
)
def test_labels_are_the_first_learner_that_brings_little(errors, least, runs):
    assert int(labels(torch.tensor(errors)[:, None], least)) + least == runs


def test_gates_learn_their_labels_and_learners_stay(handle):
    kept = [layer.w1.clone() for layer in handle.layers]
    with torch.no_grad():
        before = gate_loss(lessons(handle, pictures(99)))
    place_gates(handle, pictures, 40, lr=2e-2, **QUIET)
    with torch.no_grad():
        after = gate_loss(lessons(handle, pictures(99)))
    assert after < 0.9 * before
    assert handle.trained
    assert all(torch.equal(a, layer.w1) for a, layer in zip(kept, handle.layers, strict=True))


def test_penalties_are_the_published_ones():
    wide, narrow = Learners(4, 4, 8, 2), Learners(4, 4, 4, 2)
    nu = nn.functional.one_hot(torch.tensor([[0, 0, 2, 2], [1, 2, 2, 2]]), 3).float()
    runs = torch.tensor([[0.0, 0, 2, 2], [1, 2, 2, 2]])
    record = [Choice(wide, runs, nu), Choice(narrow, torch.full((2, 4), 2.0))]
    b = [(2 / 3) * 0.5 + 1 / 3, (2 / 3) * 7 / 8 + 1 / 3]
    assert float(penalties(record, 0.5, (1, 0, 0))) == pytest.approx(sum(b) / 2 - 0.5, abs=1e-5)
    assert float(penalties(record, 0.5, (0, 0, 1))) == pytest.approx(-(b[1] - b[0]) / 2, abs=1e-5)
    share = torch.tensor([[0.5, 0.5], [0.25, 0.75]])
    entropy = (share * share.log()).sum(1).mean() / torch.tensor(3.0).log()
    assert float(penalties(record, 0.5, (0, 1, 0))) == pytest.approx(float(entropy), abs=1e-4)


def test_the_load_follows_the_budget(handle):
    loads = {}
    for layer in handle.layers:
        nn.init.zeros_(layer.gate[-1].weight)
    for budget in (0.95, 0.75):
        handle.budget = budget

        def loss(step):
            return 0 * handle.host.model(pictures(step)).sum()

        fine_tune(handle, loss, 40, lr=3e-2, weights=(1.0, 0.0, 0.0), **QUIET)
        assert not handle.host.model.training
        with handle.router.recording() as record:
            handle.host.model.train()(pictures(99))
        loads[budget] = float(torch.stack([c.runs.mean() / 4 * c.layer.cost for c in record]).sum().detach())
        loads[budget] /= sum(c.layer.cost for c in record)
        assert loads[budget] == pytest.approx(handle.share, abs=0.15)
    assert loads[0.75] < loads[0.95] - 0.05
