"""Proof of ThunderKittens: kernels in a vocabulary of tiles are exact, move few bytes, and make long sequences cheap.

The paper's headline is linear attention on an H100. What carries over to any machine is why it is fast: in chunks, its
time grows with the tokens and is spent in matrix products. So causal linear attention by chunks runs against the matrix
of all weights (time grows with the square) and against the recurrence (a step per token), at several lengths, and the
other operators against what they replace, with the bytes that both move. On a GPU the operators are Triton kernels, on
the CPU chunked matrix products and compiled loops.

The Triton kernels themselves run in Triton's interpreter, where no GPU is at hand, on sizes that no tile divides. The
order of tiles is counted and the pipeline simulated, as in the paper's model.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from foveate.meter import Comparison, compare
from foveate.ops.thunderkittens import GROUPS, best_group, pipeline_seconds, wave_loads
from foveate.ops.tile import attention as softmax_attention
from foveate.ops.tile import gemm, interpreting, layer_norm, linear_attention, rotary, selective_scan
from foveate.proofs.evidence import Evidence, ProofContext, Row

LENGTHS = {"quick": (512, 1024, 2048, 4096), "full": (1024, 2048, 4096, 8192), "cuda": (2048, 4096, 8192, 16384)}
HEADS, WIDTH = 2, 32

STRETCH = 4
"""Exponents compare times at two lengths, one so many times the other."""

PAIRS = {"quick": 3, "full": 5}

EXACT = {"float32": 1e-5, "float16": 2e-3}
"""Largest difference of a kernel from its reference, over the largest value."""

STEEPEST, LEAST_SPEEDUP = 1.3, 5.0
"""Exponent of the chunked time in the tokens, and its speed-up over the better baseline at the longest sequence."""

WAVE = 132
"""Tiles computed at the same time by an H100, which the paper's orders are for."""

GRIDS = ((64, 64), (64, 32), (32, 16))


BASELINES: dict[str, Callable[..., Tensor]] = {
    "matrix of all weights": linear_attention.linear_attention_reference,
    "recurrence": linear_attention.linear_attention_recurrent,
}


def prove(context: ProofContext) -> Evidence:
    """Compare operators with what they replace, kernels with references, orders of tiles with row by row."""
    lengths = LENGTHS["cuda" if context.device.startswith("cuda") else context.mode]
    rows, against = linear_rows(context, lengths)
    longest = lengths[-1]
    # The baselines at the longest length and a part of it; chunks, which are quick, at it and a multiple.
    slopes = {name: exponent(context, baseline, longest // STRETCH) for name, baseline in BASELINES.items()}
    ours = exponent(context, linear_attention.linear_attention, longest)
    speedup = min(clocks[-1].speedup for clocks in against.values())
    rows += operator_rows(context)
    found = kernel_errors(context)
    rows += [order_row(height, width) for height, width in GRIDS]
    never_worse = all(row.metrics["tiles_loaded_best"] <= row.metrics["tiles_loaded_row_by_row"] for row in rows[-3:])
    used = ", ".join(f"{64 / pipeline_seconds(64, 3, 1, stages):.2f}" for stages in (1, 2, 3, 4))
    return Evidence(
        system="thunderkittens",
        claim="one vocabulary of tiles gives exact kernels, and linear attention many times faster than its baselines",
        rows=tuple(rows),
        claimed="up to 14x over the best earlier linear-attention kernels (H100)",
        measured=f"{speedup:.1f}x over the better baseline at {longest} tokens, time grows as N^{ours:.2f}",
        holds=verdict(found, ours, speedup, never_worse),
        notes=(
            f"Holds when linear attention by chunks grows slower than N^{STEEPEST}, is more than {LEAST_SPEEDUP:g}x "
            f"faster than both baselines at {longest} tokens, the kernels equal their references, and no order of "
            "tiles is worse than row by row. The paper's 14x is over CUDA kernels of 2024, which are not at hand.",
            f"Exponents of time in tokens: {', '.join(f'{name} {p:.2f}' for name, p in slopes.items())} (to {longest} "
            f"tokens), chunks {ours:.2f} (to {STRETCH * longest}). One picture, {HEADS} heads of {WIDTH} channels, "
            "float32, forward. Speed-ups are over each line's first.",
            fused_note(context),
            kernel_note(context, found),
            "Bytes: of what is replaced, all that PyTorch's kernels read and write; of the fused form, its inputs, "
            "outputs and saved statistics once each, as its kernel moves them.",
            f"A ring of 1, 2, 3, 4 stages, loads three times as long as arithmetic, is at work {used} of the time "
            "(simulated).",
        ),
        claimed_ratio=14,
        measured_ratio=speedup,
    )


def verdict(errors: dict[str, float], exponent: float, speedup: float, never_worse: bool) -> bool:
    """Whether the claim holds.

    Args:
        errors: "operator dtype" -> largest difference from the reference; empty where Triton is not installed.
        exponent: of the chunked time in the tokens.
        speedup: over the better of the two baselines.
        never_worse: no order chosen loads more tiles than row by row.
    """
    exact = all(error <= EXACT[name.split()[-1]] for name, error in errors.items())
    return exact and exponent <= STEEPEST and speedup > LEAST_SPEEDUP and never_worse


# ------------------------------------------------------------------ operators against what they replace


def linear_rows(context: ProofContext, lengths: tuple[int, ...]) -> tuple[list[Row], dict[str, list[Comparison]]]:
    """Linear attention by chunks against both baselines: rows, and the comparisons of each baseline by length."""
    against: dict[str, list[Comparison]] = {name: [] for name in BASELINES}
    rows = []
    for n in context.track(lengths, "linear attention"):
        q, k, v = sequence(context, n)
        for name, baseline in BASELINES.items():
            clock = timed(partial(baseline, q, k, v), partial(linear_attention.linear_attention, q, k, v), context)
            against[name].append(clock)
            rows.append(Row(f"linear attention, {n} tokens, {name}", ms=1e3 * statistics.median(clock.seconds[0])))
        ours = against["matrix of all weights"][-1]
        rows.append(
            Row(
                f"linear attention, {n} tokens, chunks",
                ms=1e3 * statistics.median(ours.seconds[1]),
                speedup=ours.speedup,
                speedup_over_recurrence=against["recurrence"][-1].speedup,
            )
        )
    return rows, against


def operator_rows(context: ProofContext) -> list[Row]:
    """Attention, selective scan, and residual with dropout and norm: plain and fused, time and bytes."""
    dice = context.generator()

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice, device=context.device)

    q, k, v = (normal(1, HEADS, 1024, WIDTH) for _ in range(3))
    u, step, into, out_of = normal(1, 1024, 64), normal(1, 1024, 64).abs() / 4, normal(1, 1024, 16), normal(1, 1024, 16)
    rates = -normal(64, 16).exp()
    x, residual, weight, bias = normal(1024, 384), normal(1024, 384), normal(384), normal(384)

    def plain_norm() -> Tensor:
        return F.layer_norm(residual + F.dropout(x, 0.1), (384,), weight, bias)

    cases: dict[str, tuple[Callable[[], Any], Callable[[], Any], tuple[Tensor, ...], int]] = {
        "causal attention, 1024 tokens": (
            partial(softmax_attention.attention_reference, q, k, v, True),
            partial(softmax_attention.attention, q, k, v, True),
            (q, k, v, q),
            4 * HEADS * 1024,
        ),
        "selective scan, 1024 tokens, 64 channels, 16 states": (
            partial(selective_scan.selective_scan_reference, u, step, rates, into, out_of),
            partial(selective_scan.selective_scan, u, step, rates, into, out_of),
            (u, step, rates, into, out_of, u),
            4 * 64 * 16 * 1024 // selective_scan.CHUNK["cuda" if context.device.startswith("cuda") else "cpu"],
        ),
        "residual + dropout + norm, 1024 x 384": (
            plain_norm,
            partial(layer_norm.add_dropout_norm, x, residual, weight, bias, 0.1),
            (x, residual, weight, bias, x, x),
            2 * 4 * 1024,
        ),
    }
    rows = []
    for name, (plain, fused, tensors, statistics_bytes) in cases.items():
        moved = traffic(plain)
        least = sum(t.nbytes for t in tensors) + statistics_bytes
        clock = timed(plain, fused, context)
        rows.append(Row(f"{name}, plain", ms=1e3 * statistics.median(clock.seconds[0]), mb_moved=moved / 1e6))
        rows.append(
            Row(
                f"{name}, fused",
                ms=1e3 * statistics.median(clock.seconds[1]),
                speedup=clock.speedup,
                mb_moved=least / 1e6,
                fewer_bytes=moved / least,
            )
        )
    return rows


def timed(baseline: Callable[[], Any], method: Callable[[], Any], context: ProofContext) -> Comparison:
    """Compare without gradients."""
    with torch.no_grad():
        return compare(baseline, method, PAIRS[context.mode], flops=False)


def sequence(context: ProofContext, n: int) -> tuple[Tensor, ...]:
    """Random q, k and v of n tokens."""
    dice = context.generator()
    return tuple(torch.randn(1, HEADS, n, WIDTH, generator=dice, device=context.device) for _ in range(3))


def exponent(context: ProofContext, fn: Callable[..., Tensor], short: int) -> float:
    """The p of time ~ N^p between `short` tokens and STRETCH times as many, timed in turn."""
    clock = timed(partial(fn, *sequence(context, STRETCH * short)), partial(fn, *sequence(context, short)), context)
    return math.log(clock.speedup, STRETCH)


def traffic(fn: Callable[[], Any]) -> int:
    """Bytes that PyTorch's kernels read and write in `fn()`: inputs and outputs of each, views for nothing.

    >>> x = torch.ones(10)
    >>> traffic(lambda: (x + x).view(5, 2))
    120
    """
    moved = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal moved
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                moved += sum(t.nbytes for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            return out

    with torch.no_grad(), Count():
        fn()
    return moved


# ------------------------------------------------------------------ kernels against references


def kernel_errors(context: ProofContext) -> dict[str, float]:
    """`errors_of_kernels` on the GPU, or in Triton's interpreter in a process of its own; empty without Triton."""
    if find_spec("triton") is None:
        return {}
    if context.device.startswith("cuda"):
        return errors_of_kernels(context.device)
    code = "import json, foveate.proofs.ops.thunderkittens as p; print(json.dumps(p.errors_of_kernels('cpu')))"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def errors_of_kernels(device: str) -> dict[str, float]:
    """Largest difference of outputs and gradients of each Triton kernel from its reference, over the largest value."""
    dice = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=dice)

    n = 37  # no tile divides it
    seed = torch.tensor([5], device=device)
    scan = (normal(1, 3, 18), normal(1, 3, 18).abs(), -normal(18, 3).abs(), normal(1, 3, 3), normal(1, 3, 3))
    soft, norm, turns = softmax_attention, layer_norm, rotary.angles(n, 12, device=device)
    cases: dict[str, tuple[Callable[..., Any], Callable[..., Any], tuple[Tensor, ...]]] = {
        "gemm": (gemm.gemm, gemm.gemm_reference, (normal(n, 20), normal(20, 33), normal(33))),
        "attention": (soft.attention, soft.attention_reference, tuple(normal(1, 1, n, 12) for _ in range(3))),
        "causal": (
            partial(soft.attention, causal=True),
            partial(soft.attention_reference, causal=True),
            tuple(normal(1, 1, n, 12) for _ in range(3)),
        ),
        "linear": (
            linear_attention.linear_attention,
            linear_attention.linear_attention_reference,
            (*(normal(1, 1, n, 12) / 2 for _ in range(3)), -normal(1, 1, n).abs()),
        ),
        "scan": (selective_scan.selective_scan, selective_scan.selective_scan_reference, scan),
        "norm": (
            partial(norm.add_dropout_norm, dropout=0.3, seed=seed),
            partial(norm.add_dropout_norm_reference, dropout=0.3, seed=seed),
            (normal(5, n), normal(5, n), normal(n), normal(n)),
        ),
        "rotary": (
            partial(rotary.rotary, cosine=turns[0], sine=turns[1]),
            partial(rotary.rotary_reference, cosine=turns[0], sine=turns[1]),
            (normal(1, 2, n, 12),),
        ),
    }
    with interpreting() if device == "cpu" else nullcontext():
        return {
            f"{name} {str(dtype).removeprefix('torch.')}": apart(kernel, reference, inputs, dtype, device)
            for name, (kernel, reference, inputs) in cases.items()
            for dtype in (torch.float32, torch.float16)
        }


def apart(
    kernel: Callable[..., Any],
    reference: Callable[..., Any],
    inputs: tuple[Tensor, ...],
    dtype: torch.dtype,
    device: str,
) -> float:
    """Largest difference of values and gradients over the largest value; the reference computes in float32."""
    given = [t.to(device, dtype).requires_grad_() for t in inputs]
    wide = [t.detach().float().requires_grad_() for t in given]
    results = []
    for fn, leaves in ((kernel, given), (reference, wide)):
        outs = [t for t in tree_leaves(fn(*leaves)) if isinstance(t, Tensor)]
        upstream = [torch.linspace(-1, 1, t.numel(), device=device).view_as(t).to(t.dtype) for t in outs]
        results.append([*outs, *torch.autograd.grad(outs, leaves, upstream)])
    return max(
        float((a.float() - b).detach().abs().max() / b.detach().abs().max().clamp(min=1))
        for a, b in zip(*results, strict=True)
    )


def kernel_note(context: ProofContext, errors: dict[str, float]) -> str:
    """What was and was not tested of the Triton kernels."""
    if not errors:
        return "Triton is not installed here, so its kernels were not tested."
    worst = ", ".join(
        f"{max(e for name, e in errors.items() if name.endswith(kind)):.1g} in {kind} (allowed {allowed:g})"
        for kind, allowed in EXACT.items()
    )
    where = "compiled, on the GPU" if context.device.startswith("cuda") else "in Triton's interpreter on the CPU"
    untimed = "" if context.device.startswith("cuda") else " No Triton kernel was timed: that takes --device cuda."
    return (
        f"Triton kernels ({', '.join(dict.fromkeys(name.split()[0] for name in errors))}), forward and backward, ran "
        f"{where}; largest difference from the references {worst}.{untimed}"
    )


def fused_note(context: ProofContext) -> str:
    """What the fused forms are on this device."""
    if context.device.startswith("cuda"):
        return "Fused forms are this library's Triton kernels."
    return "Fused here: attention is PyTorch's own, the scan and the norm are compiled loops, chunks plain PyTorch."


def order_row(height: int, width: int) -> Row:
    """Tiles loaded by waves of 132 tasks, row by row and in the best of the orders."""
    loads = {group: sum(wave_loads(height, width, WAVE, group)) for group in GROUPS if group <= height}
    group = best_group(height, width, WAVE)
    return Row(
        f"order of {height} x {width} output tiles, {group} rows per group",
        tiles_loaded_row_by_row=loads[1],
        tiles_loaded_best=loads[group],
        fewer_loads=loads[1] / loads[group],
    )
