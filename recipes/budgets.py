"""Accuracy on CIFAR-10 at four budgets, for networks that choose inside: by what they learned, and at random.

    python recipes/budgets.py mone --data pictures/ --minutes 6
    python recipes/budgets.py adaptive-computation-modules --data pictures/ --minutes 6 --budgets 1 0.75 0.5 0.3
    python recipes/budgets.py tokenlearner --data pictures/ --minutes 6
    python recipes/budgets.py adatape --data pictures/ --minutes 6 --out docs/results/adatape-cifar10.md

A budget is a share of the FLOPs of one dense ViT with patches of 4. Every network is trained for the same time,
measured as steps times the time of one step on one CPU thread.

- mone: a dense ViT is trained first, for as long again. Then it goes on as it is, or as a mixture of nested experts,
  which draws its share of the work anew at each step and so serves every budget after one training. Experts take tokens
  by the router, or at random; and the router that was trained is left out in use.
- adaptive-computation-modules: the same dense ViT is converted: 0.15 of the time for distillation, 0.05 for the gates,
  the rest for fine-tuning to one budget. Tokens run learners by their gates, at a price calibrated on training
  pictures, or at random.
- tokenlearner: the same dense ViT goes on with learned tokens from the latest block that the budget pays for, or with
  as many of its own tokens, drawn at random.
- adatape: a ViT with patches of 16 reads as much tape from patches of 2 as the budget pays for; what is read is chosen
  by its query, or at random.

Killed, it resumes from its checkpoints.
"""

import argparse
import json
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.data.labelled import Labelled, read_archive
from foveate.encode.adaptive_computation_modules import AdaptiveComputationModules, learner_share
from foveate.encode.adaptive_computation_training import distil, fine_tune, place_gates
from foveate.encode.adatape import PONDER, AdaTape
from foveate.encode.mone import MixtureHandle
from foveate.encode.mone import plugin as nested
from foveate.encode.tokenlearner import bottlenecks, plugin
from foveate.engine.fit import fit
from foveate.hosts import vit as described
from foveate.layers.transformer import VisionTransformer
from foveate.meter import count_flops
from foveate.proofs.evidence import markdown_row

BUDGETS = (1.0, 0.75, 0.5, 0.25)
ARCHIVES = ("cifar10_train_jpeg.npz", "cifar10_test_jpeg.npz")
SIDE, PATCH = 32, 4
SIZE = {"img_size": SIDE, "embed_dim": 64, "depth": 4, "num_heads": 4}
GATE = 8
DISTIL, PLACE = 0.15, 0.05
"""Shares of the time."""

COUNTED = 64
"""Pictures whose FLOPs are counted."""

COARSE, FINE, MERGED = 16, 2, 4
"""Patches of AdaTape and of its bank, in pixels, and patches that a tape token merges."""

Phase = Callable[..., Any]
"""Trains for steps=..., with options of `fit`."""
Row = dict[str, float | str]


class Trainer:
    """Trains phase after phase for given times.

    Args:
        learned: training pictures, on the device.
        args: minutes, steps, batch, seed, lr and work are read.
    """

    def __init__(self, learned: Labelled, args: argparse.Namespace) -> None:
        self.learned, self.args = learned, args

    def draws(self, seed: int) -> Callable[[], tuple[Tensor, Tensor]]:
        """Batches of shifted and mirrored pictures."""
        draw = self.learned.draws(self.args.seed + seed, shift=4)
        return lambda: draw(self.args.batch)

    def run(self, name: str, make: Callable[[Any], Phase], subject: Any, share: float = 1.0) -> None:
        """Train a subject for a share of the time.

        Args:
            make: from the subject, or a copy of it to be timed, to what trains it.
        """
        args = self.args
        steps = max(1, round(args.steps * share))
        if not args.steps:
            steps = max(1, int(60 * args.minutes * share / seconds_per_step(make(deepcopy(subject)))))
        much = f"{args.minutes:g}m" if args.minutes else f"{args.steps}s"
        checkpoint = args.work / f"{name.replace(' ', '-')}-{much}-{args.seed}.safetensors"
        steps = self._planned(checkpoint, steps)
        log = lambda line: print(name, line, flush=True)  # noqa: E731
        make(subject)(steps=steps, checkpoint=checkpoint, every=max(1, steps // 8), log=log)

    def _planned(self, checkpoint: Path, steps: int) -> int:
        """The steps of the training that a checkpoint belongs to: a later timing must not change them."""
        file = checkpoint.with_suffix(".json")
        file.parent.mkdir(parents=True, exist_ok=True)
        if not checkpoint.exists():
            file.write_text(json.dumps(steps))
        return int(json.loads(file.read_text()))

    def dense(self, network: nn.Module) -> Phase:
        """Cross-entropy, and of a tape what it pondered."""
        draw = self.draws(0)

        def loss(_: int) -> Tensor:
            x, label = draw()
            if not isinstance(network, AdaTape):
                return F.cross_entropy(network(x), label, label_smoothing=0.1)
            run = network.run(x)
            task = F.cross_entropy(network.forward_head(run.features), label, label_smoothing=0.1)
            return task + PONDER * run.tape.ponder.mean()

        return lambda **options: fit(network.train(), loss, lr=self.args.lr, **options)

    def distilled(self, handle: AdaptiveComputationModules) -> Phase:
        """Phase 1."""
        draw = self.draws(1)
        return lambda **options: distil(handle, lambda _: draw()[0], **options)

    def placed(self, handle: AdaptiveComputationModules) -> Phase:
        """Phase 2."""
        draw = self.draws(2)
        return lambda **options: place_gates(handle, lambda _: draw()[0], average=0.98, **options)

    def tuned(self, handle: AdaptiveComputationModules) -> Phase:
        """Phase 3."""
        draw = self.draws(3)

        def loss(_: int) -> Tensor:
            x, label = draw()
            return F.cross_entropy(handle.host.model(x), label, label_smoothing=0.1)

        return lambda **options: fine_tune(handle, loss, lr=self.args.lr / 2, **options)


def seconds_per_step(phase: Phase, timed: int = 8) -> float:
    """Time of a step: of the processor where there is one thread, so that other programs do not count."""
    clock = time.process_time if torch.get_num_threads() == 1 and not torch.cuda.is_available() else time.perf_counter
    options: dict[str, Any] = {"log": lambda line: None, "every": 10**9}
    phase(steps=2, **options)
    began = clock()
    phase(steps=timed, **options)
    return (clock() - began) / timed


def accuracy(network: nn.Module, tested: Labelled) -> float:
    """Percentage of pictures whose class is found."""
    with torch.inference_mode():
        right = [(network.eval()(x).argmax(1) == labels).sum() for x, labels in tested.batches(250)]
    return round(100 * int(sum(right)) / len(tested), 2)


def at_random(scores: Tensor) -> Tensor:
    """Scores that know nothing."""
    return torch.rand_like(scores)


def vit(classes: int, device: str) -> VisionTransformer:
    """The dense network."""
    return VisionTransformer(**SIZE, patch_size=PATCH, num_classes=classes, global_pool="avg").to(device)


def share_of_dense(network: nn.Module, dense: VisionTransformer, tested: Labelled) -> float:
    """FLOPs on pictures over those of the dense network, of which every picture takes as many."""
    pictures = [x for x, _ in tested.spread(COUNTED).batches(1)]
    with torch.inference_mode():
        full = count_flops(dense.eval(), pictures[0])
        spent = [count_flops(network.eval(), x) for x in pictures]
    return round(sum(spent) / len(spent) / full, 3)


def trained(trainer: Trainer, tested: Labelled, device: str) -> tuple[VisionTransformer, VisionTransformer, list[Row]]:
    """A dense network, the same after as much training again, and the row of the second."""
    first = vit(len(trainer.learned.classes), device)
    trainer.run("first", trainer.dense, first)
    dense = deepcopy(first)
    trainer.run("dense", trainer.dense, dense)
    return first, dense, [said({"network": "dense", "budget": 1.0, "spent": 1.0, "accuracy": accuracy(dense, tested)})]


def experts(trainer: Trainer, tested: Labelled, device: str, budgets: tuple[float, ...]) -> list[Row]:
    """Rows of MoNE."""
    first, dense, rows = trained(trainer, tested, device)
    for name in ("routed", "at random"):
        own = deepcopy(first)
        handle = nested(own, min(budgets))  # refused here, before training, if none of the experts is that narrow
        if name == "at random":
            handle.mixture.prefer = at_random
        trainer.run(f"nested {name}", trainer.dense, own)
        rows += at_budgets(name, own, handle, dense, tested, budgets)
        if name == "routed":
            handle.mixture.prefer = at_random
            rows += at_budgets("router left out in use", own, handle, dense, tested, budgets)
    return rows


def at_budgets(
    name: str, network: nn.Module, handle: MixtureHandle, dense: VisionTransformer, tested: Labelled,
    budgets: tuple[float, ...],
) -> list[Row]:  # fmt: skip
    """A row for each budget that one network of nested experts serves."""
    rows = []
    for budget in budgets:
        handle.budget = budget
        row: Row = {"network": name, "budget": budget, "spent": share_of_dense(network, dense, tested)}
        rows.append(said(row | {"accuracy": accuracy(network, tested)}))
    return rows


def tokens(trainer: Trainer, tested: Labelled, device: str, budgets: tuple[float, ...]) -> list[Row]:
    """Rows of TokenLearner."""
    first, dense, rows = trained(trainer, tested, device)
    for name in ("learned", "at random"):
        for budget in budgets:
            own = deepcopy(first)
            layer, made = bottlenecks(described(own), budget)
            if not made:  # the dense network
                continue
            if name == "learned":
                plugin(own, budget)
            else:
                described(own).blocks[layer].patch(partial(drawn, made[0].learner.tokens))
            trainer.run(f"tokens {name} {budget:g}", trainer.dense, own)
            row: Row = {"network": name, "budget": budget, "spent": share_of_dense(own, dense, tested), "layer": layer}
            rows.append(said(row | {"accuracy": accuracy(own, tested)}))
    return rows


def drawn(count: int, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Go on with some tokens of each picture only."""
    kept = torch.rand(x.shape[:2], device=x.device).topk(count).indices
    return block(x.gather(1, kept[..., None].expand(-1, -1, x.shape[2])))


def modules(trainer: Trainer, tested: Labelled, device: str, budgets: tuple[float, ...]) -> list[Row]:
    """Rows of adaptive computation modules."""
    first, dense, rows = trained(trainer, tested, device)
    handle = AdaptiveComputationModules(first.eval(), budgets[0], gate=GATE)
    trainer.run("distil", trainer.distilled, handle, DISTIL)
    trainer.run("gates", trainer.placed, handle, PLACE)
    few = trainer.draws(4)()[0]
    for name in ("by gates", "at random"):
        for budget in budgets:
            if budget == 1 and name == "at random":  # every learner runs, as by gates
                continue
            own = deepcopy(handle)
            own.budget = budget
            if name == "at random" or budget == 1:
                own.router.prefer, own.router.learning = at_random, False
            else:
                own.settle(few)
            trainer.run(f"{name} {budget:g}", trainer.tuned, own, 1 - DISTIL - PLACE)
            if own.router.learning:
                own.calibrate(few)
            row: Row = {"network": name, "budget": budget, "spent": share_of_dense(own.host.model, dense, tested)}
            rows.append(said(row | {"load": load(own, tested), "accuracy": accuracy(own.host.model, tested)}))
    return rows


def load(handle: AdaptiveComputationModules, tested: Labelled) -> float:
    """Share of learners that run."""
    pictures = next(iter(tested.spread(500).batches(500)))[0]
    with torch.inference_mode(), handle.router.recording() as record:
        handle.host.model.eval()(pictures)
    return round(float(learner_share(record).mean()), 3)


def tapes(trainer: Trainer, tested: Labelled, device: str, budgets: tuple[float, ...]) -> list[Row]:
    """Rows of AdaTape."""
    classes = len(trainer.learned.classes)
    dense = vit(classes, device)
    trainer.run("tape dense", trainer.dense, dense)
    rows = [said({"network": "dense", "budget": 1.0, "spent": 1.0, "accuracy": accuracy(dense, tested)})]
    for name in ("by query", "at random"):
        for budget in budgets:
            torch.manual_seed(trainer.args.seed)
            network = taped(budget, classes, dense).to(device)
            if name == "at random":
                network.reader.prefer = at_random
            trainer.run(f"tape {name} {budget:g}", trainer.dense, network)
            row: Row = {"network": name, "budget": budget, "spent": share_of_dense(network, dense, tested)}
            with torch.inference_mode():
                steps = torch.cat([network.run(x).tape.steps for x, _ in tested.spread(500).batches(250)]).float()
            row |= {"most": network.reader.tokens, "tape": round(float(steps.mean()), 2)}
            rows.append(said(row | {"accuracy": accuracy(network, tested)}))
    return rows


def taped(budget: float, classes: int, dense: VisionTransformer) -> AdaTape:
    """The network with the longest tape that a budget pays for on every picture."""
    picture = torch.zeros(1, 3, SIDE, SIDE, device=next(dense.parameters()).device)
    full, most = count_flops(dense.eval(), picture), (SIDE // FINE) ** 2 // MERGED
    settings: dict[str, Any] = {"patch_size": COARSE, "bank_patch": FINE, "num_classes": classes}
    widest = AdaTape(**SIZE, **settings, tape_tokens=most, threshold=most / MERGED)
    grid = (SIDE // COARSE, SIDE // COARSE)
    tokens = max(t for t in range(most + 1) if widest.flops(t, grid, (SIDE, SIDE)) <= budget * full)
    return AdaTape(**SIZE, **settings, tape_tokens=tokens, threshold=tokens / MERGED if tokens else 2.0)


def said(row: Row) -> Row:
    """The row, printed."""
    print(json.dumps(row), flush=True)
    return row


def table(name: str, rows: list[Row], args: argparse.Namespace) -> str:
    """Rows as Markdown."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [markdown_row(columns), markdown_row(["---", *("---:" for _ in columns[1:])])]
    lines += [markdown_row([str(row.get(column, "")) for column in columns]) for row in rows]
    much = f"{args.minutes:g} minutes" if args.minutes else f"{args.steps} steps"
    head = f"# {name} on CIFAR-10, {much} each\n\nMade by `python recipes/budgets.py {name}`. `spent` is in FLOPs of"
    return f"{head} the dense network, `accuracy` in % of {args.tested} test pictures.\n\n" + "\n".join(lines) + "\n"


SYSTEMS = {"mone": experts, "adaptive-computation-modules": modules, "tokenlearner": tokens, "adatape": tapes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("system", choices=SYSTEMS)
    parser.add_argument("--data", type=Path, required=True, help=f"folder of {' and '.join(ARCHIVES)}")
    much = parser.add_mutually_exclusive_group(required=True)
    much.add_argument("--minutes", type=float, default=0.0, help="training time of each row")
    much.add_argument("--steps", type=int, default=0, help="steps of each row")
    parser.add_argument("--budgets", type=float, nargs="+", default=BUDGETS)
    parser.add_argument("--tested", type=int, default=10_000, help="test pictures")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--work", type=Path, default=Path(".cache/recipes/budgets"), help="checkpoints")
    parser.add_argument("--out", type=Path, help="file for the table as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    learned, tested = (read_archive(args.data / name).to(args.device) for name in ARCHIVES)
    tested = tested.spread(args.tested)
    rows = SYSTEMS[args.system](Trainer(learned, args), tested, args.device, tuple(args.budgets))
    text = table(args.system, rows, args)
    print(text)
    if args.out:
        args.out.write_text(text)


if __name__ == "__main__":
    main()
