"""IARN: one invertible network that shrinks a picture by any factor and restores it.

Pan, Li, He, Lin, Hou, Ling 2022, "Effective Invertible Arbitrary Image Rescaling", arXiv:2209.13055. The coupling and
the losses are those of IRN (Xiao et al. 2020, arXiv:2005.05650).

With D the antialiased bicubic reduction to the wanted size and U the bicubic enlargement back, a picture x is split
before the network into what survives the cycle and what does not, a = U(D(x)) and b = x - a. Couplings change both,

    a <- a + F(b, e)      b <- b exp(s) + G(a, e),   s = 2 sigmoid(H(a, e)) - 1

and are undone in the opposite order, exactly. Of the result (a', z) only y = Q(D(a')) is kept, Q rounding to 8 bits.
Enlarging begins at (U(y), 0) and runs backwards; x^ = a + b. Training makes a' survive D and U.

The encoding e [4, H, W] tells the sub-networks where a pixel lies in its cell of the small grid, of h x w pixels:
frac((i + 1/2) h / H) - 1/2 and the same for columns, and h / H, w / W. It is never changed, so nothing of the inverse
depends on it.

With split="haar" the network is IRN itself, for scale 2^levels: a Haar transform before each level's couplings makes
the split (the small picture, a, is the first three of the bands), there is no encoding, and a' itself is y.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.tiles import Box
from foveate.errors import InputError, WeightsError
from foveate.layers.resample import Region, Size, cropped, grown_region, had, parts, resize, wholes
from foveate.layers.rescaler import Rescaler, check_turn, quantise, read_region, region_of, whole_box
from foveate.layers.upscaler import Read, window_reader
from foveate.ops.wavelet import dwt2, idwt2


class DenseBlock(nn.Module):
    """3x3 convolutions that each see all maps before; the last one is zero at first.

    Args:
        inputs, outputs: channels.
        growth: channels of each layer between.
        layers: convolutions.

    Shape: [B, inputs, H, W] -> [B, outputs, H, W].
    """

    def __init__(self, inputs: int, outputs: int, growth: int = 32, layers: int = 5) -> None:
        super().__init__()
        for i in range(1, layers + 1):
            conv = nn.Conv2d(inputs + (i - 1) * growth, growth if i < layers else outputs, 3, padding=1)
            nn.init.xavier_normal_(conv.weight, 0.1 if i < layers else 0)
            nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
            self.add_module(f"conv{i}", conv)

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.children()
        for conv in inner:
            x = torch.cat([x, F.leaky_relu(conv(x), 0.2)], 1)
        result: Tensor = last(x)
        return result


class Coupling(nn.Module):
    """Change the first three channels by the others and the others by the first three, so that it can be undone.

    Args:
        channels: of a and b together.
        encoded: channels of the encoding.
        growth, layers: of the three dense blocks.

    Shape: x [B, channels, H, W], e [1, encoded, H, W] or None -> as x.
    """

    def __init__(self, channels: int, encoded: int, growth: int, layers: int) -> None:
        super().__init__()
        rest = channels - 3
        self.F = DenseBlock(rest + encoded, 3, growth, layers)
        self.G = DenseBlock(3 + encoded, rest, growth, layers)
        self.H = DenseBlock(3 + encoded, rest, growth, layers)

    def forward(self, x: Tensor, e: Tensor | None) -> Tensor:
        a, b = x[:, :3], x[:, 3:]
        a = a + _given(self.F, b, e)
        return torch.cat([a, b * self.log_scale(a, e).exp() + _given(self.G, a, e)], 1)

    def inverse(self, y: Tensor, e: Tensor | None) -> Tensor:
        a, b = y[:, :3], y[:, 3:]
        b = (b - _given(self.G, a, e)) * (-self.log_scale(a, e)).exp()
        return torch.cat([a - _given(self.F, b, e), b], 1)

    def log_scale(self, a: Tensor, e: Tensor | None) -> Tensor:
        """s, between -1 and 1."""
        return 2 * torch.sigmoid(_given(self.H, a, e)) - 1


class Haar(nn.Module):
    """Means of 2x2 pixels of all channels, then their differences across, down and diagonally, all over 4.

    Shape: [B, C, H, W] -> [B, 4*C, ceil(H/2), ceil(W/2)].
    """

    def forward(self, x: Tensor, e: Tensor | None) -> Tensor:
        c, bands = x.shape[1], dwt2(x) / 2
        down, across, diagonal = bands[:, c:].unflatten(1, (c, 3)).unbind(2)
        return torch.cat([bands[:, :c], across, down, diagonal], 1)

    def inverse(self, y: Tensor, e: Tensor | None) -> Tensor:
        mean, across, down, diagonal = y.chunk(4, 1)
        return idwt2(2 * torch.cat([mean, torch.stack([down, across, diagonal], 2).flatten(1, 2)], 1))


class IARN(Rescaler):
    """Invertible rescaling to any size.

    Args:
        blocks: couplings; with split="haar" a number per level, each level halving the sides.
        growth, layers: of the dense blocks. Small: 4 blocks of growth 16 and 3 layers, 64,896 parameters.
        split: "position" for any scale, "haar" for IRN at scale 2^levels ([8] at 2, [8, 8] at 4).

    Shape: x [B, 3, H, W] in 0..1, size (h, w) -> (small picture [B, 3, h, w] of 8 bits, restored [B, 3, H, W]).
    Raises: InputError for other kinds of split.
    """

    slug, recipe = "iarn", "recipes/rescale.py iarn"
    largest = 640

    def __init__(
        self, blocks: int | Sequence[int] = 8, growth: int = 32, layers: int = 5, split: str = "position"
    ) -> None:
        super().__init__()
        if split not in ("position", "haar"):
            raise InputError(f"unknown split {split!r}; use 'position' for any scale or 'haar' for a power of 2.")
        counts = [blocks] if isinstance(blocks, int) else list(blocks)
        if not counts or min(counts) < 1 or layers < 1 or growth < 1 or (split == "position" and len(counts) > 1):
            raise InputError(
                f"IARN takes blocks, growth and layers of 1 or more, and a list of blocks only with split='haar', "
                f"got blocks={blocks!r}, growth={growth!r}, layers={layers!r}, split={split!r}."
            )
        self.split, steps, reach = split, list[nn.Module](), 0
        for level, count in enumerate(counts, 1):
            if split == "haar":
                steps.append(Haar())
            channels, encoded = (3 * 4**level, 0) if split == "haar" else (6, 4)
            steps += [Coupling(channels, encoded, growth, layers) for _ in range(count)]
            reach += 2 * layers * count * (2**level if split == "haar" else 1)
        self.operations = nn.ModuleList(steps)
        self.reach = reach
        self.scale = 2 ** len(counts) if split == "haar" else None
        self.halo = reach

    def forward(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        low = quantise(self.reduce(x, size))
        return low, self.enlarge(low, (x.shape[2], x.shape[3]))

    def reduce(self, x: Tensor, size: Size) -> Tensor:
        check_turn(x, size, shrink=True)
        if self.scale is not None:
            self._check_scale(x, size, shrink=True)
            return self.analyse(x, size)[0].to(x.dtype)
        return self._reduced(window_reader(x), (x.shape[2], x.shape[3]), size, whole_box(size)).to(x.dtype)

    def enlarge(self, x: Tensor, size: Size) -> Tensor:
        check_turn(x, size, shrink=False)
        if self.scale is not None:
            self._check_scale(x, size, shrink=False)
            rest = x.new_zeros(len(x), 3 * (self.scale**2 - 1), *x.shape[2:])
            return self.invert(_wide(torch.cat([x, rest], 1)))[..., : size[0], : size[1]].to(x.dtype)
        return self._enlarged(window_reader(x), (x.shape[2], x.shape[3]), size, whole_box(size)).to(x.dtype)

    def part(self, read: Read, source: Size, size: Size, box: Box, shrink: bool) -> Tensor:
        if self.scale is not None:
            return super().part(read, source, size, box, shrink)
        return (self._reduced if shrink else self._enlarged)(read, source, size, box)

    def analyse(self, x: Tensor, size: Size) -> tuple[Tensor, Tensor]:
        """What is made of a picture: (a', z). With `split="haar"`, a' is the small picture.

        Shape: [B, 3, H, W] -> twice [B, 3, H, W], or [B, 3, h, w] and [B, 3 * (s*s - 1), h, w].
        """
        source = (x.shape[2], x.shape[3])
        if self.scale is None:
            y = self.transform(*self._split(window_reader(x), source, size, region_of(whole_box(source))))
        else:
            over = [-n % self.scale for n in source]
            y = self.transform(F.pad(_wide(x), (0, over[1], 0, over[0]), mode="replicate"))
        return y[:, :3], y[:, 3:]

    def synthesise(self, a: Tensor, z: Tensor, size: Size) -> Tensor:
        """The picture that `analyse` takes apart into a' and z; size (h, w) is that of the small picture."""
        if self.scale is not None:
            return self.invert(torch.cat([a, z], 1))
        source = (a.shape[2], a.shape[3])
        e = encoding(source, size, region_of(whole_box(source)), a)
        return _joined(self.invert(torch.cat([a, z], 1), e))

    def transform(self, x: Tensor, e: Tensor | None = None) -> Tensor:
        """The invertible network."""
        for step in self.operations:
            x = step(x, e)
        return x

    def invert(self, y: Tensor, e: Tensor | None = None) -> Tensor:
        """Its inverse."""
        for step in reversed(self.operations):
            y = step.inverse(y, e)  # type: ignore[operator]
        return y

    def loss(
        self,
        x: Tensor,
        size: Size,
        guide: float = 1.0,
        latent: float = 1.0,
        stay: float = 1.0,
        noise: float = 1.0,
    ) -> Tensor:
        """How far pictures are from coming back, and their small versions from looking as they should.

            mean |x - x^|  +  guide mean (D(a') - D(x))^2  +  latent mean z^2  +  stay mean |U(D(a')) - a'|

        IRN sums over pixels and weighs 1, s_y s_x and 1; per pixel of x these are means of weight 1.

        Args:
            guide, latent, stay: weights. The last is for any-scale networks only.
            noise: standard deviation of what stands for z when the picture is restored; 0 for the zeros that are used
                later.
        """
        source = (x.shape[2], x.shape[3])
        down, up = wholes(source, size), wholes(size, source)
        a, z = self.analyse(x, size)
        small = a if self.scale is not None else resize(a, down)
        kept = quantise(small)
        back = kept if self.scale is not None else resize(kept, up)
        restored = self.synthesise(back, noise * torch.randn_like(z) if noise else torch.zeros_like(z), size)
        restored = restored[..., : source[0], : source[1]]
        total = (restored - x).square().add(1e-6).sqrt().mean()
        total = total + guide * (small - resize(x, down)).square().mean() + latent * z.square().mean()
        return total if self.scale is not None else total + stay * (resize(small, up) - a).abs().mean()

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor]) -> Self:
        """Build the network of an IRN checkpoint (pkuxmq/Invertible-Image-Rescaling).

        Raises: WeightsError when the keys do not fit.
        """
        found = {key: value for key, value in state.items() if not key.endswith("haar_weights")}
        places = [int(m[1]) for key in state if (m := re.fullmatch(r"operations\.(\d+)\.haar_weights", key))]
        steps = 1 + max((int(m[1]) for key in state if (m := re.match(r"operations\.(\d+)\.", key))), default=-1)
        if not places or sorted(places)[0] != 0 or "operations.1.F.conv1.weight" not in found:
            raise WeightsError(
                f"no IRN: the keys begin with {sorted(state)[:3]}; expected operations.0.haar_weights, "
                "operations.1.F.conv1.weight and so on."
            )
        ends = [*sorted(places)[1:], steps]
        blocks = [end - start - 1 for start, end in zip(sorted(places), ends, strict=True)]
        layers = sum(re.fullmatch(r"operations\.1\.F\.conv\d+\.weight", key) is not None for key in found)
        try:
            model = cls(blocks, found["operations.1.F.conv1.weight"].shape[0], layers, "haar")
            model.load_state_dict(found)
        except (RuntimeError, InputError) as error:
            raise WeightsError(f"the checkpoint does not fit IRN with blocks {blocks}: {error}") from error
        return model.eval()

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple[Self, tuple[Tensor, Size]]:
        """A small network whose couplings have left zero, and pictures for it."""
        model = cls(blocks=2, growth=4, layers=2)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        return model, (torch.rand(2, 3, *((13, 18) if larger else (9, 11))), (5, 6))

    def _check_scale(self, x: Tensor, size: Size, shrink: bool) -> None:
        large, small = (tuple(x.shape[2:]), size) if shrink else (size, tuple(x.shape[2:]))
        assert self.scale is not None
        if tuple(-(-n // self.scale) for n in large) != tuple(small):
            raise InputError(
                f"with split='haar' this network knows scale {self.scale} alone, got {large[1]}x{large[0]} and "
                f"{small[1]}x{small[0]}; use split='position' for any scale."
            )

    def _split(self, read: Read, source: Size, size: Size, region: Region) -> tuple[Tensor, Tensor]:
        """a and b of a region of the picture, and its encoding."""
        up = parts(size, source, region)
        down = parts(source, size, had(up))
        x = _wide(read_region(read, had(down)))
        a = resize(resize(x, down), up)
        return torch.cat([a, cropped(x, had(down), region) - a], 1), encoding(source, size, region, a)

    def _reduced(self, read: Read, source: Size, size: Size, box: Box) -> Tensor:
        last = parts(source, size, region_of(box))
        region = grown_region(had(last), self.reach, source)
        y = self.transform(*self._split(read, source, size, region))
        return resize(cropped(y[:, :3], region, had(last)), last)

    def _enlarged(self, read: Read, source: Size, size: Size, box: Box) -> Tensor:
        region = grown_region(region_of(box), self.reach, size)
        up = parts(source, size, region)
        a = resize(_wide(read_region(read, had(up))), up)
        x = self.invert(torch.cat([a, torch.zeros_like(a)], 1), encoding(size, source, region, a))
        return cropped(_joined(x), region, region_of(box))


def encoding(source: Size, size: Size, region: Region, like: Tensor) -> Tensor:
    """Where each pixel of a region of the large picture lies in its cell of the small one, and the inverse scales.

    Shape: -> [1, 4, rows, columns].

    >>> encoding((4, 4), (2, 4), ((0, 4), (0, 1)), torch.zeros(1))[0, :, :, 0].tolist()
    [[-0.25, 0.25, -0.25, 0.25], [0.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.5, 0.5], [1.0, 1.0, 1.0, 1.0]]
    """
    inside = []
    for large, small, span in zip(source, size, region, strict=True):
        # In whole numbers, so that the border of a cell does not depend on rounding.
        at = (2 * torch.arange(*span, device=like.device) + 1) * small % (2 * large)
        inside.append((at / (2 * large) - 0.5).to(like.dtype))
    ones = torch.ones(len(inside[0]), len(inside[1]), dtype=like.dtype, device=like.device)
    scales = [ones * (small / large) for large, small in zip(source, size, strict=True)]
    return torch.stack([inside[0][:, None] * ones, inside[1] * ones, *scales])[None]


def _given(block: nn.Module, x: Tensor, e: Tensor | None) -> Tensor:
    """A sub-network's answer to x and the encoding, in the precision of x."""
    dtype = next(block.parameters()).dtype
    seen = x if e is None else torch.cat([x, e.expand(len(x), -1, -1, -1)], 1)
    answer: Tensor = block(seen.to(dtype))
    return answer.to(x.dtype)


def _joined(x: Tensor) -> Tensor:
    return x[:, :3] + x[:, 3:]


def _wide(x: Tensor) -> Tensor:
    """At least float32: in less, what is added and taken away again does not come back."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
