"""What every plug-in that chooses tokens hands back: undo it, say what it spent, draw where it looked.

A plug-in changes a host by handles, and says in one function, `look`, what it chooses on given pixels. `TokenHandle`
makes the rest of both.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from foveate.data.pictures import Source
from foveate.engine.surgery import Handle, join, patch_forward
from foveate.errors import InputError
from foveate.hosts.drawing import draw
from foveate.hosts.picture import Pixels
from foveate.hosts.swin import Swin
from foveate.hosts.vit import ViT


@dataclass(frozen=True, eq=False)
class Look:
    """What a plug-in chooses on a batch of pictures.

    Args:
        tokens: of each picture.
        full: what the host alone would take.
        effort: share of a patch's full work that is spent at each place, in 0..1; [B, h, w] of any grid.
        boxes: cells of each picture as xyxy in pixels, [n, 4]; their outlines are drawn.
        unit: what is counted, in the plural.
    """

    tokens: tuple[int, ...]
    full: int
    effort: Tensor
    boxes: tuple[Tensor, ...] = ()
    unit: str = "tokens"


@dataclass(frozen=True)
class Spent:
    """What one picture cost, and what it costs the host alone. Milliseconds are wall time of a batch of one."""

    tokens: int
    full_tokens: int
    gflops: float
    full_gflops: float
    ms: float
    full_ms: float


@dataclass(frozen=True)
class Report:
    """What each picture cost. Printed, a table."""

    pictures: tuple[Spent, ...]
    unit: str = "tokens"

    @property
    def flop_reduction(self) -> float:
        """FLOPs of the host alone over those spent, all pictures together."""
        return sum(p.full_gflops for p in self.pictures) / sum(p.gflops for p in self.pictures)

    @property
    def speedup(self) -> float:
        """Time of the host alone over the time spent, all pictures together."""
        return sum(p.full_ms for p in self.pictures) / sum(p.ms for p in self.pictures)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        totals = {"flop_reduction": self.flop_reduction, "speedup": self.speedup}
        return {"unit": self.unit, **totals, "pictures": [vars(p) for p in self.pictures]}

    def __str__(self) -> str:
        lines = [f"picture  {self.unit:>13}  {'GFLOPs':>17}  {'ms':>17}"]
        for i, p in enumerate(self.pictures):
            parts = [f"{p.tokens} of {p.full_tokens}", f"{p.gflops:.4g} of {p.full_gflops:.4g}"]
            parts.append(f"{p.ms:.4g} of {p.full_ms:.4g}")
            lines.append(f"{i:>7}  {parts[0]:>13}  {parts[1]:>17}  {parts[2]:>17}")
        return "\n".join([*lines, f"{self.flop_reduction:.2f} times fewer FLOPs, {self.speedup:.2f} times as fast"])


@dataclass(eq=False)
class _Seen:
    """The pixels of the last call, as long as their owner keeps them."""

    last: Callable[[], Tensor | None] = field(default=lambda: None)

    def watch(self, forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
        given = [value for value in (*inputs, *named.values()) if isinstance(value, Tensor) and value.dim() == 4]
        if given:
            self.last = weakref.ref(given[0])
        return forward(*inputs, **named)


class TokenHandle(Handle):
    """Undo a plug-in that chooses tokens; ask what it spends and where it looks.

    Args:
        handle: of the changes made to the host.
        host: its description.
        look: what the plug-in chooses on pixels [B, 3, H, W], without running the host.
        pixels: how pictures are normalised, where not as the host's description says.
    """

    def __init__(
        self, handle: Handle, host: ViT | Swin, look: Callable[[Tensor], Look], pixels: Pixels | None = None
    ) -> None:
        self._seen = _Seen()
        super().__init__(join([handle, patch_forward(host.model, self._seen.watch)])._changes)
        self.host, self.look, self.pixels = host, look, pixels or host.pixels

    def report(self, pixels: Tensor | None = None) -> Report:
        """Run pictures one by one, with the plug-in and without, and count and time both.

        Args:
            pixels: as the host takes them, [B, 3, H, W]; default those of its last call.

        Raises: InputError when the pixels of the last call are gone, or the plug-in was removed.
        """
        from foveate.meter import count_flops, time_call

        pixels = self._seen.last() if pixels is None else pixels
        if not self.active:
            raise InputError("this plug-in was removed; apply it again to have a report.")
        if pixels is None:
            raise InputError("the pictures of the last call are gone; pass report(pixels).")
        model, look, spent = self.host.model, self.look(pixels), []
        with _evaluating(model):
            for picture, tokens in zip(pixels.split(1), look.tokens, strict=True):

                def cost(picture: Tensor = picture) -> tuple[float, float]:
                    call = lambda: model(picture)  # noqa: E731
                    return count_flops(call) / 1e9, 1e3 * min(time_call(call), time_call(call))

                gflops, ms = cost()
                with self.paused():
                    full_gflops, full_ms = cost()
                spent.append(Spent(tokens, look.full, gflops, full_gflops, ms, full_ms))
        return Report(tuple(spent), look.unit)

    def map(self, picture: Source, side: int | None = None) -> Image.Image:
        """Draw what the host will look at: the photograph, dark where little work goes, with the cells outlined.

        Args:
            picture: a path, Pillow image, array or tensor in 0..1.
            side: as `Pixels.prepare`.
        """
        return self.draw(picture, side)[0]

    def draw(self, picture: Source, side: int | None = None) -> tuple[Image.Image, Look]:
        """The drawing of `map`, and what it shows."""
        pixels = self.pixels.prepare(picture, side)
        parameter = next(self.host.model.parameters())
        with torch.no_grad():
            look = self.look(pixels.to(parameter.device, parameter.dtype))
        boxes = look.boxes[0] if look.boxes else None
        shown = self.pixels.restore(pixels)[0]
        return draw(shown, look.effort[0], boxes, f"{look.tokens[0]} of {look.full} {look.unit}"), look


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module's own mode comes back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
