"""Checkpoints of 3587jjh/PCSR: names and shapes as in the released files, networks as the papers draw them."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from foveate.errors import WeightsError
from foveate.layers.implicit import queries
from foveate.layers.upscaler import enlarge
from foveate.restore.pcsr import PCSR


def conv(name, outputs, inputs, kernel, bias=True):
    return {f"{name}.weight": (outputs, inputs, kernel, kernel)} | ({f"{name}.bias": (outputs,)} if bias else {})


def fsrcnn_shapes(d, s):
    shapes = conv("head_conv.0", d, 3, 5) | {"head_conv.1.weight": (1,)}
    shapes |= conv("body_conv.0.0", s, d, 1) | {"body_conv.0.1.weight": (1,)}
    for i in (1, 2, 3, 4):
        shapes |= conv(f"body_conv.{i}", s, s, 3)
    return shapes | {"body_conv.5.weight": (1,)} | conv("body_conv.6.0", d, s, 1) | {"body_conv.6.1.weight": (1,)}


def carn_shapes(nf, groups):
    shapes = conv("entry", nf, 3, 3)
    for block in ("b1.", "b2.", "b3.", ""):
        for i in (0, 2) if block else ():
            shapes |= conv(f"{block}b1.body.{i}", nf, nf // groups, 3)
        shapes |= conv(f"{block}b1.body.4", nf, nf, 1) if block else {}
        for i in (1, 2, 3):
            shapes |= conv(f"{block}c{i}.0", nf, nf * (i + 1), 1, bias=False)
            shapes |= {f"{block}c{i}.1.{name}": (nf,) for name in ("weight", "bias", "running_mean", "running_var")}
            shapes |= {f"{block}c{i}.1.num_batches_tracked": ()}
    return shapes


def official(encoder, heads):
    """A made-up checkpoint with the names and shapes of the released ones."""
    torch.manual_seed(0)
    shapes = {f"encoder.{name}": shape for name, shape in encoder.items()}
    channels = shapes["encoder.entry.weight" if "encoder.entry.weight" in shapes else "encoder.head_conv.0.weight"][0]
    for head, hidden, outputs in heads:
        widths = [channels + 4, *hidden, outputs]
        for i, (a, b) in enumerate(pairwise(widths)):
            shapes |= {f"{head}.imnet.layers.{2 * i}.weight": (b, a), f"{head}.imnet.layers.{2 * i}.bias": (b,)}
    state = {name: torch.randn(shape) / 4 for name, shape in shapes.items()}
    for name in state:
        if name.endswith("running_var"):
            state[name] = state[name].abs() + 0.5
        if name.endswith("num_batches_tracked"):
            state[name] = torch.tensor(7)
    return state


def head_of(state, head, z):
    for i in range(sum(k.startswith(head) and k.endswith("weight") for k in state)):
        layer = f"{head}.imnet.layers.{2 * i}"
        z = F.linear(z.relu() if i else z, state[f"{layer}.weight"], state[f"{layer}.bias"])
    return z


def fsrcnn_features(state, x):
    def layer(x, name, padding=0):
        return F.conv2d(x, state[f"encoder.{name}.weight"], state[f"encoder.{name}.bias"], padding=padding)

    def prelu(x, name):
        return F.prelu(x, state[f"encoder.{name}.weight"])

    x = prelu(layer(x, "head_conv.0", 2), "head_conv.1")
    x = prelu(layer(x, "body_conv.0.0"), "body_conv.0.1")
    for i in (1, 2, 3, 4):
        x = layer(x, f"body_conv.{i}", 1)
    return prelu(layer(prelu(x, "body_conv.5"), "body_conv.6.0"), "body_conv.6.1")


def carn_features(state, x):
    def fuse(parts, name):
        y = F.conv2d(torch.cat(parts, 1), state[f"encoder.{name}.0.weight"])
        norm = (state[f"encoder.{name}.1.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(y, *norm).relu()

    def unit(x, block):
        def layer(x, i, groups=1):
            name = f"encoder.{block}.b1.body.{i}"
            return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], padding=1 if i < 4 else 0, groups=groups)

        return (layer(layer(layer(x, 0, 4).relu(), 2, 4).relu(), 4) + x).relu()

    def block(x, name):
        parts = [x]
        for i in (1, 2, 3):
            parts.append(unit(x, name))
            x = fuse(parts, f"{name}.c{i}")
        return x

    mean = torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1)
    x = F.conv2d(x - mean, state["encoder.entry.weight"], state["encoder.entry.bias"], padding=1)
    parts = [x]
    for i in (1, 2, 3):
        parts.append(block(x, f"b{i}"))
        x = fuse(parts, f"c{i}")
    return x


HEADS = [("heavy_sampler", [6] * 4, 3), ("light_sampler", [5] * 3, 3)]
FSRCNN = official(fsrcnn_shapes(8, 4), [*HEADS, ("classifier", [], 2)])
CARN = official(carn_shapes(8, 4), [*HEADS, ("classifier", [4, 4], 2)])
BOTH = [pytest.param(FSRCNN, fsrcnn_features, id="fsrcnn"), pytest.param(CARN, carn_features, id="carn")]


@pytest.mark.parametrize(("state", "features"), BOTH)
@pytest.mark.parametrize("scale", [2, 4])
def test_an_official_checkpoint_gives_the_published_network(state, features, scale):
    net, x = PCSR.load_official(state, scale), torch.rand(1, 3, 6, 7, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = queries(features(state, x), 6 * scale, 7 * scale)
        heavy, light, logits = (head_of(state, head, z) for head in ("heavy_sampler", "light_sampler", "classifier"))
        rows = net._rows(net.encoder(x))
        threshold = float(net.scores(rows).median()) + 1e-4
        chosen = torch.where((logits[..., 1:] - logits[..., :1]) > threshold, heavy, light)
        colours, _ = net.colours(rows, threshold)
        for ours, theirs in ((net(x), heavy), (net._assemble(colours, enlarge(x, scale)), chosen)):
            theirs = theirs.transpose(1, 2).unflatten(2, (6 * scale, 7 * scale)) + enlarge(x, scale)
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not net.training


@pytest.mark.parametrize("state", [FSRCNN, CARN], ids=["fsrcnn", "carn"])
def test_a_checkpoint_with_a_key_missing_or_too_many_is_refused(state):
    for missing in (k for k in state if not k.endswith("num_batches_tracked")):
        with pytest.raises(WeightsError):
            PCSR.load_official({k: v for k, v in state.items() if k != missing})
    with pytest.raises(WeightsError, match=r"encoder\.more"):
        PCSR.load_official(state | {"encoder.more": torch.zeros(1)})
    with pytest.raises(WeightsError, match="classifier"):
        PCSR.load_official({k: v for k, v in state.items() if not k.startswith("classifier")})
    with pytest.raises(WeightsError, match="neither an FSRCNN nor a CARN"):
        PCSR.load_official({"entry.weight": torch.zeros(8, 3, 3, 3)})


@pytest.mark.parametrize(
    ("encoder", "heads", "total"),
    [("fsrcnn", ([58] * 4, [10] * 3, []), 24_502), ("carn", ([74] * 4, [20] * 3, [10, 10]), 168_970)],
)
def test_the_published_sizes_are_25_and_169_thousand_parameters(encoder, heads, total):
    assert sum(p.numel() for p in PCSR(4, encoder, None, *heads).parameters()) == total
