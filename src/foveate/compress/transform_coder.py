"""The network of a learned codec, and its weights as they are shipped.

    x  ->  analysis  ->  y  ->  hyperprior  ->  y_hat  ->  synthesis  ->  x_hat

A file of weights holds kernels in 8 bits with a scale for each of their first axis, the rest as float16, and the whole
numbers that encoder and decoder must agree upon for every level, which is a rate between the trained ones:

    steps   [levels, M]     2^-a, in units of 2^-12          side_steps   [levels, Z]         2^-b, likewise
    shifts  [levels, M]     8 a, likewise                    side_tables  [levels, Z, K + 1]  frequencies less 1
                                                             main_tables  `latent_contexts`   frequencies less 1
"""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.compress import latent_contexts
from foveate.compress.entropy import Ints, Table, quantise
from foveate.compress.hyperprior import OCTAVE, Coded, MeanScaleHyperprior, gaussian_bits
from foveate.compress.sga import Rounding
from foveate.compress.transforms import FACTOR, SMALL, Analysis, JpegLike, TwoLayer
from foveate.compress.whole import UNIT
from foveate.errors import WeightsError
from foveate.weights import FOLDER

SLUG = "shallow-ntc"
LATENTS = 320
RATES, BETWEEN = 6, 4
LEVELS = (RATES - 1) * BETWEEN + 1
REACH = 24
"""Side latents beyond it, in steps, cost an escape."""


def price(rate: Any) -> Any:
    """lambda of a rate: bits per pixel that a unit of mean squared error, in levels of 255, is worth.

    >>> price(0), price(2)
    (0.00125, 0.005)
    """
    return 0.00125 * 2**rate


class TransformCoder(nn.Module):
    """Analysis, hyperprior and synthesis.

    Shape: x [B, 3, H, W] in 0..1, sides multiples of 64; rate [B] -> [B, 3, H, W] and the bits.
    """

    def __init__(self, analysis: nn.Module, synthesis: nn.Module, prior: MeanScaleHyperprior) -> None:
        super().__init__()
        self.analysis, self.synthesis, self.prior = analysis, synthesis, prior

    def forward(self, x: Tensor, rate: Tensor) -> tuple[Tensor, Coded]:
        coded = self.prior(self.analysis(x - 0.5), rate)
        return self.synthesis(coded.latents) + 0.5, coded


def small() -> TransformCoder:
    """The network whose weights come with foveate, untrained."""
    return TransformCoder(Analysis(SMALL, LATENTS), TwoLayer(LATENTS), MeanScaleHyperprior(LATENTS, rates=RATES))


class Trial(NamedTuple):
    """What latents would cost and give, for some way of rounding them.

    Args:
        prior, synthesis: of the coder.
        image: the picture; latents that only its padding has are not counted.
        step, side_step, shift: 2^-a, 2^-b and 8 a of the rate.

    Shape: image [1, 3, h, w]; gains as in `MeanScaleHyperprior.at`; y [1, M, H, W] and z [1, Z, H / 4, W / 4] in steps.
    """

    prior: MeanScaleHyperprior
    synthesis: nn.Module
    image: Tensor
    step: Tensor
    side_step: Tensor
    shift: Tensor

    def __call__(self, rounding: Rounding, y: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Bits in all, and the mean squared error in levels of 255."""
        height, width = self.image.shape[2:]
        k_z = rounding(z)
        mean, index = self.prior.describe(k_z * self.side_step)
        k = rounding(y - mean / self.step)
        rows, columns = blocks(height, width)
        latents, k, index = (x[..., :rows, :columns] for x in (mean + k * self.step, k, index + self.shift))
        bits = gaussian_bits(k, index).sum() + self.prior.side_bits(k_z, -self.side_step.log2()).sum()
        decoded = self.synthesis(latents)[..., :height, :width] + 0.5
        return bits, 255**2 * F.mse_loss(decoded, self.image)


def blocks(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of latents that a picture has."""
    return -(-height // FACTOR), -(-width // FACTOR)


class Agreed(NamedTuple):
    """Whole numbers for every level, on which encoder and decoder agree; see the module."""

    steps: Tensor
    shifts: Tensor
    side_steps: Tensor
    side_tables: Tensor
    main_tables: Tensor

    def tables(self, level: int) -> list[Table]:
        """The tables of the side latents."""
        return [Table(row, -REACH, escape=True) for row in self.side_tables[level].numpy().astype(np.int64) + 1]


def agree(prior: MeanScaleHyperprior, counts: Ints) -> Agreed:
    """Make the whole numbers of a trained hyperprior, given what `latent_contexts.count` found."""
    with torch.no_grad():
        a, b = (gain[..., 0, 0].double() for gain in prior.at(torch.arange(LEVELS) / BETWEEN))
        k = torch.arange(-REACH, REACH + 1).float()
        tables = []
        for row in b.float():
            bits = prior.side_bits(k.expand(1, len(row), 1, -1), row[None, :, None, None])[0, :, 0].double()
            mass = torch.exp2(-bits)
            mass = torch.cat([mass, (1 - mass.sum(1, keepdim=True)).clamp(min=0)], 1)
            tables.append(torch.from_numpy(quantise((mass * 2**30).long().numpy()) - 1))
    steps, shifts, side_steps = ((x * UNIT).round().int() for x in (torch.exp2(-a), OCTAVE * a, torch.exp2(-b)))
    learned = torch.from_numpy(latent_contexts.learn(counts) - 1)
    return Agreed(steps, shifts, side_steps, torch.stack(tables).to(torch.uint16), learned.to(torch.uint16))


def save(coder: TransformCoder, linear: JpegLike, counts: Ints, card: dict[str, Any], folder: Path = FOLDER) -> None:
    """Write weights and card, each to a temporary name first.

    Args:
        coder: of the shape of `small()`.
        linear: a second synthesis for the same latents.
        counts: of `latent_contexts.count`, over training pictures.
        card: how they were made.
    """
    from safetensors.torch import save_file

    state = coder.state_dict() | {f"linear.{name}": value for name, value in linear.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.dim() == 4:
            scale = value.flatten(1).abs().amax(1).clamp(min=1e-12) / 127
            tensors[f"{name}.scale"] = scale
            value = (value / scale[:, None, None, None]).round().to(torch.int8)
        else:
            value = value.half()
        tensors[name] = value.contiguous()
    tensors |= agree(_read(tensors)[0].prior, counts)._asdict()
    part = folder / f"{SLUG}.part"
    save_file(tensors, part)
    os.replace(part, folder / f"{SLUG}.safetensors")
    part.write_text(json.dumps({"system": SLUG, **card}, indent=2) + "\n")
    os.replace(part, folder / f"{SLUG}.json")


class Shipped(NamedTuple):
    """The trained networks, and what files of theirs agree upon."""

    coder: TransformCoder
    linear: JpegLike
    agreed: Agreed


@lru_cache(maxsize=1)
def shipped() -> Shipped:
    """The networks that come with foveate (recipes/shallow_ntc.py).

    Raises: WeightsError when they cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(FOLDER / f"{SLUG}.safetensors")
        coder, linear = _read(tensors)
        agreed = Agreed(*(tensors[name] for name in Agreed._fields))
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise WeightsError(f"the weights of {SLUG} cannot be read: {error}; install foveate anew.") from error
    return Shipped(coder, linear, agreed)


def _read(tensors: dict[str, Tensor]) -> tuple[TransformCoder, JpegLike]:
    state = {}
    for name, value in tensors.items():
        if value.dtype == torch.int8:
            value = value.float() * tensors[f"{name}.scale"][:, None, None, None]
        if not name.endswith(".scale") and name not in Agreed._fields:
            state[name] = value.float()
    coder, linear = small().eval(), JpegLike(LATENTS).eval()
    linear.load_state_dict({name: state.pop(f"linear.{name}") for name in linear.state_dict()})
    coder.load_state_dict(state)
    return coder.requires_grad_(False), linear.requires_grad_(False)
