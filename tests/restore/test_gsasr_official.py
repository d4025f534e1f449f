"""Checkpoints of ChrisDud0257/GSASR: names and shapes of the released files, the decoder as its code runs it."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from foveate.errors import WeightsError
from foveate.restore.gsasr import GSASR

HEADS = {"sigma": 2, "rho": 1, "alpha": 1, "rgb": 3, "mean": 2}
DIM, SIDE, NUM_HEADS = 8, 4, 2


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def conv(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs, 3, 3), f"{name}.bias": (outputs,)}


def layer_shapes(name, kinds, dim, side, heads):
    attention, first, second = kinds
    shapes = {f"{name}.norm{i}.{part}": (dim,) for i in (1, 2, 3, 4) for part in ("weight", "bias")}
    shapes |= {f"{name}.gs_cross_attn_scale.in_proj_weight": (3 * dim, dim)}
    shapes |= {f"{name}.gs_cross_attn_scale.in_proj_bias": (3 * dim,)}
    shapes |= linear(f"{name}.gs_cross_attn_scale.out_proj", dim, dim)
    for part in ("qhead", "khead", "vhead", "proj"):
        shapes |= linear(f"{name}.{attention}.{part}", dim, dim)
    shapes |= {f"{name}.{attention}.relative_position_bias_table": ((2 * side - 1) ** 2, heads)}
    shapes |= {f"{name}.{attention}.relative_position_index": (side**2, side**2)}
    for mlp in (first, second):
        shapes |= linear(f"{name}.{mlp}.fc1", dim, dim) | linear(f"{name}.{mlp}.fc2", dim, dim)
    return shapes


CROSS = ("window_cross_attn", "mlp_crossattn_scale", "mlp_crossattn_feature")
AMONG = ("gs_self_attn", "mlp_crossattn", "mlp_selfattn")


def decoder_shapes(inputs, dim, side, heads, cross, among):
    shapes = {"gs_embedding": (side**2, dim), "pos_embedding": (side**2, dim)}
    shapes |= conv("img_feat_proj.0", dim, inputs) | conv("img_feat_proj.2", dim, dim)
    for part, kinds, (blocks, layers) in (
        ("window_crossattn_blocks", CROSS, cross),
        ("gs_selfattn_blocks", AMONG, among),
    ):
        for i in range(blocks):
            shapes |= linear(f"{part}.{i}.mlp.0", dim, dim) | linear(f"{part}.{i}.mlp.2", dim, dim)
            shapes |= {f"{part}.{i}.norm.weight": (dim,), f"{part}.{i}.norm.bias": (dim,)}
            for j in range(layers):
                shapes |= layer_shapes(f"{part}.{i}.blocks.{j}", kinds, dim, side, heads)
    for name, n in HEADS.items():
        head = f"mlp_block_{name}"
        shapes |= linear(f"{head}.0", dim, dim) | linear(f"{head}.2", 4 * dim, dim) | linear(f"{head}.4", n, 4 * dim)
    shapes |= linear("scale_mlp.0", 4 * dim, 1) | linear("scale_mlp.2", dim, 4 * dim)
    return shapes | conv("UPNet.0", 4 * dim, dim) | conv("UPNet.2", 4 * dim, dim)


def encoder_shapes(channels, blocks):
    shapes = conv("conv_first", channels, 3) | conv("conv_after_body", channels, channels)
    for i in range(blocks):
        shapes |= conv(f"body.{i}.conv1", channels, channels) | conv(f"body.{i}.conv2", channels, channels)
    return shapes


def index_of(side, among):
    """Rows of the bias table as the released code finds them, with its short stride between windows and features."""
    at = torch.stack(torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")).flatten(1)
    apart = at[:, :, None] - at[:, None] + side - 1
    return apart[0] * (2 * side - 1 if among else 2 * side - 2) + apart[1]


def official():
    """Made-up checkpoints with the names and shapes of the released ones."""
    torch.manual_seed(0)
    states = []
    for shapes in (encoder_shapes(8, 2), decoder_shapes(8, DIM, SIDE, NUM_HEADS, (1, 2), (2, 2))):
        states.append({name: (torch.randn(shape) / 4).double() for name, shape in shapes.items()})
    for name in states[1]:
        if name.endswith("relative_position_index"):
            states[1][name] = index_of(SIDE, "gs_self_attn" in name)
    return states


# ---------------------------------------------------------------------- the released code, by its equations


def lin(state, name, x):
    return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])


def norm(state, name, x):
    return F.layer_norm(x, (x.shape[-1],), state[f"{name}.weight"], state[f"{name}.bias"])


def con(state, name, x):
    return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1)


def window_attention(state, name, queries, context):
    q, k, v = (
        rearrange(lin(state, f"{name}.{part}", x), "b n (h d) -> b h n d", h=NUM_HEADS)
        for part, x in (("qhead", queries), ("khead", context), ("vhead", context))
    )
    bias = state[f"{name}.relative_position_bias_table"][state[f"{name}.relative_position_index"]].permute(2, 0, 1)
    weights = (q @ k.transpose(-2, -1) * (DIM // NUM_HEADS) ** -0.5 + bias).softmax(-1)
    return lin(state, f"{name}.proj", rearrange(weights @ v, "b h n d -> b n (h d)"))


def scale_attention(state, name, queries, t):
    full = nn.MultiheadAttention(DIM, NUM_HEADS, batch_first=True, dtype=torch.float64)
    full.load_state_dict({k: state[f"{name}.{k}"] for k in full.state_dict()})
    copies = t[:, None].expand(len(queries), SIDE**2, -1)
    return full(queries, copies, copies)[0]


def mlp(state, name, x):
    return lin(state, f"{name}.fc2", lin(state, f"{name}.fc1", x).relu())


def cut(x):
    return rearrange(x, "b (m h) (n w) c -> (b m n) (h w) c", h=SIDE, w=SIDE)


def roll(x, by):
    return torch.roll(x, (by, by), (1, 2))


def by_the_book(encoder, state, x, scale):
    """The numbers of the Gaussians, without what is added to offsets. Shape: x [1, 3, h, w] -> [1, 4 h, 4 w, 9]."""
    first = f = con(encoder, "conv_first", x)
    for i in range(2):
        f = f + con(encoder, f"body.{i}.conv2", con(encoder, f"body.{i}.conv1", f).relu())
    features = con(encoder, "conv_after_body", f) + first
    feat = con(state, "img_feat_proj.2", con(state, "img_feat_proj.0", features).relu()).permute(0, 2, 3, 1)
    m, n = x.shape[2] // SIDE, x.shape[3] // SIDE
    t = lin(state, "scale_mlp.2", lin(state, "scale_mlp.0", torch.tensor([[1 / scale]], dtype=torch.float64)).relu())
    q, places = state["gs_embedding"].repeat(m * n, 1, 1), state["pos_embedding"]

    def block_end(name, q, y):
        return q + lin(state, f"{name}.mlp.2", lin(state, f"{name}.mlp.0", y).relu())

    y = norm(state, "window_crossattn_blocks.0.norm", q)
    for j in range(2):
        name = f"window_crossattn_blocks.0.blocks.{j}"
        y = y + scale_attention(state, f"{name}.gs_cross_attn_scale", norm(state, f"{name}.norm1", y) + places, t)
        y = y + mlp(state, f"{name}.mlp_crossattn_scale", norm(state, f"{name}.norm2", y))
        context = cut(roll(feat, -(SIDE // 2) * (j % 2)))
        y = y + window_attention(state, f"{name}.window_cross_attn", norm(state, f"{name}.norm3", y) + places, context)
        y = y + mlp(state, f"{name}.mlp_crossattn_feature", norm(state, f"{name}.norm4", y))
    q = before = block_end("window_crossattn_blocks.0", q, y)
    grid = {"m": m, "n": n, "h": SIDE, "w": SIDE}
    for i in range(2):
        y = norm(state, f"gs_selfattn_blocks.{i}.norm", q)
        for j in range(2):
            name, shift = f"gs_selfattn_blocks.{i}.blocks.{j}", SIDE // 2 * (j % 2)
            y = y + scale_attention(state, f"{name}.gs_cross_attn_scale", norm(state, f"{name}.norm3", y) + places, t)
            y = y + mlp(state, f"{name}.mlp_crossattn", norm(state, f"{name}.norm4", y))
            z = rearrange(norm(state, f"{name}.norm1", y), "(b m n) (h w) c -> b (m h) (n w) c", **grid)
            z = cut(roll(z, -shift))
            z = window_attention(state, f"{name}.gs_self_attn", z, z)
            z = roll(rearrange(z, "(b m n) (h w) c -> b (m h) (n w) c", **grid), shift)
            y = y + cut(z)
            y = y + mlp(state, f"{name}.mlp_selfattn", norm(state, f"{name}.norm2", y))
        q = block_end(f"gs_selfattn_blocks.{i}", q, y)
    z = rearrange(q + before, "(b m n) (h w) c -> b c (m h) (n w)", **grid)
    for part in ("UPNet.0", "UPNet.2"):
        z = F.pixel_shuffle(con(state, part, z), 2)
    z = z.permute(0, 2, 3, 1)
    names = [f"mlp_block_{name}" for name in HEADS]
    return torch.cat(
        [lin(state, f"{h}.4", lin(state, f"{h}.2", lin(state, f"{h}.0", z).relu()).relu()) for h in names], -1
    )


@pytest.mark.parametrize("wrapped", [True, False])
def test_official_checkpoints_give_the_published_network(wrapped):
    encoder, decoder = official()
    x = torch.rand(1, 3, 8, 12, dtype=torch.float64)
    given = [{"params_ema": s} if wrapped else s for s in (encoder, decoder)]
    net = GSASR.load_official(*given).double()
    assert not net.training
    assert (net.side, net.density, net.base) == (SIDE, 4, None)
    with torch.no_grad():
        found = net.decoder(net.encoder(x), x.new_tensor([2.5]))
        torch.testing.assert_close(found, by_the_book(encoder, decoder, x, 2.5), atol=1e-5, rtol=1e-5)


def test_the_released_size_has_all_parameters_but_those_that_cannot_matter():
    shapes = decoder_shapes(64, 180, 12, 6, (1, 2), (6, 6)) | {
        f"encoder.{name}": shape for name, shape in encoder_shapes(64, 16).items()
    }
    total = sum(torch.Size(s).numel() for name, s in shapes.items() if not name.endswith("index"))
    silent = 38 * (2 * 180 * 180 + 2 * 180 + 2 * 180)
    with torch.device("meta"):
        mine = sum(p.numel() for p in GSASR().parameters())
    assert mine == total - silent
    assert total == 20_444_797


def test_checkpoints_that_do_not_fit_are_refused():
    encoder, decoder = official()
    for part, key in ((0, "conv_first.weight"), (1, "gs_embedding"), (1, "UPNet.2.bias")):
        states = [dict(encoder), dict(decoder)]
        del states[part][key]
        with pytest.raises(WeightsError, match="no GSASR"):
            GSASR.load_official(*states)
    with pytest.raises(WeightsError, match="freqs"):
        GSASR.load_official(
            encoder, decoder | {"window_crossattn_blocks.0.blocks.0.window_cross_attn.freqs": torch.ones(2)}
        )
    with pytest.raises(WeightsError):
        GSASR.load_official({}, {})
