"""Train the circuits of the codec lossless-probabilistic-circuits.

    python recipes/circuits.py photo grey thumbnail --data pictures/

For each: residuals of the pictures (bsds300, sunhays80 and t91, or cifar10_train), random patches with what is decoded
around them, a Chow-Liu tree of their mutual information, and mini-batch expectation maximisation with rising inertia.
Two to five minutes each on one core.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from foveate.compress.blended_prediction import to_symbols
from foveate.compress.circuit import HiddenChowLiuTree, chow_liu, mutual_information
from foveate.compress.circuit_coding import ALPHABET, FixedCircuit
from foveate.compress.lossless_probabilistic_circuits import SLUG, save_circuit
from foveate.data.labelled import read_archive
from foveate.weights import FOLDER

SIDE, BORDER, CROP = 4, 2, 512
Symbols = list[npt.NDArray[np.uint8]]


def photographs(folder: Path, mode: str) -> Symbols:
    """Residuals of training photographs; JPEG files at two thirds, which hides what JPEG did to them."""
    files = sorted(folder.glob("sunhays80/*.webp")) + sorted(folder.glob("t91/*.webp"))
    found = []
    for file in files + sorted(folder.glob("bsds300/*.jpg"))[::2]:
        picture = Image.open(file).convert(mode)
        if file.suffix == ".jpg":
            picture = picture.resize((picture.width * 2 // 3, picture.height * 2 // 3), Image.Resampling.LANCZOS)
        found.append(_symbols(picture))
    return found


def thumbnails(file: Path, count: int) -> Symbols:
    """Residuals of pictures of 32x32."""
    return [to_symbols(picture.permute(2, 0, 1).numpy()) for picture in read_archive(file, count).pictures]


def _symbols(picture: Image.Image) -> npt.NDArray[np.uint8]:
    pixels = np.asarray(picture)[:CROP, :CROP]
    return to_symbols(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def places(channels: int) -> npt.NDArray[np.int64]:
    """Channel, row and column of a patch's pixels and of those around it that are decoded before."""
    return np.array(
        [
            (channel, y, x)
            for y in range(-BORDER, SIDE)
            for x in range(-BORDER, SIDE + BORDER)
            if y < 0 or x < SIDE
            for channel in range(channels)
        ]
    )


def patches(pictures: Symbols, where: npt.NDArray[np.int64], count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random patches, equally many of each picture, and which of their variables lie in the picture. Shape: [N, D]."""
    random, found, known = np.random.default_rng(seed), [], []
    each = -(-count // len(pictures))
    around = ((BORDER, SIDE + BORDER), (BORDER, SIDE + BORDER))
    for symbols in pictures:
        padded = np.pad(symbols, ((0, 0), *around))
        inside = np.pad(np.ones(symbols.shape[1:], bool), around)
        ys, xs = (
            random.integers(0, extent, (each, 1)) + BORDER + where[:, axis + 1]
            for axis, extent in enumerate(symbols.shape[1:])
        )
        found.append(padded[where[:, 0], ys, xs])
        known.append(inside[ys, xs])
    order = random.permutation(each * len(pictures))[:count]
    return torch.from_numpy(np.concatenate(found)[order]), torch.from_numpy(np.concatenate(known)[order])


def started(parents: npt.NDArray[np.int64], channels: npt.NDArray[np.int64], states: int) -> HiddenChowLiuTree:
    """A circuit whose states begin as Laplace distributions of all widths, a third each leaning to either side."""
    model = HiddenChowLiuTree(parents, states, ALPHABET, channels)
    widths = np.geomspace(0.25, 50, -(-states // 3)).repeat(3)[:states]
    lean = np.resize([0.0, -0.5, 0.5], states) * widths
    distance = np.abs(np.arange(ALPHABET) - 128 - lean[:, None]) / widths[:, None]
    likeness = -(np.log(widths[:, None] / widths) ** 2)
    with torch.no_grad():
        model.prior.zero_()
        model.emissions.copy_(torch.from_numpy(np.logaddexp(-1.4 * distance, -12)).expand_as(model.emissions))
        model.transitions.mul_(0.5).add_(torch.from_numpy(np.logaddexp(likeness, -5)))
    return model


def merged(symbols: Tensor) -> Tensor:
    """Residuals by sign and order of magnitude, 13 classes, for mutual information."""
    value = symbols.double() - 128
    return (value.sign() * (value.abs() + 1).log2().ceil().clamp(max=6) + 6).long()


def train(name: str, args: argparse.Namespace) -> None:
    began = time.perf_counter()
    if name == "thumbnail":
        pictures = thumbnails(args.data / "cifar10_train_jpeg.npz", 20_000)
    else:
        pictures = photographs(args.data, "L" if name == "grey" else "RGB")
    where = places(len(pictures[0]))
    evidence = torch.from_numpy((where[:, 1:] < 0).any(1))
    x, known = patches(pictures, where, args.patches, seed=0)
    held, held_known, x, known = x[:2000], known[:2000], x[2000:], known[2000:]
    parents = chow_liu(mutual_information(merged(x[:20_000]), 13))
    model = started(parents, where[:, 0], args.states)
    print(f"{name}: {len(pictures)} pictures, {len(x)} patches, {time.perf_counter() - began:.0f} s", flush=True)

    def score() -> float:
        """Bits per coded variable, given the evidence."""
        with torch.no_grad():
            nats = (model(held, held_known & evidence) - model(held, held_known)).sum()
        return float(nats / ((held_known & ~evidence).sum() * np.log(2)))

    starts = range(0, len(x) - args.batch + 1, args.batch)
    for epoch in range(args.epochs):
        for place, start in enumerate(starts):
            batch, done = slice(start, start + args.batch), (epoch + place / len(starts)) / args.epochs
            model.em_step(x[batch], known[batch], inertia=0.3 + 0.68 * done)
        print(f"epoch {epoch + 1}: {score():.4f} bits per dimension, {time.perf_counter() - began:.0f} s", flush=True)
    card = {
        "data": "20000 pictures of cifar10_train" if name == "thumbnail" else "sunhays80, t91, half of bsds300 at 2/3",
        "recipe": f"recipes/circuits.py {name}, {len(x)} patches of {SIDE}x{SIDE} with {BORDER} pixels around, "
        f"{args.states} states, {args.epochs} epochs of expectation maximisation",
        "seconds": round(time.perf_counter() - began),
        "scores": {"bits per dimension, held out patches": round(score(), 4)},
    }
    save_circuit(FixedCircuit.of(model, where), name, card, args.out)
    print(f"{SLUG}-{name}: {json.dumps(card)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=("photo", "grey", "thumbnail"))
    parser.add_argument("--data", type=Path, required=True, help="folder in which the training pictures lie")
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--patches", type=int, default=100_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    for name in args.names:
        train(name, args)


if __name__ == "__main__":
    main()
