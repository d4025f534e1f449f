"""Reading a network's shape off somebody else's checkpoint."""

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from foveate.errors import WeightsError

M = TypeVar("M", bound=nn.Module)


class Checkpoint:
    """An official state dict, bare or wrapped as {"params": ...} or {"params_ema": ...}.

    Args:
        state: names and tensors.
        name: of the network, for messages.
    """

    def __init__(self, state: Mapping[str, Tensor], name: str) -> None:
        self.state: Mapping[str, Tensor] = state.get("params_ema", state.get("params", state))  # type: ignore[assignment]
        self.name = name

    def size(self, key: str) -> torch.Size:
        """Shape of a tensor. Raises: WeightsError when it is missing."""
        if key not in self.state:
            there = ", ".join(sorted(self.state)[:3]) or "nothing"
            raise WeightsError(f"no {self.name} checkpoint: {key} is missing; there is {there}.")
        return self.state[key].shape

    def count(self, prefix: str) -> int:
        """How many numbered parts follow a prefix: 1 + the largest number."""
        found = [key.removeprefix(prefix).split(".")[0] for key in self.state if key.startswith(prefix)]
        return max((int(number) for number in found if number.isdigit()), default=-1) + 1

    def into(self, model: M, skip: tuple[str, ...] = ()) -> M:
        """Fill a network and put it into evaluation mode.

        Args:
            skip: ends of the keys to leave out.

        Raises: WeightsError when keys or shapes do not fit.
        """
        try:
            model.load_state_dict({k: v for k, v in self.state.items() if not skip or not k.endswith(skip)})
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit {self.name}: {error}") from error
        return model.eval()
