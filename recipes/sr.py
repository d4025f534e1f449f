"""Train the super-resolution networks that come with foveate.

    python recipes/sr.py pcsr --scale 4 --data pictures/          # pictures/bsds300, pictures/sunhays80, pictures/t91
    python recipes/sr.py pcsr --scale 4 --data pictures/ --start x2.safetensors --steps 4000

Reads every photograph of the training folders, draws crops, minimises the system's own loss, measures PSNR-Y on Set5
(pictures that are not trained on) while it goes, and writes weights and card. Killed, it resumes from its checkpoint.
"""

import argparse
import json
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.progress import track
from safetensors.torch import load_file

from foveate import weights
from foveate.engine.fit import fit
from foveate.layers.upscaler import Upscaler
from foveate.learn.crops import Crops
from foveate.meter.quality import psnr_y
from foveate.ops.color import rgb_to_y
from foveate.restore.acla import ACLA
from foveate.restore.adaptive_patch_exiting import APE
from foveate.restore.espcn import ESPCN
from foveate.restore.pcsr import HEAVY, PCSR
from foveate.restore.scnet import SCNet
from foveate.restore.seemore import SeemoRe
from foveate.restore.srformer import SRFormer
from foveate.restore.tcsr import TCSR

TRAINING = ("bsds300", "sunhays80", "t91")


def evaluation_pairs(folder: Path, scale: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(low, high) of every picture of a folder: cut to a multiple of the scale, reduced by Pillow's bicubic."""
    pairs = []
    for file in sorted(folder.glob("*.png")):
        picture = Image.open(file).convert("RGB")
        w, h = picture.width // scale * scale, picture.height // scale * scale
        high = picture.crop((0, 0, w, h))
        low = high.resize((w // scale, h // scale), Image.Resampling.BICUBIC)
        pairs.append(tuple(torch.from_numpy(np.array(p)).permute(2, 0, 1)[None] / 255 for p in (low, high)))
    return pairs


def score(model: Upscaler, pairs: list[tuple[torch.Tensor, torch.Tensor]], share: float = 1.0) -> float:
    """Mean PSNR-Y in dB at a budget share, rounded to 8 bit, border of `scale` pixels cut."""
    model.eval()
    values = []
    for low, high in pairs:
        image = model.upscale(low, share).image.clamp(0, 1)
        values.append(psnr_y(image, high, border=model.scale, round_to_8bit=True).item())
    return float(np.mean(values))


def train_pcsr(args: argparse.Namespace, crops: Crops, pairs: list) -> tuple[Upscaler, dict]:
    """Phase 0: encoder and both heads. Phase 1: light head and classifier. Then all of them at the share met in use."""
    config = {
        "scale": args.scale,
        "encoder": "residual",
        "encoder_config": {"channels": 32, "blocks": 4},
        "heavy": HEAVY.get(args.scale, [112, 112]),
        "light": [args.light],
        "classifier": [16],
    }
    model = PCSR(**config)
    model.to(memory_format=torch.channels_last)
    if args.start:
        start(model, args.start)
    phase0 = [*model.encoder.parameters(), *model.heavy.parameters(), *model.light.parameters()]

    subpixels = {2: 2, 3: 3, 4: 4}[args.scale]  # drawn anew each step; all of them would cost memory, not teach more

    first = fit(
        model,
        lambda _: model.dense_loss(*crops(8, 32), subpixels, both=True),
        args.steps,
        lr=args.lr,
        parameters=phase0,
        checkpoint=args.work / f"pcsr-x{args.scale}-0.safetensors",
        evaluate=lambda m: {"set5": score(m, pairs)},
    )

    second = fit(
        model,
        lambda _: model.routed_loss(*crops(8, 32), subpixels),
        args.steps // 4,
        lr=args.lr,
        parameters=[*model.light.parameters(), *model.classifier.parameters()],
        clip=1e6,
        checkpoint=args.work / f"pcsr-x{args.scale}-1.safetensors",
        evaluate=lambda m: {"set5 at 0.5": score(m, pairs, 0.5)},
    )
    third = fit(
        model,
        lambda _: model.budget_loss(*crops(8, 32), subpixels),
        args.polish,
        lr=args.lr / 2,
        checkpoint=args.work / f"pcsr-x{args.scale}-2.safetensors",
        evaluate=lambda m: {"set5": score(m, pairs), "set5 at 0.5": score(m, pairs, 0.5)},
    )
    phases = (first, second, third)
    training = {"steps": [p["steps"] for p in phases], "seconds": sum(p["seconds"] for p in phases)}
    return model, {"config": config, "training": training | {"batch": 8, "crop": 32, "lr": args.lr}}


def train_ape(args: argparse.Namespace, crops: Crops, pairs: list) -> tuple[Upscaler, dict]:
    """Stage 1: the backbone alone, so that depth pays. Stage 2: all exits. Then the regressor and the calibration."""
    config = {"scale": args.scale, "channels": 32, "blocks": 8, "interval": 1, "gain": "error"}
    model = APE(**config).to(memory_format=torch.channels_last)
    if args.start:
        start(model, args.start)

    def last_exit(_: int) -> torch.Tensor:
        low, high = crops(4, model.patch)
        return (model(low) - high).abs().mean()

    checkpoint = str(args.work / f"{model.slug}-x{args.scale}-{{}}.safetensors")
    first = fit(
        model,
        last_exit,
        args.steps,
        lr=args.lr,
        parameters=[*model.head.parameters(), *model.body.parameters(), *model.tail.parameters()],
        checkpoint=Path(checkpoint.format(0)),
        evaluate=lambda m: {"set5": score(m, pairs)},
    )
    second = fit(
        model,
        lambda _: model.loss(*crops(4, model.patch)),
        args.polish,
        lr=args.lr / 2,
        clip=1e6,
        checkpoint=Path(checkpoint.format(1)),
        evaluate=lambda m: {"set5": score(m, pairs)},
    )
    low, high = crops(2048, model.patch)
    model.fit_regressor(low, high)
    model.calibrate(low)
    training = {"steps": [first["steps"], second["steps"]], "seconds": first["seconds"] + second["seconds"]}
    return model, {"config": config, "training": training | {"batch": 4, "crop": model.patch, "lr": args.lr}}


def train_plain(network: type[Upscaler], config: dict, args: argparse.Namespace, crops: Crops, pairs: list) -> tuple:
    """Minimise `plain_loss` on random crops."""
    config = {"scale": args.scale, **config}
    model = network(**config).to(memory_format=torch.channels_last)
    if args.start:
        start(model, args.start)

    def loss(step: int) -> torch.Tensor:
        return plain_loss(model.train(), *crops(8, 32), progress=step / args.steps)

    done = fit(
        model,
        loss,
        args.steps,
        lr=args.lr,
        checkpoint=args.work / f"{network.slug}-x{args.scale}.safetensors",
        evaluate=lambda m: {"set5": score(m, pairs)},
    )
    training = {k: done[k] for k in ("steps", "seconds")}
    return model, {"config": config, "training": training | {"batch": 8, "crop": 32, "lr": args.lr}}


def plain_loss(model: Upscaler, low: torch.Tensor, high: torch.Tensor, progress: float) -> torch.Tensor:
    """Mean absolute error, and what a network's authors add to it. `progress` goes from 0 to 1."""
    match model:
        case ESPCN():
            return (model(rgb_to_y(low)) - rgb_to_y(high)).abs().mean()
        case SeemoRe():
            return model.loss(low, high)
        case ACLA():
            model.set_temperature(5 * 0.02**progress, noisy=progress < 0.7)
            return (model(low) - high).abs().mean() + 1e-3 * model.sparsity()
        case _:
            return (model(low) - high).abs().mean()


METHODS = {
    "pcsr": train_pcsr,
    "adaptive-patch-exiting": train_ape,
    "scnet": partial(train_plain, SCNet, {"channels": 40, "blocks": 16, "upsampling": "ps"}),
    "espcn": partial(train_plain, ESPCN, {"residual": True, "activation": "relu"}),
    "seemore": partial(train_plain, SeemoRe, {"channels": 32, "groups": 5, "base": True}),
    "srformer": partial(train_plain, SRFormer, {"channels": 36, "depths": [4, 4], "drop": 0.0, "base": True}),
    "tcsr": partial(train_plain, TCSR, {"channels": 32, "blocks": 6, "kernel_size": 7, "base": True}),
    "acla": partial(train_plain, ACLA, {"channels": 32, "blocks": 8}),
}


def start(model: torch.nn.Module, file: Path) -> None:
    """Begin with the weights of another network, as far as names and dimensions agree.

    A network of another scale shares its encoder. Of a narrower head, all units are taken over; the units that it lacks
    keep their random input weights and get output weights of zero, so that the wider head begins as the same function.
    """
    own = model.state_dict()
    for key, value in load_file(file).items():
        mine = own.get(key)
        if (
            mine is None
            or mine.dim() != value.dim()
            or any(a < b for a, b in zip(mine.shape, value.shape, strict=True))
        ):
            continue
        if mine.dim() > 2 and mine.shape != value.shape:
            continue
        if mine.dim() == 2:
            mine[: len(value), value.shape[1] :] = 0
        mine[tuple(slice(n) for n in value.shape)] = value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=METHODS)
    parser.add_argument("--scale", type=int, choices=(2, 3, 4), required=True)
    parser.add_argument(
        "--data", type=Path, required=True, help=f"folder that holds {', '.join(TRAINING)}, set5, kodak12"
    )
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--light", type=int, default=64, help="hidden width of PCSR's light head")
    parser.add_argument(
        "--polish",
        type=int,
        default=1500,
        help="steps of the last phase of PCSR (all parts at the share met in use) or APE (all exits)",
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--start", type=Path, help="weights to begin with, e.g. those of another scale")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=weights.FOLDER)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    crops = Crops([args.data / d for d in TRAINING], args.scale, track=lambda f: track(f, "reading pictures"))
    pairs = evaluation_pairs(args.data / "set5", args.scale)
    model, description = METHODS[args.method](args, crops, pairs)
    shares = [1.0, 0.75, 0.5] if model.floor < 0.5 else [1.0]
    scores = {
        name: {
            f"PSNR-Y at budget {b}": round(score(model, evaluation_pairs(args.data / name, args.scale), b), 2)
            for b in shares
        }
        for name in ("set5", "kodak12")
        if (args.data / name).is_dir()
    }
    before = args.start and args.start.with_suffix(".json")
    if before and before.exists():
        card = json.loads(before.read_text())
        description["training"]["started from"] = {"scale": card["scale"]} | card["training"]
    description |= {
        "parameters": sum(p.numel() for p in model.parameters()),
        "floor": round(model.floor, 3),
        "data": "bsds300 (train and val of BSDS500), sunhays80, t91; bicubic reduction, 8 bit",
        "recipe": f"recipes/sr.py {args.method} --scale {args.scale}",
        "scores": scores,
        "trained": time.strftime("%Y-%m-%d"),
        "licence": "Apache-2.0",
    }
    weights.save(model, args.method, args.scale, description, args.out)
    print(scores)


if __name__ == "__main__":
    main()
