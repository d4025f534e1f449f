"""Fitting Gaussians to one picture: where they start, how they move, where new ones go.

The places of the first ones are drawn without replacement from

    P(p) = (1 - u) |grad I(p)| / sum + u / (H W)                        u = 0.3,

their size is that of the gaps between them, sqrt(1 / (N P)) times a factor. Then every step draws all of them, and Adam
moves them by the gradient of the squared error. Steps are relative: a centre moves by a share of its Gaussian's size, a
size by a share of itself; so that one rate serves large and small ones. The rate falls along half a cosine.

During the first half, in `ROUNDS` rounds, the rest of the N Gaussians is added where the squared error is large, each
as small as the error is concentrated there. Those already there keep their momentum: a Gaussian counts its own steps.

In the modes "sum" and "cut" the picture is linear in the colours. New ones start at 0, and a few steps of conjugate
gradients give all colours their best values for the places and shapes of the moment, which Adam would take longer to
find. With "topk" colours are means, and new ones start with the picture's.
"""

import math
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.engine.importance import gradient
from foveate.ops.gaussians import Grid, conic_of_cholesky, conic_of_scale, render

ROUNDS = 14
UNIFORM = 0.3
FIRST, LAST = 0.07, 0.53
"""Shares of the fit at which the first and the last new Gaussians arrive."""

_MOVE, _TURN, _PAINT = 0.2, 0.1, 0.04
"""Rates of Adam: centres (of a size), shapes (of themselves), colours."""

_DECAYS = (0.8, 0.99)
_LEAST, _LARGEST = 0.3, 1e4
"""Standard deviations in pixels that are possible."""


class Splats(NamedTuple):
    """Gaussians of a picture: centres [N, 2] in pixels, shapes [N, 3] as their `Form` says, colours [N, C]."""

    centres: Tensor
    shapes: Tensor
    colours: Tensor

    def select(self, index: Tensor) -> "Splats":
        """Those of an index or mask."""
        return Splats(*(t[index] for t in self))

    def plus(self, other: "Splats") -> "Splats":
        """These, then others."""
        return Splats(*(torch.cat(pair) for pair in zip(self, other, strict=True)))


class Form(NamedTuple):
    """What the three numbers of a shape mean.

    Attributes:
        conic: shapes -> conics.
        start: standard deviations [N] of round Gaussians -> shapes.
        size: shapes -> (mean standard deviation [N, 1], what a step of each number is a share of [N, 3]).
        bound: shapes -> the nearest possible ones.
    """

    conic: Callable[[Tensor], Tensor]
    start: Callable[[Tensor], Tensor]
    size: Callable[[Tensor], tuple[Tensor, Tensor]]
    bound: Callable[[Tensor], Tensor]


def _cholesky_size(shapes: Tensor) -> tuple[Tensor, Tensor]:
    size = (shapes[:, :1] * shapes[:, 2:]).sqrt()
    return size, size.expand(-1, 3)


def _cholesky_bound(shapes: Tensor) -> Tensor:
    l11, l21, l22 = shapes.unbind(1)
    return torch.stack([l11.clamp(_LEAST, _LARGEST), l21.clamp(-_LARGEST, _LARGEST), l22.clamp(_LEAST, _LARGEST)], 1)


def _axes_size(shapes: Tensor) -> tuple[Tensor, Tensor]:
    return shapes[:, :2].prod(1, keepdim=True).rsqrt(), torch.cat([shapes[:, :2], torch.ones_like(shapes[:, 2:])], 1)


CHOLESKY = Form(
    conic_of_cholesky,
    lambda s: torch.stack([s, torch.zeros_like(s), s], 1),
    _cholesky_size,
    _cholesky_bound,
)
"""(l11, l21, l22) of the covariance L L^T, in pixels."""

AXES = Form(
    lambda shapes: conic_of_scale(shapes[:, :2], shapes[:, 2]),
    lambda s: torch.stack([1 / s, 1 / s, torch.zeros_like(s)], 1),
    _axes_size,
    lambda shapes: torch.cat([shapes[:, :2].clamp(1 / _LARGEST, 1 / _LEAST), shapes[:, 2:]], 1),
)
"""(1 / s1, 1 / s2, angle), standard deviations in pixels."""

Through = Callable[[Splats], Splats]
"""What happens to Gaussians before they are drawn: quantisation, with gradients."""

Loss = Callable[[Tensor, Tensor], Tensor]
"""(drawn, target), [C, H, W] each -> gradient of the loss with respect to the drawn picture."""


def squared(drawn: Tensor, target: Tensor) -> Tensor:
    """Gradient of half the squared error."""
    return drawn - target


def pace(steps: int, seconds: float | None = None) -> Iterator[float]:
    """Shares of the way from 0 up to 1: of a number of steps, or of seconds (at least one step)."""
    if seconds is None:
        yield from (step / steps for step in range(steps))
        return
    begun = time.perf_counter()
    share = 0.0
    while share < 1:
        yield share
        share = (time.perf_counter() - begun) / max(seconds, 1e-9)


class Fit:
    """Gaussians on their way to a picture.

    Args:
        target: the picture.
        form: meaning of shapes.
        mode: of `foveate.ops.gaussians.render`.
        generator: of the random places.
        loss: what is to be small.

    Shape: target [C, H, W].
    """

    def __init__(self, target: Tensor, form: Form, mode: str, generator: torch.Generator, loss: Loss = squared) -> None:
        self.target, self.form, self.mode, self.generator, self.loss = target, form, mode, generator, loss
        self.channels, height, width = target.shape
        self.grid = Grid.over(height, width)
        empty = target.new_zeros
        self.splats = Splats(empty(0, 2), empty(0, 3), empty(0, self.channels))
        self._momenta = [(torch.zeros_like(t), torch.zeros_like(t)) for t in self.splats]
        self._age = empty(0, 1)
        self.extra: list[tuple[Tensor, float]] = []
        self._extra: list[tuple[Tensor, Tensor]] = []

    def draw(self, splats: Splats | None = None) -> Tensor:
        """The picture so far, or of other Gaussians. Shape: [C, H, W]."""
        centres, shapes, colours = self.splats if splats is None else splats
        return render(centres, self.form.conic(shapes), colours, self.grid, self.mode)

    def grow(self, count: int, among: int, density: Tensor, factor: float = 0.5, most: float = 40.0) -> None:
        """Add Gaussians at places drawn from a density [H, W].

        Args:
            among: how many Gaussians would follow the density, which says how large the gaps between them are.
            factor: their size over that of the gaps.
            most: their largest standard deviation.
        """
        if count < 1:
            return
        width = density.shape[1]
        weight = density.flatten() / density.sum()
        index = torch.multinomial(weight, count, generator=self.generator)
        where = torch.stack([index % width, index // width], 1)
        centres = where + torch.rand(count, 2, generator=self.generator).to(where.device)
        size = (factor / (among * weight[index]).sqrt()).clamp(0.7, most)
        seen = self.target[:, where[:, 1], where[:, 0]].T.contiguous()
        colours = seen if self.mode == "topk" else torch.zeros_like(seen)
        self._append(Splats(centres.to(seen), self.form.start(size), colours))
        if self.mode != "topk":
            self.repaint()

    def keep(self, index: Tensor) -> None:
        """Drop all Gaussians but those of an index or mask."""
        self.splats = self.splats.select(index)
        self._momenta = [(a[index], b[index]) for a, b in self._momenta]
        self._age = self._age[index]

    def repaint(self, rounds: int = 6) -> None:
        """Best colours for places and shapes as they are, by conjugate gradients; for modes that are linear."""
        conics = self.form.conic(self.splats.shapes)
        colours = best_colours(
            lambda colours: render(self.splats.centres, conics, colours, self.grid, self.mode),
            self.splats.colours,
            self.target,
            rounds,
        )
        self.splats = self.splats._replace(colours=colours)

    def learn(self, values: Tensor, rate: float) -> None:
        """Let Adam move further values, such as those of a quantiser; steps are a share of their mean magnitude."""
        self.extra.append((values, rate))
        self._extra.append((torch.zeros_like(values), torch.zeros_like(values)))

    def step(
        self, rate: float, through: Through | None = None, pull: Callable[[Splats], Splats | None] | None = None
    ) -> float:
        """Move all Gaussians once.

        Args:
            rate: 1 for full steps.
            through: applied before drawing.
            pull: further gradients of the Gaussians, such as those of a commitment.

        Returns: PSNR in dB before the step.
        """
        leaves = [t.detach().requires_grad_() for t in self.splats]
        more = [values.requires_grad_() for values, _ in self.extra]
        drawn = self.draw(Splats(*leaves) if through is None else through(Splats(*leaves)))
        seen = drawn.detach()
        grads = torch.autograd.grad(drawn, leaves + more, self.loss(seen, self.target), allow_unused=True)
        moved = list(grads[:3])
        pulled = None if pull is None else pull(self.splats)
        if pulled is not None:
            moved = [g + p for g, p in zip(moved, pulled, strict=True)]
        self._age += 1
        scales = (*self.form.size(self.splats.shapes), torch.ones(()))
        rates = (_MOVE, _TURN, _PAINT)
        parts = []
        for values, g, moments, scale, own in zip(self.splats, moved, self._momenta, scales, rates, strict=True):
            parts.append(values - rate * own * scale * _adam(g, moments, self._age))
        centres, shapes, colours = parts
        edge = centres.new_tensor([self.grid.width, self.grid.height])
        self.splats = Splats(centres.clamp_min(0).minimum(edge), self.form.bound(shapes), colours)
        for (values, own), g, moments in zip(self.extra, grads[3:], self._extra, strict=True):
            with torch.no_grad():
                size = values.abs().mean()
                values -= rate * own * size * _adam(g, moments, self._age.max())
            values.requires_grad_(False)
        return psnr(seen, self.target)

    def _append(self, new: Splats) -> None:
        self.splats = self.splats.plus(new)
        self._momenta = [
            (torch.cat([a, torch.zeros_like(t)]), torch.cat([b, torch.zeros_like(t)]))
            for (a, b), t in zip(self._momenta, new, strict=True)
        ]
        self._age = torch.cat([self._age, self._age.new_zeros(len(new.centres), 1)])


def grow_by_error(fit: Fit, count: int) -> None:
    """Add Gaussians where the squared error, averaged over 3 x 3 pixels, is large."""
    error = (fit.draw().clamp(0, 1) - fit.target).square().mean(0)
    error = F.avg_pool2d(error[None, None], 3, 1, 1)[0, 0]
    fit.grow(count, len(fit.splats.centres) + count, error + 1e-9 + 1e-3 * error.mean(), most=3.0)


def run(
    fit: Fit,
    count: int,
    shares: Iterator[float],
    first: float,
    uniform: float = UNIFORM,
    report: Callable[[float, float], bool] | None = None,
) -> bool:
    """Fit `count` Gaussians.

    Args:
        shares: see `pace`.
        first: share of the Gaussians that are there from the beginning.
        uniform: share of those that ignore the gradient.
        report: called with (share, PSNR); when it returns True the fit ends as it is.

    Returns: whether the fit was stopped.
    """
    start = min(count, max(1, math.ceil(first * count)))
    fit.grow(start, start, density(fit.target, uniform))
    due = [] if start == count else [FIRST + (LAST - FIRST) * i / (ROUNDS - 1) for i in range(ROUNDS)]
    for share in shares:
        while due and share >= due[0]:
            left = count - len(fit.splats.centres)
            grow_by_error(fit, -(-left // len(due)))
            due.pop(0)
        reached = fit.step(max(0.5 + 0.5 * math.cos(math.pi * share), 0.05))
        if report is not None and report(share, reached):
            return True
    return False


def density(target: Tensor, uniform: float = UNIFORM) -> Tensor:
    """Where the first Gaussians go. Shape: [C, H, W] -> [H, W], sums to 1."""
    slope = gradient(target[None])[0, 0]
    even = torch.full_like(slope, 1 / slope.numel())
    total = slope.sum()
    return even if total <= 1e-6 * slope.numel() else (1 - uniform) * slope / total + uniform * even


def best_colours(
    draw: Callable[[Tensor], Tensor], colours: Tensor, target: Tensor, rounds: int, ridge: float = 1e-3
) -> Tensor:
    """Minimise |draw(colours) - target|^2 + ridge |colours|^2 by conjugate gradients, for a draw that is linear.

    Shape: colours [N, C], target [C, H, W] -> [N, C].
    """

    def adjoint(residual: Tensor) -> Tensor:
        probe = torch.zeros_like(colours, requires_grad=True)
        (found,) = torch.autograd.grad(draw(probe), probe, residual)
        return found

    colours = colours.detach().clone()
    residual = target - draw(colours)
    slope = adjoint(residual) - ridge * colours
    way, energy = slope.clone(), slope.square().sum(0)
    for _ in range(rounds):
        seen = draw(way)
        bend = seen.square().sum((1, 2)) + ridge * way.square().sum(0)
        length = energy / bend.clamp_min(1e-20)
        colours += length * way
        residual = residual - length[:, None, None] * seen
        slope = adjoint(residual) - ridge * colours
        renewed = slope.square().sum(0)
        way = slope + renewed / energy.clamp_min(1e-20) * way
        energy = renewed
    return colours


def psnr(drawn: Tensor, target: Tensor) -> float:
    """PSNR in dB of a picture that will be clipped to 0..1."""
    return -10 * math.log10(max(float((drawn.clamp(0, 1) - target).square().mean()), 1e-12))


def supersampled(splats: Splats, form: Form, mode: str, grid: Grid, **options: float) -> Tensor:
    """Draw on a grid of any step; a coarse one averages finer samples, as a camera does.

    Shape: -> [C, H, W] in 0..1.
    """
    n = math.ceil(round(max(grid.dx, grid.dy), 6))
    fine = Grid(grid.height * n, grid.width * n, grid.row * n, grid.column * n, grid.dy / n, grid.dx / n, grid.centre)
    drawn = render(splats.centres, form.conic(splats.shapes), splats.colours, fine, mode, **options)  # type: ignore[arg-type]
    return (F.avg_pool2d(drawn[None], n)[0] if n > 1 else drawn).clamp(0, 1)


def frame(height: int, width: int, size: tuple[int, int] | None, window: tuple[int, int, int, int] | None) -> Grid:
    """The grid of a codec's (width, height) and (x, y, width, height)."""
    grid = Grid.over(height, width, None if size is None else (size[1], size[0]))
    return grid if window is None else grid.window(*window)


def _adam(gradient: Tensor, moments: tuple[Tensor, Tensor], age: Tensor) -> Tensor:
    """Direction of Adam, the moments corrected by the age of each row."""
    (mean, square), (b1, b2) = moments, _DECAYS
    mean.mul_(b1).add_(gradient, alpha=1 - b1)
    square.mul_(b2).addcmul_(gradient, gradient, value=1 - b2)
    return mean / (1 - b1**age) / ((square / (1 - b2**age)).sqrt() + 1e-12)
