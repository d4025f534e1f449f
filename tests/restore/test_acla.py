import pytest
import torch
import torch.nn.functional as F
from torch import nn

from foveate.errors import BudgetError, InputError, WeightsError
from foveate.meter import count_flops, count_parameters
from foveate.restore.acla import ACLA, CrossLayerAttention, binary_concrete, search_positions


def module(references=2, keys=4, dtype=torch.float64, **settings):
    torch.manual_seed(0)
    return CrossLayerAttention(6, references, keys, **settings).to(dtype).eval()


def layers(count, size=(7, 8), dtype=torch.float64):
    dice = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, *size, generator=dice, dtype=dtype) for _ in range(count)]


def silence(*convolutions):
    for c in convolutions:
        nn.init.zeros_(c.weight)
        nn.init.zeros_(c.bias)


def net(scale=2, dtype=torch.float64, **settings):
    """A small network with weights large enough for every path to show."""
    torch.manual_seed(0)
    model = ACLA(scale, **{"channels": 8, "blocks": 4, "stages": 2, "keys": 4, "reach": 2.0, **settings})
    for p in model.parameters():
        nn.init.normal_(p, std=0.15)
    return model.to(dtype).eval()


def picture(h, w, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)


# ---------------------------------------------------------------------- the module


@pytest.mark.parametrize("gate", [None, "mask", "logit"])
def test_without_offsets_and_weights_it_is_the_mean_of_the_references(gate):
    m, (q, *refs) = module(gate=gate), layers(3)
    silence(m.to_offset, m.to_weight)
    if gate:
        m.to_gate.bias.data += 100
    expected = torch.stack([m.value(r) for r in refs]).mean(0)
    torch.testing.assert_close(m(q, refs), expected, atol=1e-6, rtol=1e-6)


def test_whole_offsets_shift():
    m, (q, r) = module(1, 1, gate=None), layers(2)
    silence(m.to_offset)
    m.to_offset.bias.data = torch.tensor([2.0, -1.0], dtype=torch.float64)  # (x, y)
    expected = torch.zeros_like(q)
    expected[:, :, 1:, :-2] = m.value(r)[:, :, :-1, 2:]
    torch.testing.assert_close(m(q, [r]), expected)


def test_it_is_its_definition_by_grid_sample():
    m, (q, *refs) = module(2, 3), layers(3)
    offset = m.to_offset(q).view(2, 2, 3, 2, 7, 8)
    w, g = m.to_weight(q).view(2, 2, 3, 7, 8), m.to_gate(q).view(2, 2, 3, 7, 8) - 1  # some are closed
    m.to_gate.bias.data -= 1
    share = (g > 0) * w.exp()
    a = share / (1e-6 * w.amax((1, 2), keepdim=True).exp() + share.sum((1, 2), keepdim=True))
    expected = torch.zeros_like(q)
    for j, r in enumerate(refs):
        for k in range(3):
            x, y = offset[:, j, k, 0] + torch.arange(8), offset[:, j, k, 1] + torch.arange(7)[:, None]
            grid = torch.stack([2 * x / 7 - 1, 2 * y / 6 - 1], -1)
            expected += a[:, j, k, None] * F.grid_sample(m.value(r), grid, "bilinear", "zeros", align_corners=True)
    torch.testing.assert_close(m(q, refs), expected, atol=1e-9, rtol=1e-9)
    assert 0 < float((g > 0).double().mean()) < 1


def test_all_gates_closed_leave_the_trunk_as_it_is():
    model = net()
    for m in model.modules_by_stage().values():
        silence(m.to_gate)
        m.to_gate.bias.data -= 1
    plain = net(positions=[])
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("attention.")})
    torch.testing.assert_close(model(picture(6, 7)), plain(picture(6, 7)))


def test_open_gates_are_no_gates():
    (q, *refs), with_gate, without = layers(3), module(), module(gate=None)
    without.load_state_dict({k: v for k, v in with_gate.state_dict().items() if "to_gate" not in k})
    with_gate.to_gate.bias.data += 100
    torch.testing.assert_close(with_gate(q, refs), without(q, refs), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
def test_weights_sum_to_one_where_a_gate_is_open(training):
    m, (q, *_) = module(), layers(1)
    m.to_gate.weight.data *= 5
    m.to_gate.bias.data -= 2
    m.train(training)
    total = m.attention(q)[1].sum((1, 2))
    ones = total > 0.5
    torch.testing.assert_close(total[ones], torch.ones_like(total[ones]), atol=1e-4, rtol=0)
    assert not total[~ones].any()
    assert ones.any()


def test_without_noise_training_is_what_use_will_be():
    m, (q, *refs) = module(), layers(3)
    m.to_gate.weight.data *= 5
    used = m.eval()(q, refs)
    m.train().noisy = False
    assert torch.equal(m(q, refs), used)
    m.noisy = True
    assert not torch.equal(m(q, refs), used)


def test_gradients_stay_small_where_every_gate_is_closed():
    m, (q, *refs) = module(), layers(3)
    m.train().noisy = False
    m.to_gate.weight.data.zero_()
    m.to_gate.bias.data.fill_(-1e-3)
    y = m(q, refs)
    assert not y.any()
    y.sum().backward()
    assert 0 < float(m.to_gate.bias.grad.abs().max()) < 1e4


def test_keys_begin_on_a_square_around_the_pixel():
    m = module(2, 9)
    places = m.to_offset.bias.detach().view(2, 9, 2)
    expected = torch.tensor([(x, y) for y in (-1.0, 0, 1) for x in (-1.0, 0, 1)], dtype=torch.float64)
    assert torch.equal(places, expected.expand(2, 9, 2))
    assert module(1, 4).to_offset.bias.tolist() == [-0.5, -0.5, 0.5, -0.5, -0.5, 0.5, 0.5, 0.5]


def test_offsets_end_at_the_reach():
    m, (q, *_) = module(reach=0.25), layers(1)
    assert float(m.attention(q)[0].detach().abs().max()) == 0.25


def test_the_end_of_it_may_be_a_depthwise_convolution_a_norm_and_the_query():
    m, (q, *refs) = module(post=True), layers(3)
    before = module()
    before.load_state_dict({k: v for k, v in m.state_dict().items() if not k.startswith("post.")})
    torch.testing.assert_close(m(q, refs), m.post(before(q, refs)) + q)


def test_the_concrete_gate_is_fair_and_hardens():
    torch.manual_seed(0)
    logits = torch.full((20_000,), 0.8)
    hard = binary_concrete(logits, 0.5, hard=True)
    assert set(hard.unique().tolist()) <= {0.0, 1.0}
    assert float(hard.mean()) == pytest.approx(torch.sigmoid(torch.tensor(0.8)).item(), abs=0.02)
    soft = binary_concrete(logits, 0.01)
    assert float(((soft < 0.01) | (soft > 0.99)).float().mean()) > 0.95
    logits.requires_grad_()
    binary_concrete(logits, 0.5, hard=True).sum().backward()
    assert logits.grad is not None
    assert (logits.grad >= 0).all()
    assert logits.grad.any()


def test_the_cost_is_linear_in_the_area_keys_and_references():
    for references, keys, gate in ((1, 4, None), (3, 4, "mask"), (3, 9, "mask")):
        m = module(references, keys, torch.float32, gate=gate)
        for size in ((5, 6), (10, 12)):
            q, *refs = (x[:1] for x in layers(references + 1, size, torch.float32))
            spent = count_flops(m, q, refs) / 2 / (size[0] * size[1])
            # The counter sees a convolution for each product, and each key's four pixels and sum.
            assert spent == pytest.approx(m.macs_per_pixel())


@pytest.mark.parametrize("wrong", [1, 3])
def test_other_references_are_refused(wrong):
    m, (q, *refs) = module(2), layers(4)
    with pytest.raises(InputError, match="2 references of shape"):
        m(q, refs[:wrong])
    with pytest.raises(InputError, match="project others first"):
        m(q, [refs[0], refs[1][..., 1:]])


# ---------------------------------------------------------------------- the network


def test_without_modules_it_is_edsr_baseline():
    plain = ACLA(2, positions=[])
    assert count_parameters(plain) == 1_369_859  # published: 1.37M
    assert [*plain.state_dict()][:3] == ["head.0.weight", "head.0.bias", "body.0.body.0.weight"]
    for gate, ratio in ((None, 1.063), ("mask", 1.068)):
        cost = ACLA(2, gate=gate).full_flops(1, 1) / plain.full_flops(1, 1)
        assert cost == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_shapes_and_tiles(scale):
    model, x = net(scale), picture(31, 34)
    assert model(x).shape == (1, 3, 31 * scale, 34 * scale)
    for tile in (None, 3):
        torch.testing.assert_close(model.upscale(x, tile=tile).image, model(x).detach(), atol=1e-9, rtol=1e-9)


def test_modules_read_the_head_and_the_stages_before():
    model, seen = net(blocks=6, stages=3, positions=[1, 3]), {}
    for i, m in model.modules_by_stage().items():
        m.register_forward_pre_hook(lambda m, given, i=i: seen.update({i: (given[0], list(given[1]))}))
    x = picture(5, 6)
    with torch.no_grad():
        model(x)
        head = model.head(x - model.mean)
        one = model.body[1](model.body[0](head.clone()))
        after = one + model.attention["1"](one, [head])
        two = model.body[3](model.body[2](after.clone()))
    assert [len(seen[i][1]) for i in (1, 3)] == [1, 3]
    for found, expected in zip(seen[3][1], (head, one, two), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("settings", [{}, {"gate": "logit"}, {"gate": None}, {"search": True}, {"post": True}])
def test_gradients_reach_every_parameter(settings):
    model, x = net(**settings).train(), picture(8, 9).repeat(2, 1, 1, 1)
    torch.manual_seed(0)
    model(x).square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_sparsity_closes_gates_and_bfloat16_runs():
    model, x = net(), picture(6, 6)
    model(x)
    before = model.sparsity()
    before.backward()
    with torch.no_grad():
        for m in model.modules_by_stage().values():
            m.to_gate.bias -= m.to_gate.bias.grad
    model(x)
    assert float(model.sparsity()) < float(before)
    torch.manual_seed(0)
    smooth = ACLA(2, 8, 4, 2, keys=4).eval()
    exact, rough = smooth.upscale(x.float()).image, smooth.bfloat16().upscale(x.float()).image
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().mean() < 0.05
    with pytest.raises(InputError, match="no gate to close"):
        net(gate=None).sparsity()


def test_search_keeps_what_pays_and_drops_what_does_not():
    def aims(model):
        """A loss that only stage 1's gate lowers, so that stage 2's costs and gives nothing."""
        return lambda _: 3 * (1 - model.alpha[0].sigmoid()) + 0 * model(picture(4, 4)).sum()

    model = net(search=True)
    torch.nn.init.zeros_(model.alpha)
    costs = [m.macs_per_pixel() for m in model.modules_by_stage().values()]
    assert float(model.search_cost()) == pytest.approx(0.5)
    model.alpha.data = torch.tensor([50.0, -50.0], dtype=torch.float64)
    assert float(model.search_cost()) == pytest.approx(costs[0] / sum(costs))
    torch.nn.init.zeros_(model.alpha)
    assert search_positions(model, lambda _: model(picture(4, 4)).square().mean(), aims(model), 5, 0.5) == [1]
    assert model.kept() == [1]
    assert not model.training


def test_a_module_that_is_switched_off_is_as_good_as_left_out():
    model = net(search=True)
    model.alpha.data = torch.tensor([1.0, -1.0], dtype=torch.float64)
    less = net(positions=[1])
    own = less.state_dict()
    less.load_state_dict({k: v for k, v in model.state_dict().items() if k in own})
    torch.testing.assert_close(model(picture(5, 5)), less(picture(5, 5)))


def test_saving_and_loading_gives_the_same_network(tmp_path):
    model, x = net(dtype=torch.float32), picture(5, 6, torch.float32)
    model.save_pretrained(tmp_path)
    assert torch.equal(ACLA.from_pretrained(tmp_path).eval()(x), model(x))


def test_an_edsr_checkpoint_is_the_trunk():
    plain = net(4, torch.float32, positions=[], value_range=255.0)
    extra = {"sub_mean.weight": torch.eye(3).view(3, 3, 1, 1), "add_mean.bias": torch.zeros(3)}
    loaded, x = ACLA.load_official(plain.state_dict() | extra, 4, stages=2), picture(5, 6, torch.float32)
    for m in loaded.modules_by_stage().values():
        silence(m.value)
    torch.testing.assert_close(loaded(x), plain(x))
    with pytest.raises(WeightsError, match="does not fit EDSR x2"):
        ACLA.load_official(plain.state_dict(), 2, stages=2)
    with pytest.raises(WeightsError, match="no EDSR"):
        ACLA.load_official({"conv.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 5}, "1, 2, 3 or 4, got 5"),
        ({"blocks": 5, "stages": 2}, "2 stages do not divide 5"),
        ({"positions": [5]}, r"after stages 1..4, got positions \[5\]"),
        ({"gate": "soft"}, "'soft'; use one of"),
        ({"keys": 0}, "0 keys"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        ACLA(**arguments)


def test_a_budget_is_refused_with_the_cheaper_method():
    with pytest.raises(BudgetError, match="for less, use method 'espcn'"):
        net().upscale(picture(5, 5), 0.5)
