"""ACLA: a pixel reads a few keys of earlier layers, at places and with weights that it predicts.

Wang, Xu, Yang, Wu, Su, Xiong, Tang 2022, "Adaptive Cross-Layer Attention for Image Restoration", arXiv:2203.03619.

Earlier layers hold the same structure at other stages of abstraction. Attention to all of their pixels is out of reach;
instead a query Q [B, C, H, W] predicts, for each of m earlier layers R_j, the places and weights of K keys:

    S_jk(p) = phi(R_j)(p + O_jk(p)),         O, w, g = 1x1 convolutions of Q;   bilinear, zero outside the picture
    y(p) = sum_jk a_jk(p) S_jk(p),           a = M exp(w) / (eps + sum_jk M exp(w)),   M = 1[g > 0]

so the weights come from the query alone, and the gates M leave out keys that are of no use to it. In training M is a
binary concrete variable of temperature tau, sigmoid((g + logistic noise) / tau), rounded, with the gradients of what
was rounded, and `sparsity` charges for open gates; in the end the noise is left out, so that the other weights get used
to the gates that will be. Were M not rounded, all of it could shrink together at no cost, for the sum below shrinks
too, and the price would close every gate.

Where in a network such modules pay is found by search: each has a scalar gate of that kind, of logit alpha_l, on its
output, and loss + lambda * sum_l sigmoid(alpha_l) cost_l / sum_l cost_l is minimised, weights on one half of the
pictures and alphas on the other. What is left open is built anew.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError, WeightsError
from foveate.layers.residual import ResidualBlock
from foveate.layers.subpixel import subpixel_steps
from foveate.layers.upscaler import Upscaler
from foveate.ops.gathered import gathered

GATES = (None, "mask", "logit")
EPSILON = 1e-6


def binary_concrete(logits: Tensor, temperature: float, hard: bool = False, noisy: bool = True) -> Tensor:
    """Sample gates: sigmoid((logits + logistic noise) / temperature), the cold limit being 1 with odds exp(logits).

    Args:
        hard: round to 0 or 1, and pass gradients as if there were no rounding.
        noisy: with noise; rounded without it, gates are 1[logits > 0].
    """
    if noisy:
        u = torch.rand_like(logits).clamp(1e-6, 1 - 1e-6)
        logits = logits + u.log() - (-u).log1p()
    soft = torch.sigmoid(logits / temperature)
    return (soft > 0.5).to(soft.dtype).detach() + (soft - soft.detach()) if hard else soft


class CrossLayerAttention(nn.Module):
    """Read `keys` places in each of several earlier layers.

    Args:
        channels: C of query and references.
        references: m, how many earlier layers there are.
        keys: K places in each.
        gate: "mask" (ACLA: keys are left out), None (CLA: all are read), or "logit" (as in the released code: a softmax
            over each reference's keys, noisy in training, scales w).
        reach: farthest that a key may lie, in pixels to each side; None for no limit. With a limit what a pixel sees
            is bounded, so that pictures can be enlarged in tiles.
        post: end with BN(depth-wise 3x3(y)) + Q.

    Attributes: temperature (tau) and noisy, of the gates in training; opened, the mean sigmoid(g) of the last call.

    Shape: query [B, C, H, W], references m of the same shape -> [B, C, H, W].
    Raises: InputError for references of another number or shape.
    """

    opened: Tensor

    def __init__(
        self,
        channels: int,
        references: int,
        keys: int = 9,
        gate: str | None = "mask",
        reach: float | None = None,
        post: bool = False,
    ) -> None:
        super().__init__()
        if gate not in GATES:
            raise InputError(f"unknown gate {gate!r}; use one of {', '.join(map(repr, GATES))}.")
        if references < 1 or keys < 1:
            raise InputError(f"attention needs a key in a reference, got {keys} keys in {references} references.")
        self.references, self.keys, self.reach = references, keys, reach
        self.temperature, self.noisy, self.gate = 1.0, True, gate
        count = keys * references
        self.to_offset, self.to_weight = nn.Conv2d(channels, 2 * count, 1), nn.Conv2d(channels, count, 1)
        self.to_gate = nn.Conv2d(channels, count, 1) if gate else None
        self.value = nn.Conv2d(channels, channels, 1)
        depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.post = nn.Sequential(depthwise, nn.BatchNorm2d(channels)) if post else None
        with torch.no_grad():
            self.to_offset.weight.normal_(std=1e-3)  # if all keys began at one place, they would stay there together
            self.to_offset.bias.copy_(_square(keys).repeat(references, 1).flatten())  # type: ignore[union-attr]
            if self.to_gate is not None:
                self.to_gate.bias.fill_(1.0)  # type: ignore[union-attr]

    def attention(self, query: Tensor) -> tuple[Tensor, Tensor]:
        """Where each pixel looks, and how much each key counts.

        Shape: [B, C, H, W] -> offsets (x, y) [B, m, K, 2, H, W], weights [B, m, K, H, W].
        """
        offset = self.to_offset(query).unflatten(1, (self.references, self.keys, 2))
        if self.reach is not None:
            offset = offset.clamp(-self.reach, self.reach)
        w = self.to_weight(query).unflatten(1, (self.references, self.keys))
        if self.to_gate is None:
            return offset, _softmax(w)
        g = self.to_gate(query).unflatten(1, (self.references, self.keys))
        self.opened = g.sigmoid().mean()
        if self.gate == "logit":
            drawn = F.gumbel_softmax(g, self.temperature, dim=2) if self.training else g.softmax(2)
            return offset, _softmax(w * drawn)
        mask = binary_concrete(g, self.temperature, True, self.noisy) if self.training else (g > 0).to(g.dtype)
        every = (w - w.amax((1, 2), keepdim=True)).exp()
        share, full = mask * every, every.sum((1, 2), keepdim=True)
        total = share.sum((1, 2), keepdim=True)
        # Where all gates are closed the sum is 0 over anything; over everything its gradients stay small.
        return offset, share / torch.where(total > 0, EPSILON + total, full)

    def forward(self, query: Tensor, references: Sequence[Tensor]) -> Tensor:
        if len(references) != self.references or any(r.shape != query.shape for r in references):
            raise InputError(
                f"expected {self.references} references of shape {tuple(query.shape)}, "
                f"got {[tuple(r.shape) for r in references]}; project others first."
            )
        offset, weight = self.attention(query)
        keys = self.value(torch.stack(tuple(references), 1).flatten(0, 1)).unflatten(0, (len(query), -1))
        y = gathered(keys.flatten(1, 2), weight, offset).unflatten(1, keys.shape[1:3]).sum(1)
        return y if self.post is None else self.post(y) + query

    def macs_per_pixel(self) -> int:
        """Multiply-accumulates per pixel: for places, weights and gates, phi, and bilinear samples."""
        c, count = self.value.in_channels, self.keys * self.references
        return (
            c * count * (4 if self.gate else 3) + c * c * self.references + 5 * c * count + (9 * c if self.post else 0)
        )


class ACLA(Upscaler):
    """EDSR with cross-layer attention after its stages; scale 1 is for denoising and the like.

    The module after stage i reads the head's features and those of the stages before.

    Args:
        scale: 1, 2, 3 or 4.
        channels, blocks, stages: of the trunk; stages divides blocks.
        positions: stages (from 1) that a module comes after; default all. An empty list is plain EDSR.
        keys, gate, reach, post: as in `CrossLayerAttention`.
        search: give every module a gate alpha on its output, for `search_positions`.
        value_range: what 1.0 of the input means to the weights; 255 for published EDSR weights.

    Shape: [B, 3, h, w] in 0..1 -> [B, 3, s*h, s*w].
    Raises: InputError for settings that do not fit together.
    """

    slug = "acla"
    cheaper = "espcn"
    mean: Tensor

    def __init__(
        self,
        scale: int = 2,
        channels: int = 64,
        blocks: int = 16,
        stages: int = 4,
        positions: Sequence[int] | None = None,
        keys: int = 9,
        gate: str | None = "mask",
        reach: float = 8.0,
        post: bool = False,
        search: bool = False,
        value_range: float = 1.0,
    ) -> None:
        super().__init__()
        if scale not in (1, 2, 3, 4):
            raise InputError(f"ACLA enlarges by 1, 2, 3 or 4, got {scale!r}.")
        if stages < 1 or blocks % stages:
            raise InputError(f"{stages} stages do not divide {blocks} blocks.")
        places = list(range(1, stages + 1)) if positions is None else sorted(set(positions))
        if not set(places) <= set(range(1, stages + 1)):
            raise InputError(f"modules come after stages 1..{stages}, got positions {list(positions or [])}.")
        self.scale, self.stages, self.each, self.value_range = scale, stages, blocks // stages, value_range
        self.temperature = 1.0
        sides = math.ceil(reach) + 1 + post
        self.halo = 6 + 2 * blocks + len(places) * sides
        last = nn.Conv2d(channels, channels, 3, padding=1)
        self.head = nn.Sequential(nn.Conv2d(3, channels, 3, padding=1))
        self.body = nn.ModuleList([*(ResidualBlock(channels) for _ in range(blocks)), last])
        self.tail = nn.Sequential(nn.Sequential(*subpixel_steps(channels, scale)), nn.Conv2d(channels, 3, 3, padding=1))
        self.attention = nn.ModuleDict(
            {str(i): CrossLayerAttention(channels, i, keys, gate, reach, post) for i in places}
        )
        self.alpha = nn.Parameter(torch.zeros(len(places))) if search else None
        self.register_buffer("mean", torch.tensor([0.4488, 0.4371, 0.4040]).view(3, 1, 1), persistent=False)

    def modules_by_stage(self) -> dict[int, CrossLayerAttention]:
        """The attention modules by the stage they come after."""
        return {int(i): module for i, module in self.attention.items()}  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        first = self.head((x - self.mean) * self.value_range)
        h, layers = first, [first]
        found = self.modules_by_stage()
        gates = iter(self._gates())
        for i in range(1, self.stages + 1):
            for block in self.body[(i - 1) * self.each : i * self.each]:
                h = block(h.clone() if h is layers[-1] else h)  # blocks add in place where no gradient is asked for
            if i in found:
                read = found[i](h, layers)
                read = read if self.alpha is None else next(gates) * read
                layers.append(h)
                h = h + read
            else:
                layers.append(h)
        y = self.tail(first + self.body[-1](h)) / self.value_range
        return y + (x if self.scale == 1 else self.mean)

    def sparsity(self) -> Tensor:
        """Mean share of gates that were likely open in the last call: what to add to a loss, times a weight."""
        gated = [m.opened for m in self.modules_by_stage().values() if m.gate]
        if not gated:
            raise InputError("there is no gate to close; build the network with gate='mask'.")
        return torch.stack(gated).mean()

    def set_temperature(self, temperature: float, noisy: bool = True) -> None:
        """Of all gates in training; 5 to begin with and 0.1 in the end, when they should no longer be `noisy`."""
        self.temperature = temperature
        for module in self.modules_by_stage().values():
            module.temperature, module.noisy = temperature, noisy

    def search_cost(self) -> Tensor:
        """sum_l sigmoid(alpha_l) cost_l / sum_l cost_l: the share of the modules' multiply-accumulates that stays."""
        if self.alpha is None:
            raise InputError("nothing is searched for; build the network with search=True.")
        costs = torch.tensor([float(m.macs_per_pixel()) for m in self.modules_by_stage().values()])
        costs = costs.to(self.alpha)
        return (self.alpha.sigmoid() * costs).sum() / costs.sum()

    def kept(self) -> list[int]:
        """Stages whose module the search kept: sigmoid(alpha) > 1/2."""
        if self.alpha is None:
            return sorted(self.modules_by_stage())
        return [i for i, open_ in zip(self.modules_by_stage(), (self.alpha > 0).tolist(), strict=True) if open_]

    def _gates(self) -> Tensor:
        if self.alpha is None:
            return torch.empty(0)
        if self.training:
            return binary_concrete(self.alpha, self.temperature)
        return (self.alpha > 0).to(self.alpha.dtype)

    @classmethod
    def load_official(cls, state: Mapping[str, Tensor], scale: int = 2, **settings: object) -> "ACLA":
        """Begin with an official EDSR checkpoint as the trunk; the attention modules are new.

        Raises: WeightsError when the keys do not fit.
        """
        state = {key: value for key, value in state.items() if not key.startswith(("sub_mean.", "add_mean."))}
        if "head.0.weight" not in state:
            raise WeightsError(f"no EDSR: the keys begin with {sorted(state)[:3]}; expected head.0.weight.")
        blocks = max((int(k.split(".")[1]) for k in state if k.startswith("body.")), default=0)
        model = cls(scale, state["head.0.weight"].shape[0], blocks, value_range=255.0, **settings)  # type: ignore[arg-type]
        own = {key: value for key, value in model.state_dict().items() if key.startswith(("attention.", "alpha"))}
        try:
            model.load_state_dict({**own, **state})
        except RuntimeError as error:
            raise WeightsError(f"the checkpoint does not fit EDSR x{scale}: {error}") from error
        return model.eval()


def search_positions(
    model: ACLA,
    loss: Callable[[int], Tensor],
    held_out: Callable[[int], Tensor],
    steps: int,
    weight: float = 0.1,
    lr: float = 1e-3,
    temperatures: tuple[float, float] = (5.0, 0.1),
) -> list[int]:
    """Find the stages where a module pays: a step on the weights, then one on the alphas, in turn.

    Args:
        model: built with search=True; trained in place.
        loss, held_out: step number -> loss on one half of the training pictures, and on the other.
        weight: lambda, what all modules' multiply-accumulates together cost, in units of the loss.
        lr: of Adam; ten times as much for the alphas.
        temperatures: of all gates at the first and the last step, geometric between.

    Returns: positions for a new network.
    """
    alpha = model.alpha
    if alpha is None:
        raise InputError("nothing is searched for; build the network with search=True.")
    theta = [p for p in model.parameters() if p is not alpha]
    for_weights, for_alpha = torch.optim.Adam(theta, lr), torch.optim.Adam([alpha], 10 * lr, betas=(0.5, 0.99))
    first, last = temperatures
    model.train()
    for step in range(steps):
        model.set_temperature(first * (last / first) ** (step / max(1, steps - 1)))
        for optimiser, value in (
            (for_weights, lambda: loss(step)),  # noqa: B023  (called at once)
            (for_alpha, lambda: held_out(step) + weight * model.search_cost()),  # noqa: B023
        ):
            model.zero_grad(set_to_none=True)
            value().backward()
            optimiser.step()
    model.eval()
    return model.kept()


def _softmax(w: Tensor) -> Tensor:
    return w.flatten(1, 2).softmax(1).view_as(w)


def _square(keys: int) -> Tensor:
    """The first places (x, y) of the smallest square grid with so many, a pixel apart. Shape: [K, 2]."""
    side = math.isqrt(keys - 1) + 1
    line = torch.arange(side) - (side - 1) / 2
    return torch.cartesian_prod(line, line).flip(1)[:keys]
