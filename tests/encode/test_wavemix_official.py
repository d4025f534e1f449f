"""Checkpoints of pranavphoenix/WaveMix: names and shapes as released, the network written out from the paper."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

from foveate.encode.wavemix import WaveMix, WaveMixDense
from foveate.errors import WeightsError


def conv(name, shape, bias):
    return {f"{name}.weight": shape, f"{name}.bias": (bias,)}


def norm(name, n):
    shapes = {f"{name}.{key}": (n,) for key in ("weight", "bias", "running_mean", "running_var")}
    return shapes | {f"{name}.num_batches_tracked": ()}


def official(dim, depth, levels, patch=None, head=None, seed=0):
    """A made-up checkpoint with the names and shapes of the released ones."""
    shapes = {}
    if patch:
        shapes |= conv("conv.0", (dim // 4, 3, 3, 3), dim // 4) | conv("conv.1", (dim // 2, dim // 4, 3, 3), dim // 2)
        shapes |= conv("conv.2", (dim, dim // 2, patch, patch), dim) | norm("conv.4", dim)
    else:
        shapes |= conv("conv.0", (dim // 2, 3, 3, 3), dim // 2) | conv("conv.1", (dim, dim // 2, 3, 3), dim)
    for i in range(depth):
        shapes |= conv(f"layers.{i}.reduction", (dim // 4, dim, 1, 1), dim // 4)
        for level in range(1, levels + 1):
            name = f"layers.{i}.feedforward{level if levels > 1 else ''}"
            inputs, outputs = dim if level == levels else dim * 3 // 2, dim if level == 1 else dim // 2
            shapes |= conv(f"{name}.0", (2 * dim, inputs, 1, 1), 2 * dim) | conv(f"{name}.3", (dim, 2 * dim, 1, 1), dim)
            shapes |= conv(f"{name}.4", (dim, outputs, 4, 4), outputs) | norm(f"{name}.5", outputs)
    shapes |= head or {"pool.2.weight": (6, dim), "pool.2.bias": (6,)}
    dice = torch.Generator().manual_seed(seed)
    state = {key: torch.randn(shape, generator=dice) / 4 for key, shape in shapes.items()}
    for key in state:
        if key.endswith("running_var"):
            state[key] = state[key].abs() + 0.5
        if key.endswith("num_batches_tracked"):
            state[key] = torch.tensor(7)
    return state


def decoder(name, *widths, outputs):
    shapes = {}
    for i, (a, b) in enumerate(pairwise(widths)):
        shapes |= conv(f"{name}.{i}", (a, b, 4, 4), b)
    return shapes | conv(f"{name}.{len(widths) - 1}", (outputs, widths[-1], 1, 1), outputs)


def written_out(state, x, levels, stride):
    """The features, with the wavelet as a strided convolution."""

    def layer(x, name, **options):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **options)

    def batch_norm(x, name):
        values = (state[f"{name}.{key}"] for key in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *values)

    def haar(x):
        signs = [[[1, 1], [1, 1]], [[1, 1], [-1, -1]], [[1, -1], [1, -1]], [[1, -1], [-1, 1]]]
        kernel = torch.tensor(signs).float()[:, None].repeat(x.shape[1], 1, 1, 1) / 2
        y = F.conv2d(x, kernel, stride=2, groups=x.shape[1]).unflatten(1, (-1, 4))
        return y[:, :, 0], y[:, :, 1:].flatten(1, 2)

    def block(x, i):
        low, bands, y = layer(x, f"layers.{i}.reduction"), [], None
        for _ in range(levels):
            low, details = haar(low)
            bands.append(torch.cat((low, details), 1))
        for level in range(levels, 0, -1):
            name = f"layers.{i}.feedforward{level if levels > 1 else ''}"
            z = bands[level - 1] if y is None else torch.cat((bands[level - 1], y), 1)
            z = layer(F.gelu(layer(z, f"{name}.0")), f"{name}.3")
            z = F.conv_transpose2d(z, state[f"{name}.4.weight"], state[f"{name}.4.bias"], stride=2, padding=1)
            y = batch_norm(z, f"{name}.5")
        return y

    if "conv.2.weight" in state:
        x = layer(layer(x, "conv.0", padding=1), "conv.1", padding=1)
        x = batch_norm(F.gelu(layer(x, "conv.2", stride=state["conv.2.weight"].shape[2])), "conv.4")
    else:
        x = layer(layer(x, "conv.0", padding=1, stride=stride), "conv.1", padding=1, stride=stride)
    for i in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("layers."))):
        x = block(x, i) + x
    return x


@pytest.mark.parametrize(("levels", "patch", "stride"), [(1, None, 1), (1, 4, 1), (2, 8, 1), (3, 4, 1), (4, None, 2)])
def test_an_official_classifier_gives_the_published_network(levels, patch, stride):
    state, x = official(8, 2, levels, patch), torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        features = written_out(state, x, levels, stride)
        expected = F.linear(features.mean((2, 3)), state["pool.2.weight"], state["pool.2.bias"])
        found = WaveMix.load_official({f"module.{key}": value for key, value in state.items()}, stride)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "widths", "outputs", "patch", "stride"),
    [("expand", [8, 4, 2], 7, None, 2), ("pool", [8, 6, 3], 20, 4, 2), ("expand", [8, 4], 3, None, 1)],
    ids=["segmentation", "cityscapes", "super-resolution"],
)
def test_an_official_decoder_gives_the_published_network(name, widths, outputs, patch, stride):
    state, x = official(8, 2, 2, patch, decoder(name, *widths, outputs=outputs)), torch.rand(1, 3, 16, 32)
    with torch.no_grad():
        expected = written_out(state, x, 2, stride)
        for i in range(len(widths) - 1):
            weight, bias = state[f"{name}.{i}.weight"], state[f"{name}.{i}.bias"]
            expected = F.conv_transpose2d(expected, weight, bias, stride=2, padding=1)
        last = f"{name}.{len(widths) - 1}"
        expected = F.conv2d(expected, state[f"{last}.weight"], state[f"{last}.bias"])
        found = WaveMixDense.load_official(state, stride)(x)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_checkpoints_of_something_else_are_refused():
    state = official(8, 1, 2)
    with pytest.raises(WeightsError, match=r"no checkpoint of a WaveMix.*'fc.weight'"):
        WaveMix.load_official({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(WeightsError, match="WaveMixDense for decoders"):
        WaveMix.load_official(official(8, 1, 1, head=decoder("expand", 8, 4, 2, outputs=3)))
    with pytest.raises(WeightsError):
        WaveMixDense.load_official(state)
    state.pop("layers.0.feedforward2.3.weight")
    with pytest.raises(WeightsError, match=r"mixers\.1\.3\.weight"):
        WaveMix.load_official(state)
