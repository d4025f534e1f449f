"""Train the weights of ADK-Net that come with foveate.

    python recipes/downscale.py --scale 2 --features 24 --data pictures/      # pictures/bsds300, sunhays80, t91
    python recipes/downscale.py --scale 4 --features 20 --data pictures/

Draws crops of every photograph of the training folders, reduces them by a camera-like downscaler that treats each
colour another way (`foveate.restore.adk_net.sample_camera`; the network sees its results only), minimises the mean
absolute error, and writes weights and card. Killed, it resumes from its checkpoint. Another downscaler to imitate takes
the place of `sample_camera` below.
"""

import argparse
import time
from pathlib import Path

import torch
from rich.progress import track

from foveate import weights
from foveate.data import pictures
from foveate.data.degrade import downscale, mod_crop
from foveate.engine.fit import fit
from foveate.learn.crops import Crops
from foveate.meter.quality import psnr
from foveate.restore.adk_net import ADKNet, sample_camera

TRAINING = ("bsds300", "sunhays80", "t91")
RIM = 3
"""Small pixels at the border of a crop for whose window the crop does not suffice."""


def score(reduce, found: list[torch.Tensor], scale: int) -> float:
    """PSNR in dB of RGB against the true small pictures, rounded to 8 bits, a border of 2 pixels cut; the mean."""
    values = []
    for x in found:
        with torch.inference_mode():
            y, truth = ((255 * t.clamp(0, 1)).round() / 255 for t in (reduce(x), sample_camera(x, scale)))
        values.append(float(psnr(y, truth, border=2)))
    return sum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=2)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {', '.join(TRAINING)}, set5, kodak12")
    parser.add_argument("--features", type=int, default=24)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--trunk", type=int, default=2)
    parser.add_argument("--normalise", default="signed")
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--crop", type=int, default=24, help="side of the crops in small pixels")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=weights.FOLDER)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    folders = [args.data / d for d in TRAINING if (args.data / d).is_dir()]
    crops = Crops(folders, args.scale, track=lambda files: track(files, "reading pictures"))
    tests = {
        name: [mod_crop(x, args.scale) for x in pictures.read_folder(args.data / name)]
        for name in ("set5", "kodak12")
        if (args.data / name).is_dir()
    }
    config = {k: getattr(args, k) for k in ("scale", "features", "blocks", "trunk", "normalise")}
    model = ADKNet(**config)

    def loss(_: int) -> torch.Tensor:
        high = crops(args.batch, args.crop)[1]
        wanted = sample_camera(high, args.scale)
        return (model(high) - wanted)[..., RIM:-RIM, RIM:-RIM].abs().mean()

    done = fit(
        model,
        loss,
        args.steps,
        lr=args.lr,
        checkpoint=args.work / f"adk-net-x{args.scale}.safetensors",
        evaluate=lambda m: {"set5": score(m.reduce, tests["set5"], args.scale)} if "set5" in tests else {},
    )
    scores = {
        name: {
            "PSNR": round(score(model.reduce, found, args.scale), 2),
            "PSNR of bicubic": round(score(lambda x: downscale(x, args.scale), found, args.scale), 2),
        }
        for name, found in tests.items()
    }
    training = {k: done[k] for k in ("steps", "seconds")} | {"batch": args.batch, "crop": args.crop, "lr": args.lr}
    description = {
        "config": config,
        "training": training,
        "parameters": sum(p.numel() for p in model.parameters()),
        "data": f"{', '.join(f.name for f in folders)}; small pictures by sample_camera",
        "recipe": f"recipes/downscale.py --scale {args.scale} --features {args.features}",
        "scores": scores,
        "trained": time.strftime("%Y-%m-%d"),
        "licence": "Apache-2.0",
    }
    weights.save(model, "adk-net", args.scale, description, args.out)
    print(scores)


if __name__ == "__main__":
    main()
