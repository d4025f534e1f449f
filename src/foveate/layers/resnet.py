"""Residual networks for small pictures: the plain baseline that other encoders are measured against.

He, Zhang, Ren, Sun 2015, "Deep Residual Learning for Image Recognition", arXiv:1512.03385. A block adds to its input
two 3 x 3 convolutions with batch norm,

    y = relu(S x + BN(conv(relu(BN(conv(x))))))

where S is the identity or, where size or width change, a strided 1 x 1 convolution with batch norm. The networks of the
paper for CIFAR-10 are three stages of equally many blocks, (16, 32, 64) wide; `fuse()` folds all batch norms.
"""

from collections.abc import Sequence
from typing import Self

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers import fold
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm
from foveate.layers.residual import add_


class BasicBlock(nn.Module):
    """y of the equation above.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution and of S.
        gamma: what the weight of the last batch norm begins with; 0 makes a block begin as its shortcut.

    Shape: [B, inputs, H, W] -> [B, outputs, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, gamma: float = 1.0) -> None:
        super().__init__()
        self.body = nn.Sequential(
            ConvNorm(inputs, outputs, 3, stride), nn.ReLU(), ConvNorm(outputs, outputs, 3, gamma=gamma)
        )
        plain = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if plain else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(add_(self.body(x), self.shortcut(x)))


class ResNet(ImageClassifier):
    """Classify small pictures.

    Args:
        num_classes, in_chans: see `ImageClassifier`.
        widths: channels of each stage; each but the first halves the map.
        depths: blocks of each stage, 2 + 2 sum(depths) being the layers of the paper's names.
        stride: of the convolution before the first stage.

    Shape: [B, in_chans, H, W] -> [B, num_classes].
    Raises: InputError for settings or pictures that do not fit.
    """

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        depths: Sequence[int] = (3, 3, 3),
        stride: int = 1,
    ) -> None:
        if not widths or len(widths) != len(depths) or min(*widths, *depths, stride) < 1:
            raise InputError(f"widths, depths and stride must be at least 1, and as many; got {widths=}, {depths=}.")
        super().__init__(widths[-1], in_chans)
        self.stem = nn.Sequential(ConvNorm(in_chans, widths[0], 3, stride), nn.ReLU())
        blocks, before = [], widths[0]
        for i, (width, depth) in enumerate(zip(widths, depths, strict=True)):
            for j in range(depth):
                blocks.append(BasicBlock(before, width, 2 if i and not j else 1))
                before = width
        self.blocks = nn.Sequential(*blocks)
        self.reset_classifier(num_classes)

    def forward_features(self, x: Tensor) -> Tensor:
        """The last map. Shape: [B, in_chans, H, W] -> [B, C, h, w]."""
        self.check(x)
        return self.blocks(self.stem(x))

    def fuse(self) -> Self:
        """Fold batch norms for inference, in place; returns the network in eval mode."""
        fold.fuse(self)
        return self
