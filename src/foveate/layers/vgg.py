"""VGG as a feature network: the pictures a network sees halfway, by the names that losses use for them.

Simonyan, Zisserman 2014, "Very Deep Convolutional Networks for Large-Scale Image Recognition", arXiv:1409.1556. Blocks
of 3 x 3 convolutions, each followed by a ReLU, and a 2 x 2 maximum after each block; relu{i}_{j} is what comes out of
the j-th ReLU of block i, of shape [B, C_ij, H / 2^(i-1), W / 2^(i-1)].

Parameters are named as in torchvision (`features.0.weight`, `features.2.weight`, ...), so its files load as they are.
The ReLUs are not in place: an activation that was handed out stays what it was.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.fold import ConvNorm

Blocks = Sequence[Sequence[int]]

VGG16: Blocks = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that torchvision's weights expect, RGB in 0..1."""

CAFFE = ((103.939 / 255, 116.779 / 255, 123.68 / 255), (1 / 255,) * 3)
"""The same for weights that come from Caffe, blue first."""

SLUG = "perceptual-losses"
SMALL: Blocks = ((16, 16), (32, 32), (64, 64, 64), (96, 96))
SMALL_NORMAL = ((0.5,) * 3, (0.25,) * 3)


class VGG(nn.Module):
    """Give the activations of pictures by name.

    Args:
        blocks: channels of the convolutions of each block.
        normal: mean and standard deviation per channel, in the network's order of channels, for pictures of 0..1.
        bgr: the network wants blue first, as those from Caffe do.
        norm: a batch norm after each convolution, for training; `foveate.layers.fold.fuse` folds them away.

    Shape: x [B, 3, H, W] in 0..1 -> {name: [B, C, h, w]}.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        blocks: Blocks = VGG16,
        normal: tuple[Sequence[float], Sequence[float]] = IMAGENET,
        bgr: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.bgr, self.layers = bgr, dict[str, int]()
        parts, inputs = list[nn.Module](), 3
        for i, widths in enumerate(blocks, 1):
            for j, width in enumerate(widths, 1):
                conv = ConvNorm(inputs, width, 3) if norm else nn.Conv2d(inputs, width, 3, padding=1)
                parts += [conv, nn.ReLU()]
                self.layers[f"relu{i}_{j}"], inputs = len(parts) - 1, width
            parts.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*parts)
        for name, values in zip(("mean", "std"), normal, strict=True):
            self.register_buffer(name, torch.tensor(values).view(3, 1, 1), persistent=False)

    def forward(self, x: Tensor, layers: Iterable[str] | None = None) -> dict[str, Tensor]:
        """Activations of some layers, by default all; layers after the deepest one asked for are not run.

        Raises: InputError for an unknown layer, or pictures that the poolings before the deepest one leave nothing of.
        """
        asked = set(self.layers if layers is None else layers)
        if unknown := asked - set(self.layers):
            raise InputError(f"no layer {', '.join(sorted(unknown))} in this VGG; it has {', '.join(self.layers)}.")
        if x.dim() != 4 or x.shape[1] != 3 or not x.is_floating_point():
            raise InputError(f"VGG got {x.dtype} of shape {tuple(x.shape)}, expected floats in 0..1, [B, 3, H, W].")
        last = max(self.layers[name] for name in asked)
        parts = list(self.features)[: last + 1]
        least = 2 ** sum(isinstance(part, nn.MaxPool2d) for part in parts)
        if min(x.shape[2:]) < least:
            size = f"{x.shape[3]} x {x.shape[2]}"
            raise InputError(
                f"pictures of {size} pixels are too small for {max(asked)}, which needs {least} x {least}; "
                "enlarge them or ask for an earlier layer."
            )
        names = {self.layers[name]: name for name in asked}
        x = ((x.flip(1) if self.bgr else x) - self.mean) / self.std
        found = {}
        for i, part in enumerate(parts):
            x = part(x)
            if i in names:
                found[names[i]] = x
        return found

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor] | str | Path, caffe: bool = False) -> Self:
        """Build the network of torchvision's `vgg11`, `vgg13`, `vgg16` or `vgg19` weights; the classifier is left out.

        Args:
            state: the weights, or a safetensors file of them.
            caffe: they were converted from Caffe and want blue first, 0..255, without the mean.

        Raises: WeightsError for another kind of file or other weights.
        """
        if not isinstance(state, Mapping):
            state = _read(Path(state))
        weights = {k: v.float() for k, v in state.items() if k.startswith("features.")}
        try:
            convs = sorted(int(name.split(".")[1]) for name in weights if name.endswith(".weight"))
            blocks: list[list[int]] = []
            for before, i in zip([-9, *convs], convs, strict=False):
                if i - before != 2:  # a convolution and its ReLU; with the pooling it would be 3
                    blocks.append([])
                blocks[-1].append(weights[f"features.{i}.weight"].shape[0])
            if not blocks:
                raise LookupError("features.0.weight")
            network = cls(blocks, CAFFE if caffe else IMAGENET, bgr=caffe)
            network.load_state_dict(weights)
        except (LookupError, RuntimeError, ValueError) as error:
            begin = sorted(state)[:3]
            raise WeightsError(
                f"no weights of a VGG without batch norms (keys begin with {begin}): {error}."
            ) from error
        return network.eval()


@lru_cache(maxsize=1)
def small_vgg() -> VGG:
    """The small network that comes with foveate, trained on CIFAR-10 (recipes/stylize.py); shared and frozen.

    >>> {name: act.shape[1] for name, act in small_vgg()(torch.rand(1, 3, 32, 32), ["relu1_2", "relu4_2"]).items()}
    {'relu1_2': 16, 'relu4_2': 96}
    """
    from foveate.weights import FOLDER

    network = VGG(SMALL, SMALL_NORMAL)
    network.load_state_dict({k: v.float() for k, v in _read(FOLDER / f"{SLUG}.safetensors").items()})
    return network.eval().requires_grad_(False)


def _read(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise WeightsError(
            f"no safetensors file at {str(path)!r} ({error}); convert weights of another kind with safetensors.torch."
        ) from error
