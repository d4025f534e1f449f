"""ACM: the host in slices, budgets kept to the last learner, and a host that comes back."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.encode.adaptive_computation_modules import (
    AdaptiveComputationModules,
    Joined,
    learner_share,
    learners_for,
    projection_learners,
)
from foveate.errors import BudgetError, InputError
from foveate.layers.learners import Learners
from foveate.layers.transformer import MLP, VisionTransformer
from foveate.meter import count_flops
from small_hosts import output, vits

SIDE, PATCH, WIDTH, DEPTH, HEADS, GATE = 32, 4, 48, 2, 3, 4
N = (SIDE // PATCH) ** 2
VITS = vits(SIDE, PATCH, WIDTH, DEPTH, HEADS, 4 * WIDTH)


@pytest.fixture(
    params=[
        "ours",
        "ViTForImageClassification",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "CLIPVisionModel",
    ]
)
def host(request):
    torch.manual_seed(0)
    return VITS[request.param]().eval()


@pytest.fixture
def net():
    torch.manual_seed(0)
    return VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4).eval()


@pytest.fixture
def x():
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def undecided(handle):
    """Gates that tell tokens apart."""
    torch.manual_seed(2)
    for layer in handle.layers:
        nn.init.normal_(layer.gate[-1].weight, std=3.0)
        nn.init.normal_(layer.gate[-1].bias)
    return handle


def recorded(handle, x):
    with torch.no_grad(), handle.router.recording() as record:
        handle.host.model(x)
    return record


def test_an_mlp_becomes_learners_that_add_up_to_it():
    mlp, x = MLP(12, 48), torch.randn(2, 5, 12)
    nn.init.normal_(mlp.fc2.bias)
    made = learners_for(mlp, 12, 4)
    assert made.w1.shape == (4, 12, 12)
    torch.testing.assert_close(made(x), mlp(x) - mlp.fc2.bias)
    worth = (made.w1.norm(dim=2) * made.w2.norm(dim=2)).flatten()
    assert (worth.diff() <= 1e-6).all()
    assert sum(p.numel() for p in (made.w1, made.b1, made.w2)) <= sum(p.numel() for p in mlp.parameters())
    with pytest.raises(InputError, match="MLP"):
        learners_for(nn.Sequential(nn.Linear(12, 8)), 12, 4)


@pytest.mark.parametrize("parts", [1, 3])
def test_projections_start_with_their_leading_directions(parts):
    torch.manual_seed(0)
    layer, x = nn.Linear(16, 16 * parts), torch.randn(2, 5, 16)
    made = projection_learners(layer, parts, 4)
    assert len(made) == parts
    for i, one in enumerate(made):
        assert one.b1.shape == (4, 2)  # (256 + 16) / (4 * 33)
        weight, bias = layer.weight[16 * i : 16 * i + 16].detach(), layer.bias[16 * i : 16 * i + 16].detach()
        u, s, vh = torch.linalg.svd(weight)
        for k in (1, 2, 4):
            r = 2 * k
            best = x @ (u[:, :r] * s[:r] @ vh[:r]).T + u[:, :r] @ (u[:, :r].T @ bias)
            torch.testing.assert_close(one.sums(x)[k - 1], best, atol=1e-4, rtol=1e-3)
    y = Joined(made)(x)
    assert y.shape == (2, 5, 16 * parts)
    torch.testing.assert_close(y[..., -16:], made[-1](x))


def test_removal_gives_the_host_back(host, x):
    before, state, modules = output(host, x), {k: v.clone() for k, v in host.state_dict().items()}, list(host.modules())
    handle = AdaptiveComputationModules(host, budget=0.7, gate=GATE)
    assert len(handle.layers) == 5 * DEPTH
    assert all(isinstance(layer, Learners) and layer in list(host.modules()) for layer in handle.layers)
    assert not torch.allclose(output(host, x), before)
    handle.remove()
    assert torch.equal(output(host, x), before)
    assert list(host.modules()) == modules
    assert list(host.state_dict()) == list(state)
    assert all(torch.equal(host.state_dict()[k], v) for k, v in state.items())


def test_it_keeps_to_the_budget_and_uses_it(host, x):
    full = count_flops(lambda: output(host, x[:1]))
    with undecided(AdaptiveComputationModules(host, budget=0.7, gate=GATE)) as handle:
        for budget in (0.65, 0.7, 0.85, f"{0.8 * full / 1e9} GFLOPs"):
            handle.budget = budget
            share = budget if isinstance(budget, float) else 0.8
            spent = count_flops(lambda: output(host, x[:1]))
            assert (share - 0.02) * full < spent <= share * full * 1.0001
        handle.budget = 1.0
        assert count_flops(lambda: output(host, x[:1])) <= 1.01 * full
        with pytest.raises(BudgetError, match="ask for that much"):
            handle.budget = 0.1
        assert handle.budget.amount == 1.0


def test_where_projections_stay_they_are_paid_for_first(net, x):
    full = count_flops(net, x[:1])
    handle = undecided(AdaptiveComputationModules(net, budget=0.7, projections=False, gate=GATE))
    assert 0.68 * full < count_flops(lambda: output(net, x[:1])) <= 0.7 * full
    mlps = 2 * DEPTH * 8 * WIDTH**2 * (N + 1)
    gates = (N + 1) * sum(layer.gate_cost for layer in handle.layers)
    assert handle.share == pytest.approx(1 - (0.3 * full + gates) / mlps, abs=0.01)


def test_every_picture_and_layer_runs_as_many_learners_as_it_may(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.65, gate=GATE))
    share, tokens = handle.share, N + 1
    record = recorded(handle, x)
    assert [choice.layer for choice in record] != []
    for choice in record:
        wanted = max(int(share * tokens * 4 + 1e-6), tokens * choice.layer.least)
        assert choice.runs.sum(1).tolist() == [wanted] * 3
        assert int(choice.runs.min()) >= choice.layer.least
        assert int(choice.runs.max()) <= 4
        assert len(choice.runs.unique()) > 1
    alone = torch.cat([output(net, one) for one in x.split(1)])
    torch.testing.assert_close(output(net, x), alone, atol=1e-5, rtol=1e-4)


def test_at_a_price_tokens_run_what_is_worth_it(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.65, gate=GATE))
    for price in (-100.0, 0.0, 0.7, 100.0):
        handle.router.price = price
        first = recorded(handle, x)[0]
        with torch.no_grad():
            scores = first.layer.gate(net.blocks[0].norm1(net._pos_embed(net.patch_embed(x))))
        cost = torch.arange(scores.shape[-1]) * (price * first.layer.cost / handle.router.work.dearest)
        assert torch.equal(first.runs, first.layer.least + (scores - cost).argmax(-1))


def test_a_calibrated_price_meets_the_budget_together_and_not_one_by_one(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.7, gate=GATE))
    price = handle.calibrate(x)
    assert handle.router.price == price
    spent = learner_share(recorded(handle, x))
    assert handle.share - 0.02 < float(spent.mean()) <= handle.share
    assert len({choice.runs.sum().item() / (4 * 3 * (N + 1)) for choice in recorded(handle, x)}) > 3
    handle.budget = 0.7
    assert handle.router.price is None


def test_a_price_is_found_where_projections_run_no_more_than_they_must(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.44, gate=GATE))
    assert handle.share < 1 / 4
    exact = count_flops(net, x)
    handle.calibrate(x)
    assert count_flops(net, x) == pytest.approx(exact, rel=0.03)


def test_settled_gates_keep_to_the_budget_by_themselves(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.7, gate=GATE))
    handle.calibrate(x)
    priced = [choice.runs for choice in recorded(handle, x)]
    handle.settle(x)
    assert handle.router.price == 0
    settled = [choice.runs for choice in recorded(handle, x)]
    assert all(torch.equal(a, b) for a, b in zip(priced, settled, strict=True))


def test_without_training_all_tokens_run_alike(net, x):
    handle = AdaptiveComputationModules(net, budget=0.7, gate=GATE)
    for choice in recorded(handle, x):
        assert int(choice.runs.max() - choice.runs.min()) <= 1
    assert not handle.trained
    assert undecided(handle).trained


def test_all_learners_run_at_a_budget_of_1_and_none_leave_a_block_as_it_was(net, x):
    handle = AdaptiveComputationModules(net, budget=1.0, projections=False, gate=GATE)
    assert len(handle.layers) == DEPTH
    plain, static = copy.deepcopy(net), output(net, x)
    for block in plain.blocks:
        block.mlp.router = None
    assert torch.equal(static, output(plain, x))
    handle.budget = 0.8
    handle.router.price = 1e4
    for choice in recorded(handle, x):
        assert not choice.runs.any()
    z = torch.randn(1, N + 1, WIDTH)
    block = net.blocks[0]
    assert torch.equal(block(z), z + block.attn(block.norm1(z)))


def test_training_draws_from_the_gates(net, x):
    handle = AdaptiveComputationModules(net.train(), budget=0.7, gate=GATE)
    layer = handle.layers[0]
    layer.gate[-1].bias.data = torch.tensor([0.1, 0.2, 0.3, 0.4]).repeat(2)[: len(layer.gate[-1].bias)].log()
    with handle.router.recording() as record:
        for _ in range(8):
            net(x).sum().backward()
    drawn = torch.stack([c.nu for c in record if c.layer is layer]).detach()
    assert set(drawn.unique().tolist()) <= {0.0, 1.0} or torch.allclose(drawn, drawn.round(), atol=1e-6)
    expected = layer.gate[-1].bias.softmax(0)
    torch.testing.assert_close(drawn.mean((0, 1, 2)), expected, atol=0.06, rtol=0)
    assert all(p.grad is not None and p.grad.any() for p in handle.layers[1].gate[-1].parameters())
    handle.router.learning = False
    torch.manual_seed(0)
    first = net(x)
    assert torch.equal(first, net(x))


@given(st.floats(0.45, 0.99), st.integers(20, 90))
@settings(deadline=None, max_examples=25)
def test_shares_and_budgets_are_two_sides_of_one_sum(budget, patches):
    host = VisionTransformer(SIDE, PATCH, 96, 1, 3, num_classes=0).eval()
    work, full = AdaptiveComputationModules(host, 0.9, gate=2).router.work, None
    from foveate.engine.budget import Budget

    tokens = patches + 1
    full = work.patch * patches + work.linear * tokens + work.square * tokens**2
    try:
        share = work.share(Budget(budget), tokens)
    except BudgetError:
        return
    learners = sum(one.cost * one.learners * max(share, one.least / one.learners) for one in work.layers)
    spent = full + tokens * (learners + sum(one.gate_cost for one in work.layers) - work.linear)
    assert spent == pytest.approx(budget * full, rel=1e-6) or share == 1


def test_look_and_report(net, x):
    with undecided(AdaptiveComputationModules(net, budget=0.7, gate=GATE)) as handle:
        look = handle.look(x)
        assert look.effort.shape == (3, SIDE // PATCH, SIDE // PATCH)
        assert 0 < float(look.effort.min()) < float(look.effort.max()) <= 1
        assert float(look.effort.mean()) == pytest.approx(handle.share, abs=0.05)
        assert handle.report(x[:1]).flop_reduction == pytest.approx(1 / 0.7, rel=0.03)
    with AdaptiveComputationModules(net, budget=0.7, gate=GATE) as handle, pytest.warns(UserWarning, match="trained"):
        handle.report(x[:1])


def test_a_copy_is_its_own(net, x):
    handle = undecided(AdaptiveComputationModules(net, budget=0.7, gate=GATE))
    twin = copy.deepcopy(handle)
    twin.budget = 0.9
    assert twin.layers[0] is not handle.layers[0]
    assert twin.layers[0].router is twin.router
    assert not torch.equal(output(twin.host.model, x), output(net, x))
    twin.remove()
    assert isinstance(twin.host.model.blocks[0].mlp, MLP)
    assert isinstance(net.blocks[0].mlp, Learners)


def test_bfloat16_and_other_sizes(net, x):
    undecided(AdaptiveComputationModules(net, budget=0.7, gate=GATE))
    with torch.no_grad():
        assert net(torch.rand(1, 3, 45, 37)).shape == (1, 4)
        exact = net(x)
        rough = net.bfloat16()(x.bfloat16()).float()
    assert (rough - exact).abs().mean() < 0.3 * exact.abs().mean() + 0.05
