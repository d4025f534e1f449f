"""Train the any-scale network that comes with foveate.

    python recipes/gaussian_sr.py --data pictures/          # pictures/bsds300, pictures/sunhays80, pictures/t91

Every step draws a scale from 1 to 4 and crops whose reduction by it has `--side` pixels, and minimises the mean
absolute error of the enlarged crops. PSNR-Y on Set5 (pictures that are not trained on) is measured at three scales
while it goes. Killed, it resumes from its checkpoint.
"""

import argparse
import time
from math import ceil
from pathlib import Path

import numpy as np
import torch
from rich.progress import track
from torch import Tensor

from foveate import weights
from foveate.data.pictures import read_folder
from foveate.engine.fit import fit
from foveate.layers.rescaler import Filter, Rescaler
from foveate.learn.crops import Crops
from foveate.meter.quality import psnr_y
from foveate.restore.gsasr import GSASR, reduced

TRAINING = ("bsds300", "sunhays80", "t91")
CONFIG = {
    "channels": 32,
    "blocks": 8,
    "dim": 40,
    "heads": 4,
    "side": 8,
    "cross": (1, 2),
    "among": (1, 2),
    "density": 2,
    "expand": 2,
    "masked": True,
    "base": True,
}
SMALLEST, LARGEST = 1.0, 4.0
"""Scales of training."""

SCALES = {"x2": (2.0, 2.0), "x2.7": (2.7, 2.7), "x3": (3.0, 3.0), "x4": (4.0, 4.0), "x2 by x3.3": (2.0, 3.3)}
"""Scales of the scores, for rows and for columns."""


def score(model: Rescaler, pictures: list[Tensor], scale: tuple[float, float]) -> float:
    """Mean PSNR-Y in dB, rounded to 8 bit, a border of the larger scale cut."""
    values = []
    for picture in pictures:
        few = [int(n / s + 1e-9) for n, s in zip(picture.shape[2:], scale, strict=True)]
        rows, columns = (round(n * s) for n, s in zip(few, scale, strict=True))
        high = picture[..., :rows, :columns]
        image = model.enlarge(reduced(high, (few[0], few[1])), (rows, columns))
        values.append(psnr_y(image, high, border=ceil(max(scale)), round_to_8bit=True).item())
    return float(np.mean(values))


def scores(model: Rescaler, pictures: list[Tensor], names: tuple[str, ...] = tuple(SCALES)) -> dict[str, float]:
    """PSNR-Y at several scales."""
    with torch.inference_mode():
        return {name: round(score(model, pictures, SCALES[name]), 2) for name in names}


def step(model: GSASR, crops: Crops, scale: float, batch: int, side: int) -> Tensor:
    """The loss of one step."""
    large = round(scale * side)
    _, high = crops(batch, ceil(large / crops.scale))
    high = high[..., :large, :large]
    return (model.enlarge(reduced(high, (side, side)), (large, large)) - high).abs().mean()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(TRAINING)}, set5, kodak12")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--side", type=int, default=24, help="of the reduced crops in pixels")
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=weights.FOLDER)
    args = parser.parse_args(argv)

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    folders = [args.data / name for name in TRAINING if (args.data / name).is_dir()]
    # Of the crops only the large twins are used; Crops leaves out pictures below 48 pixels times its scale.
    crops = Crops(folders, ceil(LARGEST * args.side / 48), track=lambda files: track(files, "reading pictures"))
    tests = {name: read_folder(args.data / name) for name in ("set5", "kodak12") if (args.data / name).is_dir()}
    watched = next(iter(tests.values()), [])
    model = GSASR(**CONFIG)
    dice = np.random.default_rng(0)

    def loss(_: int) -> Tensor:
        return step(model, crops, float(dice.uniform(SMALLEST, LARGEST)), args.batch, args.side)

    done = fit(
        model,
        loss,
        args.steps,
        lr=args.lr,
        checkpoint=args.work / "gsasr.safetensors",
        evaluate=(lambda m: scores(m, watched, ("x2", "x3", "x4"))) if watched else None,
    )
    model.eval()
    bicubic = Filter("bicubic")
    description = {
        "config": CONFIG,
        "training": {k: done[k] for k in ("steps", "seconds")}
        | {"batch": args.batch, "crop": args.side, "lr": args.lr, "scales": [SMALLEST, LARGEST]},
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"{', '.join(folder.name for folder in folders)}; bicubic reduction, 8 bit",
        "recipe": "recipes/gaussian_sr.py",
        "scores": {name: {"PSNR-Y": scores(model, pictures)} for name, pictures in tests.items()},
        "bicubic": {name: {"PSNR-Y": scores(bicubic, pictures)} for name, pictures in tests.items()},
        "trained": time.strftime("%Y-%m-%d"),
        "licence": "Apache-2.0",
    }
    print(model.keep(description, args.out))
    print(description["scores"])


if __name__ == "__main__":
    main()
