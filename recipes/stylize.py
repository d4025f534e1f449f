"""Train what `foveate stylize` needs: the small feature network, then one transformation network per style.

    python recipes/stylize.py features --data pictures/              # pictures/cifar10_train_jpeg.npz, ..._test_...
    python recipes/stylize.py style strokes --data pictures/         # pictures/bsds300, pictures/kodak12
    python recipes/stylize.py style night --picture night.jpg --data pictures/ --features vgg16.safetensors --paper

`features` learns to name the objects of CIFAR-10 and keeps the convolutions. `style` draws the style picture, or takes
one of yours, and minimises the perceptual losses of Johnson et al. 2016 on crops of photographs. Both resume from a
checkpoint when killed, and write weights in half precision beside a card.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from rich.progress import track
from scipy.ndimage import gaussian_filter
from scipy.spatial import cKDTree
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from foveate.data.labelled import read_archive
from foveate.engine.fit import fit
from foveate.layers.fold import fuse
from foveate.layers.vgg import SLUG, SMALL, SMALL_NORMAL, VGG, small_vgg
from foveate.learn.crops import Crops
from foveate.learn.image_transform import TransformNet
from foveate.learn.perceptual_losses import PerceptualLosses
from foveate.meter import count_parameters
from foveate.weights import FOLDER

LAYERS = ("relu1_2", "relu2_2", "relu3_3", "relu4_2")
"""Where the style is looked for in the small network; in VGG-16 the last one is relu4_3."""

CONTENT = "relu2_2"
CONFIG = {"widths": [16, 32, 48], "blocks": 4, "bound": "none", "residual": True}
PAPER = {"widths": [32, 64, 128], "blocks": 5}
BLUES = ((18, 32, 74), (28, 66, 128), (46, 110, 160), (92, 158, 186), (178, 200, 180), (236, 206, 110), (244, 168, 48),
         (206, 96, 36))  # fmt: skip
GLASS = ((178, 34, 36), (226, 120, 30), (240, 196, 60), (36, 120, 72), (20, 92, 140), (74, 44, 120), (232, 226, 205),
         (120, 180, 200))  # fmt: skip


class Classifier(nn.Module):
    """The feature network with an average and a linear layer on top."""

    def __init__(self) -> None:
        super().__init__()
        self.vgg = VGG(SMALL, SMALL_NORMAL, norm=True)
        self.deepest = max(self.vgg.layers)
        self.head = nn.Linear(SMALL[-1][-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.vgg(x, [self.deepest])[self.deepest].mean((2, 3)))


def train_features(args: argparse.Namespace) -> None:
    """Train the feature network on CIFAR-10; write it with its batch norms folded."""
    learned = read_archive(args.data / "cifar10_train_jpeg.npz", track=lambda i: track(i, "reading"))
    tested = read_archive(args.data / "cifar10_test_jpeg.npz", track=lambda i: track(i, "reading"))
    network, draw = Classifier().to(memory_format=torch.channels_last), learned.draws(0, shift=4)

    def batch() -> tuple[Tensor, Tensor]:
        pictures, labels = draw(args.batch)
        return (pictures + 2) / 4, labels  # draws are 4 x - 2; the network does that itself

    def loss(_: int) -> Tensor:
        pictures, labels = batch()
        return F.cross_entropy(network.train()(pictures), labels, label_smoothing=0.1)

    def evaluate(_: nn.Module) -> dict[str, float]:
        update_bn((batch()[0] for _ in range(20)), network)
        network.eval()
        with torch.inference_mode():
            right = sum(int((network((x + 2) / 4).argmax(1) == t).sum()) for x, t in tested.batches(500))
        return {"accuracy": 100 * right / len(tested)}

    done = fit(
        network, loss, args.steps, lr=3e-3, average=0.995, checkpoint=args.work / "features.safetensors",
        evaluate=evaluate, every=args.every,
    )  # fmt: skip
    scores = evaluate(network)
    folded = fuse(network.vgg)
    card = {
        "system": SLUG,
        "config": {"blocks": SMALL, "normal": SMALL_NORMAL},
        "parameters": count_parameters(folded),
        "data": "CIFAR-10, its 50,000 training pictures",
        "training": {"steps": args.steps, "seconds": done["seconds"], "batch": args.batch, "lr": 3e-3},
        "scores": {
            "accuracy in % on the CIFAR-10 test pictures, before the classifier was cut off": scores["accuracy"]
        },
    }
    write(folded, SLUG, card, args)


def train_style(args: argparse.Namespace) -> None:
    """Train the network of one style; every part of the loss is relative to what the pictures themselves have."""
    judge = VGG.load_official(args.features, args.caffe) if args.features else small_vgg()
    layers = [*LAYERS[:3], "relu4_3" if "relu4_3" in judge.layers else LAYERS[3]]
    drawn = Image.open(args.picture).convert("RGB") if args.picture else STYLES[args.name](256)
    drawn.thumbnail((256, 256))
    style = torch.from_numpy(np.array(drawn)).permute(2, 0, 1)[None] / 255
    crops = Crops([args.data / "bsds300"], 1, track=lambda files: track(files, "reading pictures"))
    losses = PerceptualLosses(
        judge, [CONTENT], layers, style_weight=args.style_weight, variation_weight=args.variation_weight
    ).relative_to(style, crops(16, args.side)[0])
    grams = losses.grams(style)
    config = PAPER if args.paper else CONFIG
    network = TransformNet(**config).to(memory_format=torch.channels_last)
    tested = "kodak12" if (args.data / "kodak12").is_dir() else "bsds300"
    held_out = Crops([args.data / tested], 1)(8, args.side)[0]

    def loss(_: int) -> Tensor:
        pictures = crops(args.batch, args.side)[0].contiguous(memory_format=torch.channels_last)
        y = network(pictures)
        beyond = (y - y.clamp(0, 1)).square().mean()  # what no file can hold must not make up for the style
        return losses(y, pictures, grams) + args.range_weight * beyond

    def evaluate(_: nn.Module) -> dict[str, float]:
        with torch.inference_mode():
            terms = losses.terms(network(held_out).clamp(0, 1), held_out, grams)
        return {name: round(float(value), 4) for name, value in terms._asdict().items()}

    done = fit(
        network, loss, args.steps, lr=args.lr, average=0.99, checkpoint=args.work / f"style-{args.name}.safetensors",
        evaluate=evaluate, every=args.every,
    )  # fmt: skip
    with torch.inference_mode():
        before = losses.terms(held_out, held_out, grams)
    card = {
        "system": SLUG,
        "config": config,
        "parameters": count_parameters(network),
        "style": str(args.picture.name) if args.picture else f"drawn by {args.recipe}",
        "features": str(args.features.name) if args.features else f"{SLUG}.safetensors",
        "data": "bsds300 (train and val of BSDS500)",
        "training": {"steps": args.steps, "seconds": done["seconds"], "batch": args.batch, "crop": args.side}
        | {"style weight": args.style_weight, "variation weight": args.variation_weight}
        | {"range weight": args.range_weight, "lr": args.lr},
        "scores": {"pictures": tested, "of the pictures, with style": [round(float(v), 4) for v in before]}
        | {"of the results": [done[name] for name in before._fields], "parts": list(before._fields)},
    }
    write(network, f"stylize-{args.name}", card, args)


def _noise(dice: np.random.Generator, side: int, smooth: float) -> npt.NDArray[np.float64]:
    """A smooth random field in 0..1 that repeats at its borders."""
    field = gaussian_filter(dice.standard_normal((side, side)), smooth, mode="wrap")
    return (field - field.min()) / (field.max() - field.min())


def strokes(side: int, seed: int = 0) -> Image.Image:
    """Thick strokes of paint, blue and gold, along a swirling field."""
    dice, big = np.random.default_rng(seed), 2 * side
    angle, tone, palette = 4 * np.pi * _noise(dice, big, 60), _noise(dice, big, 40), np.array(BLUES)
    image = Image.new("RGB", (big, big), BLUES[0])
    draw = ImageDraw.Draw(image)
    for _ in range(5000 * side**2 // 256**2):
        x, y = dice.uniform(0, big, 2)
        pick = np.clip((tone[int(y), int(x)] + dice.normal(0, 0.08)) * len(palette), 0, len(palette) - 1)
        colour = np.clip(palette[int(pick)] + dice.normal(0, 10, 3), 0, 255).astype(int)
        points = []
        for _ in range(8):
            points.append((x, y))
            towards = angle[int(y) % big, int(x) % big]
            x, y = x + 8 * np.cos(towards), y + 8 * np.sin(towards)
        draw.line(points, fill=tuple(colour), width=int(dice.integers(8, 14)), joint="curve")
    return image.resize((side, side), Image.Resampling.LANCZOS)


def mosaic(side: int, seed: int = 0) -> Image.Image:
    """Coloured glass in lead."""
    dice, big, count = np.random.default_rng(seed), 2 * side, 240 * side**2 // 256**2
    points, pixels = dice.uniform(0, big, (count, 2)), np.stack(np.mgrid[:big, :big], -1).reshape(-1, 2)
    for _ in range(2):  # Lloyd's steps even the cells out
        nearest = cKDTree(points).query(pixels)[1]
        sizes = np.maximum(1, np.bincount(nearest, minlength=count))
        points = np.stack([np.bincount(nearest, axis, count) / sizes for axis in pixels.T], -1)
    away, nearest = cKDTree(points).query(pixels, k=2)
    row, column = points.astype(int).clip(0, big - 1).T
    pick = _noise(dice, big, 50)[row, column] * len(GLASS) + dice.normal(0, 1.3, count)
    colours = np.array(GLASS)[pick.clip(0, len(GLASS) - 1).astype(int)] + dice.normal(0, 12, (count, 3))
    glass = colours[nearest[:, 0]] * (1 - 0.25 * away[:, :1] / away[:, 0].max())
    glass[away[:, 1] - away[:, 0] < 8] = (26, 22, 20)
    image = Image.fromarray(glass.clip(0, 255).astype(np.uint8).reshape(big, big, 3))
    return image.resize((side, side), Image.Resampling.LANCZOS)


STYLES: dict[str, Callable[[int], Image.Image]] = {"strokes": strokes, "mosaic": mosaic}


def write(network: nn.Module, name: str, card: dict, args: argparse.Namespace) -> None:
    """Weights in half precision and their card."""
    from safetensors.torch import save_file

    args.out.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().half().contiguous() for k, v in network.state_dict().items()}
    save_file(tensors, args.out / f"{name}.safetensors")
    more = {"recipe": args.recipe, "trained": time.strftime("%Y-%m-%d"), "licence": "Apache-2.0"}
    (args.out / f"{name}.json").write_text(json.dumps(card | more, indent=2) + "\n")
    print(name, card.get("scores"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    features = commands.add_parser("features", help="train the feature network on CIFAR-10")
    features.add_argument("--steps", type=int, default=1200)
    features.add_argument("--batch", type=int, default=96)
    features.set_defaults(run=train_features, recipe="recipes/stylize.py features")
    style = commands.add_parser("style", help="train the network of one style on photographs")
    style.add_argument("name", help=f"{', '.join(STYLES)}, or a name for --picture")
    style.add_argument("--picture", type=Path, help="the style, if it is not one that is drawn here")
    style.add_argument(
        "--features", type=Path, help="safetensors of torchvision's VGG-16, instead of the small network"
    )
    style.add_argument("--caffe", action="store_true", help="they were converted from Caffe")
    style.add_argument("--paper", action="store_true", help="the paper's widths instead of a smaller network")
    style.add_argument("--steps", type=int, default=1500)
    style.add_argument("--batch", type=int, default=2)
    style.add_argument("--side", type=int, default=128)
    style.add_argument("--lr", type=float, default=1e-3)
    style.add_argument("--style-weight", type=float, default=1.0)
    style.add_argument("--variation-weight", type=float, default=0.5)
    style.add_argument("--range-weight", type=float, default=30.0, help="of squares of what lies outside 0..1")
    style.set_defaults(run=train_style, recipe="recipes/stylize.py style")
    for command in (features, style):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--every", type=int, default=300, help="steps between checkpoints")
        command.add_argument("--threads", type=int, default=torch.get_num_threads())
        command.add_argument("--work", type=Path, default=Path(".cache/recipes/stylize"), help="checkpoints")
        command.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    if args.command == "style" and args.picture is None and args.name not in STYLES:
        parser.error(f"{args.name!r} is not drawn here; use {', '.join(STYLES)}, or give its --picture")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.run(args)


if __name__ == "__main__":
    main()
