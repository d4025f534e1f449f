"""APT: large patches where a picture is plain, small ones where it is busy, in any pretrained vision transformer.

Choudhury, Kim, Park, Yang, Jeni, Kitani 2025, "Accelerating Vision Transformers with Adaptive Patch Sizes",
arXiv:2510.18091.

With p the host's patch and E its patch projection, a square of 2^s p pixels, s = 0 .. S - 1, may become one token. It
does where the entropy of its grey levels, H = -sum_v p_v log2 p_v over 512 bins, is below the threshold of its scale
and no larger square that holds it was taken (`foveate.engine.quadtree`). Its token is

    s = 0     E(patch) + PE                         as in the host
    s > 0     E(patch shrunk to p x p) + Z(v) + PE_s,     v = conv^s(E(sub-patches) [2^s, 2^s, C]) -> [1, 1, C]

with conv a 2 x 2 convolution of stride 2 applied s times, Z a linear layer that starts at zero, and PE_s the host's
positions resampled to the coarse grid. So the host works at once, on a mixed grid, and fine-tuning adds what the
shrunken patches lost. Tokens of all pictures run end to end through the host's own blocks (`foveate.hosts.packing`);
after the last block a coarse token stands for all patches it covers, so the head sees as many tokens as ever.

A budget is met on each picture exactly (its easiest squares are joined until it is met), or on average, by thresholds
calibrated on pictures that the user hands over; or thresholds are given in bits, as in the paper.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine import importance
from foveate.engine.allocate import calibrate
from foveate.engine.budget import Budget
from foveate.engine.packed import Packed
from foveate.engine.quadtree import Quadtree, coarse_grid, cover, cover_within
from foveate.engine.surgery import add, join
from foveate.errors import BudgetError, InputError, MissingExtraError
from foveate.hosts import vit
from foveate.hosts.packing import Plan, run_packed
from foveate.hosts.picture import Pixels
from foveate.hosts.plugin import Look, TokenHandle
from foveate.hosts.vit import ViT
from foveate.layers.patch import resample_positions

BITS_APART = 2.0
"""By how much the threshold of 4 p lies below that of 2 p, and so on; the authors use 6 and 4 bits."""


class MixedPatch(nn.Module):
    """What a shrunken patch lost, from its sub-patches: Z(conv^s(u)); zero until it is trained.

    Names of parameters are the authors' own.

    Args:
        dim: C.

    Shape: [n, C, 2^s, 2^s] -> [n, C].
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.patch_attn = nn.Conv2d(dim, dim, 2, 2)
        self.zero_conv = nn.Linear(dim, dim)
        nn.init.zeros_(self.zero_conv.weight)
        nn.init.zeros_(self.zero_conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        while x.shape[-1] > 1:
            x = self.patch_attn(x)
        return self.zero_conv(x.flatten(1))

    @property
    def trained(self) -> bool:
        """Whether it adds anything."""
        return any(bool(p.any()) for p in self.zero_conv.parameters())


class AdaptivePatchTransformer(TokenHandle):
    """Give a vision transformer adaptive patch sizes.

    While it is applied the host holds a `mixed_patch` whose parameters train with it.

    Args:
        model: a host known to `foveate.hosts.vit`, changed in place.
        budget: a share of the host's FLOPs, "20 GFLOPs" or "64 tokens" per picture.
        scales: S, patch sizes p, 2 p, ..., 2^(S-1) p.
        thresholds: of the scores of sizes 2 p, 4 p, ...; with them the budget is not looked at.
        pictures: normalised pixels [B, 3, H, W], or several such; thresholds are calibrated so that they meet the
            budget on average. Default: each picture meets it for itself.
        score: "entropy" (bits), "laplacian" (mean absolute), or "error" (mean square of shrinking and enlarging).
            Entropy does not see where grey levels lie: a checkerboard of two levels has one bit.
        mean, std: how pixels were normalised, where not as the host's family does it.

    Raises: InputError for a model that is no such host, scales that do not fit it, or an unknown score; BudgetError for
        a budget that the coarsest patches exceed. The model is unchanged then.
    """

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | str = 0.5,
        scales: int = 3,
        thresholds: Sequence[float] | None = None,
        pictures: Tensor | Iterable[Tensor] | None = None,
        score: str = "entropy",
        mean: tuple[float, float, float] | None = None,
        std: tuple[float, float, float] | None = None,
    ) -> None:
        host = vit(model)
        own = host.pixels
        pixels = Pixels(mean or own.mean, std or own.std, own.size, own.multiple)
        scales = scales if thresholds is None else len(thresholds) + 1
        mixed = MixedPatch(host.width).to(host.patches.weight)
        chooser = Chooser(host, pixels, Budget.parse(budget), scales, score, mixed)
        if thresholds is not None:
            chooser.thresholds = tuple(float(t) for t in thresholds)
        elif pictures is not None:
            chooser.calibrate([pictures] if isinstance(pictures, Tensor) else list(pictures))
        else:
            chooser.allowed(host.native_grid)  # what cannot be met is said before anything changes
        handle = join([add(host.body, "mixed_patch", mixed), run_packed(host, chooser.plan)])
        super().__init__(handle, host, chooser.look, pixels)
        self.chooser = chooser

    @property
    def thresholds(self) -> tuple[float, ...] | None:
        """Of sizes 2 p, 4 p, ...; None where each picture meets the budget for itself."""
        return self.chooser.thresholds


class Chooser:
    """Choose patch sizes on pixels, and make their tokens."""

    def __init__(self, host: ViT, pixels: Pixels, budget: Budget, scales: int, score: str, mixed: MixedPatch) -> None:
        if score not in SCORES:
            raise InputError(f"there is no score {score!r}; use one of {', '.join(SCORES)}.")
        if scales < 1:
            raise InputError(f"there is at least one patch size, got scales={scales}.")
        self.host, self.pixels, self.budget, self.scales = host, pixels, budget, scales
        self.measure, self.step = SCORES[score]
        self.mixed = mixed
        self.thresholds: tuple[float, ...] | None = None
        self._allowed: dict[tuple[tuple[int, int], bool], int] = {}
        self.coarse(host.native_grid)

    def coarse(self, grid: tuple[int, int]) -> list[tuple[int, int]]:
        """Grids of the sizes 2 p, 4 p, ... Raises: InputError when the largest does not fit into the picture."""
        grids = [coarse_grid(grid, s) for s in range(1, self.scales)]
        if any(min(g) < 1 for g in grids):
            size = self.host.patch << (self.scales - 1)
            raise InputError(f"{self.scales} patch sizes reach {size} pixels, more than the picture; use fewer scales.")
        return grids

    def allowed(self, grid: tuple[int, int]) -> int:
        """Patch tokens that the budget pays for. Raises: BudgetError when the coarsest patches are more."""
        key = (grid, self.mixed.trained)
        if key not in self._allowed:
            self._allowed[key] = self._affordable(grid)
        return self._allowed[key]

    def _affordable(self, grid: tuple[int, int]) -> int:
        total, coarse = grid[0] * grid[1], self.coarse(grid)
        shrunken = 2 * sum(h * w for h, w in coarse) * self.host.patches.weight.numel()
        # Z and the 2 x 2 convolutions cost at most this for each token saved, which a square of 2 p comes close to.
        merging = 10 / 3 * self.host.width**2 if self.mixed.trained else 0.0
        fine = self.host.affordable(self.budget, grid, lambda n: shrunken + merging * (total - n))
        least = total
        if coarse:
            least = int(cover([torch.zeros(1, *cells) for cells in coarse], grid, [1.0] * len(coarse)).lengths)
        if fine < least:
            share = (self.host.flops(least, grid) + shrunken) / self.host.flops(total, grid)
            raise BudgetError(
                f"A budget of {self.budget} pays for {fine} tokens, but {self.scales} patch sizes need {least} at "
                f"least; ask for a share of {share + 0.005:.2f} or more, or for more scales."
            )
        return fine

    def tree(self, pixels: Tensor) -> Quadtree:
        """Choose. Shape: [B, 3, H, W]."""
        grid = self.host.grid(pixels)
        if self.scales == 1:
            return Quadtree((torch.ones(len(pixels), *grid, dtype=torch.bool, device=pixels.device),))
        scores = self.scores(pixels, grid)
        if self.thresholds is not None:
            return cover(scores, grid, self.thresholds)
        return cover_within(scores, grid, self.allowed(grid), self.step)

    def scores(self, pixels: Tensor, grid: tuple[int, int]) -> list[Tensor]:
        """How busy each square is, from size 2 p on. Shape: [B, 3, H, W] -> [B, h >> s, w >> s] each."""
        with torch.no_grad():
            grey, sizes = importance.luma(self.pixels.restore(pixels)), range(1, len(self.coarse(grid)) + 1)
            return [self.measure(self._whole(grey, grid, s), self.host.patch << s, s) for s in sizes]

    def calibrate(self, pictures: Sequence[Tensor]) -> None:
        """Find thresholds whose mean number of tokens meets the budget."""
        grids = [self.host.grid(pixels) for pixels in pictures]
        scored = [self.scores(pixels, grid) for pixels, grid in zip(pictures, grids, strict=True)]
        shifted = [s + self.step * i for scores in scored for i, s in enumerate(scores)]
        if not shifted:
            raise InputError("thresholds are calibrated on at least one picture and two patch sizes.")
        low, high = (float(min(s.min() for s in shifted)), float(max(s.max() for s in shifted)))
        target = sum(self.allowed(grid) * len(p) for grid, p in zip(grids, pictures, strict=True))

        def tokens(t: float) -> float:
            trees = (cover(s, g, self._spread(t)) for s, g in zip(scored, grids, strict=True))
            return float(sum(int(tree.lengths.sum()) for tree in trees))

        # A score must lie below its threshold, so the ends lie outside of all of them.
        margin = 1e-3 * (high - low) + 1e-6
        self.thresholds = tuple(self._spread(calibrate(tokens, target, low - margin, high + margin)))

    def plan(self, pixels: Tensor) -> Plan:
        """Tokens of mixed sizes, packed."""
        host, grid, tree = self.host, self.host.grid(pixels), self.tree(pixels)
        fine, positions = host.patches(pixels), host.positions(grid)
        candidates = [host.prefix().expand(len(pixels), -1, -1), fine.flatten(2).mT + positions]
        plane = positions.mT.unflatten(2, grid)
        for s, mask in enumerate(tree.masks[1:], 1):
            if bool(mask.any()):
                candidates.append(self._coarse(pixels, fine, plane, mask, s))
            else:
                candidates.append(fine.new_zeros(len(pixels), mask[0].numel(), host.width))
        prefixes = candidates[0].shape[1]
        keep = torch.cat([tree.chosen.new_ones(len(pixels), prefixes), tree.chosen], 1)
        packed = Packed.select(torch.cat(candidates, 1), keep)
        start = torch.tensor(packed.offsets[:-1], device=pixels.device)[:, None]
        first = torch.arange(prefixes, device=pixels.device).expand(len(pixels), -1)
        rows = start + torch.cat([first, prefixes + tree.owner.flatten(1)], 1)
        return Plan(packed, lambda y: y[rows])

    def look(self, pixels: Tensor) -> Look:
        """What is chosen; a square of scale s has 4^-s of the work that its patches would have."""
        tree = self.tree(pixels)
        boxes = tuple(tree.boxes(i) * self.host.patch for i in range(len(pixels)))
        full = tree.grid[0] * tree.grid[1]
        return Look(tuple(tree.lengths.tolist()), full, 0.25 ** tree.scales.float(), boxes)

    def _coarse(self, pixels: Tensor, fine: Tensor, plane: Tensor, mask: Tensor, s: int) -> Tensor:
        """Tokens of all squares of a scale, corrected where they are chosen. Shape: -> [B, h_s * w_s, C]."""
        grid = (fine.shape[2], fine.shape[3])
        small = F.interpolate(self._whole(pixels, grid, s), scale_factor=0.5**s, mode="bilinear")
        tokens = self.host.patches(small).flatten(2).mT
        if torch.is_grad_enabled() or self.mixed.trained:
            cells = _cells(fine, mask.shape[1:], s)[mask]
            chosen = mask.flatten(1)
            corrected = tokens[chosen] + self.mixed(cells)
            tokens = tokens.masked_scatter(chosen[..., None], corrected)
        side, (h, w) = 2**s, mask.shape[1:]
        own = plane[:, :, : h * side, : w * side].flatten(2).mT
        return tokens + resample_positions(own, (h * side, w * side), (h, w))

    def _whole(self, picture: Tensor, grid: tuple[int, int], s: int) -> Tensor:
        """The part of a picture that whole squares of a scale cover."""
        h, w = coarse_grid(grid, s)
        side = 2**s * self.host.patch
        return picture[:, :, : h * side, : w * side]

    def _spread(self, t: float) -> list[float]:
        return [t - self.step * i for i in range(self.scales - 1)]


def _cells(fine: Tensor, grid: Sequence[int], s: int) -> Tensor:
    """Patches of each square. Shape: [B, C, h, w] -> [B, h_s, w_s, C, 2^s, 2^s]."""
    (h, w), side = grid, 2**s
    inside = fine[:, :, : h * side, : w * side]
    return inside.unflatten(3, (w, side)).unflatten(2, (h, side)).permute(0, 2, 4, 1, 3, 5)


def _entropy(grey: Tensor, size: int, _: int) -> Tensor:
    # The authors' bins are half a grey level wide: floor(2 v) of v in 0..255. The shift keeps whole levels, which
    # normalising and undoing it may have rounded, from falling into the bin below.
    return importance.entropy(grey * (255 / 256) + 2e-6, size, bins=512)


def _laplacian(grey: Tensor, size: int, _: int) -> Tensor:
    kernel = grey.new_full((1, 1, 3, 3), -1.0)
    kernel[..., 1, 1] = 8.0
    edges = F.conv2d(F.pad(grey, (1, 1, 1, 1), mode="reflect"), kernel)
    return importance.pool_patches(edges.abs(), size)


def _error(grey: Tensor, size: int, s: int) -> Tensor:
    small = F.interpolate(grey, scale_factor=0.5**s, mode="bilinear")
    back = F.interpolate(small, grey.shape[2:], mode="bilinear")
    return importance.pool_patches((grey - back).square(), size)


Measure = Callable[[Tensor, int, int], Tensor]
SCORES: dict[str, tuple[Measure, float]] = {
    "entropy": (_entropy, BITS_APART),
    "laplacian": (_laplacian, 0.0),
    "error": (_error, 0.0),
}
"""Score of squares of a size (2^s patches) on a grey picture; how far apart thresholds of neighbouring scales are."""


def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
    """A small ViT of transformers, and pictures of which one is plain in most places."""
    try:
        from transformers import ViTConfig, ViTModel
    except ImportError as error:
        raise MissingExtraError("ViT needs transformers. Install it: pip install 'foveate[hosts]'") from error
    config: Any = ViTConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=64,
        patch_size=8,
        initializer_range=0.2,
    )
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    pixels[1, :, 16:] = 0.5
    return ViTModel(config).eval(), (pixels,)
