import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from foveate.encode import lambda_networks
from foveate.encode.lambda_networks import SIZES, LambdaLayer, LambdaResNet, apply_lambdas
from foveate.errors import InputError, WeightsError
from foveate.meter import count_flops, count_parameters

SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(1, 7)


def layer_of(seed=0, dtype=torch.float64, **settings):
    """A layer with norms that do something, in eval mode."""
    torch.manual_seed(seed)
    layer = LambdaLayer(**{"dim": 6, "heads": 2, "key_dim": 3, "reach": 5} | settings)
    return stirred(layer).to(dtype)


def stirred(module):
    with torch.no_grad():
        for m in module.modules():
            if isinstance(m, nn.BatchNorm2d):
                for t in (m.weight, m.running_var):
                    t.uniform_(0.5, 1.5)
                for t in (m.bias, m.running_mean):
                    t.normal_(0, 0.3)
    return module.eval()


def by_definition(layer, x, table=None):
    """The layer through `apply_lambdas`, with E banded from R pair by pair."""
    _, _, height, width = x.shape
    q = layer.query(x).flatten(2).mT.unflatten(2, (layer.heads, -1))
    v = layer.value(x).flatten(2).mT.unflatten(2, (-1, layer.intra))
    k = layer.key(x).flatten(2).mT.unflatten(2, (-1, layer.intra))
    table = layer.position if table is None else table
    ry, rx = table.shape[2] // 2, table.shape[3] // 2
    n = height * width
    e = x.new_zeros(n, n, *table.shape[:2])
    for i in range(n):
        for j in range(n):
            dy, dx = j // width - i // width, j % width - i % width
            if abs(dy) <= ry and abs(dx) <= rx:
                e[i, j] = table[:, :, dy + ry, dx + rx]
    return apply_lambdas(q, k, v, e).flatten(2).mT.unflatten(2, (height, width))


# ---------------------------------------------------------------------- the layer


@given(SIDES, SIDES, st.integers(1, 2), st.sampled_from([1, 3, (5, 3), (13, 11)]), SEEDS)
@settings(deadline=None, max_examples=40)
def test_the_layer_is_its_definition_whichever_way_it_is_computed(height, width, intra, reach, seed):
    layer, x = layer_of(seed, intra=intra, reach=reach), torch.randn(2, 6, height, width, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), by_definition(layer, x))


@pytest.mark.parametrize("size", [(4, 6), (9, 8)])
def test_both_ways_are_taken(size, monkeypatch):
    layer, x = layer_of(), torch.randn(1, 6, *size, dtype=torch.float64)
    dense = size[0] * size[1] <= 25
    called = []
    whole = LambdaLayer.embeddings
    monkeypatch.setattr(LambdaLayer, "embeddings", lambda self, *a: called.append(1) or whole(self, *a))
    layer(x)
    assert bool(called) == dense


def test_lambdas_are_made_a_few_at_a_time_where_nothing_is_learned(monkeypatch):
    layer, x = layer_of(bias=True), torch.randn(2, 6, 9, 8, dtype=torch.float64)
    nn.init.normal_(layer.bias)
    expected = layer(x)
    monkeypatch.setattr(lambda_networks, "_AT_ONCE", 1)
    sizes, plain = [], LambdaLayer.lambdas
    monkeypatch.setattr(LambdaLayer, "lambdas", lambda self, v: sizes.append(v.shape[1]) or plain(self, v))
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected)
    assert sizes == [1, 1, 1]


@given(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), SEEDS)
@settings(deadline=None, max_examples=25)
def test_it_is_linear_in_its_queries_and_indifferent_to_the_order_of_contexts(intra, n, m, seed):
    random = torch.Generator().manual_seed(seed)
    q, q2 = torch.randn(2, 2, n, 2, 3, generator=random, dtype=torch.float64)
    k, v = (torch.randn(2, m, d, intra, generator=random, dtype=torch.float64) for d in (3, 4))
    e = torch.randn(n, m, 3, intra, generator=random, dtype=torch.float64)
    y = apply_lambdas(q, k, v, e)
    torch.testing.assert_close(apply_lambdas(2 * q - 3 * q2, k, v, e), 2 * y - 3 * apply_lambdas(q2, k, v, e))
    order = torch.randperm(m, generator=random)
    torch.testing.assert_close(apply_lambdas(q, k[:, order], v[:, order], e[:, order]), y)


def test_without_positions_it_is_linear_attention():
    q, k, v = (torch.randn(2, n, d, 1, dtype=torch.float64) for n, d in ((5, 3), (7, 3), (7, 4)))
    expected = q[..., 0] @ (k[..., 0].softmax(1).mT @ v[..., 0])
    torch.testing.assert_close(apply_lambdas(q.mT, k, v)[:, :, 0], expected)


def test_the_softmax_is_over_contexts():
    k = torch.randn(1, 7, 3, 1)
    identity = torch.eye(3).view(1, 3, 1, 3)
    out = apply_lambdas(identity, k, torch.ones(1, 7, 1, 1))
    torch.testing.assert_close(out, torch.ones(1, 3, 1, 1))  # every weight of a key sums to one over the contexts
    assert not torch.allclose(apply_lambdas(identity, k + torch.randn(1, 1, 3, 1), torch.randn(1, 7, 1, 1)), out)


def test_masked_contexts_are_as_if_they_were_not_there():
    q, k, v = torch.randn(2, 4, 2, 3), torch.randn(2, 6, 3, 2), torch.randn(2, 6, 5, 2)
    e, mask = torch.randn(4, 6, 3, 2), torch.tensor([1, 0, 1, 1, 0, 1], dtype=torch.bool)
    expected = apply_lambdas(q, k[:, mask], v[:, mask], e[:, mask])
    changed = [torch.where(mask[None, :, None, None], t, torch.full_like(t, 9.0)) for t in (k, v, e)]
    torch.testing.assert_close(apply_lambdas(q, *changed, mask=mask), expected)


def test_content_is_blind_to_places_and_positions_are_not():
    x, order = torch.randn(1, 6, 5, 7, dtype=torch.float64), torch.randperm(35)
    shuffled = x.flatten(2)[..., order].view_as(x)
    for settings_, blind in (({"reach": None}, True), ({}, False), ({"content": False}, False)):
        layer = layer_of(**settings_)
        with torch.no_grad():
            same = layer(x).flatten(2)[..., order]
            assert torch.allclose(layer(shuffled).flatten(2), same) == blind


def test_a_position_lambda_moves_with_the_map():
    layer = layer_of(content=False)
    nn.init.zeros_(layer.value.bn.bias)
    nn.init.zeros_(layer.value.bn.running_mean)
    x = torch.zeros(2, 6, 16, 18, dtype=torch.float64)
    x[0, :, 5:9, 5:10] = torch.randn(6, 4, 5)
    x[1] = x[0].roll((3, 2), (1, 2))
    with torch.no_grad():
        first, second = layer(x)
    torch.testing.assert_close(first.roll((3, 2), (1, 2)), second)


def test_a_table_of_all_offsets_zero_beyond_r_is_the_convolution():
    local = layer_of(reach=3)
    whole = layer_of(reach=(2 * 6 - 1, 2 * 7 - 1))
    state = local.state_dict()
    state["position"] = nn.functional.pad(state["position"], (5, 5, 4, 4))
    whole.load_state_dict(state)
    x = torch.randn(2, 6, 6, 7, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(whole(x), local(x))


@pytest.mark.parametrize("size", [(4, 5), (6, 7)])
def test_gradients_are_those_of_finite_differences(size):
    layer = layer_of(dim=2, key_dim=2, intra=2).train()
    x = torch.randn(2, 2, *size, dtype=torch.float64, requires_grad=True)
    parameters = [p.detach().requires_grad_() for p in layer.parameters()]
    names = [name for name, _ in layer.named_parameters()]

    def run(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(run, (x, *parameters))


def test_more_queries_need_no_more_keys_values_and_positions():
    few, many = (LambdaLayer(64, heads=h, key_dim=8) for h in (2, 8))
    assert few.key.weight.shape == many.key.weight.shape
    assert few.position.shape == many.position.shape
    assert (few.value.c.out_channels, many.value.c.out_channels) == (32, 8)


# ---------------------------------------------------------------------- published figures


@pytest.mark.parametrize(
    ("k", "h", "u", "r", "millions"),
    [(16, 4, 1, 23, 15.0), (32, 4, 1, 23, 15.4), (8, 8, 1, 23, 14.7), (16, 8, 1, 23, 15.1), (32, 8, 1, 23, 15.7),
     (8, 8, 4, 7, 15.3), (8, 8, 8, 7, 16.0), (16, 4, 4, 7, 16.0)],
)  # fmt: skip
def test_lambdanetwork_50_has_the_published_parameters(k, h, u, r, millions):
    with torch.device("meta"):
        model = LambdaResNet("50", key_dim=k, heads=h, intra=u, reach=r)
    assert count_parameters(model) / 1e6 == pytest.approx(millions, abs=0.07)


@pytest.mark.parametrize(
    ("size", "parameters", "gmacs"),
    # timm's weights; the second is exact. Multiplications are its figures, convolutions of small maps are dense here.
    [("26t", 10_958_272, 3.02), ("50ts", 21_536_832, 5.07), ("26rpt", 10_988_688, 3.16)],
)
def test_hybrids_have_the_published_size(size, parameters, gmacs):
    with torch.device("meta"):
        model, x = LambdaResNet(size).eval(), torch.zeros(1, 3, 256, 256)
    assert count_parameters(model) == parameters
    with torch.no_grad():
        assert count_flops(model, x) / 2e9 == pytest.approx(gmacs, rel=0.01)


# ---------------------------------------------------------------------- the network


def small(**settings):
    torch.manual_seed(0)
    options = {"num_classes": 5, "depths": (1, 2), "widths": (8, 12), "lambdas": ((0,), (1,)), "reach": 5}
    return stirred(LambdaResNet("small", **options | settings))


@pytest.mark.parametrize("settings", [{}, {"lambdas": ((), (0, 1)), "activation": "silu"}, {"stem": "tiered"}])
@pytest.mark.parametrize("size", [(1, 1), (17, 22), (32, 32)])
def test_every_size_passes_and_folding_changes_nothing(settings, size):
    model, x = small(**settings), torch.rand(2, 3, *size)
    with torch.no_grad():
        expected = model(x)
        assert expected.shape == (2, 5)
        fused = model.fuse()
        torch.testing.assert_close(fused(x), expected, atol=1e-3, rtol=1e-4)
    left = [name for name, m in fused.named_modules() if isinstance(m, nn.BatchNorm2d)]
    assert all(name.endswith("middle.norm") for name in left)


def test_the_first_block_of_a_stage_halves_an_odd_map_as_its_shortcut_does():
    model = small(lambdas=((), (0,)))
    with torch.no_grad():
        assert model.forward_features(torch.rand(1, 3, 9, 11)).shape == (1, 48, 5, 6)


def test_tables_of_all_offsets_fit_the_maps_of_a_size():
    model = small(depths=(1, 2, 1), widths=(8, 8, 8), lambdas=((0,), (0, 1), (0,)), img_size=(40, 33))
    sides = [tuple(m.position.shape[2:]) for m in model.modules() if isinstance(m, LambdaLayer)]
    assert sides == [(79, 65), (79, 65), (39, 33), (39, 33)]


def test_saved_it_remembers_its_settings(tmp_path):
    model, x = small(intra=2), torch.rand(1, 3, 16, 16)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(LambdaResNet.from_pretrained(tmp_path).eval()(x), model(x))


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: LambdaResNet("18"), "'18'; use one of '50'"),
        (lambda: LambdaResNet(depths=(1, 1)), "as many"),
        (lambda: small(activation="tanh"), "activation='tanh'"),
        (lambda: small(stem="5x5"), "stem='5x5'"),
        (lambda: LambdaLayer(10, heads=4), "outputs=10, heads=4"),
        (lambda: LambdaLayer(8, reach=4), "odd.*got 4"),
        (lambda: LambdaLayer(8, reach=None, content=False), "without positions"),
        (lambda: small()(torch.rand(1, 1, 8, 8)), r"\[B, 3, H, W\]"),
        (lambda: small()(torch.full((1, 3, 8, 8), float("nan"))), "NaN"),
    ],
)
def test_what_does_not_fit_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call()


# ---------------------------------------------------------------------- timm's checkpoints


def timm_state(depths, lambdas, table=False, classes=7):
    """A state dict of timm's names and shapes: h = 4, k = 16, r = 9, or tables of all offsets at 256 px."""
    shapes: dict = {}

    def conv_norm(name, outputs, inputs, kernel):
        shapes[f"{name}.conv.weight"] = (outputs, inputs, kernel, kernel)
        norm(f"{name}.bn", outputs)

    def norm(name, channels):
        shapes.update({f"{name}.{k}": (channels,) for k in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    for i, (inputs, outputs) in enumerate([(3, 24), (24, 32), (32, 64)]):
        conv_norm(f"stem.conv{i + 1}", outputs, inputs, 3)
    before = 64
    for i, depth in enumerate(depths):
        width = 64 * 2**i
        for j in range(depth):
            block = f"stages.{i}.{j}"
            conv_norm(f"{block}.conv1_1x1", width, before, 1)
            if j in lambdas[i]:
                shapes[f"{block}.self_attn.qkv.weight"] = (4 * 16 + 16 + width // 4, width, 1, 1)
                norm(f"{block}.self_attn.norm_q", 64)
                norm(f"{block}.self_attn.norm_v", width // 4)
                if table:
                    side = 2 * (64 >> (i if j else i - 1)) - 1
                    shapes[f"{block}.self_attn.pos_emb"] = (side, side, 16)
                else:
                    shapes[f"{block}.self_attn.conv_lambda.weight"] = (16, 1, 9, 9, 1)
                    shapes[f"{block}.self_attn.conv_lambda.bias"] = (16,)
                norm(f"{block}.post_attn", width)
            else:
                conv_norm(f"{block}.conv2_kxk", width, width, 3)
            conv_norm(f"{block}.conv3_1x1", 4 * width, width, 1)
            if j == 0:
                conv_norm(f"{block}.shortcut", 4 * width, before, 1)
            before = 4 * width
    shapes |= {"head.fc.weight": (classes, before), "head.fc.bias": (classes,)}
    torch.manual_seed(0)
    return {
        key: torch.tensor(1) if not shape else torch.rand(shape) + 0.5 if "running_var" in key else torch.randn(shape)
        for key, shape in shapes.items()
    }


@pytest.mark.parametrize("size", ["26t", "26rpt"])
def test_timms_checkpoints_load(size):
    state = timm_state(SIZES[size]["depths"], SIZES[size]["lambdas"], size == "26rpt", 1000)
    model = LambdaResNet.load_official(state)
    with torch.device("meta"):
        shapes = {key: t.shape for key, t in LambdaResNet(size).state_dict().items()}
    assert {key: t.shape for key, t in model.state_dict().items()} == shapes
    name, layer = "stages.2.1.self_attn", model.stages[2][1].middle[0]
    qkv = torch.cat([layer.query.c.weight, layer.key.weight, layer.value.c.weight])
    assert torch.equal(qkv, state[f"{name}.qkv.weight"])
    assert torch.equal(layer.value.bn.running_mean, state[f"{name}.norm_v.running_mean"])
    if size == "26rpt":
        assert torch.equal(layer.position[:, 0].permute(1, 2, 0), state[f"{name}.pos_emb"])
    else:
        assert torch.equal(layer.position[..., None], state[f"{name}.conv_lambda.weight"])
        assert torch.equal(layer.bias, state[f"{name}.conv_lambda.bias"])
    assert torch.equal(model.stages[3][0].middle.norm.weight, state["stages.3.0.post_attn.weight"])
    assert torch.equal(model.stages[0][1].middle.c.weight, state["stages.0.1.conv2_kxk.conv.weight"])
    assert torch.equal(model.stem[4].c.weight, state["stem.conv3.conv.weight"])


@pytest.mark.parametrize("damage", ["missing", "unknown", "strange"])
def test_other_checkpoints_are_refused(damage):
    state = timm_state((1, 1), ((), (0,)))
    if damage == "missing":
        del state["stages.0.0.conv3_1x1.conv.weight"]
    elif damage == "unknown":
        state["stages.0.0.extra"] = torch.zeros(1)
    else:
        state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="no checkpoint of timm's"):
        LambdaResNet.load_official(state)
