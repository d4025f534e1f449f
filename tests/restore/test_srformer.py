"""SRFormer against its equations, Swin's attention, its published sizes and a network written down on a state dict."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import BudgetError, InputError, WeightsError
from foveate.layers import whole_upscaler
from foveate.meter import count_flops
from foveate.restore.srformer import SIZES, Block, PermutedAttention, SRFormer, aligned_index


def tiny(scale=2, dtype=torch.float64, **config):
    """A small network whose weights are large enough for every path to show."""
    torch.manual_seed(0)
    net = SRFormer(scale, **({"channels": 8, "depths": (2, 2), "heads": 2, "window": 4} | config))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return net.to(dtype).eval()


def picture(h, w, dtype=torch.float64):
    return torch.rand(1, 3, h, w, generator=torch.Generator().manual_seed(0), dtype=dtype)


def attention(dim=16, heads=2, window=8, reduce=2, shift=0):
    torch.manual_seed(0)
    layer = PermutedAttention(dim, heads, window, reduce, shift).double()
    torch.nn.init.normal_(layer.relative_position_bias_table)
    return layer


# ---------------------------------------------------------------------- published sizes


@pytest.mark.parametrize(("scale", "parameters"), [(2, 853_272), (3, 861_387), (4, 872_748)])
def test_the_light_network_has_the_published_parameters(scale, parameters):
    assert sum(p.numel() for p in SRFormer(scale, **SIZES["light"]).parameters()) == parameters


@pytest.mark.parametrize(("scale", "millions"), [(2, 10.40), (4, 10.52)])
def test_the_classical_network_has_the_published_parameters(scale, millions):
    net = SRFormer(scale, **SIZES["classical"])
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, rel=0.003)


@pytest.mark.parametrize(("scale", "published"), [(2, 236), (4, 62.8)])
def test_the_light_network_spends_the_published_multiply_accumulates(scale, published):
    net = SRFormer(scale, **SIZES["light"])
    height, width = (-(-side // 16) * 16 for side in (720 // scale, 1280 // scale))
    normalisations = 60 * (2 * 24 + 2)  # values per pixel; the published figures count five operations for each
    counted = net.full_flops(720 // scale, 1280 // scale) / 2 + 5 * normalisations * height * width
    assert counted / 1e9 == pytest.approx(published, rel=0.002)


@pytest.mark.parametrize("window", [8, 16])
def test_a_layer_has_the_parameters_and_multiply_accumulates_of_the_paper(window):
    c, n = 60, window**2
    layer = PermutedAttention(c, 6, window)
    expected = 2 * (c * c + c) + (c * c + c) // 2 + (window - 1) ** 2 * 6
    assert sum(p.numel() for p in layer.parameters()) == expected
    macs = 1.5 * n * c * c + n * (n // 4) * c * 2 + n * c * c
    x = torch.zeros(1, window, 2 * window, c)
    with torch.no_grad():
        assert count_flops(layer, x) / 2 == 2 * macs
        swin = 3 * n * c * c + 2 * n * n * c + n * c * c
        assert count_flops(PermutedAttention(c, 6, window, 1), x) / 2 == 2 * swin


# ---------------------------------------------------------------------- exact properties


@settings(deadline=None, max_examples=20)
@given(st.sampled_from([(4, 2), (8, 2), (6, 3), (8, 4), (4, 1)]), st.integers(1, 3))
def test_permuting_moves_every_number_to_its_place(sizes, part):
    window, r = sizes
    layer, c = PermutedAttention(part * r * r, 1, window, r), part * r * r
    kv = torch.arange(window * window * 2 * part).reshape(1, window * window, 2 * part)
    keys, values = layer.permute(kv)
    assert keys.shape == values.shape == (1, (window // r) ** 2, c)
    assert torch.cat([keys, values]).unique().numel() == kv.numel()  # a bijection
    cells = window // r
    for both, which in ((keys, 0), (values, 1)):
        back = both.reshape(cells, cells, r, r, part).permute(0, 2, 1, 3, 4).reshape(window * window, part)
        assert torch.equal(back, kv[0].reshape(-1, 2, part)[:, which])
    y, x, dy, dx, channel = cells - 1, 0, r - 1, 0, part - 1
    assert keys[0, y * cells + x, (dy * r + dx) * part + channel] == kv[0, (y * r + dy) * window + x * r + dx, channel]


@pytest.mark.parametrize("shift", [0, 2])
def test_without_reduction_it_is_the_attention_of_swin(shift):
    swin = pytest.importorskip("transformers.models.swin.modeling_swin")
    theirs = swin.SwinAttention(swin.SwinConfig(attn_implementation="eager"), 16, 2, 4).double().eval()
    layer = attention(window=4, reduce=1, shift=shift)
    layer.q.load_state_dict(theirs.q_proj.state_dict())
    layer.proj.load_state_dict(theirs.o_proj.state_dict())
    for name in ("weight", "bias"):
        both = torch.cat([getattr(theirs.k_proj, name), getattr(theirs.v_proj, name)])
        getattr(layer.kv, name).data.copy_(both)
    torch.nn.init.normal_(theirs.relative_position_bias.relative_position_bias_table)
    table = theirs.relative_position_bias.relative_position_bias_table
    layer.relative_position_bias_table.data.copy_(table)
    x = torch.randn(2, 8, 12, 16).double()
    rolled = x.roll((-shift, -shift), (1, 2))
    windows = rolled.reshape(2, 2, 4, 3, 4, 16).transpose(2, 3).reshape(12, 16, 16)
    mask = None
    if shift:
        rows, columns = ((torch.arange(n) >= n - 4).int() + (torch.arange(n) >= n - shift).int() for n in (8, 12))
        region = (3 * rows[:, None] + columns).reshape(2, 4, 3, 4).transpose(1, 2).reshape(6, 16)
        mask = -100.0 * (region[:, :, None] != region[:, None]).double()
    out = theirs(windows, mask)[0].reshape(2, 2, 3, 4, 4, 16).transpose(2, 3).reshape(2, 8, 12, 16)
    torch.testing.assert_close(layer(x), out.roll((shift, shift), (1, 2)))


@pytest.mark.parametrize(("window", "reduce"), [(4, 2), (8, 2), (6, 3)])
def test_the_bias_is_aligned_to_cells(window, reduce):
    index, cells = aligned_index(window, reduce), window // reduce
    grid = index.reshape(cells, reduce, cells, reduce, -1)
    assert (grid == grid[:, :1, :, :1]).all()  # the queries of a cell share a row
    assert index.unique().numel() == (2 * cells - 1) ** 2
    y, x, u, v = window - 1, 0, 0, cells - 1
    expected = (y // reduce - u + cells - 1) * (2 * cells - 1) + x // reduce - v + cells - 1
    assert index[y * window + x, u * cells + v] == expected


def test_shifted_windows_do_not_see_the_other_end_of_the_map():
    layer, x = attention(window=8, shift=4), torch.randn(1, 16, 24, 16).double()
    other = x.clone()
    other[:, :4] += 1  # after the shift these rows share windows with the last four
    change = (layer(other) - layer(x)).abs().amax((0, 2, 3))
    assert change[:4].min() > 1e-3
    assert change[4:].max() < 1e-12  # exp(-100) of what they would be
    alone = attention(window=8)
    change = (alone(other) - alone(x)).abs().amax((0, 2, 3))
    assert change[:8].min() > 1e-3
    assert change[8:].max() == 0


def test_rows_of_the_attention_sum_to_one():
    layer = attention(shift=4)
    torch.nn.init.zeros_(layer.kv.weight)
    torch.nn.init.constant_(layer.kv.bias, 0.5)
    torch.nn.init.eye_(layer.proj.weight)
    torch.nn.init.zeros_(layer.proj.bias)
    out = layer(torch.randn(1, 16, 16, 16).double())
    torch.testing.assert_close(out, torch.full_like(out, 0.5))


# ---------------------------------------------------------------------- use


@pytest.mark.parametrize("size", [(1, 1), (3, 17), (8, 12)])
@pytest.mark.parametrize(("scale", "upsampler"), [(2, "direct"), (3, "classical"), (4, "classical"), (4, "nearest")])
def test_pictures_of_any_size_pass_and_tiles_change_nothing(size, scale, upsampler):
    net, x = tiny(scale, upsampler=upsampler, depths=(2,)), picture(*size)
    done = net.upscale(x)
    assert done.image.shape == (1, 3, scale * size[0], scale * size[1])
    torch.testing.assert_close(done.image, net(x).detach())
    assert torch.equal(net.upscale(x, tile=3).image, done.image)


def test_pieces_on_the_grid_with_context_equal_the_whole(monkeypatch):
    monkeypatch.setattr(whole_upscaler, "PIECE", 8)
    net, x = tiny(depths=(2,)), picture(22, 45)
    pieces = net.upscale(x).image
    # Two blocks reach 3 + 2 places beyond the window each, the convolutions one each: less than four windows.
    torch.testing.assert_close(pieces, net(x).detach(), atol=1e-12, rtol=1e-12)
    net.halo = 0
    assert not torch.allclose(net.upscale(x).image, pieces, atol=1e-3)


def test_with_a_base_the_bilinear_picture_takes_the_place_of_the_mean():
    x = picture(8, 12)
    with_base, without = tiny(base=True)(x), tiny()(x)
    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1)
    expected = F.interpolate(x, scale_factor=2, mode="bilinear") - mean
    torch.testing.assert_close(with_base - without, expected, atol=1e-7, rtol=0)


def test_reported_flops_are_those_of_the_run():
    net, x = tiny(4, torch.float32), picture(10, 17, torch.float32)
    assert net.upscale(x).flops == net.full_flops(10, 17) == count_flops(net.upscale, x)


def test_gradients_reach_every_parameter_and_bfloat16_runs():
    net, x = tiny(upsampler="classical").train(), picture(9, 9)
    net(x).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []
    net.eval()
    rough, exact = tiny(upsampler="classical", dtype=torch.bfloat16).upscale(x).image, net.upscale(x).image
    assert rough.dtype == torch.bfloat16
    assert (rough - exact).abs().mean() < 0.1 * exact.abs().mean()


def test_branches_of_whole_pictures_are_dropped_in_training():
    torch.manual_seed(0)
    block, x = Block(attention(window=4), 16, 32, drop=0.5).double().train(), torch.randn(64, 4, 4, 16).double()
    unchanged = (block(x) == x).flatten(1).all(1)
    assert 4 <= int(unchanged.sum()) <= 32  # a quarter expected
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_saving_and_loading_gives_the_same_network(tmp_path):
    net, x = tiny(dtype=torch.float32, reduce=1), picture(6, 7, torch.float32)
    net.save_pretrained(tmp_path)
    assert torch.equal(SRFormer.from_pretrained(tmp_path).eval()(x), net(x))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0}, "at least 1, got 0"),
        ({"scale": 6, "upsampler": "classical"}, "got 6"),
        ({"scale": 2, "upsampler": "nearest"}, "enlarges by 4, got 2"),
        ({"upsampler": "cubic"}, "'cubic'; use 'direct', 'classical' or 'nearest'"),
        ({"window": 10}, "10 must be divisible by 4"),
        ({"channels": 62, "heads": 2}, r"62 channels must be divisible by 2 heads and by 2\^2"),
        ({"channels": 64}, "64 channels must be divisible by 6 heads"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        SRFormer(**arguments)


def test_a_window_must_hold_whole_cells():
    with pytest.raises(InputError, match="window 9 and shift 0 must be divisible by the reduction 2"):
        PermutedAttention(8, 2, 9)


def test_a_budget_is_refused_with_the_cheaper_method():
    with pytest.raises(BudgetError, match=r"SRFormer x2 .* got 0\.5; for less, use method 'espcn'"):
        tiny().upscale(picture(4, 4), 0.5)


# ---------------------------------------------------------------------- official weights


def official(scale, upsampler, c=8, depths=(2, 1), heads=2, side=4, size=16):
    """A made-up checkpoint with the names and shapes of the released ones, their tables included."""
    torch.manual_seed(0)
    square = (c, c, 3, 3)
    shapes = {"conv_first": (c, 3, 3, 3), "conv_after_body": square, "norm": (c,), "patch_embed.norm": (c,)}
    state = {}
    for g, depth in enumerate(depths):
        shapes[f"layers.{g}.conv"] = square
        for b in range(depth):
            block = f"layers.{g}.residual_group.blocks.{b}"
            shapes |= {f"{block}.norm1": (c,), f"{block}.norm2": (c,)}
            shapes |= {f"{block}.attn.q": (c, c), f"{block}.attn.kv": (c // 2, c), f"{block}.attn.proj": (c, c)}
            shapes |= {f"{block}.mlp.fc1": (2 * c, c), f"{block}.mlp.fc2": (c, 2 * c)}
            shapes[f"{block}.mlp.dwconv.depthwise_conv.0"] = (2 * c, 1, 5, 5)
            state[f"{block}.attn.relative_position_bias_table"] = torch.randn((side - 1) ** 2, heads)
            state[f"{block}.attn.aligned_relative_position_index"] = aligned_index(side, 2)
            if b % 2:
                state[f"{block}.attn_mask"] = torch.zeros((size // side) ** 2, side**2, side**2 // 4)
    if upsampler == "direct":
        shapes["upsample.0"] = (3 * scale**2, c, 3, 3)
    else:
        shapes |= {"conv_before_upsample.0": (64, c, 3, 3), "conv_last": (3, 64, 3, 3)}
        if upsampler == "nearest":
            shapes |= dict.fromkeys(("conv_up1", "conv_up2", "conv_hr"), (64, 64, 3, 3))
        elif scale == 3:
            shapes["upsample.0"] = (576, 64, 3, 3)
        else:
            shapes |= {f"upsample.{2 * i}": (256, 64, 3, 3) for i in range(scale // 2)}
    for name, shape in shapes.items():
        fan = max(1, torch.Size(shape[1:]).numel())
        state[f"{name}.weight"] = torch.randn(shape) / fan**0.5
        state[f"{name}.bias"] = torch.randn(shape[0]) / 3
    return {k: v.double() if v.is_floating_point() else v for k, v in state.items()}


def by_the_book(state, x, scale, upsampler, depths=(2, 1), heads=2, s=4):
    """The network as its paper draws it, window by window, on a state dict."""

    def norm(t, name):
        return F.layer_norm(t, t.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def linear(t, name):
        return F.linear(t, state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(t, name):
        w = state[f"{name}.weight"]
        return F.conv2d(t, w, state[f"{name}.bias"], padding=w.shape[2] // 2, groups=t.shape[1] // w.shape[1])

    def attend(t, name, region):
        """One window [S, S, C]; region [S, S] numbers what may see what."""
        c, d = t.shape[-1], t.shape[-1] // heads
        q, kv = linear(t, f"{name}.q"), linear(t, f"{name}.kv")
        keys, values, where = [], [], []
        for y in range(0, s, 2):
            for x in range(0, s, 2):
                cell = [kv[y + dy, x + dx] for dy in (0, 1) for dx in (0, 1)]
                keys.append(torch.cat([place[: c // 4] for place in cell]))
                values.append(torch.cat([place[c // 4 :] for place in cell]))
                where.append((y // 2, x // 2, region[y, x]))
        k, v, out = torch.stack(keys), torch.stack(values), torch.zeros_like(t)
        table = state[f"{name}.relative_position_bias_table"]
        for y in range(s):
            for x in range(s):
                rows = [(y // 2 - u + s // 2 - 1) * (s - 1) + x // 2 - w + s // 2 - 1 for u, w, _ in where]
                mask = torch.tensor([0.0 if number == region[y, x] else -100.0 for _, _, number in where])
                for h in range(heads):
                    part = slice(h * d, (h + 1) * d)
                    scores = k[:, part] @ q[y, x, part] / d**0.5 + table[rows, h] + mask
                    out[y, x, part] = scores.softmax(0) @ v[:, part]
        return linear(out, f"{name}.proj")

    def block(f, name, shift):
        t = norm(f, f"{name}.norm1").roll((-shift, -shift), (0, 1))
        height, width = t.shape[:2]
        region, ends = torch.zeros(height, width), ((0, -s), (-s, -shift), (-shift, None))
        if shift:
            for n, ((a, b), (i, j)) in enumerate([(p, q) for p in ends for q in ends]):
                region[a:b, i:j] = n
        out = torch.zeros_like(t)
        for y in range(0, height, s):
            for x in range(0, width, s):
                box = (slice(y, y + s), slice(x, x + s))
                out[box] = attend(t[box], f"{name}.attn", region[box])
        f = f + out.roll((shift, shift), (0, 1))
        u = F.gelu(linear(norm(f, f"{name}.norm2"), f"{name}.mlp.fc1"))
        wide = F.gelu(conv(u.permute(2, 0, 1)[None], f"{name}.mlp.dwconv.depthwise_conv.0"))[0].permute(1, 2, 0)
        return f + linear(u + wide, f"{name}.mlp.fc2")

    mean = torch.tensor([0.4488, 0.4371, 0.4040], dtype=x.dtype).view(3, 1, 1)
    h, w = x.shape[2:]
    x = F.pad(x, (0, -w % s, 0, -h % s), mode="reflect")
    f0 = conv(x - mean, "conv_first")
    f = norm(f0[0].permute(1, 2, 0), "patch_embed.norm")
    for g, depth in enumerate(depths):
        y = f
        for b in range(depth):
            y = block(y, f"layers.{g}.residual_group.blocks.{b}", s // 2 if b % 2 else 0)
        f = f + conv(y.permute(2, 0, 1)[None], f"layers.{g}.conv")[0].permute(1, 2, 0)
    f = conv(norm(f, "norm").permute(2, 0, 1)[None], "conv_after_body") + f0
    if upsampler == "direct":
        y = F.pixel_shuffle(conv(f, "upsample.0"), scale)
    else:
        f = F.leaky_relu(conv(f, "conv_before_upsample.0"), 0.01)
        if upsampler == "nearest":
            for name in ("conv_up1", "conv_up2"):
                f = F.leaky_relu(conv(f.repeat_interleave(2, 2).repeat_interleave(2, 3), name), 0.2)
            f = F.leaky_relu(conv(f, "conv_hr"), 0.2)
        else:
            for i, step in enumerate({2: [2], 3: [3], 4: [2, 2]}[scale]):
                f = F.pixel_shuffle(conv(f, f"upsample.{2 * i}"), step)
        y = conv(f, "conv_last")
    return (y + mean)[..., : scale * h, : scale * w]


@pytest.mark.parametrize(
    ("scale", "upsampler"),
    [(2, "direct"), (3, "direct"), (2, "classical"), (3, "classical"), (4, "classical"), (4, "nearest")],
)
def test_an_official_checkpoint_gives_the_published_network(scale, upsampler):
    state, x = official(scale, upsampler), picture(7, 10)
    net = SRFormer.load_official({"params": state})
    assert not net.training
    assert (net.scale, net.window, net.upsampler) == (scale, 4, upsampler)
    net.double().load_state_dict({k: v for k, v in state.items() if k in net.state_dict()})  # in double precision
    torch.testing.assert_close(net(x), by_the_book(state, x, scale, upsampler), atol=1e-6, rtol=1e-6)


def test_a_checkpoint_with_a_key_missing_or_too_many_is_refused():
    state = official(4, "classical", depths=(2,))
    for missing in state:
        if not missing.endswith(("attn_mask", "aligned_relative_position_index")):
            with pytest.raises(WeightsError):
                SRFormer.load_official({k: v for k, v in state.items() if k != missing})
    with pytest.raises(WeightsError, match="more"):
        SRFormer.load_official(state | {"more.weight": torch.zeros(1)})
