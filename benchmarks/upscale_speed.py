"""Quality and speed of `foveate upscale`: PSNR-Y at several budgets, and the efficiency of a budget on the clock.

    python benchmarks/upscale_speed.py --data pictures/ --method pcsr --budget 0.5

Reports PSNR-Y on set5 and kodak12 (border of `scale` pixels cut, 8 bit), and, with budget 1 and the asked budget run in
turn through the same code, speed-up, FLOP reduction and efficiency = speed-up / FLOP reduction on kodak12 and on one
picture enlarged to 3840x2160. Timings are of the network on a tensor in memory; files and decoding stay outside.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from PIL import Image

from foveate import weights
from foveate.data import pictures
from foveate.data.degrade import downscale, mod_crop
from foveate.layers.upscaler import Upscaler
from foveate.meter import compare, psnr_y


def quality(model: Upscaler, originals: list[torch.Tensor], share: float) -> float:
    """Mean PSNR-Y in dB."""
    values = []
    for high in originals:
        high = mod_crop(high, model.scale)
        low = downscale(high, model.scale, rounded=True)
        image = model.upscale(low, share).image.clamp(0, 1)
        values.append(psnr_y(image, high, border=model.scale, round_to_8bit=True).item())
    return statistics.mean(values)


def efficiency(model: Upscaler, low: torch.Tensor, share: float, pairs: int) -> dict[str, float]:
    """Budget 1 and a share of it in turn."""
    full, part = model.upscale(low), model.upscale(low, share)
    result = compare(
        lambda: model.upscale(low), lambda: model.upscale(low, share), pairs=pairs, flops=(full.flops, part.flops)
    )
    return {
        "full ms": 1e3 * statistics.median(result.seconds[0]),
        "ms": 1e3 * statistics.median(result.seconds[1]),
        "speed-up": result.speedup,
        "FLOP reduction": result.flop_reduction or float("nan"),
        "efficiency": result.efficiency or float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds set5 and kodak12")
    parser.add_argument("--method", default="pcsr")
    parser.add_argument("--scale", type=int, default=4)
    parser.add_argument("--budget", type=float, default=0.5)
    parser.add_argument("--quality", action=argparse.BooleanOptionalAction, default=True, help="measure PSNR too")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    out: dict[str, object] = {"method": args.method, "scale": args.scale, "budget": args.budget}

    for scale in weights.available()[args.method] if args.quality else []:
        model = weights.load(args.method, scale).to(memory_format=torch.channels_last)
        shares = [1.0, 0.75, args.budget] if model.floor <= args.budget else [1.0]
        for name in ("set5", "kodak12"):
            originals = pictures.read_folder(args.data / name)
            row = {f"{share:g}": round(quality(model, originals, share), 2) for share in shares}
            print(f"PSNR-Y x{scale} {name:8}", row, f"floor {model.floor:.2f}", flush=True)
            out[f"x{scale} {name}"] = row

    model = weights.load(args.method, args.scale).to(memory_format=torch.channels_last)
    if model.floor <= args.budget:
        originals = pictures.read_folder(args.data / "kodak12")
        kodak = [downscale(mod_crop(x, args.scale), args.scale, rounded=True) for x in originals]
        rows = [efficiency(model, low, args.budget, args.pairs) for low in kodak]
        summary = {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}
        print(f"kodak12 x{args.scale}, median of {len(rows)}:", summary, flush=True)
        first = next(file for file, _ in pictures.list_pictures(args.data / "kodak12"))
        with Image.open(first) as opened:
            large = opened.convert("RGB").resize((3840 // args.scale, 2160 // args.scale), Image.Resampling.LANCZOS)
        low = pictures.load(large).window(0, large.height, 0, large.width)[0]
        frame = {key: round(value, 3) for key, value in efficiency(model, low, args.budget, args.pairs).items()}
        print(f"3840x2160 x{args.scale}:", frame, flush=True)
        out |= {"kodak12": summary, "3840x2160": frame}
    if args.json:
        args.json.write_text(json.dumps(out, indent=2) + "\n")


if __name__ == "__main__":
    main()
