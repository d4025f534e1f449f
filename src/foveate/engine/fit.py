"""The training loop that recipes share: Adam, warm-up and cosine decay, averaged weights, resumable."""

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


def schedule(step: int, steps: int, warmup: int = 200, final: float = 0.01) -> float:
    """Learning-rate factor: linear warm-up, then cosine decay to `final`.

    >>> [round(schedule(step, 10_000), 2) for step in (0, 200, 10_000)]
    [0.01, 1.0, 0.01]
    """
    warmup = min(warmup, max(1, steps // 10))
    if step < warmup:
        return (step + 1) / warmup
    t = (step - warmup) / max(1, steps - warmup)
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * t))


def fit(
    model: nn.Module,
    loss: Callable[[int], Tensor],
    steps: int,
    *,
    lr: float = 1e-3,
    parameters: Iterable[nn.Parameter] | None = None,
    average: float = 0.999,
    clip: float = 1.0,
    checkpoint: Path | None = None,
    evaluate: Callable[[nn.Module], dict[str, float]] | None = None,
    every: int = 250,
    log: Callable[[str], None] = print,
) -> dict[str, float]:
    """Minimise a loss and leave the exponentially averaged weights in the model.

    Args:
        model: trained in place.
        loss: step number -> scalar to minimise.
        steps: optimisation steps in all; the learning rate ends there.
        lr: peak learning rate of Adam (0.9, 0.99).
        parameters: what to train; default all that require a gradient.
        average: decay of the averaged weights, which are what is evaluated and kept.
        clip: largest gradient norm.
        checkpoint: safetensors file written every `every` steps; where it exists, training goes on from it.
        evaluate: model -> scores, called on the averaged weights.
        every: steps between evaluations and checkpoints.
        log: receives a line of JSON each time.

    Returns: {"steps", "seconds", the last scores}. `seconds` counts all runs of a resumed training.
    """
    trained = [p for p in (parameters or model.parameters()) if p.requires_grad]
    adam = torch.optim.Adam(trained, lr=lr, betas=(0.9, 0.99))
    averaged = [p.detach().clone() for p in trained]
    start, before = 0, 0.0
    if checkpoint and checkpoint.exists():
        start, before = _restore(checkpoint, model, trained, averaged, adam)
    began, running, counted, scores = time.perf_counter(), 0.0, 0, {}
    for step in range(start, steps):
        for group in adam.param_groups:
            group["lr"] = lr * schedule(step, steps)
        value = loss(step)
        adam.zero_grad(set_to_none=True)
        value.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        adam.step()
        decay = min(average, (step + 1) / (step + 10))
        torch._foreach_lerp_(averaged, [p.detach() for p in trained], 1 - decay)
        running, counted = running + float(value.detach()), counted + 1
        if (step + 1) % every == 0 or step + 1 == steps:
            seconds = before + time.perf_counter() - began
            if checkpoint:
                _keep(checkpoint, model, trained, averaged, adam, step + 1, seconds)
            if evaluate:
                scores = _with(trained, averaged, lambda: evaluate(model))
            line = {"step": step + 1, "loss": running / counted, "seconds": round(seconds), **scores}
            log(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in line.items()}))
            running, counted = 0.0, 0
    with torch.no_grad():
        for p, a in zip(trained, averaged, strict=True):
            p.copy_(a)
    return {"steps": steps, "seconds": round(before + time.perf_counter() - began), **scores}


def _with(trained: list[nn.Parameter], averaged: list[Tensor], run: Callable[[], dict[str, float]]) -> dict[str, float]:
    """Run with the averaged weights in place."""
    own = [p.detach().clone() for p in trained]
    with torch.no_grad():
        for p, a in zip(trained, averaged, strict=True):
            p.copy_(a)
        scores = run()
        for p, o in zip(trained, own, strict=True):
            p.copy_(o)
    return scores


def _keep(
    path: Path, model: nn.Module, trained: list, averaged: list, adam: torch.optim.Adam, step: int, seconds: float
) -> None:
    """Parameters, their averages and moments (a parameter that no loss has reached has none), and buffers."""
    tensors = {"step": torch.tensor(step), "seconds": torch.tensor(seconds)}
    tensors |= {f"buffer.{name}": b.detach().contiguous().clone() for name, b in model.named_buffers()}
    for i, (p, a) in enumerate(zip(trained, averaged, strict=True)):
        tensors |= {f"{i}.p": p.detach().contiguous(), f"{i}.a": a.contiguous()}
        if state := adam.state.get(p):
            tensors |= {f"{i}.m": state["exp_avg"].contiguous(), f"{i}.v": state["exp_avg_sq"].contiguous()}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    save_file(tensors, temporary)
    os.replace(temporary, path)


def _restore(path: Path, model: nn.Module, trained: list, averaged: list, adam: torch.optim.Adam) -> tuple[int, float]:
    tensors = load_file(path)
    step = int(tensors["step"])
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if f"buffer.{name}" in tensors:
                buffer.copy_(tensors[f"buffer.{name}"])
        for i, (p, a) in enumerate(zip(trained, averaged, strict=True)):
            p.copy_(tensors[f"{i}.p"])
            a.copy_(tensors[f"{i}.a"])
            if f"{i}.m" in tensors:
                adam.state[p] = {
                    "step": torch.tensor(float(step)),
                    "exp_avg": tensors[f"{i}.m"].clone(memory_format=torch.preserve_format),
                    "exp_avg_sq": tensors[f"{i}.v"].clone(memory_format=torch.preserve_format),
                }
    return step, float(tensors["seconds"])
