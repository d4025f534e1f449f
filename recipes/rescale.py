"""Train the networks that shrink pictures and bring them back, at all scales together.

    python recipes/rescale.py iarn --data pictures/                       # bsds300, sunhays80, t91, set5, kodak12
    python recipes/rescale.py bidirectional-rescaling --data pictures/

Draws crops of photographs and a scale per step, evenly between 1 and 4 (a tenth of the steps with one for each side),
minimises the system's own loss, measures round trips on Set5 while it goes, and writes weights and card with scores on
kodak12. Killed, it resumes from its checkpoint.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from rich.progress import track
from torch import Tensor

from foveate import weights
from foveate.data.pictures import read_folder
from foveate.engine.fit import fit
from foveate.layers.resample import Size, resize, wholes
from foveate.layers.rescaler import Rescaler, quantise
from foveate.learn.crops import Crops
from foveate.meter.cost import count_parameters
from foveate.meter.quality import psnr_y
from foveate.restore.bidirectional_rescaling import BAIRNet
from foveate.restore.iarn import IARN

TRAINING = ("bsds300", "sunhays80", "t91")
SCALES = (1.5, 2.0, 3.0, 4.0)
MIDDLE = 256

NETWORKS = {
    "iarn": (IARN, {"blocks": 4, "growth": 16, "layers": 3}),
    "bidirectional-rescaling": (BAIRNet, {"channels": 16, "blocks": 4, "every": 0}),
}
LOSSES = {
    "iarn": {"guide": 4.0, "latent": 0.0, "stay": 0.0, "noise": 0.0},
    "bidirectional-rescaling": {"fidelity": 4.0, "idempotence": 0.1},
}


def drawn_size(dice: torch.Generator, side: int, largest: float = 4.0) -> Size:
    """(rows, columns) of a crop shrunk by a scale from 1 to the largest; one in ten has a scale for each side."""
    down, across, which = torch.rand(3, generator=dice).tolist()
    across = across if which < 0.1 else down
    return tuple(max(1, round(side / (1 + (largest - 1) * share))) for share in (down, across))  # type: ignore[return-value]


def read(folder: Path, side: int = 0) -> list[Tensor]:
    """The pictures of a folder, or the middles of them."""
    found = []
    for x in read_folder(folder):
        top, left = (max(0, (n - side) // 2) if side else 0 for n in x.shape[2:])
        found.append(x[..., top : top + side, left : left + side].contiguous() if side else x)
    return found


def scores(model: Rescaler, pictures: list[Tensor], scales: tuple[float, ...] = SCALES) -> dict[str, float]:
    """PSNR-Y of pictures that were shrunk, rounded to 8 bits and enlarged, and of the small ones against bicubic."""
    model.eval()
    found: dict[str, float] = {}
    for scale in scales:
        back, like = [], []
        for x in pictures:
            sides = (x.shape[2], x.shape[3])
            size = (round(sides[0] / scale), round(sides[1] / scale))
            with torch.inference_mode():
                small = quantise(model.reduce(x, size))
                back.append(float(psnr_y(model.enlarge(small, sides), x, round_to_8bit=True)))
                like.append(float(psnr_y(small, resize(x, wholes(sides, size)), round_to_8bit=True)))
        found |= {f"dB at {scale:g}": sum(back) / len(back), f"small dB at {scale:g}": sum(like) / len(like)}
    model.train()
    return {name: round(value, 2) for name, value in found.items()}


def loss_of(
    model: Rescaler, crops: Callable[[int, int], tuple[Tensor, Tensor]], batch: int, side: int, settings: dict
) -> Callable[[int], Tensor]:
    """The loss of a step: crops and a scale of their own."""
    dice = torch.Generator().manual_seed(0)

    def loss(_: int) -> Tensor:
        x = crops(batch, side)[1].contiguous(memory_format=torch.channels_last)
        result: Tensor = model.loss(x, drawn_size(dice, side), **settings)  # type: ignore[operator]
        return result

    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("method", choices=NETWORKS)
    parser.add_argument("--data", type=Path, required=True, help=f"folder that holds {', '.join(TRAINING)}, kodak12")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--side", type=int, default=48, help="of the crops, in pixels")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes"), help="checkpoints")
    parser.add_argument("--out", type=Path, default=weights.FOLDER)
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    network, config = NETWORKS[args.method]
    model: Rescaler = network(**config).to(memory_format=torch.channels_last)  # type: ignore[call-overload,arg-type]
    crops = Crops([args.data / d for d in TRAINING], 1, track=partial(track, description="reading pictures"))
    watched = read(args.data / "set5", 192) if (args.data / "set5").is_dir() else []
    done = fit(
        model,
        loss_of(model, crops, args.batch, args.side, LOSSES[args.method]),
        args.steps,
        lr=args.lr,
        checkpoint=args.work / f"{args.method}.safetensors",
        evaluate=(lambda m: scores(m, watched, (1.5, 3.0))) if watched else None,
    )
    kodak = args.data / "kodak12"
    description = {
        "config": config,
        "training": {"steps": done["steps"], "minutes": round(done["seconds"] / 60, 1)}
        | {"batch": args.batch, "crop": args.side, "lr": args.lr, "loss": LOSSES[args.method]},
        "parameters": count_parameters(model),
        "data": "bsds300 (train and val of BSDS500), sunhays80, t91; scales 1 to 4",
        "recipe": f"recipes/rescale.py {args.method} --steps {args.steps}",
        "scores": {f"kodak12, middle {MIDDLE} pixels": scores(model, read(kodak, MIDDLE))} if kodak.is_dir() else {},
        "trained": time.strftime("%Y-%m-%d"),
        "licence": "Apache-2.0",
    }
    print(model.keep(description, args.out), description["scores"])


if __name__ == "__main__":
    main()
