"""Checkpoints of jameslahm/lsnet: names and shapes as released, the network written out from the paper."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from foveate.encode.lsnet import LSNet
from foveate.errors import WeightsError

WIDTHS, DEPTHS, HEADS, KEY, SIDE = (8, 16, 24, 32), (0, 2, 4, 3), 2, 4, 2


def conv_bn(name, inputs, outputs, k=1, groups=1):
    shapes = {f"{name}.c.weight": (outputs, inputs // groups, k, k)}
    return shapes | norm(f"{name}.bn", outputs)


def norm(name, n):
    shapes = {f"{name}.{key}": (n,) for key in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def layer(name, *shape):
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def official(distilled=False, classes=6):
    """A made-up checkpoint with the names and shapes of the released ones."""
    first = WIDTHS[0]
    shapes = conv_bn("patch_embed.0", 3, first // 4, 3) | conv_bn("patch_embed.2", first // 4, first // 2, 3)
    shapes |= conv_bn("patch_embed.4", first // 2, first, 3)
    for stage, (c, depth) in enumerate(zip(WIDTHS, DEPTHS, strict=True)):
        name, skip = f"blocks{stage + 1}", 0
        if stage:
            before, skip = WIDTHS[stage - 1], 2
            shapes |= conv_bn(f"{name}.0", before, before, 3, before) | conv_bn(f"{name}.1", before, c)
        for i in range(depth):
            block = f"{name}.{i + skip}"
            if i % 2 == 0:
                shapes |= conv_bn(f"{block}.mixer.conv", c, c, 3, c) | conv_bn(f"{block}.mixer.conv1", c, c, 1, c)
                shapes |= layer(f"{block}.se.fc1", 8, c, 1, 1) | layer(f"{block}.se.fc2", c, 8, 1, 1)
            elif stage < 3:
                lkp = f"{block}.mixer.lkp"
                shapes |= conv_bn(f"{lkp}.cv1", c, c // 2) | conv_bn(f"{lkp}.cv2", c // 2, c // 2, 7, c // 2)
                shapes |= conv_bn(f"{lkp}.cv3", c // 2, c // 2) | layer(f"{lkp}.cv4", 9 * c // 8, c // 2, 1, 1)
                shapes |= layer(f"{lkp}.norm", 9 * c // 8) | norm(f"{block}.mixer.bn", c)
            else:
                m = f"{block}.mixer.m"
                shapes |= conv_bn(f"{m}.qkv", c, 2 * HEADS * KEY + c) | conv_bn(f"{m}.proj.1", c, c)
                shapes |= conv_bn(f"{m}.dw", HEADS * KEY, HEADS * KEY, 3, HEADS * KEY)
                shapes |= {f"{m}.attention_biases": (HEADS, SIDE**2)}
            shapes |= conv_bn(f"{block}.ffn.m.pw1", c, 2 * c) | conv_bn(f"{block}.ffn.m.pw2", 2 * c, c)
    for head in ("head", "head_dist") if distilled else ("head",):
        shapes |= norm(f"{head}.bn", WIDTHS[-1]) | layer(f"{head}.l", classes, WIDTHS[-1])
    dice = torch.Generator().manual_seed(0)
    state = {key: torch.randn(shape, generator=dice) / 3 for key, shape in shapes.items()}
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 0.5
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    for key in [key for key in state if key.endswith("attention_biases")]:
        state[key.replace("biases", "bias_idxs")] = distances()
    return state


def distances():
    """Entries of the table, in order of first appearance, for every pair of pixels."""
    points = list(itertools.product(range(SIDE), range(SIDE)))
    pairs = [(abs(a[0] - b[0]), abs(a[1] - b[1])) for a in points for b in points]
    known = list(dict.fromkeys(pairs))
    return torch.tensor([known.index(pair) for pair in pairs]).view(SIDE**2, SIDE**2)


def written_out(state, x, distilled):
    def bn(x, name):
        return F.batch_norm(x, *(state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias")))

    def conv(x, name, stride=1):
        weight = state[f"{name}.c.weight"]
        y = F.conv2d(x, weight, None, stride, weight.shape[2] // 2, groups=x.shape[1] // weight.shape[1])
        return bn(y, f"{name}.bn")

    def plain(x, name):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def ls(x, name):
        b, c, h, w = x.shape
        y = conv(conv(F.relu(conv(x, f"{name}.lkp.cv1")), f"{name}.lkp.cv2"), f"{name}.lkp.cv3")
        k = plain(F.relu(y), f"{name}.lkp.cv4")
        k = F.group_norm(k, c // 8, state[f"{name}.lkp.norm.weight"], state[f"{name}.lkp.norm.bias"])
        columns = F.unfold(x, 3, padding=1).view(b, 8, c // 8, 9, h, w)
        return bn((columns * k.view(b, 1, c // 8, 9, h, w)).sum(3).flatten(1, 2), f"{name}.bn") + x

    def attention(x, name):
        b, c, h, w = x.shape
        q, k, v = conv(x, f"{name}.qkv").split([HEADS * KEY, HEADS * KEY, c], 1)
        q, k, v = (t.view(b, HEADS, -1, h * w) for t in (conv(q, f"{name}.dw"), k, v))
        bias = state[f"{name}.attention_biases"][:, state[f"{name}.attention_bias_idxs"]]
        share = (q.mT @ k * KEY**-0.5 + bias).softmax(3)
        return x + conv(F.relu((v @ share.mT).reshape(b, c, h, w)), f"{name}.proj.1")

    x = conv(F.relu(conv(F.relu(conv(x, "patch_embed.0", 2)), "patch_embed.2", 2)), "patch_embed.4", 2)
    for stage, depth in enumerate(DEPTHS):
        name, skip = f"blocks{stage + 1}", 2 if stage else 0
        x = conv(conv(x, f"{name}.0", 2), f"{name}.1") if stage else x
        for i in range(depth):
            block = f"{name}.{i + skip}"
            if i % 2 == 0:
                x = conv(x, f"{block}.mixer.conv") + conv(x, f"{block}.mixer.conv1") + x
                gate = plain(F.relu(plain(x.mean((2, 3), keepdim=True), f"{block}.se.fc1")), f"{block}.se.fc2")
                x = x * gate.sigmoid()
            else:
                x = ls(x, f"{block}.mixer") if stage < 3 else attention(x, f"{block}.mixer.m")
            x = x + conv(F.relu(conv(x, f"{block}.ffn.m.pw1")), f"{block}.ffn.m.pw2")
    x = x.mean((2, 3))
    heads = ("head", "head_dist") if distilled else ("head",)
    return sum(F.linear(bn(x, f"{h}.bn"), state[f"{h}.l.weight"], state[f"{h}.l.bias"]) for h in heads) / len(heads)


@pytest.mark.parametrize("distilled", [False, True])
def test_an_official_checkpoint_gives_the_published_network(distilled):
    state, x = official(distilled), torch.rand(2, 3, 128, 128)
    model = LSNet.load_official({"model": state})
    with torch.no_grad():
        expected = written_out(state, x, distilled)
        torch.testing.assert_close(model(x), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.fuse()(x), expected, atol=1e-4, rtol=1e-4)


def test_checkpoints_of_something_else_are_refused():
    with pytest.raises(WeightsError, match=r"no checkpoint of an LSNet.*'fc.weight'"):
        LSNet.load_official({"fc.weight": torch.zeros(2, 2)})
    for gone in ("blocks2.3.mixer.lkp.cv2.c.weight", "blocks4.3.mixer.m.dw.bn.bias", "head.l.weight"):
        state = official()
        state.pop(gone)
        with pytest.raises(WeightsError, match="no checkpoint"):
            LSNet.load_official(state)
    with pytest.raises(WeightsError, match="extra"):
        LSNet.load_official(official() | {"blocks2.3.mixer.extra": torch.zeros(1)})
