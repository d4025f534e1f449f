"""Adaptive Patch Exiting: smooth patches leave a super-resolution network after a few blocks, textured ones stay.

Wang et al. 2022, "Adaptive Patch Exiting for Scalable Single Image Super-Resolution", arXiv:2203.11589.

A residual network head -> B_1 .. B_N -> last -> tail gets an exit after every `interval` blocks, all sharing `last` and
`tail`:   y_e = tail(x_0 + last(h_e)) + enlarged input,   h_e the features after block e * interval.
One small regressor, shared by all exits, predicts how little the exit's stage gained,

    s_e = tanh(w . mean(h_e) + b),   trained towards t_e = 1 - tanh(P_e - P_{e-1}),   P_e the PSNR of y_e in dB,

under L = sum_e |y_e - high| + (s_e - t_e)^2. A patch leaves at the first exit with s_e >= tau; tau slides from the
cheapest network to the full one. Whole patches leave, so what remains is a smaller dense batch.

Decibels of a patch are not what a picture's PSNR is made of: a smooth patch may gain many and save next to no error.
With `gain="error"` (ours) the same regressor looks ahead to the squared error E that the next stage would save,

    t_e = -tanh((log10(E_e - E_{e+1}) + 5) / 2).

A budget fixes how many patches may pass each exit: the share that passes it in the calibration scores (kept with the
weights) at the tau whose mean cost is the budget. At each exit the patches with the lowest scores stay, so that every
picture keeps its budget.
"""

from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from operator import mul
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.residual import ResidualBlock
from foveate.layers.upscaler import STRIP_PIXELS, Read, Rendered, Upscaler, enlarge

Stay = Callable[[int, Tensor], Tensor]
"""stay(exit, scores [P]) -> [P] bool: which patches go on."""

BATCH = 8
"""Patches per step: their features stay in cache."""


class APE(Upscaler):
    """A residual super-resolution network whose depth is chosen patch by patch.

    Args:
        scale: integer enlargement s.
        channels, blocks, res_scale: of the EDSR backbone.
        interval: blocks between exits; E = blocks // interval exits.
        tail: "direct" (one convolution to 3*s*s channels, a pixel shuffle) or "edsr" (the published tail).
        base: add the bilinearly enlarged input (ours); the published networks do not.
        gain: what scores tell about the next stage, "psnr" (published: as much as the last one gained) or "error".
        value_range: what 1.0 of the input means to the weights; 255 for the published ones.
        patch, step: side of the patches in pixels and distance between them; overlaps are averaged.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w].
    """

    slug = "adaptive-patch-exiting"
    cheaper = "espcn"
    halo = 0
    mean: Tensor
    calibration: Tensor

    def __init__(
        self,
        scale: int = 4,
        channels: int = 32,
        blocks: int = 8,
        interval: int = 2,
        res_scale: float = 1.0,
        tail: str = "direct",
        base: bool = True,
        gain: str = "psnr",
        value_range: float = 1.0,
        patch: int = 48,
        step: int = 46,
    ) -> None:
        super().__init__()
        if not 1 <= interval <= blocks:
            raise InputError(f"interval must lie in 1..{blocks} (the number of blocks), got {interval}.")
        if not 1 <= step <= patch:
            raise InputError(f"step must lie in 1..{patch} (the patch side) to leave no gap, got {step}.")
        if gain not in ("psnr", "error"):
            raise InputError(f"unknown gain {gain!r}; use 'psnr' or 'error'.")
        self.gain = gain
        self.scale, self.interval, self.exits = int(scale), interval, blocks // interval
        self.base, self.value_range, self.patch, self.step = base, value_range, patch, step
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.body = nn.ModuleList([*(ResidualBlock(channels, res_scale) for _ in range(blocks)), last])
        self.tail = _tail(tail, channels, self.scale)
        self.regressor = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1), nn.Tanh())
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)
        self.register_buffer("calibration", torch.zeros(256, self.exits))

    # ------------------------------------------------------------------ the network

    def start(self, x: Tensor) -> Tensor:
        """x_0: the head's features of a patch."""
        return self.head((x - self.mean) * self.value_range)

    def stage(self, h: Tensor, exit: int) -> Tensor:
        """The blocks between exit - 1 and exit (counted from 1)."""
        for block in self.body[(exit - 1) * self.interval : exit * self.interval]:
            h = block(h)
        return h

    def finish(self, x: Tensor, x0: Tensor, h: Tensor) -> Tensor:
        """The picture at an exit."""
        y = self.tail(x0 + self.body[-1](h)) / self.value_range
        return y + (enlarge(x, self.scale) if self.base else self.mean)

    def score(self, h: Tensor) -> Tensor:
        """s_e of each patch: near 1 where nothing more is gained. Shape: [P, C, h, w] -> [P]."""
        return self.regressor(h)[:, 0]

    def forward(self, x: Tensor) -> Tensor:
        """The last exit on whole pictures, not cut into patches."""
        h = x0 = self.start(x)
        for e in range(1, self.exits + 1):
            h = self.stage(h, e)
        return self.finish(x, x0, h)

    def walk(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Features and picture at exit 1, 2, .. E."""
        h = x0 = self.start(x)
        for e in range(1, self.exits + 1):
            h = self.stage(h.clone() if h is x0 else h, e)
            yield h, self.finish(x, x0, h)

    def all_exits(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Every exit's picture, and the scores [P, E]."""
        exits = list(self.walk(x))
        return [picture for _, picture in exits], torch.stack([self.score(h) for h, _ in exits], 1)

    def loss(self, low: Tensor, high: Tensor, from_zero: bool = False) -> Tensor:
        """L = sum_e 255 |y_e - high| + (s_e - t_e)^2 on a batch of patches.

        Args:
            from_zero: P_0 = 0 as in the released code, which trains the first exit never to fire; default is the
                PSNR of the enlarged input.
        """
        pictures, scores = self.all_exits(low)
        wanted = self.targets(low, high, pictures, from_zero)
        colours = torch.stack([(y - high).abs().mean() for y in pictures]).sum()
        return 255 * colours + (scores - wanted).square().mean(0).sum()

    @torch.no_grad()
    def targets(self, low: Tensor, high: Tensor, pictures: list[Tensor], from_zero: bool = False) -> Tensor:
        """t_e, what the scores of patches should be, from the pictures of all exits. Shape: [P, E]."""
        b = self.scale + 6
        errors = torch.stack(
            [(y - high)[..., b:-b, b:-b].square().mean((1, 2, 3)) for y in (enlarge(low, self.scale), *pictures)], 1
        )
        if self.gain == "psnr":
            quality = -10 * torch.log10(errors.clamp_min(1e-10))
            if from_zero:
                quality[:, 0] = 0
            return 1 - torch.tanh(quality.diff(dim=1))
        saved = F.pad(-errors.diff(dim=1)[:, 1:], (0, 1))  # after the last exit nothing is saved
        return -torch.tanh((torch.log10(saved.clamp_min(1e-7)) + 5) / 2)

    @torch.no_grad()
    def fit_regressor(self, low: Tensor, high: Tensor) -> None:
        """Fit the regressor alone, by least squares on patches: what the exits have learned decides (ours)."""
        rows, wanted = [], []
        for x, truth in zip(low.split(BATCH), high.split(BATCH), strict=True):
            features, pictures = zip(*self.walk(x), strict=True)
            rows.append(torch.stack([self.regressor[:2](h) for h in features], 1)[:, :-1])
            wanted.append(self.targets(x, truth, list(pictures))[:, :-1].clamp(-0.99, 0.99).atanh())
        x, y = torch.cat(rows).flatten(0, 1).double(), torch.cat(wanted).flatten().double()
        mean, spread = x.mean(0), x.std(0).clamp_min(1e-9)
        x = (x - mean) / spread
        ridge = 1e-3 * len(x) * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)
        weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean())) / spread
        linear = cast(nn.Linear, self.regressor[2])
        linear.weight.copy_(weight[None])
        linear.bias.copy_(y.mean() - weight @ mean)

    @torch.no_grad()
    def calibrate(self, patches: Tensor) -> None:
        """Keep the scores of sample patches [P, 3, patch, patch], by which a budget is turned into exits."""
        scores = torch.cat([self.all_exits(p)[1] for p in patches.split(BATCH)])
        rows = torch.linspace(0, len(scores) - 1, len(self.calibration)).round().long()
        self.calibration = scores[rows].to(self.calibration)

    # ------------------------------------------------------------------ cost

    def exit_costs(self) -> list[float]:
        """FLOPs per low-resolution pixel of leaving at exit 1..E."""
        from foveate.meter import count_flops

        if "costs" not in self.__dict__:
            x = torch.zeros(1, 3, 16, 16, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                x0 = self.start(x)
                # A patch's x_0 is computed again when it leaves, which is cheaper than keeping it.
                fixed = 2 * count_flops(self.start, x) + count_flops(self.finish, x, x0, x0)
                block = count_flops(self.body[0], x0)
            self.__dict__["costs"] = [(fixed + e * self.interval * block) / 256 for e in range(1, self.exits + 1)]
        return self.__dict__["costs"]

    def _flops_per_pixel(self) -> float:
        return self.exit_costs()[-1]

    def full_flops(self, height: int, width: int) -> float:
        """FLOPs of the last exit for all patches, their overlap included."""
        ph, pw = min(self.patch, height), min(self.patch, width)
        patches = len(_starts(height, ph, self.step)) * len(_starts(width, pw, self.step))
        return patches * ph * pw * self.exit_costs()[-1]

    @property
    def floor(self) -> float:
        """The share of the full cost at which every patch leaves at the first exit."""
        return self.exit_costs()[0] / self.exit_costs()[-1]

    def survivors(self, share: float) -> list[float]:
        """The share of patches that may pass exit 1..E-1 under a budget, from the calibration scores.

        Raises: WeightsError for a network that was never calibrated.
        """
        from foveate.engine.allocate import calibrate

        if share >= 1:
            return [1.0] * (self.exits - 1)
        if not self.calibration.any():
            raise WeightsError(
                "this network has no calibration scores; call calibrate(patches) on sample patches first."
            )
        costs = torch.tensor(self.exit_costs(), dtype=torch.float64)
        stages = costs.diff() / costs[-1]

        def passing(tau: float) -> Tensor:
            return (self.calibration[:, :-1] < tau).double().cumprod(1).mean(0)

        def cost(tau: float) -> float:
            return float(costs[0] / costs[-1] + (passing(tau) * stages).sum())

        shares = passing(calibrate(cost, share, -1.0, 1.0))
        missing = share - float(costs[0] / costs[-1] + (shares * stages).sum())
        if self.exits > 1 and missing > 0:  # scores are discrete: give the rest to those that are left behind
            room = (1 - shares) * stages
            shares = shares + (1 - shares) * min(1.0, missing / max(float(room.sum()), 1e-12))
        return shares.tolist()

    # ------------------------------------------------------------------ patches that leave

    def run(self, patches: Tensor, stay: Stay) -> tuple[Tensor, Tensor]:
        """Send patches through the network until each leaves.

        Args:
            patches: [P, 3, h, w].
            stay: the rule at exits 1..E-1.

        Returns: (pictures [P, 3, s*h, s*w], exit of each patch, counted from 1).
        """
        if self.training and any(isinstance(m, nn.BatchNorm2d) for m in self.modules()):
            raise InputError(
                "batch normalisation in training mode makes patches depend on each other; call eval() first."
            )
        exits = torch.full((len(patches),), self.exits, device=patches.device)
        active = torch.arange(len(patches), device=patches.device)
        s, (h, w) = self.scale, patches.shape[2:]
        out = patches.new_empty(len(patches), 3, s * h, s * w)
        features: list[Tensor] = [
            self.start(p).contiguous(memory_format=torch.channels_last) for p in patches.split(BATCH)
        ]
        for e in range(1, self.exits + 1):
            features = [self.stage(f, e) for f in features]
            if e < self.exits:
                go_on = stay(e, torch.cat([self.score(f) for f in features])) if len(active) else active.bool()
            else:
                go_on = torch.zeros(len(active), dtype=torch.bool, device=patches.device)
            leaving = [f[~g] for f, g in zip(features, go_on.split([len(f) for f in features]), strict=True)]
            self._leave(patches, out, active[~go_on], leaving)
            exits[active[~go_on]] = e
            if not go_on.any():
                break
            kept = [f[g] for f, g in zip(features, go_on.split([len(f) for f in features]), strict=True)]
            features = list(torch.cat(kept).contiguous(memory_format=torch.channels_last).split(BATCH))
            active = active[go_on]
        return out, exits

    def _leave(self, patches: Tensor, out: Tensor, index: Tensor, features: list[Tensor]) -> None:
        if not len(index):
            return
        for i, h in zip(index.split(BATCH), torch.cat(features).split(BATCH), strict=True):
            x = patches[i]
            out[i] = self.finish(x, self.start(x), h)

    def by_threshold(self, tau: float) -> Stay:
        """The paper's rule: leave where the score is tau or more. Raises: InputError on NaN."""
        if tau != tau:
            raise InputError("the threshold is NaN; use a number from -1 (all leave at once) to 1 (none leave).")
        return lambda _, scores: (scores < tau) | (tau >= 1)  # scores below 1 may round to 1

    def by_budget(self, share: float, patches: int) -> Stay:
        """At most the calibrated number of patches passes each exit: those with the lowest scores."""
        counts = self._counts(share, patches)

        def stay(e: int, scores: Tensor) -> Tensor:
            mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
            mask[scores.argsort(stable=True)[: counts[e - 1]]] = True
            return mask

        return stay

    def _counts(self, share: float, patches: int) -> list[int]:
        """How many patches may pass exits 1..E-1: the survivors rounded down, then up while the budget lasts."""
        wanted = [passing * patches for passing in self.survivors(share)]
        counts = [int(w + 1e-6) for w in wanted]
        costs = self.exit_costs()
        stages = [(b - a) / costs[-1] for a, b in pairwise(costs)]
        left = share * patches - costs[0] / costs[-1] * patches - sum(map(mul, counts, stages)) + 1e-9
        for e in sorted(range(len(counts)), key=lambda e: counts[e] - wanted[e]):
            before = counts[e - 1] if e else patches
            if counts[e] < before and stages[e] <= left:
                counts[e] += 1
                left -= stages[e]
        return counts

    def strips(
        self,
        read: Read,
        height: int,
        width: int,
        share: float = 1.0,
        tile: int | None = None,
        tau: float | None = None,
    ) -> Iterator[Rendered]:
        """See `Upscaler.strips`; with `tau` the paper's threshold decides instead of the budget."""
        if tau is None:
            self.check_share(share)
        ph, pw, s = min(self.patch, height), min(self.patch, width), self.scale
        tops, lefts = _starts(height, ph, self.step), _starts(width, pw, self.step)
        rows_at_once = max(1, STRIP_PIXELS // (ph * width))
        costs = torch.tensor(self.exit_costs(), dtype=torch.float64) * ph * pw
        carry: tuple[Tensor, Tensor, Tensor] | None = None
        for first in range(0, len(tops), rows_at_once):
            rows = tops[first : first + rows_at_once]
            bottom = rows[-1] + ph
            boxes = [(y, x) for y in rows for x in lefts]
            patches = torch.cat([read(x, y, x + pw, y + ph) for y, x in boxes])
            rule = self.by_threshold(tau) if tau is not None else self.by_budget(share, len(patches))
            pictures, exits = self.run(patches, rule)
            origin = rows[0]
            total = patches.new_zeros(1, 3, s * (bottom - origin), s * width)
            effort, count = (patches.new_zeros(1, 1, bottom - origin, width) for _ in range(2))
            spent = (costs / costs[-1]).to(patches)
            for (y, x), picture, e in zip(boxes, pictures, exits.tolist(), strict=True):
                y -= origin
                total[..., s * y : s * (y + ph), s * x : s * (x + pw)] += picture
                effort[..., y : y + ph, x : x + pw] += spent[e - 1]
                count[..., y : y + ph, x : x + pw] += 1
            if carry is not None:  # rows that the strip above reached into
                overlap = carry[2].shape[2]
                total[..., : s * overlap, :] += carry[0]
                effort[..., :overlap, :] += carry[1]
                count[..., :overlap, :] += carry[2]
            following = tops[first + rows_at_once] if first + rows_at_once < len(tops) else height
            done = following - origin
            carry = (total[..., s * done :, :], effort[..., done:, :], count[..., done:, :])
            weight = count[..., :done, :]
            image = total[..., : s * done, :] / weight.repeat_interleave(s, 2).repeat_interleave(s, 3)
            counts = {f"exit {e}": int((exits == e).sum()) for e in range(1, self.exits + 1)}
            flops = float(costs[exits.cpu() - 1].sum())
            yield Rendered(image, effort[..., :done, :] / weight, flops, counts)

    # ------------------------------------------------------------------ official weights

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], scale: int = 4, interval: int = 4) -> "APE":
        """Build the network of an official EDSR checkpoint (littlepure2333/APE).

        Keys: head.0, body.{i}.body.{0,2}, body.{N}, tail.0.*, tail.1, regressor.2; the mean shifts are constants.

        Raises: WeightsError when the keys do not fit.
        """
        if "head.0.weight" not in state or "regressor.2.weight" not in state:
            raise WeightsError(f"no APE-EDSR checkpoint: the keys begin with {sorted(state)[:3]}.")
        blocks = max((int(k.split(".")[1]) for k in state if k.startswith("body.")), default=0)
        if blocks < interval:
            raise WeightsError(f"{blocks} blocks among the keys (body.0, ...), fewer than the interval of {interval}.")
        channels = state["head.0.weight"].shape[0]
        res_scale = 0.1 if channels > 64 else 1.0
        model = cls(scale, channels, blocks, interval, res_scale, "edsr", False, "psnr", 255.0)
        own = {k: v for k, v in state.items() if not k.startswith(("sub_mean", "add_mean"))}
        try:
            model.load_state_dict(own | {"calibration": model.calibration})
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit APE-EDSR x{scale}: {error}") from error
        return model.eval()


def _tail(kind: str, channels: int, scale: int) -> nn.Sequential:
    if kind == "direct":
        return nn.Sequential(nn.Conv2d(channels, 3 * scale**2, 3, padding=1), nn.PixelShuffle(scale))
    if kind != "edsr":
        raise InputError(f"unknown tail {kind!r}; use 'direct' or 'edsr'.")
    steps = {2: [2], 3: [3], 4: [2, 2]}.get(scale)
    if steps is None:
        raise InputError(f"EDSR's tail enlarges by 2, 3 or 4, got {scale}.")
    up: list[nn.Module] = []
    for step in steps:
        up += [nn.Conv2d(channels, channels * step**2, 3, padding=1), nn.PixelShuffle(step)]
    return nn.Sequential(nn.Sequential(*up), nn.Conv2d(channels, 3, 3, padding=1))


def _starts(length: int, side: int, step: int) -> list[int]:
    """Starts of windows of `side` every `step`, the last one moved to the border."""
    return [*range(0, length - side, step), length - side]
