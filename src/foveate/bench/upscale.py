"""Quality against cost of every super-resolution network with weights: what `foveate bench upscale` measures.

Pictures are shrunk by Pillow's bicubic filter and rounded to 8 bits, enlarged again, and compared on luminance with a
border of `scale` pixels cut, as the literature does. GFLOPs, time and memory are means over pictures, of the network on
a tensor in memory. Bicubic interpolation, which all have to beat, runs beside them.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import mean

import torch
from torch import Tensor

from foveate.bench.frontier import Entry, Panel, Report, averaged
from foveate.data import pictures as files
from foveate.data.degrade import downscale, mod_crop
from foveate.data.degrade import upscale as bicubic
from foveate.errors import InputError
from foveate.layers.upscaler import Rendered, Upscaler
from foveate.meter.cost import count_parameters, peak_memory, time_call
from foveate.meter.quality import psnr_y, ssim
from foveate.ops.color import rgb_to_y
from foveate.proofs import ProofContext, environment
from foveate.restore.upscale import methods, network

BUDGETS = (1.0, 0.75, 0.5)
SETS = ("set5", "kodak12")

REPORT = Report(
    name="upscale",
    title="Super-resolution",
    text=(
        "Written by `foveate bench upscale`. Means over pictures: PSNR and SSIM of luminance, 8 bits, a border of "
        "`scale` pixels cut; time and memory of one picture on this machine. A setting is the budget, a share of the "
        "full network's FLOPs."
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


def read(folder: Path, limit: int | None = None) -> list[Tensor]:
    """Pictures of a folder, [1, 3, H, W] each. Raises: InputError when there are none."""
    found = [files.load(path) for path, _ in files.list_pictures(folder)][:limit]
    if not found:
        raise InputError(f"{folder} holds no pictures.")
    return [p.window(0, p.height, 0, p.width)[0].expand(-1, 3, -1, -1).contiguous() for p in found]


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
    pairs = []
    for original in originals:
        high = mod_crop(original, scale)
        pairs.append((downscale(high, scale, rounded=True), high))
    there = [slug for slug, scales in methods().items() if scale in scales]
    todo: list[tuple[str, Upscaler | None, float]] = [] if chosen is not None else [("bicubic", None, 1.0)]
    for slug in there if chosen is None else chosen:
        own = network(slug, scale, context.device)
        todo += [(slug, own, share) for share in budgets if own.floor <= share]
    for method, model, share in context.track(todo, f"{name} x{scale}"):
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


@torch.inference_mode()
def once(model: Upscaler | None, share: float, low: Tensor, high: Tensor, scale: int) -> dict[str, float | None]:
    """Figures of one picture; the network is run once before the clock starts."""
    found: list[Rendered] = []

    def run() -> None:
        if model is None:
            found[:] = [Rendered(bicubic(low, scale), low[:, :1], 0.0)]
        else:
            found[:] = [model.upscale(low.to(model.device), share)]

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
