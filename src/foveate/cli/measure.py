"""`foveate measure`: what a system costs on this machine, and what a smaller budget saves."""

import re
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foveate.cli.console import print_json

if TYPE_CHECKING:
    from torch import Tensor


def measure(
    system: Annotated[str, typer.Argument(help="Name of a working system, as `foveate list --works` prints it.")],
    budget: Annotated[
        str | None,
        typer.Option(help='What it may spend: 0.3, "30%", "2 GFLOPs", "35 ms".  [default: 0.5, or the least it can]'),
    ] = None,
    size: Annotated[str, typer.Option(help="Size of the input picture: 256 or 512x384 (width x height).")] = "256",
    scale: Annotated[int, typer.Option(help="Upscaling factor.")] = 2,
    pairs: Annotated[int, typer.Option(help="How many times the two are timed in turn.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure what a system costs at budget 1 and at yours.

    Parameters, FLOPs, time and memory. The two run in turn, so that a busy machine slows both; the speed-up is the
    median of the pairwise ratios.

    \b
    Examples:
      foveate measure pcsr --budget 0.5
      foveate measure espcn --size 1920x1080 --scale 4 --json
    """
    from foveate import catalog
    from foveate.engine.budget import Budget
    from foveate.errors import InputError
    from foveate.meter import compare, count_parameters
    from foveate.meter import measure as measure_call

    card = catalog.card(system)
    width, height = parse_size(size)
    if pairs < 1:
        raise InputError(f"--pairs {pairs}: give at least 1.")
    model = network(card, scale)
    asked = Budget.parse(max(0.5, model.floor) if budget is None else budget)
    picture = photograph(height, width)
    full = {"gflops": model.full_flops(height, width) / 1e9}
    if asked.unit == "ms":
        full["ms"] = 1e3 * measure_call(lambda: model.upscale(picture, 1.0), repeats=3).seconds
    share = asked.share_of(**full)
    result = compare(
        lambda: model.upscale(picture, 1.0),
        lambda: model.upscale(picture, share),
        pairs=pairs,
        names=("budget 1", f"budget {share:.3g}"),
    )
    parameters = count_parameters(model)
    if as_json:
        head = {"system": card.slug, "scale": scale, "width": width, "height": height, "share": share}
        print_json({**head, "parameters": parameters, **result.to_dict()})
        return
    typer.echo(f"{card.slug} x{scale} on {width}x{height}, {parameters:,} parameters, {pairs} pairs of runs\n")
    typer.echo(result.table())


def parse_size(text: str) -> tuple[int, int]:
    """Read "256" or "512x384" as (width, height) in pixels.

    >>> parse_size("512x384")
    (512, 384)
    """
    from foveate.errors import InputError

    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text.lower())
    if match is None:
        raise InputError(f"--size {text} is not a size. Give pixels as 256 or 512x384 (width x height).")
    return int(match[1]), int(match[2] or match[1])


def photograph(height: int, width: int) -> "Tensor":
    """A photograph of any size, mirrored at its borders where it is too small. Shape: [1, 3, height, width]."""
    import numpy as np
    import torch

    from foveate.data import pictures

    picture = next(iter(pictures.samples().values()))[:, :height, :width].numpy()
    missing = ((0, 0), (0, height - picture.shape[1]), (0, width - picture.shape[2]))
    return torch.from_numpy(np.ascontiguousarray(np.pad(picture, missing, mode="symmetric")))[None].float()


def network(card: Any, scale: int) -> Any:
    """The system's network with foveate's own weights. Raises: InputError for a system that upscales nothing."""
    from foveate import weights
    from foveate.errors import InputError

    if not hasattr(card.target(), "upscale"):
        raise InputError(
            f"foveate measure runs systems that upscale pictures, and {card.slug} does not. "
            "Measure your own call to it with foveate.meter.compare."
        )
    return weights.load(card.slug, scale=scale).eval()
