"""Quality against cost of every super-resolution network with weights: what `foveate bench upscale` measures.

Pictures are shrunk by Pillow's bicubic filter and rounded to 8 bits, enlarged again, and compared on luminance with a
border of `scale` pixels cut, as the literature does. GFLOPs, time and memory are means over pictures, of the network on
a tensor in memory. Bicubic interpolation, which all have to beat, runs beside them. `sheet` shows what figures hide.
"""

from collections.abc import Iterable, Iterator
from statistics import mean

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor

from foveate.bench.frontier import Entry, Panel, Report, averaged
from foveate.data.degrade import downscale, mod_crop
from foveate.data.degrade import upscale as bicubic
from foveate.errors import InputError
from foveate.layers.rescaler import Rescaler
from foveate.layers.upscaler import Rendered, Upscaler
from foveate.meter.cost import count_parameters, peak_memory, time_call
from foveate.meter.quality import psnr_y, ssim
from foveate.ops.color import rgb_to_y
from foveate.proofs import ProofContext, environment
from foveate.restore.rescaling import rescaler
from foveate.restore.upscale import methods, network

BUDGETS = (1.0, 0.75, 0.5)
SETS = ("set5", "kodak12")

BICUBIC = "bicubic"
CROP, ZOOM, GAP, CAPTION = 96, 3, 6, 22
"""Of the contact sheet, in pixels: side of the crop, how much larger it is shown, and what lies between crops."""

Network = Upscaler | Rescaler

REPORT = Report(
    name="upscale",
    title="Super-resolution",
    text=(
        "Written by `foveate bench upscale`. Means over pictures: PSNR and SSIM of luminance, 8 bits, a border of "
        "`scale` pixels cut; time and memory of one picture on this machine. A setting is the budget, a share of the "
        "full network's FLOPs. `upscale-crop.png` shows one hard crop through all methods."
    ),
    columns={
        "psnr": ("PSNR-Y (dB)", ".2f"),
        "ssim": ("SSIM-Y", ".4f"),
        "parameters": ("parameters", ",d"),
        "gflops": ("GFLOPs", ".3g"),
        "ms": ("ms", ".3g"),
        "peak_mb": ("peak MB", ".3g"),
        "count": ("pictures", "d"),
    },
    panels=(Panel("ms", "psnr", log=True), Panel("gflops", "psnr", log=True)),
)


def measured(
    originals: Iterable[Tensor],
    name: str,
    scale: int,
    context: ProofContext,
    chosen: Iterable[str] | None = None,
    budgets: Iterable[float] = BUDGETS,
) -> Iterator[Entry]:
    """Enlarge pictures by every method at every budget that it can meet, one entry each.

    Args:
        originals: pictures [1, 3, H, W].
        name: of the set.
        chosen: methods; all that have weights for the scale when None.
    """
    pairs = [pair(original, scale) for original in originals]
    runs: list[tuple[str, Network | None, float]] = [] if chosen is not None else [(BICUBIC, None, 1.0)]
    for slug in there(scale) if chosen is None else chosen:
        own = opened(slug, scale, context.device)
        least = own.floor if isinstance(own, Upscaler) else 1.0
        runs += [(slug, own, share) for share in budgets if least <= share]
    for method, model, share in context.track(runs, f"{name} x{scale}"):
        figures = averaged([once(model, share, low, high, scale) for low, high in pairs], mean)
        yield {
            "method": method,
            "setting": f"{share:g}",
            "pictures": f"{name} x{scale}",
            **figures,
            "parameters": 0 if model is None else count_parameters(model),
            "count": len(pairs),
            "environment": environment(context.device),
        }


def there(scale: int) -> list[str]:
    """Methods with weights for a scale, those for any scale too."""
    return [slug for slug, scales in methods().items() if not scales or scale in scales]


def opened(slug: str, scale: int, device: str) -> Network:
    """The network of a method."""
    return rescaler(slug, device=device) or network(slug, scale, device)


def pair(original: Tensor, scale: int) -> tuple[Tensor, Tensor]:
    """A picture made small, and as it should become again."""
    high = mod_crop(original, scale)
    return downscale(high, scale, rounded=True), high


def enlarged(model: Network | None, share: float, low: Tensor, scale: int) -> Rendered:
    """A picture through a network, or through bicubic interpolation."""
    if model is None:
        return Rendered(bicubic(low, scale), low[:, :1], 0.0)
    if isinstance(model, Upscaler):
        return model.upscale(low.to(model.device), share)
    source = (low.shape[2], low.shape[3])
    size = (scale * source[0], scale * source[1])
    return Rendered(model.enlarge(low.to(model.device), size), low[:, :1], model.flops(source, size))


@torch.inference_mode()
def once(model: Network | None, share: float, low: Tensor, high: Tensor, scale: int) -> dict[str, float | None]:
    """Figures of one picture; the network is run once before the clock starts."""
    found: list[Rendered] = []

    def run() -> None:
        found[:] = [enlarged(model, share, low, scale)]

    peak = peak_memory(run)
    seconds = min(time_call(run), time_call(run))
    image = found[0].image.clamp(0, 1).cpu()
    seen, wanted = (rgb_to_y((255 * x).round() / 255)[..., scale:-scale, scale:-scale] for x in (image, high))
    return {
        "psnr": float(psnr_y(image, high, border=scale, round_to_8bit=True)),
        "ssim": float(ssim(seen, wanted)),
        "gflops": found[0].flops / 1e9 or None,
        "ms": 1e3 * seconds,
        "peak_mb": None if peak is None else peak / 1e6,
    }


@torch.inference_mode()
def sheet(
    originals: Iterable[Tensor], scale: int, context: ProofContext, chosen: Iterable[str] | None = None
) -> Image.Image:
    """One hard crop as it was and through every method, each with the PSNR of its luminance there.

    The crop is the square of `CROP` pixels on which bicubic interpolation is furthest off.

    Args:
        originals: pictures [1, 3, H, W] to find it in.
        chosen: methods; all that have weights for the scale when None.
    """
    low, high, (x, y) = hardest([pair(original, scale) for original in originals], scale)
    cut = (..., slice(y, y + CROP), slice(x, x + CROP))
    shown = {"original": high[cut]}
    for slug in [BICUBIC, *(there(scale) if chosen is None else chosen)]:
        model = None if slug == BICUBIC else opened(slug, scale, context.device)
        shown[slug] = enlarged(model, 1.0, low, scale).image.clamp(0, 1).cpu()[cut]
    step, columns = ZOOM * CROP, 4
    page = Image.new("RGB", (columns * (step + GAP), -(-len(shown) // columns) * (step + CAPTION)), "white")
    draw = ImageDraw.Draw(page)
    for number, (name, crop) in enumerate(shown.items()):
        left, top = number % columns * (step + GAP), number // columns * (step + CAPTION)
        pixels = Image.fromarray((255 * crop[0]).round().byte().permute(1, 2, 0).numpy())
        page.paste(pixels.resize((step, step), Image.Resampling.NEAREST), (left, top))
        quality = "" if name == "original" else f"  {float(psnr_y(crop, high[cut], round_to_8bit=True)):.2f} dB"
        draw.text((left + 2, top + step + 2), name + quality, fill="black", font_size=CAPTION - 6)
    return page


def hardest(pairs: Iterable[tuple[Tensor, Tensor]], scale: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """The pair with the square that bicubic interpolation does worst, and that square's corner (x, y)."""
    found, most = None, -1.0
    for low, high in pairs:
        if min(high.shape[2:]) < CROP:
            continue
        lost = (rgb_to_y(bicubic(low, scale)) - rgb_to_y(high)).square()
        means = F.avg_pool2d(lost, CROP, CROP // 4)
        if float(means.max()) > most:
            place, most = int(means.flatten().argmax()), float(means.max())
            found = low, high, (place % means.shape[3] * (CROP // 4), place // means.shape[3] * (CROP // 4))
    if found is None:
        raise InputError(f"all pictures are smaller than {CROP} pixels a side; give larger ones.")
    return found
