"""Store a set of pictures as tokens, and train a classifier from them or from the pictures.

    python recipes/seit.py store --data pictures/ --out .cache/tokens            # pictures/cifar10_train_jpeg.npz
    python recipes/seit.py train --data pictures/ --store .cache/tokens --steps 3000 [--changes all]
    python recipes/seit.py train --data pictures/ --steps 3000                   # from pixels, for comparison

Pictures are those of CIFAR-10, or of a folder with train/<class>/ and test/<class>/. The network is a small vision
transformer whose patches are 8x8 pixels, or 2x2 tokens of 4x4 pixels with the Stem-Adapter. Prints a row of JSON.
"""

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from foveate.curate.seit import NONE, Changes, SeiT, adapt_stem, draws
from foveate.curate.tokeniser import PatchTokeniser
from foveate.data.labelled import Labelled, read_archive, read_folder
from foveate.data.token_store import TokenStore
from foveate.engine.fit import fit
from foveate.layers.transformer import VisionTransformer

SIDE, PATCH = 32, 4
CHANGES = {
    "none": NONE,
    "light": Changes(scale=(0.5, 1.0), noise=0, exchange=0, cutmix=0),
    "all": Changes(),
}


def read(folder: Path, part: str) -> Labelled:
    """The pictures of a part, "train" or "test"."""
    archive = folder / f"cifar10_{part}_jpeg.npz"
    if archive.is_file():
        return read_archive(archive, track=lambda items: track(items, f"reading {part}"))
    return read_folder(folder / part, SIDE, lambda items: track(items, f"reading {part}"))


def unit(pictures: Tensor) -> Tensor:
    """Bytes [B, H, W, 3] as [B, 3, H, W] in 0..1."""
    return pictures.permute(0, 3, 1, 2).float() / 255


def store(args: argparse.Namespace) -> None:
    """Fit a tokeniser, save it, and write the store beside it."""
    learned = read(args.data, "train")
    tokeniser = PatchTokeniser(PATCH, args.words, args.dim).fit(unit(learned.spread(4000).pictures), args.seed)
    tokeniser.save_pretrained(args.out / "tokeniser")
    parts = zip(learned.pictures.split(1000), learned.labels.split(1000), strict=True)
    batches = ((tokeniser(unit(pictures)), labels) for pictures, labels in parts)
    made = TokenStore.write(args.out / "tokens", batches, tokeniser.codebook, learned.classes, kind=args.kind)
    row = {"pictures": len(made), "bytes": made.total_bytes, "bytes per picture": made.total_bytes / len(made)}
    print(json.dumps(row | {"bits per token": round(made.entropy, 3)}))


def train(args: argparse.Namespace) -> None:
    """Train from a store, or from pixels without one, and test on the test pictures."""
    torch.manual_seed(args.seed)
    tested = read(args.data, "test")
    size = {"embed_dim": args.width, "depth": args.depth, "num_heads": args.width // 32, "global_pool": "avg"}
    if args.store:
        made = TokenStore(args.store / "tokens")
        tokeniser = PatchTokeniser.from_pretrained(args.store / "tokeniser")
        book = made.codebook
        network = VisionTransformer(SIDE // PATCH, 2, num_classes=len(made.classes), in_chans=book.shape[1], **size)
        adapt_stem(network)
        model = reading = SeiT(network, book, changes=CHANGES[args.changes], seed=args.seed)
        batches = draws(*made.all(), args.batch, args.seed)

        def loss(step: int) -> Tensor:
            return reading.loss(*next(batches))

        pairs = zip(tested.pictures.split(500), tested.labels.split(500), strict=True)
        parts = [(tokeniser(unit(pictures)), labels) for pictures, labels in pairs]
    else:
        learned = read(args.data, "train")
        model = network = VisionTransformer(SIDE, 2 * PATCH, num_classes=len(learned.classes), **size)
        draw = learned.draws(args.seed, shift=4)

        def loss(step: int) -> Tensor:
            pictures, labels = draw(args.batch)
            return F.cross_entropy(network(pictures), labels, label_smoothing=0.1)

        parts = list(tested.batches(500))
    model.train()
    result = fit(model, loss, args.steps, lr=args.lr, every=max(1, args.steps // 10))
    model.eval()
    with torch.inference_mode():
        right = sum(int((model(x).argmax(1) == y).sum()) for x, y in parts)
    source = f"tokens, changes: {args.changes}" if args.store else "pixels"
    print(json.dumps({"source": source, "accuracy": round(100 * right / len(tested), 2), **result}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    first = commands.add_parser("store", help="store the training pictures as tokens")
    first.add_argument("--out", type=Path, required=True)
    first.add_argument("--words", type=int, default=391)
    first.add_argument("--dim", type=int, default=16, help="numbers of a word")
    first.add_argument("--kind", choices=["parquet", "npz"], help="default: Parquet where pyarrow is there")
    second = commands.add_parser("train", help="train a classifier")
    second.add_argument("--store", type=Path, help="what `store` wrote; pixels when left out")
    second.add_argument("--changes", choices=CHANGES, default="light")
    second.add_argument("--steps", type=int, default=3000)
    second.add_argument("--batch", type=int, default=128)
    second.add_argument("--lr", type=float, default=1e-3)
    second.add_argument("--width", type=int, default=96)
    second.add_argument("--depth", type=int, default=4)
    for command in (first, second):
        command.add_argument("--data", type=Path, required=True)
        command.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (store if args.command == "store" else train)(args)


if __name__ == "__main__":
    main()
