"""Fitting a neural image to one picture, all of its levels at once.

Each step looks at about `BATCH` pixels: where some rows and some columns cross, one row of each of as many equal bands
and columns alike. The errors of up to three levels are summed, those of the narrowest, the widest and one drawn at
random (sandwich), and Adam follows the gradient, its rate falling along half a cosine. Errors are roots of mean
squares: of the squares themselves, the widest level's would be the least part. A first part of the steps is free; in
the rest, what is computed with is quantised.

Colours are linear in the heads. So at the end every level's head gets the weights that are best for the whole picture.
"""

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from foveate.compress import neural_codes
from foveate.compress.neural_codes import Codes
from foveate.compress.neural_decode import places
from foveate.layers.implicit import NeuralImage

BATCH = 2304
_RATES = {"fourier": 1e-2, "siren": 2e-3}
_FILTERS = 10.0
"""Rate of trained filters over that of other weights."""

Report = Callable[[float, float], bool]
"""(share done, PSNR so far) -> True to stop."""


def fit(
    net: NeuralImage,
    target: Tensor,
    shares: Iterator[float],
    generator: torch.Generator,
    bits: int | None = None,
    report: Report | None = None,
) -> bool:
    """Train all levels.

    Args:
        target: the picture.
        shares: see `foveate.compress.gaussian_fit.pace`.
        generator: of pixels and levels.
        bits: of matrices between layers while training; not quantised when None.
        report: told the PSNR of the widest level on the pixels of late; when it returns True the fit ends.

    Shape: target [C, H, W].
    Returns: whether the fit was stopped.
    """
    height, width = target.shape[1:]
    y, x = (places(n, n / max(height, width)).float() for n in (height, width))
    rows, columns = _shape(height, width)
    filters = [p for name, p in net.named_parameters() if name in ("frequencies", "phases")]
    others = [p for name, p in net.named_parameters() if name not in ("frequencies", "phases")]
    full = _RATES[net.kind]
    groups = [{"params": others, "full": full}, {"params": filters, "full": full * _FILTERS}]
    adam = torch.optim.Adam(groups[: 1 + bool(filters)], lr=full, betas=(0.9, 0.99), fused=True)
    error, last = 0.0, len(net.levels) - 1
    for step, share in enumerate(shares):
        for group in adam.param_groups:
            group["lr"] = group["full"] * (0.02 + 0.49 * (1 + math.cos(math.pi * share)))
        i, j = _strata(height, rows, generator), _strata(width, columns, generator)
        wanted = target[:, i[:, None], j].flatten(1).T
        levels = sorted({0, last, int(torch.randint(last + 1, (1,), generator=generator))})
        weights: dict[str, Tensor] = dict(net.named_parameters())
        if bits is not None:
            weights = {n: neural_codes.through(w, neural_codes.bits_of(n, bits)) for n, w in weights.items()}
        losses = [(z - wanted).square().mean() for z in functional_call(net, weights, (y[i], x[j], levels))]
        adam.zero_grad(set_to_none=True)
        (torch.stack(losses) + 1e-12).sqrt().sum().backward()
        adam.step()
        weight = max(0.02, 1 / (step + 1))
        error += weight * (float(losses[-1].detach()) - error)
        if report is not None and report(share, -10 * math.log10(max(error, 1e-12))):
            return True
    return False


@torch.no_grad()
def quantise(net: NeuralImage, target: Tensor, bits: int) -> dict[str, Codes]:
    """Codes of a network, with the best heads for the picture; the network gets the weights they stand for."""
    codes = {n: neural_codes.encode(w, neural_codes.bits_of(n, bits)) for n, w in net.named_parameters()}
    neural_codes.put(net, codes)
    for level in range(len(net.levels)):
        head, offset = _best_head(net, target, level)
        codes |= {f"heads.{level}": head, f"offsets.{level}": offset}
    neural_codes.put(net, codes)
    return codes


def _best_head(net: NeuralImage, target: Tensor, level: int) -> tuple[Codes, Codes]:
    """The codes of a head with the least squared error, out of those as trained and those solved for.

    The exact solution has large weights of either sign that few bits cannot hold, so some ridges are tried.
    """
    gram, right = _normal(net, target, level)
    trained = torch.cat([net.heads[level], net.offsets[level][:, None]], 1).double()
    slope = right - trained @ gram
    found: list[tuple[float, Codes, Codes]] = []
    for ridge in (None, 1e-1, 1e-2, 1e-3, 1e-4):
        head = trained
        if ridge is not None:
            firm = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
            head = trained + torch.linalg.solve(firm, slope.T).T
        codes = neural_codes.encode(head[:, :-1].float(), 8), neural_codes.encode(head[:, -1].float(), 8)
        coded = torch.cat([codes[0].weights(), codes[1].weights()[:, None]], 1).double()
        found.append((float((coded @ gram * coded - 2 * coded * right).sum()), *codes))
    return min(found, key=lambda candidate: candidate[0])[1:]


def _normal(net: NeuralImage, target: Tensor, level: int, pixels: int = 1 << 17) -> tuple[Tensor, Tensor]:
    """Normal equations of a head, over all pixels or a regular grid of at most so many.

    Shape: -> sums of z z^T [n + 1, n + 1] and of t z^T [C, n + 1], where z ends in a 1 for the offset.
    """
    height, width = target.shape[1:]
    apart = math.ceil(math.sqrt(height * width / pixels))
    y, x = (places(n, n / max(height, width))[apart // 2 :: apart].float() for n in (height, width))
    wanted = target[:, apart // 2 :: apart, apart // 2 :: apart]
    size, band = net.levels[level][0] + 1, max(1, (1 << 14) // len(x))
    gram, right = torch.zeros(size, size).double(), torch.zeros(len(target), size).double()
    for top in range(0, len(y), band):
        (z,) = net(y[top : top + band], x, [level], heads=False)
        seen = F.pad(z, (0, 1), value=1.0)
        gram += (seen.T @ seen).double()
        right += (wanted[:, top : top + band].flatten(1) @ seen).double()
    return gram, right


def _shape(height: int, width: int) -> tuple[int, int]:
    """Rows and columns of a batch: all of a small picture, else about a square."""
    rows = min(height, max(math.isqrt(BATCH), BATCH // width))
    return rows, min(width, max(1, BATCH // rows))


def _strata(length: int, count: int, generator: torch.Generator) -> Tensor:
    """One number out of each of `count` equal parts of 0..length - 1."""
    return (
        ((torch.arange(count) + torch.rand(count, generator=generator)) * (length / count)).long().clamp_max(length - 1)
    )
