"""SeemoRe against its equations, its published sizes and a network written down on a state dict."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers import whole_upscaler
from foveate.meter import count_flops
from foveate.restore.seemore import SIZES, Expert, Experts, SeemoRe, Striped


def tiny(scale=2, dtype=torch.float64, **config):
    """A small network whose weights are large enough for every path, and different experts, to show."""
    torch.manual_seed(0)
    net = SeemoRe(scale, **({"channels": 8, "groups": 2, "recursive": 1} | config))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.to(dtype)


def pictures(n, h, w, dtype=torch.float64):
    scale = torch.linspace(0.1, 1, n, dtype=dtype)[:, None, None, None]  # unlike ones, so that routes differ
    return torch.rand(n, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype) * scale


# ---------------------------------------------------------------------- published sizes


def test_seemore_t_has_the_published_number_of_parameters():
    net = SeemoRe(4, **SIZES["T"])
    assert sum(p.numel() for p in net.parameters()) == 231_804
    group = net.body[0]
    assert sum(p.numel() for p in group["local_block"].parameters()) == 24_544
    assert sum(p.numel() for p in group["global_block"].parameters()) == 9_360


@pytest.mark.parametrize(("variant", "scale", "parameters"), [("T", 2, 220_104), ("B", 4, 505_952), ("L", 4, 968_896)])
def test_the_other_networks(variant, scale, parameters):
    assert sum(p.numel() for p in SeemoRe(scale, **SIZES[variant]).parameters()) == parameters


def test_seemore_t_spends_the_published_12_billion_multiply_accumulates():
    assert SeemoRe(4, **SIZES["T"]).full_flops(180, 320) / 2e9 == pytest.approx(12, rel=0.01)


# ---------------------------------------------------------------------- exact properties


@pytest.mark.parametrize("top", [1, 2, 3])
def test_what_runs_in_use_is_what_is_trained(top):
    net, x = tiny(top=top), pictures(4, 9, 12)
    trained, routes = net.train().run(x)
    used, again = net.eval().run(x)
    torch.testing.assert_close(used, trained, atol=1e-12, rtol=1e-12)
    assert torch.equal(routes, again)
    assert routes.shape == (2, 4, top)
    if top == 1:
        assert len(routes.unique()) > 1  # pictures of this batch take different experts
    for i, one in enumerate(x):
        torch.testing.assert_close(net(one[None])[0], used[i])


def test_each_picture_runs_its_chosen_experts_only():
    net, x = tiny().eval(), pictures(3, 8, 8)
    ran = []
    for name, module in net.named_modules():
        if isinstance(module, Expert):
            module.register_forward_hook(lambda m, given, out, name=name: ran.append((name, len(given[0]))))
    routes = net.run(x)[1]
    for g in range(2):
        for e in range(3):
            name = f"body.{g}.local_block.block.moe_layer.experts.{e}"
            assert sum(n for found, n in ran if found == name) == int((routes[g] == e).sum())


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(0, 99))
def test_an_expert_is_a_map_of_its_rank(rank, seed):
    torch.manual_seed(seed)
    expert = Expert(9, rank).double()
    k, a = torch.randn(1, 9, 1, 1).double(), torch.eye(9).double()[:, :, None, None]
    zero = expert(torch.zeros_like(k), k)
    columns = (expert(a, k.expand(9, -1, -1, -1)) - zero).flatten(1)
    assert torch.linalg.matrix_rank(columns, rtol=1e-9) == rank


def test_all_experts_are_the_softmax_weighted_sum():
    torch.manual_seed(0)
    layer = Experts(6, (2, 3, 5), top=3).double().eval()
    a, k = torch.randn(2, 2, 6, 4, 5).double()
    weights = torch.softmax(a.mean((2, 3)) @ layer.gate["body"][2].weight.T, 1)
    expected = a + sum(weights[:, e, None, None, None] * layer.experts[e](a, k) for e in range(3))
    torch.testing.assert_close(layer(a, k)[0], expected)


@pytest.mark.parametrize("kernel", [3, 11])
def test_stripes_are_an_outer_product(kernel):
    stripes = Striped(3, kernel).double()
    first, second = stripes.conv
    torch.nn.init.zeros_(first.bias)
    torch.nn.init.zeros_(second.bias)
    x = torch.rand(1, 3, 9, 13).double()
    expected = F.conv2d(x, second.weight * first.weight, padding=kernel // 2, groups=3)
    torch.testing.assert_close(stripes(x), expected)


def test_silent_last_layers_leave_the_mean_picture():
    net = tiny()
    for module in (net.conv_2, net.upsampler[0]):
        for p in module.parameters():
            torch.nn.init.zeros_(p)
    expected = torch.tensor([0.4488, 0.4371, 0.4040]).view(1, 3, 1, 1).expand(1, 3, 14, 18).double()
    torch.testing.assert_close(net(pictures(1, 7, 9)), expected, atol=1e-7, rtol=0)


def test_with_a_base_the_bilinear_picture_takes_the_place_of_the_mean():
    x = pictures(1, 17, 19)
    with_base, without = tiny(base=True)(x), tiny()(x)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear") - mean
    torch.testing.assert_close(with_base - without, expected, atol=1e-7, rtol=0)


def test_the_loss_is_the_published_one():
    net, low, high = tiny(), pictures(2, 6, 5), pictures(2, 12, 10)
    apart = net(low) - high
    n = torch.fft.fft2(apart)[..., :6]  # of a real signal, the other half says nothing new
    spectrum = torch.cat([n.real, n.imag]).abs().mean()
    torch.testing.assert_close(net.loss(low, high), apart.abs().mean() + 0.1 * spectrum)


# ---------------------------------------------------------------------- use


@pytest.mark.parametrize("size", [(1, 1), (5, 40), (17, 23)])
@pytest.mark.parametrize("recursive", [1, 2])
def test_pictures_of_any_size_pass_and_tiles_change_nothing(size, recursive):
    net, x = tiny(3, recursive=recursive).eval(), pictures(1, *size)
    done = net.upscale(x)
    assert done.image.shape == (1, 3, 3 * size[0], 3 * size[1])
    torch.testing.assert_close(done.image, net(x).detach())
    assert torch.equal(net.upscale(x, tile=2).image, done.image)


def test_pictures_larger_than_a_piece_are_routed_by_piece(monkeypatch):
    monkeypatch.setattr(whole_upscaler, "PIECE", 32)
    net, x = tiny().eval(), pictures(1, 20, 60)
    net.halo = 16
    done = net.upscale(x)
    assert sum(done.counts.values()) == 2 * 2  # groups, pieces
    torch.testing.assert_close(done.image[..., :64], net(x[..., :48]).detach()[..., :64])
    torch.testing.assert_close(done.image[..., 64:], net(x[..., 16:]).detach()[..., 32:])


def test_reported_flops_are_those_of_the_run():
    net, x = tiny(4, torch.float32).train(), pictures(1, 16, 24, torch.float32)
    done = net.upscale(x)
    assert net.training
    net.eval()
    assert done.flops == pytest.approx(count_flops(net.upscale, x))
    largest = tiny(4, torch.float32, ranks=(8, 8, 8)).eval()
    assert net.full_flops(16, 24) == pytest.approx(count_flops(largest.upscale, x))
    assert done.counts == {f"rank {r}": int((net.run(x)[1] == i).sum()) for i, r in enumerate((2, 4, 8))}
    assert done.flops <= net.full_flops(16, 24)


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    net, x = tiny().train(), pictures(2, 8, 8)
    net(x).square().sum().backward()
    unreached = [name for name, p in net.named_parameters() if p.grad is None]
    assert unreached == []
    routes = net.run(x)[1]
    for name, p in net.named_parameters():
        parts = name.split(".")
        chosen = "experts" not in parts or int(parts[parts.index("experts") + 1]) in routes[int(parts[1])]
        assert bool(p.grad.any()) == chosen, name
    exact, rough = tiny().eval(), tiny(dtype=torch.bfloat16).eval()
    image = rough.upscale(x[1:]).image
    assert image.dtype == torch.bfloat16
    if torch.equal(rough.run(x[1:].bfloat16())[1], exact.run(x[1:])[1]):
        assert (image - exact.upscale(x[1:]).image).abs().mean() < 0.1 * exact.upscale(x[1:]).image.abs().mean()


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(dtype=torch.float32, ranks=(1, 3)).eval(), pictures(1, 6, 7, torch.float32)
    net.save_pretrained(tmp_path)
    assert torch.equal(SeemoRe.from_pretrained(tmp_path).eval()(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "at least 1, got 0"),
        ({"top": 4}, r"1\.\.3 .* got 4"),
        ({"kernel": 4}, "odd .* got 4"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SeemoRe(**arguments)


def test_a_budget_is_refused_with_the_cheaper_method():
    with pytest.raises(BudgetError, match=r"SeemoRe x2 .* got 0\.5; for less, use method 'espcn'"):
        tiny().upscale(pictures(1, 4, 4), 0.5)


# ---------------------------------------------------------------------- official weights


def official(scale=4, c=8, groups=2, ranks=(2, 4, 8), kernel=11):
    """A made-up checkpoint with the names and shapes of the released ones."""
    torch.manual_seed(0)
    shapes = {"conv_1": (c, 3, 3, 3), "conv_2": (c, c, 3, 3), "upsampler.0": (3 * scale**2, c, 3, 3), "norm": (c,)}
    point, gate = (c, c, 1, 1), (c, 1, 3, 3)
    for i in range(groups):
        local, wide = f"body.{i}.local_block", f"body.{i}.global_block"
        for block in (local, wide):
            shapes |= {f"{block}.norm_1": (c,), f"{block}.norm_2": (c,)}
            shapes |= {f"{block}.ffn.fn_1.0": (2 * c, c, 1, 1), f"{block}.ffn.fn_2.0": point, f"{block}.ffn.gate": gate}
            shapes[f"{block}.block.proj"] = point
        shapes |= {f"{local}.block.conv_1.0": (c, c, 3, 3), f"{local}.block.conv_1.2": (2 * c, c, 1, 1)}
        shapes |= {f"{local}.block.agg_conv.0": (c, 1, 4, 4)}
        shapes |= {f"{local}.block.conv.0": gate, f"{local}.block.conv.1": point}
        shapes |= {f"{local}.block.conv_2.0.conv.{j}": (c, 1, *k) for j, k in enumerate(((1, 3), (3, 1)))}
        for e, r in enumerate(ranks):
            expert = f"{local}.block.moe_layer.experts.{e}"
            shapes |= {f"{expert}.conv_1": (r, c, 1, 1), f"{expert}.conv_2": (r, c, 1, 1)}
            shapes[f"{expert}.conv_3"] = (c, r, 1, 1)
        shapes[f"{wide}.block.to_qv.0"] = (2 * c, c, 1, 1)
        shapes |= {f"{wide}.block.attn.conv.{j}": (c, 1, *k) for j, k in enumerate(((1, kernel), (kernel, 1)))}
    state = {f"{name}.weight": torch.randn(shape) / 3 for name, shape in shapes.items()}
    state |= {f"{name}.bias": torch.randn(shape[0]) / 3 for name, shape in shapes.items()}
    gates = {
        f"body.{i}.local_block.block.moe_layer.gate.body.2.weight": torch.randn(len(ranks), c) for i in range(groups)
    }
    return {k: v.double() for k, v in (state | gates).items()}


def by_the_book(state, x, scale, groups=2, shuffle=True, recursive=2):
    """The network as its paper draws it, on a state dict."""

    def conv(x, name, **settings):
        w = state[f"{name}.weight"]
        same = (w.shape[2] // 2, w.shape[3] // 2)
        return F.conv2d(x, w, state[f"{name}.bias"], groups=x.shape[1] // w.shape[1], **({"padding": same} | settings))

    def norm(x, name):
        apart = x - x.mean(1, keepdim=True)
        y = apart / (apart.square().mean(1, keepdim=True) + 1e-6).sqrt()
        return y * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]

    def ffn(x, name):
        u, v = F.gelu(conv(x, f"{name}.fn_1.0")).chunk(2, 1)
        return F.gelu(conv(u * conv(v, f"{name}.gate"), f"{name}.fn_2.0"))

    def stripes(x, name):
        return conv(conv(x, f"{name}.conv.0"), f"{name}.conv.1")

    def moe(x, name):
        u = conv(F.gelu(conv(x, f"{name}.conv_1.0")), f"{name}.conv_1.2")
        if shuffle:
            half = u.shape[1] // 2
            u = torch.stack([u[:, i // 2 + half * (i % 2)] for i in range(2 * half)], 1)
        a, k = u.chunk(2, 1)
        a, r = F.gelu(stripes(a, f"{name}.conv_2.0")), k
        for _ in range(recursive):
            r = F.gelu(conv(r, f"{name}.agg_conv.0", stride=4, padding=0))
        r = conv(conv(r, f"{name}.conv.0"), f"{name}.conv.1")
        k = k + F.interpolate(r, a.shape[2:], mode="bilinear")
        w = (state[f"{name}.moe_layer.gate.body.2.weight"] @ a.mean((2, 3))[0]).softmax(0)
        e = int(w.argmax())
        expert = f"{name}.moe_layer.experts.{e}"
        y = conv(conv(a, f"{expert}.conv_1") * conv(k, f"{expert}.conv_2"), f"{expert}.conv_3")
        return conv(a + w[e] * y, f"{name}.proj")

    mean = torch.tensor([0.4488, 0.4371, 0.4040], dtype=x.dtype).view(3, 1, 1)
    f = f0 = conv(x - mean, "conv_1")
    for i in range(groups):
        local, wide = f"body.{i}.local_block", f"body.{i}.global_block"
        f = f + moe(norm(f, f"{local}.norm_1"), f"{local}.block")
        f = f + ffn(norm(f, f"{local}.norm_2"), f"{local}.ffn")
        q, v = F.gelu(conv(norm(f, f"{wide}.norm_1"), f"{wide}.block.to_qv.0")).chunk(2, 1)
        f = f + conv(stripes(q, f"{wide}.block.attn") * v, f"{wide}.block.proj")
        f = f + ffn(norm(f, f"{wide}.norm_2"), f"{wide}.ffn")
    return F.pixel_shuffle(conv(conv(norm(f, "norm"), "conv_2") + f0, "upsampler.0"), scale) + mean


@pytest.mark.parametrize(("scale", "config"), [(2, {}), (4, {}), (3, {"shuffle": False, "recursive": 1})])
def test_an_official_checkpoint_gives_the_published_network(scale, config):
    state, x = official(scale), pictures(1, 21, 18)
    net = SeemoRe.load_official({"params": state}, **config).double()
    net.load_state_dict(state)  # in double precision
    assert not net.training
    torch.testing.assert_close(net(x), by_the_book(state, x, scale, **config), atol=1e-6, rtol=1e-6)


def test_sixteen_groups_are_the_large_network():
    net = SeemoRe.load_official(official(c=4, groups=16))
    block = net.body[0]["local_block"].block
    assert (block.shuffle, block.recursive) == (False, 1)
    block = SeemoRe.load_official(official(c=4)).body[0]["local_block"].block
    assert (block.shuffle, block.recursive) == (True, 2)


def test_a_checkpoint_with_a_key_missing_or_too_many_is_refused():
    state = official(c=4, groups=1)
    for missing in state:
        with pytest.raises(WeightsError):
            SeemoRe.load_official({k: v for k, v in state.items() if k != missing})
    with pytest.raises(WeightsError, match="more"):
        SeemoRe.load_official(state | {"more.weight": torch.zeros(1)})
