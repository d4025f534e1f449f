"""Checkpoints of facebookresearch/LeViT and of timm, with names as released; outputs as those of transformers."""

import pytest
import torch
from torch import nn

from foveate.encode.levit import LeViT
from foveate.errors import WeightsError

DIMS, HEADS, DEPTHS, KEY = (32, 48, 64), (2, 3, 4), (1, 2, 1), 16


def norm(name, n):
    return {f"{name}.bn.{key}": (n,) for key in ("weight", "bias", "running_mean", "running_var")} | {
        f"{name}.bn.num_batches_tracked": ()
    }


def linear(name, inputs, outputs):
    return {f"{name}.c.weight": (outputs, inputs)} | norm(name, outputs)


def official(side=64, heads=("head", "head_dist")):
    """A made-up checkpoint with the names and shapes of the released ones, and their buffers of indices."""
    shapes, channels = {}, [3, *(DIMS[0] // n for n in (8, 4, 2, 1))]
    for i in range(4):
        shapes |= {f"patch_embed.{2 * i}.c.weight": (channels[i + 1], channels[i], 3, 3)}
        shapes |= norm(f"patch_embed.{2 * i}", channels[i + 1])
    tokens, block = (side // 16) ** 2, 0

    def mlp(dim):
        nonlocal block
        parts = linear(f"blocks.{block}.m.0", dim, 2 * dim) | linear(f"blocks.{block}.m.2", 2 * dim, dim)
        block += 1
        return parts

    for stage, dim in enumerate(DIMS):
        if stage:
            before, name = DIMS[stage - 1], f"blocks.{block}"
            count = before // KEY
            fewer = ((int(tokens**0.5) + 1) // 2) ** 2
            shapes |= {f"{name}.attention_biases": (count, tokens), f"{name}.attention_bias_idxs": (fewer, tokens)}
            shapes |= linear(f"{name}.kv", before, 5 * KEY * count) | linear(f"{name}.q.1", before, KEY * count)
            shapes |= linear(f"{name}.proj.1", 4 * KEY * count, dim)
            tokens, block = fewer, block + 1
            shapes |= mlp(dim)
        for _ in range(DEPTHS[stage]):
            count, name = HEADS[stage], f"blocks.{block}.m"
            shapes |= {f"{name}.attention_biases": (count, tokens), f"{name}.attention_bias_idxs": (tokens, tokens)}
            shapes |= linear(f"{name}.qkv", dim, 4 * KEY * count) | linear(f"{name}.proj.1", 2 * KEY * count, dim)
            block += 1
            shapes |= mlp(dim)
    for name in heads:
        shapes |= norm(name, DIMS[-1]) | {f"{name}.l.weight": (7, DIMS[-1]), f"{name}.l.bias": (7,)}
    dice = torch.Generator().manual_seed(0)
    state = {}
    for key, shape in shapes.items():
        value = torch.rand(shape, generator=dice)
        fan = value[0].numel() if value.dim() > 1 else 1
        state[key] = (value - 0.5) * 2 / fan**0.5 if key.endswith(("c.weight", "l.weight")) else value + 0.5
    return {k: v.long() if k.endswith(("idxs", "tracked")) else v for k, v in state.items()}


def test_an_official_checkpoint_says_what_it_is():
    state = official()
    net = LeViT.load_official({"model": state})
    assert not net.training
    assert net.distillation
    assert [net.num_classes, net.num_features] == [7, 64]
    own = net.state_dict()
    assert own.keys() == {key for key in state if not key.endswith("idxs")}
    assert all(torch.equal(own[key], state[key]) for key in own)
    assert torch.isfinite(net(torch.rand(1, 3, 64, 64))).all()
    assert not LeViT.load_official(official(heads=("head",))).distillation


def timm_names(state, convolutions):
    """The same weights as timm names them: blocks by stage, in no particular order."""
    named, stage, block = {}, 0, 0
    kinds = ["kv" if f"blocks.{i}.kv.c.weight" in state else "qkv" if f"blocks.{i}.m.qkv.c.weight" in state else "mlp"
             for i in range(1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks.")))]  # fmt: skip
    places = []
    for i, kind in enumerate(kinds):
        if kind == "kv":
            stage, block = stage + 1, 0
            places.append(f"stages.{stage}.downsample.attn_downsample")
        elif kind == "mlp" and kinds[i - 1] == "kv":
            places.append(f"stages.{stage}.downsample.mlp")
        else:
            places.append(f"stages.{stage}.blocks.{block}.{'attn' if kind == 'qkv' else 'mlp'}")
            block += kind == "mlp"
    for key, value in state.items():
        first, *rest = key.split(".")
        if key.endswith("idxs"):
            continue
        if first == "blocks":
            inner = rest[1:] if kinds[int(rest[0])] == "kv" else rest[2:]
            if kinds[int(rest[0])] == "mlp":
                inner[0] = {"0": "ln1", "2": "ln2"}[inner[0]]
            elif inner[0] in ("proj", "q"):
                inner[1] = "ln"
            first, rest = places[int(rest[0])], inner
            if convolutions and rest[-2:] == ["c", "weight"]:
                value = value[..., None, None]
        elif first == "patch_embed":
            first, rest = "stem", [f"conv{int(rest[0]) // 2 + 1}", *rest[1:]]
        rest = ["linear" if part in ("c", "l") else part for part in rest]
        named[".".join([first, *rest])] = value
    return dict(sorted(named.items()))


@pytest.mark.parametrize("convolutions", [False, True])
def test_timms_names_are_the_same_network(convolutions):
    state = official()
    timm = timm_names(state, convolutions)
    assert timm["stages.0.blocks.0.attn.proj.ln.linear.weight"].dim() == (4 if convolutions else 2)
    assert "stages.1.blocks.1.mlp.ln2.bn.running_var" in timm
    assert "stages.2.downsample.attn_downsample.q.ln.bn.weight" in timm
    assert "head_dist.linear.weight" in timm
    first, second = LeViT.load_official(state).state_dict(), LeViT.load_official(timm).state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("damage", ["missing", "extra", "shape", "other"])
def test_what_is_no_checkpoint_is_refused(damage):
    state = official()
    if damage == "missing":
        del state["blocks.3.m.0.c.weight"]
    elif damage == "extra":
        state["cls_token"] = torch.zeros(1)
    elif damage == "shape":
        state["blocks.0.m.qkv.c.weight"] = torch.zeros(5, 32)
    else:
        state = {"conv1.weight": torch.zeros(1)}
    with pytest.raises(WeightsError, match="no checkpoint of LeViT"):
        LeViT.load_official(state)


def test_outputs_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.LevitConfig(
        image_size=64, hidden_sizes=list(DIMS), num_attention_heads=list(HEADS), depths=list(DEPTHS),
        key_dim=[KEY] * 3, num_labels=7,
    )  # fmt: skip
    config.down_ops = [["Subsample", KEY, dim // KEY, 4, 2, 2] for dim in DIMS[:2]]
    theirs = transformers.LevitForImageClassificationWithTeacher(config).eval()
    ours = LeViT.load_official(official())

    def sorted_modules(net, kinds):
        return [m for m in net.modules() if isinstance(m, kinds)]

    kinds = (nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d)
    # In both, layers stand in the order of their use, but for the queries of shrinking attention.
    with torch.no_grad():
        for a, b in zip(sorted_modules(theirs, kinds), sorted_modules(ours, kinds), strict=True):
            a.load_state_dict(b.state_dict())
        tables = ([m for _, m in net.named_parameters() if _.endswith("attention_biases")] for net in (theirs, ours))
        for a, b in zip(*tables, strict=True):
            a.copy_(b)
        x = torch.rand(2, 3, 64, 64)
        torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours.fuse()(x), theirs(x).logits, atol=1e-4, rtol=1e-4)
