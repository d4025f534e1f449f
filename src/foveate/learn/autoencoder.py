"""Convolutional autoencoders of small pictures: three convolutions with pooling, a code, and their mirror image.

The architecture of Snell et al. 2015 (arXiv:1511.06409) for pictures of 32 to 96 pixels, as far as it is published. Any
distance between pictures can train it: `foveate.learn.losses` has some, and `ExpectedLossVAE` takes the two halves.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from foveate.errors import InputError

WIDTHS = (16, 32, 32)


def conv_encoder(numbers: int, side: int = 32, channels: int = 1, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Pictures to numbers.

    Args:
        numbers: of the code; twice as many for a variational autoencoder, means and log-variances.
        side: of the square pictures, a multiple of 2 to the number of widths.
        channels: of the pictures.
        widths: channels after each convolution, which a pooling follows.

    Shape: [B, channels, side, side] -> [B, numbers].
    Raises: InputError for a side that does not fit.
    """
    last = _last(side, widths)
    parts, before = list[nn.Module](), channels
    for width in widths:
        parts += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        before = width
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(before * last**2, numbers))


def conv_decoder(numbers: int, side: int = 32, channels: int = 1, widths: Sequence[int] = WIDTHS) -> nn.Sequential:
    """Numbers to pictures in 0..1, the mirror image of `conv_encoder`.

    Shape: [B, numbers] -> [B, channels, side, side].
    Raises: InputError for a side that does not fit.
    """
    last = _last(side, widths)
    parts: list[nn.Module] = [nn.Linear(numbers, widths[-1] * last**2), nn.ReLU(), nn.Unflatten(1, (-1, last, last))]
    for before, after in zip(widths[::-1], [*widths[-2::-1], channels], strict=True):
        parts += [nn.Upsample(scale_factor=2), nn.Conv2d(before, after, 3, padding=1), nn.ReLU()]
    parts[-1] = nn.Sigmoid()
    return nn.Sequential(*parts)


class ConvAutoencoder(nn.Module):
    """`conv_encoder` and `conv_decoder`, one after the other.

    Args:
        code: numbers in the code.
        side, channels, widths: as there.

    Shape: [B, channels, side, side] -> the same, in 0..1.
    """

    def __init__(self, code: int = 32, side: int = 32, channels: int = 1, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        self.encoder = conv_encoder(code, side, channels, widths)
        self.decoder = conv_decoder(code, side, channels, widths)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


def _last(side: int, widths: Sequence[int]) -> int:
    """Side of the smallest map."""
    if not widths or side < 2 ** len(widths) or side % 2 ** len(widths):
        raise InputError(f"side={side} and widths={tuple(widths)}: a side is a multiple of 2 per width.")
    return side // 2 ** len(widths)
