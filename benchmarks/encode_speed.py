"""Speed of plug-ins that choose tokens, windows or widths: what a FLOP saved is worth on the clock.

    python benchmarks/encode_speed.py --data pictures/ --hosts vit-b --sizes 384 --budgets 0.75 0.5 0.25

Hosts have the published sizes and random weights, which do for time; photographs are kodak12's where --data holds them,
else those every machine has. Host alone and host with plug-in run in turn on the same batch, and each line tells tokens
kept, FLOP reduction, speed-up and efficiency = speed-up / FLOP reduction. A new plug-in joins by a line in METHODS.
"""

import argparse
import importlib
import json
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate import hosts
from foveate.data import pictures
from foveate.errors import BudgetError
from foveate.hosts.plugin import TokenHandle
from foveate.meter import compare

METHODS = {
    "adaptive-patch-transformer": ("vit", "foveate.encode.adaptive_patch_transformer:AdaptivePatchTransformer"),
    "sparsevit": ("swin", "foveate.encode.sparsevit:SparseViT"),
    "mone": ("vit", "foveate.encode.mone:plugin"),
    "tokenlearner": ("vit", "foveate.encode.tokenlearner:plugin"),
    "adaptive-computation-modules": (
        "vit",
        "foveate.encode.adaptive_computation_modules:AdaptiveComputationModules",
    ),
}
"""Plug-in: (kind of host, entry). The entry is called with the model and a budget and gives a TokenHandle."""

VITS = {"vit-s": (384, 12, 6), "vit-b": (768, 12, 12), "vit-l": (1024, 24, 16)}
SWINS = {"swin-t": (96, [2, 2, 6, 2], [3, 6, 12, 24]), "swin-b": (128, [2, 2, 18, 2], [4, 8, 16, 32])}


def host(name: str, side: int) -> nn.Module:
    """A model of transformers of a published size, with random weights."""
    from transformers import SwinConfig, SwinModel, ViTConfig, ViTModel

    torch.manual_seed(0)
    if name in VITS:
        width, depth, heads = VITS[name]
        sizes = {"hidden_size": width, "num_hidden_layers": depth, "num_attention_heads": heads}
        return ViTModel(ViTConfig(**sizes, intermediate_size=4 * width, image_size=side, patch_size=16)).eval()
    width, depths, heads_of = SWINS[name]
    return SwinModel(SwinConfig(embed_dim=width, depths=depths, num_heads=heads_of, image_size=side)).eval()


def photographs(data: Path | None, count: int) -> Iterable[Any]:
    """Photographs in any form that `Pixels.prepare` opens."""
    if data is not None:
        return [file for file, _ in pictures.list_pictures(data / "kodak12")][:count]
    return list(pictures.samples().values())[:count]


def measure(model: nn.Module, x: Tensor, handle: TokenHandle, pairs: int) -> dict[str, float]:
    """Host alone and with the plug-in in turn."""

    def run(call: Callable[[], Any] = lambda: model(x)) -> None:
        with torch.inference_mode():
            call()

    def alone() -> None:
        with handle.paused():
            run()

    look = handle.look(x)
    result = compare(alone, run, pairs=pairs)
    return {
        "tokens": statistics.mean(look.tokens),
        "of": look.full,
        "host ms": 1e3 * statistics.median(result.seconds[0]),
        "ms": 1e3 * statistics.median(result.seconds[1]),
        "FLOP reduction": result.flop_reduction or float("nan"),
        "speed-up": result.speedup,
        "efficiency": result.efficiency or float("nan"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder that holds kodak12")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--hosts", nargs="+", default=["vit-b", "vit-l"], choices=[*VITS, *SWINS])
    parser.add_argument("--sizes", nargs="+", type=int, default=[384, 768], help="sides of the pictures, in pixels")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.75, 0.5, 0.25])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    for name in args.hosts:
        for side in args.sizes:
            model = host(name, side).to(args.device, getattr(torch, args.dtype))
            kind = "vit" if name in VITS else "swin"
            pixels = getattr(hosts, kind)(model).pixels
            x = torch.cat([pixels.prepare(source) for source in photographs(args.data, args.batch)])
            x = x.to(args.device, getattr(torch, args.dtype))
            for method in args.methods:
                wanted, entry = METHODS[method]
                if wanted != kind:
                    continue
                module, _, attribute = entry.partition(":")
                for budget in args.budgets:
                    try:
                        with getattr(importlib.import_module(module), attribute)(model, budget=budget) as handle:
                            row = measure(model, x, handle, args.pairs)
                    except BudgetError as error:
                        print(f"{name} {side} px, {method} at {budget:g}: {error}", flush=True)
                        continue
                    rows.append({"host": name, "side": side, "method": method, "budget": budget, **row})
                    figures = "  ".join(f"{key} {value:.4g}" for key, value in row.items())
                    print(f"{name} {side} px, {method} at {budget:g}:  {figures}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
