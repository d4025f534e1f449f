"""What proofs of encoders share."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from foveate.meter import Comparison, count_flops, count_parameters
from foveate.proofs.evidence import Row


@contextmanager
def one_thread() -> Iterator[None]:
    """Run on one CPU thread, then on as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def network_row(name: str, network: nn.Module, x: Tensor, clock: Comparison, side: int) -> Row:
    """What a network costs; it is one side of a comparison."""
    seconds = sorted(clock.seconds[side])[len(clock.seconds[side]) // 2]
    with torch.inference_mode():
        gmacs = count_flops(network, x[:1]) / 2e9
    return Row(name, parameters=count_parameters(network), gmacs=gmacs, images_per_second=len(x) / seconds)
