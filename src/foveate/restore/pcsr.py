"""PCSR: a cheap head for easy output pixels, a costly one for hard ones.

Jeong, Kim, Jin, Park, Kim 2024, "Accelerating Image Super-Resolution Networks with Pixel-Level Classification",
arXiv:2407.21448.

A backbone gives features F [h*w, C] at low resolution. Every output pixel q is a query: the nearest feature, the
offset of q from that feature's centre and the size of q in low-resolution pixels,

    z_q = [F_q, rel_y, rel_x, cell_y, cell_x]  in R^(C+4),

from which MLPs predict the colour (added to the bilinearly enlarged picture): U_1 heavy, U_0 light, and a classifier
K gives p = softmax(K(z)). With cost_j the FLOPs of running head j everywhere, pixel q is heavy where

    p_1 / cost_1^k > p_0 / cost_0^k   <=>   d_q = log p_1 - log p_0 > k log(cost_1 / cost_0).

So one threshold on the score d slides from all light to all heavy. A budget fixes the share of heavy pixels, and the
threshold is the quantile of d that meets it on this picture.

How it is made fast, without changing a value: the first layer of an MLP on z splits into W_F F + (W_o o + b), where
the offsets o take only s*s values at an integer scale s. The first term is computed once per low-resolution pixel
rather than s*s times. Light head and classifier run everywhere (they are tiny), the heavy head on the pixels gathered
for it, in chunks that stay in cache.
"""

import math
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.engine.allocate import threshold_for
from foveate.engine.tiles import Box, plan
from foveate.errors import InputError, WeightsError
from foveate.layers.encoders import ENCODERS
from foveate.layers.implicit import MLP, subpixel_offsets
from foveate.layers.upscaler import STRIP_PIXELS, TILE, Read, Rendered, Upscaler, enlarge, strip_rows, with_halo
from foveate.ops.threads import each

SAMPLES = 1 << 16
"""Scores that a threshold is computed from, at most."""

PROBE = 64
"""Side of the windows from which the threshold for a large picture is found, in low-resolution pixels."""

HEAVY = {1: [192] * 4, 2: [160, 160, 160], 3: [152, 152]}
"""Hidden widths of the heavy head by scale."""

CHUNK = 4096
"""Low-resolution pixels per step of the heads."""

HEAVY_ROWS = 4096
"""Output pixels per step of the heavy head."""

HEAD_PIXELS = 1 << 16
"""Low-resolution pixels per strip of output: small enough that the system hands the same memory out again."""


class PCSR(Upscaler):
    """Super-resolution with a light and a heavy head, chosen pixel by pixel.

    Args:
        scale: integer enlargement s.
        encoder: "residual" (ours), "fsrcnn" or "carn" (the paper's), with `encoder_config` for its arguments.
        heavy, light, classifier: hidden widths of the three MLPs. By default the heavy head is the wider the fewer
            sub-pixels there are, which keeps the floor near a third.
        refine: replace light pixels beside heavy ones by their 3x3 mean, which hides seams between the heads.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w].
    """

    slug = "pcsr"
    cheaper = "espcn"

    def __init__(
        self,
        scale: int = 4,
        encoder: str = "residual",
        encoder_config: dict[str, int] | None = None,
        heavy: list[int] | None = None,
        light: list[int] | None = None,
        classifier: list[int] | None = None,
        refine: bool = False,
    ) -> None:
        super().__init__()
        if encoder not in ENCODERS:
            raise InputError(f"unknown encoder {encoder!r}; use one of {', '.join(ENCODERS)}.")
        if int(scale) != scale or scale < 1:
            raise InputError(f"PCSR needs an integer scale of at least 1, got {scale!r}.")
        self.scale = int(scale)
        self.encoder = ENCODERS[encoder](**(encoder_config or {}))
        self.halo = self.encoder.halo + 2
        inputs = self.encoder.channels + 4
        self.heavy = MLP(inputs, HEAVY.get(self.scale, [112, 112]) if heavy is None else heavy, 3)
        self.light = MLP(inputs, [64] if light is None else light, 3)
        self.classifier = MLP(inputs, [16] if classifier is None else classifier, 2)
        self.refine = refine

    def offsets(self) -> Tensor:
        """Offset and cell of the s*s sub-pixels. Shape: [s*s, 4]."""
        return subpixel_offsets(self.scale).to(self.device, self.dtype)

    # ------------------------------------------------------------------ cost

    def _encoder_flops(self) -> float:
        from foveate.meter import count_flops

        if "encoder_flops" not in self.__dict__:
            example = torch.zeros(1, 3, 16, 16, dtype=self.dtype, device=self.device)
            with torch.no_grad():
                self.__dict__["encoder_flops"] = count_flops(self.encoder, example) / 256
        return self.__dict__["encoder_flops"]

    def cost(self, heavy: float) -> float:
        """FLOPs per low-resolution pixel when a share `heavy` of output pixels takes the heavy head.

        At 1 neither light head nor classifier runs.
        """
        s2 = self.scale**2
        first, rest = self.heavy.cost(s2)
        total = self._encoder_flops() + first + heavy * s2 * rest
        if heavy < 1:
            for mlp in (self.light, self.classifier):
                first, rest = mlp.cost(s2)
                total += first + s2 * rest
        return total

    def _deciding_flops(self, height: int, width: int) -> float:
        """FLOPs of encoder and classifier on the windows that a threshold is found from."""
        first, rest = self.classifier.cost(self.scale**2)
        pixels = sum((x1 - x0) * (y1 - y0) for x0, y0, x1, y1 in probed(height, width))
        return pixels * (self._encoder_flops() + first + self.scale**2 * rest)

    def _flops_per_pixel(self) -> float:
        return self.cost(1.0)

    @property
    def floor(self) -> float:
        """The share of the full cost at which every pixel is light."""
        return self.cost(0.0) / self.cost(1.0)

    def heavy_share(self, share: float) -> float:
        """The share of heavy pixels that a share of the full cost pays for."""
        if share >= 1:
            return 1.0
        slope = self.scale**2 * self.heavy.cost(1)[1]
        return min(1.0, max(0.0, (share * self.cost(1.0) - self.cost(0.0)) / slope))

    # ------------------------------------------------------------------ the heads

    def forward(self, x: Tensor) -> Tensor:
        """The heavy head everywhere (budget 1)."""
        return self._assemble(
            self.heavy.everywhere(self._rows(self.encoder(x)), self.offsets()), enlarge(x, self.scale)
        )

    # ------------------------------------------------------------------ training

    def dense_loss(self, low: Tensor, high: Tensor, subpixels: int | None = None, both: bool = False) -> Tensor:
        """Phase 0: mean |heavy head + base - high|.

        Args:
            subpixels: how many random sub-pixels per feature to learn from; default all s*s.
            both: add the light head's error, so that the features serve both heads. The paper trains the heavy head
                alone here; with features made for it, a light head of one hidden layer stays far behind.
        """
        rows, target, offsets = self._drawn(self.encoder(low), low, high, subpixels)
        heads = [self.heavy, self.light] if both else [self.heavy]
        return torch.stack([(head.everywhere(rows, offsets) - target).abs().mean() for head in heads]).sum()

    def routed_loss(self, low: Tensor, high: Tensor, subpixels: int | None = None) -> Tensor:
        """Phase 1, encoder and heavy head frozen: with y = p_0 U_0 + p_1 U_1 + base over Q pixels,

        L = 1000 mean |y - high| + 3 |sum p_1 - Q/2| / (Q/2), the second term keeping half of the pixels heavy.
        """
        training = self.encoder.training
        with torch.no_grad():
            features = self.encoder.eval()(low)  # in training mode CARN's batch statistics would drift
            self.encoder.train(training)
            rows, target, offsets = self._drawn(features, low, high, subpixels)
            heavy = self.heavy.everywhere(rows, offsets)
        p = self.classifier.everywhere(rows, offsets).softmax(-1)
        mixed = p[..., :1] * self.light.everywhere(rows, offsets) + p[..., 1:] * heavy
        half = p[..., 1].numel() / 2
        return 1000 * (mixed - target).abs().mean() + 3 * (p[..., 1].sum() - half).abs() / half

    def budget_loss(self, low: Tensor, high: Tensor, subpixels: int | None = None, heavy: float = 0.25) -> Tensor:
        """Polish everything for a heavy share as it is met in use (ours, after the paper's two phases).

        L = mean |U_1 - t| + mean |hard mixture - t| + routing, where the share `heavy` of pixels, those of the highest
        scores, takes the heavy head, and routing is phase 1's loss / 1000 on the classifier alone.
        """
        rows, target, offsets = self._drawn(self.encoder(low), low, high, subpixels)
        strong, weak = self.heavy.everywhere(rows, offsets), self.light.everywhere(rows, offsets)
        logits = self.classifier.everywhere(rows.detach(), offsets)
        score = (logits[..., 1] - logits[..., 0]).detach()
        chosen = (score > threshold_for(score, heavy))[..., None]
        p = logits.softmax(-1)
        soft = (p[..., :1] * weak.detach() + p[..., 1:] * strong.detach() - target).abs().mean()
        usage = (2 * p[..., 1].mean() - 1).abs()
        return (
            (strong - target).abs().mean()
            + (torch.where(chosen, strong, weak) - target).abs().mean()
            + (soft + 0.003 * usage)
        )

    def _drawn(self, features: Tensor, low: Tensor, high: Tensor, count: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Features [N, C], what the heads should add to the base [N, count, 3], and the drawn offsets [count, 4]."""
        s = self.scale
        offsets = self.offsets()
        drawn = torch.randperm(s * s, device=low.device)[:count]
        residual = F.pixel_unshuffle(high - enlarge(low, s), s)  # [B, 3*s*s, h, w]
        residual = residual.unflatten(1, (3, s * s))[:, :, drawn].permute(0, 3, 4, 2, 1).reshape(-1, len(drawn), 3)
        return self._rows(features), residual, offsets[drawn]

    @staticmethod
    def _rows(features: Tensor) -> Tensor:
        return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])

    def _assemble(self, colours: Tensor, base: Tensor) -> Tensor:
        """Colours [B*h*w, s*s, 3] as a picture [B, 3, s*h, s*w], on top of the enlarged input."""
        b, _, height, width = base.shape
        s = self.scale
        grid = colours.view(b, height // s, width // s, s, s, 3)
        return grid.permute(0, 5, 1, 3, 2, 4).reshape(b, 3, height, width).add_(base)

    def scores(self, rows: Tensor) -> Tensor:
        """d = log p_1 - log p_0 at every sub-pixel. Shape: features [N, C] -> [N, s*s]."""
        offsets, difference = self.offsets(), rows.new_tensor([[-1.0, 1.0]])
        out = rows.new_empty(len(rows), len(offsets), 1)

        def score(chunk: Tensor, target: Tensor) -> None:
            self.classifier.everywhere(chunk, offsets, difference, target)

        each_chunk(score, CHUNK, rows, out)
        return out[..., 0]

    def colours(
        self, rows: Tensor, threshold: float | None, share: float = 1.0, score: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Colour every output pixel with the head it deserves.

        Args:
            rows: features [N, C].
            threshold: a pixel is heavy where its score is above; None: found from the scores to meet `share`.
            share: of the full cost; 1 without a threshold runs the heavy head everywhere and nothing else.
            score: the scores of `rows`, where they are known.

        Returns: (colours [N, s*s, 3], heavy [N, s*s] bool).
        """
        offsets = self.offsets()
        s2 = len(offsets)
        out = rows.new_empty(len(rows), s2, 3)

        def all_heavy(chunk: Tensor, target: Tensor) -> None:
            for features, colours in zip(chunk.split(HEAVY_ROWS // s2), target.split(HEAVY_ROWS // s2), strict=True):
                self.heavy.everywhere(features, offsets, out=colours)

        def mixed(chunk: Tensor, target: Tensor, score: Tensor, flag: Tensor) -> None:
            torch.gt(score, limit, out=flag)
            self.light.everywhere(chunk, offsets, out=target)
            self.heavy.somewhere(chunk, offsets, flag.view(-1).nonzero()[:, 0], target.view(-1, 3), HEAVY_ROWS)

        if threshold is None and self.heavy_share(share) >= 1:
            each_chunk(all_heavy, CHUNK, rows, out)
            return out, torch.ones(len(rows), s2, dtype=torch.bool, device=rows.device)
        score = self.scores(rows) if score is None else score
        limit = self._threshold(score, self.heavy_share(share)) if threshold is None else threshold
        flags = torch.empty_like(score, dtype=torch.bool)
        each_chunk(mixed, CHUNK, rows, out, score, flags)
        return out, flags

    @staticmethod
    def _threshold(score: Tensor, share: float) -> float:
        if share <= 0:
            return float("inf")
        stride = max(1, score.numel() // SAMPLES)
        while math.gcd(stride, score.shape[-1]) > 1:  # so that all sub-pixels are met
            stride += 1
        return float(threshold_for(score.flatten()[::stride], share))

    # ------------------------------------------------------------------ pictures of any size

    def strips(
        self, read: Read, height: int, width: int, share: float = 1.0, tile: int | None = None
    ) -> Iterator[Rendered]:
        """See `Upscaler.strips`. The heavy share is exact where the picture is one strip, else very nearly."""
        self.check_share(share)
        bounds, edge = strip_rows(height, width, tile), int(self.refine)  # the refinement looks one row further
        whole = len(bounds) == 1 and height * width <= STRIP_PIXELS
        dense = self.heavy_share(share) >= 1
        threshold, deciding = None, 0.0
        if not whole and not dense:
            threshold = self.decide(read, height, width, share)
            deciding = self._deciding_flops(height, width)
        for y0, y1 in bounds:
            first = max(0, y0 - edge)
            rows = self._features(read, height, width, (0, first, width, min(height, y1 + edge)), tile or TILE)
            score = None if dense else self.scores(rows)
            if whole and score is not None:
                threshold = self._threshold(score, self.heavy_share(share))
            for top, bottom in strip_rows(y1 - y0, width, max(1, HEAD_PIXELS // width)):
                part = self._render(read, height, width, y0 + top, y0 + bottom, first, rows, score, threshold, share)
                part.flops, deciding = part.flops + deciding, 0.0
                yield part

    def _features(self, read: Read, height: int, width: int, box: Box, tile: int = TILE) -> Tensor:
        """Features of a box as [rows * columns, C], computed tile by tile with their context."""
        left, top, right, bottom = box
        out = torch.empty(bottom - top, right - left, self.encoder.channels, dtype=self.dtype, device=self.device)
        for x0, y0, x1, y1 in (t.core for t in plan(bottom - top, right - left, tile)):
            core = (left + x0, top + y0, left + x1, top + y1)
            x, dx, dy = with_halo(read, height, width, core, self.encoder.halo)
            features = self.encoder(x.contiguous(memory_format=torch.channels_last))
            out[y0:y1, x0:x1] = features[0, :, dy : dy + y1 - y0, dx : dx + x1 - x0].permute(1, 2, 0)
        return out.flatten(0, 1)

    def _render(
        self,
        read: Read,
        height: int,
        width: int,
        y0: int,
        y1: int,
        first: int,
        rows: Tensor,
        score: Tensor | None,
        threshold: float | None,
        share: float,
    ) -> Rendered:
        """Rows y0 to y1 of the picture, from the features (and scores) of rows `first` and on."""
        s, edge = self.scale, int(self.refine)
        a, b = max(0, y0 - edge), min(height, y1 + edge)
        part = slice((a - first) * width, (b - first) * width)
        colours, flags = self.colours(rows[part], threshold, share, None if score is None else score[part])
        x, _, above = with_halo(read, height, width, (0, a, width, b), 1)  # bilinear enlargement looks one further
        base = enlarge(x.contiguous(memory_format=torch.channels_last), s)[..., s * above : s * (above + b - a), :]
        image = self._assemble(colours, base)
        if self.refine:
            image = refine(image, self._picture_of(flags, b - a, width), a == 0, b == height)
        inner = slice(y0 - a, y1 - a)
        flags = flags.view(b - a, width, s * s)[inner]
        heavy, pixels = int(flags.sum()), flags.numel()
        flops = self.cost(heavy / pixels) * (y1 - y0) * width
        image = image[..., s * inner.start : s * inner.stop, :]
        return Rendered(image, self._effort(flags), flops, {"heavy": heavy, "light": pixels - heavy})

    def _effort(self, flags: Tensor) -> Tensor:
        heavy = flags.to(self.dtype).mean(-1)
        low, high = self.cost(0.0), self.cost(1.0)
        return (torch.where(heavy >= 1, high, low + heavy * (high - low)) / high)[None, None]

    def _picture_of(self, flags: Tensor, height: int, width: int) -> Tensor:
        s = self.scale
        return flags.view(height, width, s, s).permute(0, 2, 1, 3).reshape(1, 1, height * s, width * s)

    def decide(self, read: Read, height: int, width: int, share: float) -> float:
        """The threshold on the score that meets a share of the full cost on this picture.

        It rests on all of a picture of up to STRIP_PIXELS, and on 8 x 8 windows spread evenly over a larger one, so it
        does not depend on how the picture is cut.
        """
        boxes = probed(height, width)
        rows = torch.cat([self._features(read, height, width, box) for box in boxes])
        if len(boxes) > 1:
            # A large picture pays for its windows; a small one that is cut by hand gives the same as whole.
            share = max(self.floor, share - self._deciding_flops(height, width) / self.full_flops(height, width))
        return self._threshold(self.scores(rows), self.heavy_share(share))

    # ------------------------------------------------------------------ official weights

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], scale: int = 4) -> "PCSR":
        """Build the network that an official checkpoint (3587jjh/PCSR, FSRCNN or CARN) was trained as.

        Args:
            state: the checkpoint's ['model']['sd'] (or a plain state dict), with keys `encoder.*`,
                `heavy_sampler.imnet.layers.*`, `light_sampler.imnet.layers.*`, `classifier.imnet.layers.*`.
            scale: the scale it was trained for.

        Raises: WeightsError when keys are missing or unknown.
        """
        names = {"heavy_sampler.imnet.": "heavy.", "light_sampler.imnet.": "light.", "classifier.imnet.": "classifier."}
        mapped = {}
        for key, value in state.items():
            for old, new in names.items():
                key = key.replace(old, new) if key.startswith(old) else key
            mapped[key] = value

        def hidden(head: str) -> list[int]:
            sizes = [v.shape[0] for k, v in mapped.items() if k.startswith(f"{head}.layers.") and k.endswith("weight")]
            if not sizes:
                raise WeightsError(f"the state dict has no {head} head; its keys begin with {sorted(state)[:3]}.")
            return sizes[:-1]

        if {"encoder.head_conv.0.weight", "encoder.body_conv.0.0.weight"} <= mapped.keys():
            d = mapped["encoder.head_conv.0.weight"].shape[0]
            s = mapped["encoder.body_conv.0.0.weight"].shape[0]
            maps = sum(
                k.startswith("encoder.body_conv.") and v.dim() == 4 and v.shape[2] == 3 for k, v in mapped.items()
            )
            kind, config = "fsrcnn", {"channels": d, "shrink": s, "maps": maps}
        elif {"encoder.entry.weight", "encoder.b1.b1.body.0.weight"} <= mapped.keys():
            nf = mapped["encoder.entry.weight"].shape[0]
            groups = nf // mapped["encoder.b1.b1.body.0.weight"].shape[1]
            kind, config = "carn", {"channels": nf, "groups": groups}
        else:
            raise WeightsError(f"neither an FSRCNN nor a CARN encoder among the keys {sorted(state)[:5]}.")
        model = cls(scale, kind, config, hidden("heavy"), hidden("light"), hidden("classifier"))
        try:
            model.load_state_dict(mapped)
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit a {kind} PCSR: {error}") from error
        return model.eval()


def each_chunk(fn: Callable[..., None], size: int, *tensors: Tensor) -> None:
    """Call fn on chunks of `size` rows of all tensors, several at once on a CPU."""
    chunks = list(zip(*(t.split(size) for t in tensors), strict=True))
    if tensors[0].device.type == "cpu":
        each(lambda parts: fn(*parts), chunks)
    else:
        for parts in chunks:
            fn(*parts)


def probed(height: int, width: int) -> list[Box]:
    """The windows that a threshold is found from."""
    if height * width <= STRIP_PIXELS:
        return [(0, 0, width, height)]
    side = min(PROBE, height, width)
    return [(x, y, x + side, y + side) for y in probes(height, side, 8) for x in probes(width, side, 8)]


def probes(length: int, side: int, count: int) -> list[int]:
    """Starts of at most `count` windows of `side`, spread evenly over a length.

    >>> probes(1000, 100, 4)
    [0, 300, 600, 900]
    """
    count = min(count, length // side)
    return [i * (length - side) // max(1, count - 1) for i in range(count)]


def refine(image: Tensor, heavy: Tensor, top: bool = True, bottom: bool = True) -> Tensor:
    """Replace light pixels that touch a heavy one by their 3x3 mean; the border of the picture stays.

    Args:
        image: [1, 3, H, W].
        heavy: [1, 1, H, W] bool.
        top, bottom: whether the first / last row is the picture's border.
    """
    near = F.max_pool2d(heavy.to(image.dtype), 3, stride=1, padding=1) > 0
    change = near & ~heavy
    change[..., 0], change[..., -1] = False, False
    if top:
        change[..., 0, :] = False
    if bottom:
        change[..., -1, :] = False
    mean = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return torch.where(change, mean, image)
