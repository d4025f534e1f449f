"""Train the networks of the encode wing on CIFAR-10, or on a folder of pictures, all for the same time.

    python recipes/encode.py train resnet levit --data pictures/ --minutes 10 --table .cache/recipes/cifar10.jsonl
    python recipes/encode.py train all --data flowers/ --steps 2000     # flowers/train/<class>/, flowers/test/<class>/
    python recipes/encode.py table .cache/recipes/cifar10.jsonl         # writes docs/results/cifar10.md

Reads the training pictures, draws shifted and mirrored batches, minimises the cross-entropy with averaged weights and
measures the accuracy on the test pictures. How long a step takes is timed first, on one CPU thread by the time that the
processor works, so that other programs do not count; with --minutes, as many steps are trained as fit. Killed, it
resumes from its checkpoint.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.progress import Progress, track
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from foveate.data.labelled import Labelled, read_archive, read_folder
from foveate.engine.fit import fit
from foveate.errors import InputError
from foveate.layers.classifier import ImageClassifier
from foveate.layers.fold import ConvNorm
from foveate.meter import count_flops, count_parameters
from foveate.proofs.evidence import markdown_row

SIDE = 32
SHIFT = 4
"""Pixels that pictures are shifted by, at most."""

NORMING = 20
"""Batches that batch norms gather their statistics from, for weights that are averages."""

ARCHIVES = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")
RESULT = Path("docs/results/cifar10.md")


@dataclass(frozen=True)
class Network:
    """How to build a network for 32 x 32 pictures, of about 0.3 million parameters.

    Args:
        entry: module and class.
        settings: of the class.
        stem: channels of a 3x3 convolution of stride 2 in place of a stem that shrinks large pictures; 0 keeps its own.
        lr: peak learning rate.
    """

    entry: str
    settings: dict[str, Any] = field(default_factory=dict)
    stem: int = 0
    lr: float = 3e-3

    @property
    def there(self) -> bool:
        """Whether its module exists."""
        return find_spec(self.entry.partition(":")[0]) is not None

    def build(self, classes: int) -> ImageClassifier:
        """The network with random weights."""
        module, _, name = self.entry.partition(":")
        network = getattr(import_module(module), name)(num_classes=classes, **self.settings)
        if self.stem:
            network.stem = nn.Sequential(ConvNorm(3, self.stem, 3, 2), nn.ReLU())
        return network


NETWORKS = {
    "resnet": Network("foveate.layers.resnet:ResNet", {"widths": (32, 64, 128), "depths": (1, 1, 1), "stride": 2}),
    "levit": Network(
        "foveate.encode.levit:LeViT",
        {"img_size": SIDE, "patch_size": 4, "embed_dims": (56, 80, 96), "key_dim": 16, "num_heads": (2, 3, 4)}
        | {"depths": (1, 1, 1), "distillation": False},
    ),
    "wavemix": Network(
        "foveate.encode.wavemix:WaveMix", {"dim": 56, "depth": 3, "levels": 2, "patch": 2, "dropout": 0.0}
    ),
    "fftnet": Network(
        "foveate.encode.fftnet:FFTNet",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 80, "depth": 4, "num_heads": 4, "drop_rate": 0.0}
        | {"class_token": False},
    ),
    # Attention's table of biases is one for 2 x 2 tokens, what an eighth of the map after the stem leaves.
    "lsnet": Network(
        "foveate.encode.lsnet:LSNet",
        {"widths": (32, 64, 96, 128), "depths": (1, 2, 2, 2), "img_size": 128},
        stem=32,
    ),
    "replknet": Network(
        "foveate.encode.replknet:RepLKNet",
        {"widths": (40, 80, 128), "depths": (1, 1, 1), "kernels": (13, 7, 5), "small": 3},
        stem=40,
    ),
    "lambda-networks": Network(
        "foveate.encode.lambda_networks:LambdaResNet",
        {"depths": (1, 1, 2), "widths": (24, 48, 96), "reach": 7, "stem": "3x3"},
        stem=24,
    ),
    "dcnv4": Network(
        "foveate.encode.flash_intern_image:FlashInternImage",
        {"channels": 28, "depths": (1, 1, 1), "groups": (1, 2, 4), "drop_path": 0.0},
        stem=28,
    ),
    # Most of its parameters make kernels, and are gone once it is folded.
    "tvconv": Network(
        "foveate.encode.tvconv:TVNet",
        {"img_size": SIDE, "width": 0.1, "embedding": 64, "hidden": 4, "layers": 1},
    ),
    "tokenlearner": Network(
        "foveate.encode.tokenlearner:TokenLearnerViT",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 80, "depth": 4, "num_heads": 4, "tokens": 8, "layer": 2},
    ),
    # Trained for any budget; its accuracy is that of all the work.
    "mone": Network(
        "foveate.encode.mone:MoNE",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 80, "depth": 4, "num_heads": 4},
    ),
    # Without its ponder loss, for which see recipes/budgets.py.
    "adatape": Network(
        "foveate.encode.adatape:AdaTape",
        {"img_size": SIDE, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
}


def read(folder: Path) -> tuple[str, Labelled, Labelled]:
    """Name, training and test pictures: CIFAR-10 where the folder holds it, or the classes in its train/ and test/."""
    if all((folder / name).is_file() for name in ARCHIVES):
        first, second = (read_archive(folder / name, track=lambda i: track(i, "reading")) for name in ARCHIVES)
        return "CIFAR-10", first, second
    if all((folder / name).is_dir() for name in ("train", "test")):
        first, second = (read_folder(folder / n, SIDE, lambda i: track(i, "reading")) for n in ("train", "test"))
        if first.classes != second.classes:
            raise InputError(f"the classes of train/ and test/ differ: {first.classes} and {second.classes}.")
        return folder.resolve().name, first, second
    raise InputError(f"{str(folder)!r} holds neither {' and '.join(ARCHIVES)} nor the folders train/ and test/.")


class Training:
    """One network and what it learns from; called with a step, it gives the loss.

    Args:
        network: to be trained, on the device.
        learned: training pictures, on the device.
        args: batch, seed and device are read.
    """

    def __init__(self, network: nn.Module, learned: Labelled, args: argparse.Namespace) -> None:
        self.network, self.learned, self.args = network, learned, args
        self.draw: Callable[[int], tuple[Tensor, Tensor]] | None = None
        self.report: Callable[[int], None] = lambda step: None

    def __call__(self, step: int) -> Tensor:
        if self.draw is None:  # a resumed training does not see its first batches again
            self.draw = self.learned.draws(self.args.seed + step, SHIFT)
        self.report(step)
        pictures, labels = self.draw(self.args.batch)
        with half_precision(self.args.device):
            return F.cross_entropy(self.network.train()(pictures), labels, label_smoothing=0.1)

    def gather_norms(self) -> None:
        """Let batch norms see training pictures anew."""
        draw = self.learned.draws(self.args.seed, SHIFT)
        with half_precision(self.args.device):
            update_bn((draw(self.args.batch)[0] for _ in range(NORMING)), self.network)
        self.network.eval()


def half_precision(device: str) -> torch.autocast:
    """bfloat16 where it is faster: on an accelerator."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=kind != "cpu")


def accuracy(network: nn.Module, tested: Labelled, device: str) -> float:
    """Percentage of pictures whose class is found."""
    with torch.inference_mode(), half_precision(device):
        right = [(network(x).argmax(1) == labels).sum() for x, labels in tested.batches(250)]
    return 100 * int(sum(right)) / len(tested)


def seconds_per_step(training: Training, lr: float, timed: int = 15) -> float:
    """Median time of a step, on a copy of the network; see above for the clock."""
    alone = torch.device(training.args.device).type == "cpu" and torch.get_num_threads() == 1
    clock, marks = time.process_time if alone else time.perf_counter, []
    trial = Training(deepcopy(training.network), training.learned, training.args)
    trial.report = lambda step: marks.append(clock())
    fit(trial.network, trial, timed + 3, lr=lr, log=lambda _: None)
    return statistics.median(after - before for before, after in pairwise(marks[2:]))


def train(name: str, data: str, learned: Labelled, tested: Labelled, args: argparse.Namespace) -> dict[str, Any]:
    """Train one network, or go on with it; return a row of the table."""
    torch.manual_seed(args.seed)
    spec = NETWORKS[name]
    network = spec.build(len(learned.classes))
    ready: Any = deepcopy(network).eval()
    ready = ready.fuse() if hasattr(ready, "fuse") else ready
    spent = count_flops(ready, torch.zeros(1, 3, SIDE, SIDE)) / 1e6
    network.to(args.device, memory_format=torch.channels_last)
    training = Training(network, learned, args)
    much = f"{args.minutes:g} minutes" if args.minutes else f"{args.steps} steps"
    where = "1 GPU" if torch.device(args.device).type != "cpu" else f"{torch.get_num_threads()} CPU thread(s)"
    budget = f"{much}, {where}, batches of {args.batch}"
    plan = {"data": data, "settings": spec.settings, "lr": spec.lr, "budget": budget, "seed": args.seed}
    checkpoint = args.work / f"{data}-{name}-{much.replace(' ', '-')}.safetensors"
    plan = resume(checkpoint, plan) or plan
    if "steps" not in plan:
        seconds = seconds_per_step(training, spec.lr)
        plan |= {"seconds per step": seconds, "steps": args.steps or max(1, int(60 * args.minutes / seconds))}
        checkpoint.with_suffix(".json").write_text(json.dumps(plan))
    few, steps = tested.spread(1000), plan["steps"]

    def evaluate(_: nn.Module) -> dict[str, float]:
        training.gather_norms()
        return {"accuracy": accuracy(network, few, args.device)}

    every = max(1, steps // args.looks)
    with Progress(transient=True) as progress:
        task = progress.add_task(f"training {name}", total=steps)
        training.report = lambda step: progress.update(task, completed=step)
        fit(
            network, training, steps, lr=spec.lr, checkpoint=checkpoint, evaluate=evaluate, every=every,
            log=lambda line: progress.console.print(f"{name} {line}", highlight=False),
        )  # fmt: skip
    training.gather_norms()
    return {
        "data": data,
        "budget": budget,
        "network": name,
        "parameters": count_parameters(network),
        "MFLOPs": round(spent, 1),
        "steps": steps,
        "minutes": round(steps * plan["seconds per step"] / 60, 1),
        "accuracy": round(accuracy(network, tested, args.device), 2),
    }


def resume(checkpoint: Path, plan: dict[str, Any]) -> dict[str, Any] | None:
    """The plan of the training that a checkpoint belongs to; a checkpoint of another plan is removed."""
    file = checkpoint.with_suffix(".json")
    file.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(file.read_text()) if file.exists() else {}
    if before.items() >= json.loads(json.dumps(plan)).items():
        return before
    checkpoint.unlink(missing_ok=True)
    return None


def table(file: Path) -> str:
    """The rows of a file as Markdown, a table per set of pictures and budget; of a network the newest row counts."""
    rows = {(r["data"], r["budget"], r["network"]): r for r in map(json.loads, file.read_text().splitlines())}
    text = ["# Small networks, equal training time", "Made by `python recipes/encode.py`; `resnet` is the baseline."]
    columns = ("network", "parameters", "MFLOPs", "steps", "minutes", "accuracy")
    for data, budget in dict.fromkeys(key[:2] for key in rows):
        chosen = [row for key, row in rows.items() if key[:2] == (data, budget)]
        lines = [markdown_row(columns), markdown_row(["---", *("---:" for _ in columns[1:])])]
        for row in sorted(chosen, key=lambda row: -row["accuracy"]):
            cells = [f"{row[c]:,}" if isinstance(row[c], int) else str(row[c]) for c in columns]
            lines.append(markdown_row(cells))
        text += [f"## {data}: {budget}", "\n".join(lines)]
    text.append(
        "Accuracy is in % of all test pictures. FLOPs are two per multiply-accumulate, for one picture, folded for "
        "inference. Minutes are steps times the time of one step, on one CPU thread the time that the processor works."
    )
    return "\n\n".join(text) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train", help="train networks, one after the other")
    learn.add_argument("networks", nargs="+", choices=[*NETWORKS, "all"], metavar="network")
    learn.add_argument("--data", type=Path, required=True, help=f"folder of {' and '.join(ARCHIVES)}, or train/, test/")
    much = learn.add_mutually_exclusive_group(required=True)
    much.add_argument("--minutes", type=float, default=0.0, help="training time of each network")
    much.add_argument("--steps", type=int, default=0)
    learn.add_argument("--batch", type=int, default=128)
    learn.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    learn.add_argument("--threads", type=int, default=1)
    learn.add_argument("--looks", type=int, default=8, help="how often to measure accuracy on 1,000 pictures meanwhile")
    learn.add_argument("--seed", type=int, default=0)
    learn.add_argument("--work", type=Path, default=Path(".cache/recipes/encode"), help="checkpoints")
    learn.add_argument("--table", type=Path, help="file to append a row of JSON to")
    show = commands.add_parser("table", help="write the table of the rows in a file")
    show.add_argument("file", type=Path)
    show.add_argument("--out", type=Path, default=RESULT)
    args = parser.parse_args()
    if args.command == "table":
        args.out.write_text(table(args.file))
        return
    torch.set_num_threads(args.threads)
    data, learned, tested = read(args.data)
    learned, tested = learned.to(args.device), tested.to(args.device)
    for name in [n for n in NETWORKS if n in args.networks or ("all" in args.networks and NETWORKS[n].there)]:
        row = train(name, data, learned, tested, args)
        print(json.dumps(row))
        if args.table:
            args.table.parent.mkdir(parents=True, exist_ok=True)
            with args.table.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
