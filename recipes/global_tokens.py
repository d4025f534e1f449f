"""Train the network of the codec quantised-global-autoencoder.

    python recipes/global_tokens.py --data pictures/          # pictures/bsds300, pictures/t91, pictures/kodak12

Learns from random squares of the training photographs: first without quantisation, then with codebooks started by
k-means, unused words revived. Half of the squares keep only the first tokens, so that these learn to matter most. Then
counts how often every word is chosen, for the entropy coder, and measures kodak12. Ten minutes on one core; killed, it
resumes from its checkpoint.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import Progress, track
from torch import Tensor

from foveate.compress.global_tokens import GlobalAutoencoder
from foveate.compress.quantised_global_autoencoder import LEVELS, save_weights
from foveate.data import pictures
from foveate.engine.fit import fit
from foveate.learn.crops import Crops
from foveate.weights import FOLDER

PLAIN, FREEZE = 0.1, 0.8
"""Shares of the steps: before it nothing is quantised, after it no word is revived."""

REVIVE, STARTING, COUNTED = 100, 4096, 20_000
CONFIG = {"size": 32, "tokens": 64, "words": 128, "dim": 16, "heads": 16, "halvings": 2, "widths": [16, 32, 64]}


class Training:
    """The loss of a step."""

    def __init__(self, network: GlobalAutoencoder, crops: Crops, args: argparse.Namespace) -> None:
        self.network, self.crops, self.args = network, crops, args
        self.dice = torch.Generator().manual_seed(args.seed)
        self.plain, self.freeze = int(PLAIN * args.steps), int(FREEZE * args.steps)

    def __call__(self, step: int) -> Tensor:
        quantiser = self.network.quantiser
        if step == self.plain:
            with torch.no_grad():
                draws = [self.network.vectors(self.squares(64)) for _ in range(STARTING // 64)]
                quantiser.start(torch.cat(draws), self.dice)
        if self.plain < step < self.freeze:
            quantiser.observe()
            if step % REVIVE == 0:
                quantiser.revive(self.dice)
        x = self.squares(self.args.batch)
        coarse = torch.tensor(LEVELS)[torch.randint(len(LEVELS), (len(x),), generator=self.dice)]
        kept = torch.where(torch.rand(len(x), generator=self.dice) < 0.5, coarse, self.network.tokens)
        y, found = self.network(x, kept, quantised=step >= self.plain)
        loss = F.mse_loss(y, x)
        return loss if found is None else loss + self.args.price * found.loss

    def squares(self, count: int) -> Tensor:
        """Random squares of the training photographs."""
        return self.crops(count, self.network.size)[1]


def squares_of(folder: Path, side: int) -> Tensor:
    """All squares of all photographs. Shape: [N, 3, side, side]."""
    found = []
    for file, _ in pictures.list_pictures(folder):
        picture = pictures.load(file)
        colour, _ = picture.window(0, picture.height // side * side, 0, picture.width // side * side)
        found.append(colour[0].unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1))
    return torch.cat(found)


@torch.no_grad()
def scores(network: GlobalAutoencoder, tested: Tensor, levels: tuple[int, ...] = LEVELS) -> dict[str, float]:
    """PSNR in dB of squares by so many tokens."""
    codes = torch.cat([network.encode(part) for part in tested.split(256)])
    found = {}
    for level in levels:
        parts = zip(codes.split(256), tested.split(256), strict=True)
        lost = sum(F.mse_loss(network.decode(c, level), x, reduction="sum") for c, x in parts) / tested.numel()
        found[f"PSNR of {level} tokens"] = round(float(-10 * torch.log10(torch.as_tensor(lost))), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder in which bsds300/, t91/ and kodak12/ lie")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--price", type=float, default=0.1, help="weight of the quantiser's loss")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes/global_tokens"), help="checkpoint")
    parser.add_argument("--out", type=Path, default=FOLDER)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    folders = [args.data / name for name in ("bsds300", "t91")]
    crops = Crops(folders, 1, seed=args.seed, track=lambda files: track(files, "reading"))
    network = GlobalAutoencoder(**CONFIG)
    tested = squares_of(args.data / "kodak12", network.size)
    training = Training(network, crops, args)
    with Progress(transient=True) as progress:
        task = progress.add_task("training", total=args.steps)

        def loss(step: int) -> Tensor:
            progress.update(task, completed=step)
            return training(step)

        result = fit(
            network, loss, args.steps, lr=args.lr, average=0.995, every=-(-args.steps // 8),
            checkpoint=args.work / "checkpoint.safetensors",
            evaluate=lambda model: scores(network, tested[::8], (LEVELS[2], LEVELS[-1])),
            log=lambda line: progress.console.print(line, highlight=False),
        )  # fmt: skip
    counts = torch.zeros(network.tokens, network.quantiser.books.shape[1], dtype=torch.int64)
    with torch.no_grad():
        for _ in range(COUNTED // 256):
            codes = network.encode(training.squares(256))
            counts.scatter_add_(1, codes.T, torch.ones_like(codes.T))
    card = {
        "config": CONFIG,
        "data": "squares of 32x32 of bsds300 and t91, at full and 0.6 size",
        "recipe": f"recipes/global_tokens.py --steps {args.steps} --batch {args.batch} --lr {args.lr}",
        "seconds": result["seconds"],
        "scores": {"kodak12, squares": scores(network, tested)},
    }
    save_weights(network, counts, card, args.out)
    print(card)


if __name__ == "__main__":
    main()
