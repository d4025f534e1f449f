"""MoNE: capacities that meet the budget, tokens that keep to their width, and a host that comes back."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate import hosts
from foveate.encode.mone import DRAWN, Experts, MoNE, capacities, plugin
from foveate.engine.surgery import patch_forward
from foveate.errors import BudgetError, InputError
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops
from small_hosts import filled, output, vits

SIDE, PATCH, WIDTH, DEPTH, HEADS = 32, 4, 24, 3, 3
N = (SIDE // PATCH) ** 2
VITS = vits(SIDE, PATCH, WIDTH, DEPTH, HEADS)


@pytest.fixture(
    params=["ours", "ViTModel", "Dinov2ForImageClassification", "Dinov2WithRegistersModel", "CLIPVisionModel"]
)
def host(request):
    return filled(VITS[request.param]())


@pytest.fixture
def net():
    made = filled(MoNE(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4))
    with torch.no_grad():
        made.experts.alpha.copy_(torch.tensor([0.3, 0.0, 0.9]))
    return made


@pytest.fixture
def x():
    return torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("share", "published"),
    [
        (0.2, (0.605, 0.305, 0.083, 0.007)),
        (0.3, (0.420, 0.315, 0.191, 0.073)),
        (0.4, (0.314, 0.278, 0.235, 0.174)),
        (0.6, (0.166, 0.182, 0.237, 0.415)),
        (0.8, (0.062, 0.084, 0.167, 0.688)),
    ],
)
def test_capacities_are_those_of_the_papers_problem(share, published):
    assert capacities(share) == pytest.approx(published, abs=6e-4)


@given(st.floats(0.125, 1), st.floats(0.125, 1))
@settings(deadline=None, max_examples=40)
def test_capacities_meet_the_share_and_the_widest_grows_with_it(a, b):
    found = [capacities(share) for share in sorted((a, b))]
    for share, c in zip(sorted((a, b)), found, strict=True):
        assert sum(c) == pytest.approx(1, abs=1e-9)
        assert sum(part * 2.0 ** (i - 3) for i, part in enumerate(c)) == pytest.approx(share, abs=1e-6)
        assert min(c) >= 0
    assert found[0][-1] <= found[1][-1] + 1e-9


def test_capacities_out_of_reach_are_refused():
    with pytest.raises(BudgetError, match=r"0\.125 to 1"):
        capacities(0.1)


def test_at_full_width_it_is_the_plain_transformer_bit_for_bit(net, x):
    plain = VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, global_pool="avg").eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("experts.")})
    nn.init.zeros_(net.experts.alpha)
    assert torch.equal(output(net, x), output(plain, x))
    net.mixture.shares = (0.0, 0.0, 0.0, 1.0)
    assert torch.equal(output(net, x), output(plain, x))


@pytest.mark.parametrize("budget", [0.45, 0.6, 0.8])
def test_every_picture_has_as_many_tokens_of_each_width_as_its_capacity(net, x, budget):
    with net.mixture.spending(budget):
        shares = capacities(net.mixture.linear_share(N))
        output(net, x)
    for expert in net.mixture.expert:
        counts = torch.bincount(expert, minlength=4).tolist()
        assert counts[1:] == [int(c * N + 1e-6) for c in shares[1:]]
        assert sum(counts) == N


def reference(net, x, budget):
    """Classes by whole matrices and masks, from the equations."""
    tokens = net._pos_embed(net.patch_embed(x))
    r = net.experts.router(tokens).softmax(-1)
    with net.mixture.spending(budget):
        shares = capacities(net.mixture.linear_share(N))
    expert = torch.zeros(tokens.shape[:2], dtype=torch.long)
    for picture, scores in zip(expert, r, strict=True):
        for j in (3, 2, 1):
            liked = scores[:, j].masked_fill(picture > 0, -1)
            picture[liked.topk(int(shares[j] * N + 1e-6)).indices] = j
    mask = (torch.arange(WIDTH) < (WIDTH // 2 ** (3 - expert))[..., None]).float()
    gain = r.gather(-1, expert[..., None])
    for block, alpha in zip(net.blocks, net.experts.alpha, strict=True):
        q, k, v = block.attn.qkv(block.norm1(tokens) * mask).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        tokens = tokens + block.attn.proj(y) * mask
        hidden = block.mlp.act(block.mlp.fc1(block.norm2(tokens) * mask))
        tokens = tokens + (1 + alpha * gain) * block.mlp.fc2(hidden) * mask
    return net.head(net.norm(tokens).mean(1)), mask


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("budget", [0.45, 0.7])
def test_it_equals_masks_on_whole_matrices(net, x, budget, gradients):
    with torch.set_grad_enabled(gradients):
        torch.testing.assert_close(net(x, budget=budget), reference(net, x, budget)[0], atol=1e-4, rtol=1e-4)


def test_features_beyond_its_width_leave_a_token_as_they_came(net, x):
    seen = []
    with torch.no_grad(), patch_forward(net.norm, lambda run, y: seen.append(y) or run(y)):
        net(x, budget=0.45)
        start, (_, mask) = net._pos_embed(net.patch_embed(x)), reference(net, x, 0.45)
    assert torch.equal(seen[0][mask == 0], start[mask == 0])
    assert (seen[0] != start)[mask == 1].float().mean() > 0.99


@given(st.floats(0.3, 0.99))
@settings(deadline=None, max_examples=10)
def test_it_keeps_to_the_budget_and_uses_it(budget):
    made = MoNE(SIDE, PATCH, 64, 2, 2, num_classes=0).eval()
    picture = torch.zeros(1, 3, SIDE, SIDE)
    spent, full = (count_flops(made, picture, budget=b) for b in (budget, 1.0))
    router = 2 * N * 64 * 4
    assert budget * full - 0.04 * full < spent <= budget * full + router


def test_linear_work_is_counted_to_the_last_token(net, x):
    block = net.mixture.host.blocks[0]
    linear = sum(2 * m.weight.numel() for m in block.module.modules() if isinstance(m, nn.Linear))
    spent = {b: count_flops(net, x[:1], budget=b) for b in (1.0, 0.5)}
    output(net, x[:1])
    net(x[:1], budget=0.5)
    widths = sum(net.experts.widths[e] / WIDTH for e in net.mixture.expert[0].tolist())
    assert spent[1.0] - spent[0.5] == pytest.approx(DEPTH * linear * (N - widths), abs=1)


def test_removal_gives_the_host_back(host, x):
    before, state, modules = output(host, x), {k: v.clone() for k, v in host.state_dict().items()}, list(host.modules())
    handle = plugin(host, budget=0.7)
    assert not torch.allclose(output(host, x), before)
    assert set(host.state_dict()) - set(state) == {
        name for name in host.state_dict() if "experts." in name and name not in state
    }
    handle.remove()
    assert torch.equal(output(host, x), before)
    assert list(host.modules()) == modules
    assert list(host.state_dict()) == list(state)
    assert all(torch.equal(host.state_dict()[k], v) for k, v in state.items())


def test_a_budget_of_1_is_the_host_bit_for_bit(host, x):
    before = output(host, x)
    with plugin(host, budget=1.0):
        assert torch.equal(output(host, x), before)


def test_the_budget_changes_at_run_time(host, x):
    before, spent = output(host, x), {}
    with plugin(host, budget=0.6) as handle:
        for budget in (0.6, 0.8, 1.0):
            handle.budget = budget
            spent[budget] = count_flops(lambda: output(host, x))
        assert torch.equal(output(host, x), before)
        with pytest.raises(BudgetError):
            handle.budget = 0.01
        assert handle.budget.amount == 1.0
    full = count_flops(lambda: output(host, x))
    assert spent[0.6] < spent[0.8] < spent[1.0]
    assert spent[0.6] <= 0.6 * full
    assert spent[1.0] <= 1.05 * full


def test_prefix_tokens_go_at_full_width(host, x):
    with plugin(host, budget=0.6) as handle:
        look = handle.look(x)
        prefixes = hosts.vit(host).prefixes
        assert prefixes >= 1
        assert (handle.mixture.expert[:, :prefixes] == 3).all()
    assert look.effort.shape == (3, SIDE // PATCH, SIDE // PATCH)
    assert set(look.effort.unique().tolist()) <= {0.125, 0.25, 0.5, 1.0}
    assert look.tokens == tuple(round(float(e.sum())) for e in look.effort)


def test_model_and_plugin_are_the_same(net, x):
    plain = VisionTransformer(SIDE, PATCH, WIDTH, DEPTH, HEADS, num_classes=4, global_pool="avg").eval()
    plain.load_state_dict({k: v for k, v in net.state_dict().items() if not k.startswith("experts.")})
    handle = plugin(plain, budget=0.5)
    handle.mixture.experts.load_state_dict(net.experts.state_dict())
    with torch.no_grad():
        assert torch.equal(plain(x), net(x, budget=0.5))
        assert not torch.equal(plain(x), net(x))


def test_a_copy_routes_by_itself(net, x):
    twin = copy.deepcopy(net)
    nn.init.normal_(twin.experts.router.weight, std=3.0)
    assert not torch.equal(twin(x, budget=0.5), net(x, budget=0.5))
    assert twin.mixture.experts is twin.experts
    assert twin.mixture.host.model is twin


def test_routing_by_other_scores_spends_as_much(net, x):
    spent = count_flops(net, x, budget=0.5)
    routed = output(net, x), net.mixture.prefer
    net.mixture.prefer = lambda r: -r
    assert count_flops(net, x, budget=0.5) == spent
    assert not torch.equal(net(x, budget=0.5), routed[0])


def test_training_draws_the_work_anew_and_evaluation_is_dense(net, x):
    net.train()
    torch.manual_seed(0)
    drawn = {net.mixture.counts(N) for _ in range(60)}
    possible = set()
    for share in DRAWN:
        wide = [int(c * N + 1e-6) for c in capacities(share)[1:]]
        possible.add((N - sum(wide), *wide))
    assert drawn == possible
    assert net.eval().mixture.counts(N) == (0, 0, 0, N)
    with net.train().mixture.spending(0.5):
        assert len({net.mixture.counts(N) for _ in range(9)}) == 1


def test_the_router_learns_once_alpha_has_left_zero(net, x):
    for alpha, reached in ((0.0, False), (0.5, True)):
        nn.init.constant_(net.experts.alpha, alpha)
        net.zero_grad()
        net(x, budget=0.5).square().sum().backward()
        assert bool(net.experts.router.weight.grad.any()) == reached
        assert net.experts.alpha.grad.all()


def test_alpha_is_kept_in_0_to_1_and_never_loses_its_gradient():
    experts = Experts(8, 2, 3)
    for mode, expected in ((False, [-0.5, 0.25, 1.5]), (True, [0.0, 0.25, 1.0])):
        with torch.no_grad():
            experts.alpha.copy_(torch.tensor([-0.5, 0.25, 1.5]))
        experts.train(mode)(torch.zeros(1, 2, 8))
        assert experts.alpha.tolist() == expected
    gains = [experts.gain(i, torch.tensor(0.5)) for i in range(3)]
    assert [g.item() for g in gains] == [1.0, 1.125, 1.5]
    sum(gains).backward()
    assert experts.alpha.grad.tolist() == [0.5, 0.5, 0.5]


def test_whole_pictures_are_dropped_in_training(net, x):
    net(x, budget=0.5)
    seen = {}

    def dropped(run, block_input):
        seen["before"] = net.mixture.nesting.restore(block_input[0])
        kept = net.mixture._drop_pictures(lambda ones: ones * torch.tensor([0.0, 2.0, 1.0]).view(3, 1, 1), block_input)
        seen["after"] = net.mixture.nesting.restore(kept[0])
        return run(block_input)

    with patch_forward(net.blocks[1], dropped):
        net(x, budget=0.5)
    torch.testing.assert_close(seen["after"], seen["before"] * torch.tensor([0.0, 2.0, 1.0]).view(3, 1, 1))


def test_stochastic_depth_of_a_host(x):
    t = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 3, "image_size": SIDE}
    model = t.Dinov2Model(t.Dinov2Config(**sizes, patch_size=PATCH, drop_path_rate=0.5)).train()
    with plugin(model):
        model(x).last_hidden_state.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_report_on_untrained_slices_warns(x):
    model = filled(VITS["ours"]())
    with plugin(model, budget=0.6) as handle:
        with pytest.warns(UserWarning, match="never trained"):
            report = handle.report(x[:1])
        assert report.flop_reduction > 1.6
        nn.init.constant_(handle.mixture.experts.alpha, 0.1)
        handle.report(x[:1])


def test_unusable_settings(net, x):
    with pytest.raises(InputError, match="divides, got 20"):
        MoNE(SIDE, PATCH, 20, 1, 2)
    model = filled(VITS["ours"]())
    before = output(model, x)
    for budget in (0.05, "3 bpp", "10 tokens"):
        with pytest.raises(BudgetError):
            plugin(model, budget=budget)
    with pytest.raises(BudgetError, match="ask for that much"):
        net(x, budget=0.1)
    model.blocks[1].mlp.fc2 = nn.Linear(4 * WIDTH, 8)
    with pytest.raises(InputError, match="MLP"):
        plugin(model)
    model.blocks[1].mlp.fc2 = nn.Linear(4 * WIDTH, WIDTH)
    assert before.shape == output(model, x).shape
    assert not vars(model.blocks[0]).get("forward")


def test_bfloat16_and_other_sizes(net, x):
    with torch.no_grad():
        exact = net(x, budget=0.6)
        assert (net.bfloat16()(x.bfloat16(), budget=0.6).float() - exact).abs().mean() < 0.2 * exact.abs().mean()
        assert net(torch.rand(1, 3, 45, 37).bfloat16(), budget=0.6).shape == (1, 4)
