"""The network of the quantised global autoencoder: every token is a pattern over the whole picture.

Elsner et al. 2024, "Quantised Global Autoencoder: A Holistic Approach to Representing Visual Data", arXiv:2407.11913.

    F = unet(x) + pool(conv1x1(x))            [B, C, h, h],  h = size / 2^f
    V[:, c] = down_n(F[:, c] as hh numbers)   [B, C, D],     n = the head of token c; its group shares the map hh -> D
    k[c] = argmin_j |V[:, c] - E[c, j]|^2     a codebook of K words for every token
    Z = E[c, k[c]] + O[c]                     and tokens from the t-th on are zero, where only t are kept
    y = unet'(U) + up(conv1x1(U)),            U[:, c] = up_n(Z[:, c])

Space and channels have changed places: what a patch autoencoder does for each place, this one does for each channel.
A picture is C log2 K bits. Training on random t sorts the tokens by what they bring, so that a prefix is a coarser
picture.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError
from foveate.layers.vector_quantise import Quantised, VectorQuantiser

OCTAVES = 6
"""Frequencies that places are told in; the published 16 are beyond what 32 pixels show."""


class ConditionedResidual(nn.Module):
    """conv1x1(x) + conv(SiLU(GN(conv(SiLU(GN(x + a conv1x1 of the condition)))))), convolutions of 3x3.

    The condition is sines and cosines of places and, where it is given, the picture, both at the size of x.

    Shape: x [B, C, h, w], places [1, p, h, w], picture [B, n, h, w] -> [B, C, h, w].
    """

    def __init__(self, channels: int, places: int, picture: int = 0) -> None:
        super().__init__()
        self.skip = nn.Conv2d(channels, channels, 1)
        self.places = nn.Conv2d(places, channels, 1)
        self.picture = nn.Conv2d(picture, channels, 1, bias=False) if picture else None
        groups = next(g for g in range(min(16, channels), 0, -1) if channels % g == 0)
        steps = [[nn.GroupNorm(groups, channels), nn.SiLU(), _conv(channels, channels)] for _ in range(2)]
        self.body = nn.Sequential(*steps[0], *steps[1])
        _keep_scale(self.skip)

    def forward(self, x: Tensor, places: Tensor, picture: Tensor | None = None) -> Tensor:
        told = x + self.places(places)
        if self.picture is not None:
            told = told + self.picture(picture)
        return self.skip(x) + self.body(told)


class UNet(nn.Module):
    """Halve, go down a level, double; without shortcuts between equal sizes, but one from input to output.

    Args:
        inputs, outputs: channels.
        widths: channels of each level, outermost first; between two levels the map is halved and doubled.
        blocks: residual ones on either side of a level.
        still_down, still_up: the outermost levels that leave out their halving, or their doubling.
        told: whether residual blocks are conditioned on the input.

    Shape: [B, inputs, h, w] -> [B, outputs, h', w'], h' = h 2^(still_down - still_up).
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        widths: Sequence[int],
        blocks: int = 1,
        *,
        still_down: int = 0,
        still_up: int = 0,
        told: bool = False,
    ) -> None:
        super().__init__()
        steps = len(widths) - 1
        self.halving = [step >= still_down for step in range(steps)]
        self.doubling = [step >= still_up for step in range(steps)]
        self.told = told
        enter: list[nn.Conv2d] = []
        leave: list[nn.Conv2d] = []
        before: list[nn.ModuleList] = []
        after: list[nn.ModuleList] = []
        for i, width in enumerate(widths):
            outer, out = (widths[i - 1], widths[i - 1]) if i else (inputs, outputs)
            enter.append(_conv(outer, width))
            leave.append(_conv(width, out))
            _keep_scale(enter[-1], leave[-1])
            for row in (before, after):
                told_of = (width, 4 * OCTAVES, inputs if told else 0)
                row.append(nn.ModuleList(ConditionedResidual(*told_of) for _ in range(blocks)))
        self.enter, self.leave = nn.ModuleList(enter), nn.ModuleList(leave)
        self.before, self.after = nn.ModuleList(before), nn.ModuleList(after)
        self.across = _conv(inputs, outputs)

    @torch.no_grad()
    def hush(self, share: float) -> None:
        """Leave a share of the output."""
        for layer in (self.leave[0], self.across):
            assert isinstance(layer, nn.Conv2d)
            assert layer.bias is not None
            layer.weight *= share
            layer.bias *= share

    def forward(self, x: Tensor) -> Tensor:
        y = self._level(x, x, 0)
        small = _resized(x, min(x.shape[2], y.shape[2]))
        return y + _resized(self.across(small), y.shape[2])

    def _level(self, x: Tensor, seen: Tensor, i: int) -> Tensor:
        x = self._blocks(self.before[i], self.enter[i](x), seen)
        if i < len(self.halving):
            x = _resized(x, x.shape[2] // 2) if self.halving[i] else x
            x = self._level(x, seen, i + 1)
            x = _resized(x, x.shape[2] * 2) if self.doubling[i] else x
        return self.leave[i](self._blocks(self.after[i], x, seen))

    def _blocks(self, blocks: nn.Module, x: Tensor, seen: Tensor) -> Tensor:
        assert isinstance(blocks, nn.ModuleList)
        places, picture = _places(x), _resized(seen, x.shape[2]) if self.told else None
        for block in blocks:
            x = block(x, places, picture)
        return x


class GlobalAutoencoder(nn.Module):
    """Square pictures to C global tokens and back.

    Args:
        size: side of a picture, a power of 2 times 8.
        tokens: C.
        words: K, of each token's codebook.
        dim: D, of a word.
        heads: groups of tokens with projections of their own; a divisor of C.
        halvings: f.
        widths: of the U-Nets' levels, as many halvings as stop at maps of 8x8 in the published networks.
        blocks: residual ones on either side of a level.
        channels: of a picture.

    Shape: [B, channels, size, size] in 0..1 -> (the same, `Quantised`).
    Raises: InputError for sizes that do not fit together.
    """

    def __init__(
        self,
        size: int = 32,
        tokens: int = 64,
        words: int = 128,
        dim: int = 16,
        heads: int = 16,
        halvings: int = 1,
        widths: Sequence[int] = (16, 32, 64),
        blocks: int = 1,
        channels: int = 3,
    ) -> None:
        super().__init__()
        steps = len(widths) - 1
        if tokens % heads or size % 2**steps or not 0 <= halvings <= steps or min(size, words, dim, blocks) < 1:
            raise InputError(
                f"heads must divide tokens, 2^{steps} the size, and halvings be 0 to {steps}; got {heads=}, {tokens=}, "
                f"{size=}, {halvings=}."
            )
        self.size, self.tokens, self.heads, self.channels = size, tokens, heads, channels
        self.side = size >> halvings
        area = self.side**2
        self.encoder = UNet(channels, tokens, widths, blocks, still_up=halvings, told=True)
        self.decoder = UNet(tokens, channels, widths, blocks, still_down=halvings)
        # Without biases: those of the U-Nets' shortcuts serve both.
        self.beside_encoder = nn.Conv2d(channels, tokens, 1, bias=False)
        self.beside_decoder = nn.Conv2d(tokens, channels, 1, bias=False)
        self.down = nn.Parameter(torch.randn(heads, area, dim) / area**0.5)
        self.up = nn.Parameter(torch.randn(heads, dim, area) / dim**0.5)
        self.down_bias, self.up_bias = nn.Parameter(torch.zeros(heads, dim)), nn.Parameter(torch.zeros(heads, area))
        self.offset = nn.Parameter(torch.zeros(tokens, dim))
        self.quantiser = VectorQuantiser(words, dim, tokens)
        self._start_as_frequencies()

    @torch.no_grad()
    def _start_as_frequencies(self) -> None:
        """Begin with what Fourier would do: heads share out the frequencies of a map, the lowest ones first, and tokens
        of a head the colours, brightness first; and back. U-Nets add little. Random projections would first have to
        find a way through, and heads that all begin with the lowest frequencies say the same thing over and over.
        """
        cosines = _cosines(self.side)
        for n in range(self.heads):
            basis = cosines[:, n :: self.heads][:, : self.down.shape[2]]
            self.down[n, :, : basis.shape[1]], self.up[n, : basis.shape[1]] = basis, basis.T
        colours = _waves(self.channels)[torch.arange(self.tokens // self.heads) % self.channels]
        self.beside_encoder.weight[:, :, 0, 0] = 1.5 * colours.repeat(self.heads, 1)
        self.beside_decoder.weight[:, :, 0, 0] = colours.pinverse().repeat(1, self.heads) / 1.5
        for net in (self.encoder, self.decoder):
            net.hush(0.02)

    def vectors(self, x: Tensor) -> Tensor:
        """V, before quantisation. Shape: [B, channels, size, size] -> [B, C, D]."""
        if x.shape[1:] != (self.channels, self.size, self.size) or not len(x):
            wanted = f"[B, {self.channels}, {self.size}, {self.size}]"
            raise InputError(f"expected pictures of shape {wanted}, got {tuple(x.shape)}; cut or resize them.")
        maps = self.encoder(x) + _resized(self.beside_encoder(x), self.side)
        return _projected(maps.flatten(2), self.down, self.down_bias)

    def render(self, z: Tensor) -> Tensor:
        """Pictures of vectors with their offsets. Shape: [B, C, D] -> [B, channels, size, size]."""
        maps = _projected(z, self.up, self.up_bias).unflatten(2, (self.side, self.side))
        return self.decoder(maps) + _resized(self.beside_decoder(maps), self.size)

    def encode(self, x: Tensor) -> Tensor:
        """Tokens. Shape: [B, channels, size, size] -> [B, C] int64."""
        return self.quantiser.codes(self.vectors(x))

    def decode(self, codes: Tensor, kept: Tensor | int | None = None) -> Tensor:
        """Pictures of the first `kept` tokens, all when None. Shape: [B, C], kept [B] -> [B, channels, size, size]."""
        return self.render(first(self.quantiser.words(codes) + self.offset, kept))

    def forward(
        self, x: Tensor, kept: Tensor | int | None = None, quantised: bool = True
    ) -> tuple[Tensor, Quantised | None]:
        vectors = self.vectors(x)
        if not quantised:
            return self.render(first(vectors + self.offset, kept)), None
        found = self.quantiser(vectors)
        return self.render(first(found.values + self.offset, kept)), found


def first(z: Tensor, kept: Tensor | int | None) -> Tensor:
    """Zero all tokens but the first. Shape: z [B, C, D], kept [B] or a number -> [B, C, D]."""
    if kept is None:
        return z
    kept = torch.as_tensor(kept, device=z.device).expand(len(z))
    return z * (torch.arange(z.shape[1], device=z.device) < kept[:, None])[..., None]


def _projected(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map for each group of tokens. Shape: x [B, C, n], weight [heads, n, m], bias [heads, m] -> [B, C, m]."""
    grouped = x.unflatten(1, (len(weight), -1))
    return (grouped @ weight + bias[:, None]).flatten(1, 2)


def _cosines(side: int) -> Tensor:
    """The cosine transform of square maps, orthonormal, low frequencies first. Shape: [side^2, side^2], in columns."""
    waves, frequency = _waves(side), torch.arange(side)
    both = torch.einsum("iy,jx->yxij", waves, waves).flatten(2).flatten(0, 1)
    return both[:, (frequency[:, None] + frequency).flatten().argsort(stable=True)]


def _waves(length: int) -> Tensor:
    """The cosine transform of so many numbers, orthonormal, in rows, low frequencies first. Shape: [length, length]."""
    frequency, at = torch.arange(length)[:, None], torch.arange(length) + 0.5
    return F.normalize(torch.cos(torch.pi / length * frequency * at), dim=1)


def _places(x: Tensor) -> Tensor:
    """Sines and cosines of 2^i pi times both coordinates in 0..1. Shape: [1, 4 OCTAVES, h, w]."""
    waves = []
    for axis in (2, 3):
        at = (torch.arange(x.shape[axis], device=x.device, dtype=x.dtype) + 0.5) / x.shape[axis]
        phase = torch.pi * 2.0 ** torch.arange(OCTAVES, device=x.device, dtype=x.dtype)[:, None] * at
        wave = torch.cat([phase.sin(), phase.cos()])
        shape = (-1, x.shape[2], x.shape[3])
        waves.append((wave[:, :, None] if axis == 2 else wave[:, None]).expand(shape))
    return torch.cat(waves)[None]


def _resized(x: Tensor, side: int) -> Tensor:
    """By whole factors: means going down, bilinear going up."""
    if x.shape[2] == side:
        return x
    if x.shape[2] > side:
        return F.avg_pool2d(x, x.shape[2] // side)
    return F.interpolate(x, size=(side, side), mode="bilinear", align_corners=False)


def _conv(inputs: int, outputs: int) -> nn.Conv2d:
    """3x3; beyond the edge its pixels go on, for windows lie side by side and zeros would frame each of them."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="replicate")


def _keep_scale(*convs: nn.Conv2d) -> None:
    """Let outputs be as large as inputs at first; PyTorch's own start shrinks them, and signals die in a deep net."""
    for conv in convs:
        nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")
