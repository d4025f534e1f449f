"""Nested fine-tuning: make a trained vision transformer serve every budget, on CIFAR-10.

    python recipes/nested.py --data pictures/ --dense 4000 --steps 2000

Trains a small dense ViT, then goes on for as many steps with three copies of it: dense as it is, as a mixture of nested
experts (`foveate.apply(vit, "mone")`) that draws its share of the work anew at each step, and the same with experts
that take tokens at random. Prints the accuracy of each at budgets 1, 0.75, 0.5 and 0.25. Killed, it resumes from its
checkpoints.
"""

import argparse
import json
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.data.labelled import Labelled, read_archive
from foveate.encode.mone import MixtureHandle, plugin
from foveate.layers.transformer import VisionTransformer
from foveate.learn.fit import fit

BUDGETS = (1.0, 0.75, 0.5, 0.25)
ARCHIVES = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")


def train(network: nn.Module, learned: Labelled, steps: int, args: argparse.Namespace, name: str, seed: int) -> None:
    """Minimise the cross-entropy on shifted and mirrored pictures."""
    draw = learned.draws(seed, shift=4)

    def loss(_: int) -> Tensor:
        pictures, labels = draw(args.batch)
        return F.cross_entropy(network(pictures), labels, label_smoothing=0.1)

    checkpoint = args.work / f"{name}-{args.dense}-{steps}-{args.seed}.safetensors"
    fit(network.train(), loss, steps, lr=args.lr, checkpoint=checkpoint, log=lambda line: print(name, line, flush=True))
    network.eval()


def accuracy(network: nn.Module, tested: Labelled) -> float:
    """Percentage of pictures whose class is found."""
    with torch.inference_mode():
        right = [(network(x).argmax(1) == labels).sum() for x, labels in tested.batches(250)]
    return round(100 * int(sum(right)) / len(tested), 2)


def at_random(r: Tensor) -> Tensor:
    """Scores that know nothing of the tokens."""
    return torch.rand_like(r)


def run(
    dense: nn.Module, learned: Labelled, tested: Labelled, args: argparse.Namespace
) -> list[dict[str, float | str]]:
    """Train all of it; return a row for each network and budget."""
    train(dense, learned, args.dense, args, "first", args.seed)
    rows: list[dict[str, float | str]] = []
    for name in ("dense", "routed", "at random"):
        network, handle = deepcopy(dense), None
        if name != "dense":
            handle = plugin(network, budget=1.0)
            if name == "at random":
                handle.mixture.prefer = at_random
        train(network, learned, args.steps, args, name.replace(" ", "-"), args.seed + 1)
        rows += measured(name, network, handle, tested)
    return rows


def measured(
    name: str, network: nn.Module, handle: MixtureHandle | None, tested: Labelled
) -> list[dict[str, float | str]]:
    """Accuracy at every budget; a dense network has but one."""
    rows: list[dict[str, float | str]] = []
    for budget in BUDGETS if handle else BUDGETS[:1]:
        if handle:
            handle.budget = budget
        rows.append({"network": name, "budget": budget, "accuracy": accuracy(network, tested)})
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {' and '.join(ARCHIVES)}")
    parser.add_argument("--dense", type=int, default=4000, help="steps of the dense network before")
    parser.add_argument("--steps", type=int, default=2000, help="steps of each copy")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes/nested"), help="checkpoints")
    args = parser.parse_args()
    learned, tested = (read_archive(args.data / name).to(args.device) for name in ARCHIVES)
    torch.manual_seed(args.seed)
    run(VisionTransformer(32, 4, 128, 6, 4, num_classes=10, global_pool="avg").to(args.device), learned, tested, args)


if __name__ == "__main__":
    main()
