"""ACM: each layer of a vision transformer becomes a row of small learners, and each token runs as many as it needs.

Wojcik, Devoto, Pustelnik, Minervini, Scardapane 2023, "Adaptive Computation Modules: Granular Conditional Computation
for Efficient Inference", arXiv:2312.10193.

Every MLP and every projection of attention (queries, keys, values, output) is replaced by L = 4 learners that cost
together what it cost, and a gate that scores how many of them a token should run: 0 ... L in the MLPs, which stand
under a residual connection, and 1 ... L in projections. See `foveate.layers.learners`. The hidden units are

    b = round(P / (L (D + O + 1)))      P parameters of the layer, D -> O; MLP b = hidden / L, projection ~ D / (2 L)

Three phases make a trained model of it (`foveate.encode.adaptive_computation_training`): the old layers teach the new,
layer by layer; gates learn from measured errors; all of it is fine-tuned to a budget, where a gate draws
nu = one-hot(softmax((scores + Gumbel noise) / 0.8)), straight through.

What a token runs in evaluation. The g_n of a token are what learners add to its score (`gains`). Without a price,
each layer runs on each picture the floor(beta N L) learners of greatest gain, so a picture's cost is known before it is
seen; with a price t the learners with g_n > t c, where c is their cost over that of an MLP's, so that hard pictures and
layers get more. t = 0 is the gates' own choice (arg max). The share beta of the learners' work comes from the budget by

    budget * full = rest + gates + beta * learners                of all FLOPs; attention's products are in the rest

Not as in the paper: there the one way to another budget is another fine-tuning, which also has to bring the gates down
to it (`settle` begins there); learners start at random, and projections have a GELU too. Here MLPs start with the
host's own hidden units, those of largest |w1| |w2| first, and projections, without GELU as in the published code, with
the leading singular directions of theirs.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.engine.allocate import calibrate, top_k
from foveate.engine.budget import Budget
from foveate.engine.surgery import find, replace
from foveate.errors import BudgetError, InputError
from foveate.hosts import vit
from foveate.hosts.plugin import Look, Report, TokenHandle
from foveate.hosts.vit import ViT
from foveate.layers.learners import Learners, gains

TEMPERATURE = 0.8
"""Of Gumbel-softmax."""

DEAREST = 50.0
"""Prices are looked for from minus this to this."""


@dataclass(frozen=True, eq=False)
class Choice:
    """What one layer ran in one call. Shape: runs [B, N] learners; nu [B, N, choices], in training only."""

    layer: Learners
    runs: Tensor
    nu: Tensor | None = None


class Router:
    """Say how many learners tokens run, in all layers of a host.

    Attributes:
        budget: what may be spent in evaluation; 1 runs all learners.
        price: None keeps to the budget on every picture and layer; see above.
        learning: whether training draws from the gates; else it chooses as evaluation does.
        prefer: from a gate's scores to those by which tokens are chosen.
    """

    def __init__(self, budget: Budget, work: "Work") -> None:
        self.budget, self.work = budget, work
        self.price: float | None = None
        self.learning = True
        self.prefer: Callable[[Tensor], Tensor] = _as_they_are
        self._record: list[Choice] | None = None

    def __call__(self, layer: Learners, x: Tensor) -> Tensor | None:
        share = self.work.share(self.budget, x.shape[-2])
        drawing = layer.training and self.learning
        if not drawing and share == 1 and self.price is None:
            self._note(layer, torch.full(x.shape[:-1], layer.learners, device=x.device))
            return None
        scores = self.prefer(layer.gate(x))
        if drawing:
            nu = F.gumbel_softmax(scores.float(), TEMPERATURE, hard=True)
            self._note(layer, nu @ torch.arange(layer.least, layer.learners + 1.0, device=x.device), nu)
            return nu
        k = layer.least + self._chosen(gains(scores.detach().float()), share, layer)
        self._note(layer, k)
        return k

    def _chosen(self, gain: Tensor, share: float, layer: Learners) -> Tensor:
        """Learners beyond those that every token runs. Shape: gain [..., N, L] -> [..., N]."""
        if self.price is not None:
            return (gain > self.price * layer.cost / self.work.dearest).sum(-1)
        n, further = gain.shape[-2:]
        wanted = math.floor(share * n * layer.learners + 1e-6) - n * layer.least
        # Learner by learner: where gains are equal, all tokens have their first before any has its second.
        marks = top_k(gain.mT.flatten(-2), min(max(wanted, 0), n * further))
        return marks.unflatten(-1, (further, n)).sum(-2)

    def _note(self, layer: Learners, runs: Tensor, nu: Tensor | None = None) -> None:
        if self._record is not None:
            self._record.append(Choice(layer, runs, nu))

    @contextmanager
    def recording(self) -> Iterator[list[Choice]]:
        """Collect what layers run while this is open."""
        before, self._record = self._record, []
        try:
            yield self._record
        finally:
            self._record = before


@dataclass(frozen=True, eq=False)
class Work:
    """What a host cost before, in FLOPs, and what its new layers cost.

    Attributes:
        patch, linear, square: of the host, on embedding a patch, in its linear layers on a token, and in attention on a
            pair of tokens.
        prefixes: tokens beside the patches.
        replaced: of `linear`, what the new layers take the place of.
        layers: the new ones.
    """

    patch: int
    linear: int
    square: int
    prefixes: int
    replaced: int
    layers: tuple[Learners, ...]

    @property
    def dearest(self) -> int:
        """FLOPs of one learner on one token where it costs most: in an MLP."""
        return max(layer.cost for layer in self.layers)

    def share(self, budget: Budget, tokens: int) -> float:
        """beta, the share of each layer's learners that a budget pays for on a picture.

        Raises: BudgetError for a budget in another unit than share or GFLOPs, or too little for any.
        """
        full = self.patch * (tokens - self.prefixes) + self.linear * tokens + self.square * tokens**2
        share = budget.share_of(gflops=full / 1e9)
        if share == 1:
            return 1.0
        gates = sum(layer.gate_cost for layer in self.layers)
        bound = sum(layer.cost * layer.learners for layer in self.layers if layer.least)
        free = sum(layer.cost * layer.learners for layer in self.layers if not layer.least)
        floor = bound / self.layers[0].learners
        left = (share * full - full) / tokens + self.replaced - gates
        if left < floor:
            least = 1 + (floor - self.replaced + gates) * tokens / full
            raise BudgetError(
                f"A budget of {budget} does not pay for one learner in every projection: on {tokens} tokens that takes "
                f"a share of {least + 0.005:.2f}; ask for that much, or for more learners."
            )
        # Layers that run one learner at least do not go below it; the others then pay for them.
        even = left / (bound + free)
        return min(1.0, even if even * self.layers[0].learners >= 1 else (left - floor) / free)


class AdaptiveComputationModules(TokenHandle):
    """Make layers of a vision transformer run as many learners on each token as it needs.

    While it is applied the host's layers are the new ones, which train and save with it; they have to be trained, see
    `foveate.encode.adaptive_computation_training`. The budget may be changed at any time.

    Args:
        model: a host known to `foveate.hosts.vit`, changed in place.
        budget: a share of the host's FLOPs, or GFLOPs.
        learners: L.
        projections: replace attention's projections too, and not only MLPs.
        gate: hidden units of the gates; fewer for hosts of few channels, where gates weigh.

    Attributes:
        router: what chooses; see `Router`.
        pairs: what was replaced, and by which layers (queries, keys and values may have been one).

    Raises: InputError for a model that is no such host; BudgetError for too small a budget. The model is unchanged
        then.

    >>> from foveate.layers.transformer import VisionTransformer
    >>> host = VisionTransformer(32, 8, 48, 2, 3, num_classes=10).eval()
    >>> with AdaptiveComputationModules(host, budget=0.7, gate=4) as handle:
    ...     print(handle.look(torch.zeros(1, 3, 32, 32)).tokens)
    (9,)
    """

    host: ViT

    def __init__(
        self,
        model: nn.Module,
        budget: Budget | float | str = 0.5,
        learners: int = 4,
        projections: bool = True,
        gate: int = 16,
    ) -> None:
        host = vit(model)
        self.pairs: list[tuple[nn.Module, list[Learners]]] = []
        for block in host.blocks:
            self.pairs.append((block.mlp, [learners_for(block.mlp, host.width, learners, gate)]))
            if projections:
                for layer in (*block.attention.qkv, block.attention.out):
                    parts = layer.out_features // host.width if len(block.attention.qkv) == 1 else 1
                    self.pairs.append((layer, projection_learners(layer, parts, learners, gate)))
        layers = tuple(one for _, made in self.pairs for one in made)
        linear = sum(2 * block.flops(1) - block.flops(2) // 2 for block in host.blocks)
        square = sum(block.flops(1) for block in host.blocks) - linear
        old = [m for module, _ in self.pairs for m in module.modules() if isinstance(m, nn.Linear)]
        replaced = 2 * sum(layer.weight.numel() for layer in old)
        work = Work(2 * host.patches.weight.numel(), linear, square, host.prefixes, replaced, layers)
        self.router = Router(Budget.parse(budget), work)
        work.share(self.router.budget, self._tokens(host))
        for one in layers:
            one.router = self.router
        names = {host.name_of(old): made[0] if len(made) == 1 else Joined(made) for old, made in self.pairs}
        super().__init__(replace(host.model, names), host, self.effort)

    @property
    def layers(self) -> tuple[Learners, ...]:
        """The new layers."""
        return self.router.work.layers

    @property
    def budget(self) -> Budget:
        """What may be spent in evaluation. Setting it takes back the price."""
        return self.router.budget

    @budget.setter
    def budget(self, budget: Budget | float | str) -> None:
        parsed = Budget.parse(budget)
        self.router.work.share(parsed, self._tokens(self.host))
        self.router.budget, self.router.price = parsed, None

    @property
    def share(self) -> float:
        """beta: the share of the learners' work that the budget leaves, at the host's own size of pictures."""
        return self.router.work.share(self.budget, self._tokens(self.host))

    @property
    def trained(self) -> bool:
        """Whether gates have left their beginning."""
        return any(bool(p.any()) for layer in self.layers for p in layer.gate[-1].parameters())

    def calibrate(self, pixels: Tensor) -> float:
        """Find the price at which these pictures keep to the budget together, and use it from now on.

        Pictures and layers then no longer get equal shares: hard ones get more. Returns the price.

        Raises: BudgetError when even the dearest price spends more.
        """

        def spent(price: float) -> float:
            self.router.price = price
            with torch.no_grad(), self.router.recording() as record:
                self.host.tokens(pixels)
            return float(learner_share(record).mean())

        share = self.router.work.share(self.budget, self._tokens(self.host, pixels))
        wanted = sum(layer.cost * max(share, layer.least / layer.learners) for layer in self.layers)
        before, target = self.router.price, wanted / sum(layer.cost for layer in self.layers)
        training = self.host.model.training
        self.host.model.eval()
        try:
            found = calibrate(spent, target, -DEAREST, DEAREST, tol=1e-2)
        except BudgetError:
            self.router.price = before
            raise
        finally:
            self.host.model.train(training)
        self.router.price = found
        return found

    @torch.no_grad()
    def settle(self, pixels: Tensor) -> None:
        """Calibrate, and take the price off the gates' scores: then what they choose by themselves costs the budget.

        Fine-tuning starts from there; without it, gates first have to come down from as many learners as help at all.

        Raises: BudgetError as `calibrate`.
        """
        price = self.calibrate(pixels)
        for layer in self.layers:
            last = layer.gate[-1]
            assert isinstance(last, nn.Linear)
            number = torch.arange(last.out_features, dtype=last.bias.dtype, device=last.bias.device)
            last.bias.sub_(price * layer.cost / self.router.work.dearest * number)
        self.router.price = 0.0

    def effort(self, pixels: Tensor) -> Look:
        """Learners that each patch runs over all of them, weighed by their cost."""
        rows, columns = self.host.grid(pixels)
        with self.router.recording() as record:
            self.host.tokens(pixels)
        share = spent_per_token(record).detach()[:, self.host.prefixes :]
        worth = tuple(round(float(e)) for e in share.sum(1))
        return Look(worth, rows * columns, share.unflatten(1, (rows, columns)), unit="tokens of full width")

    def report(self, pixels: Tensor | None = None) -> Report:
        if not self.trained:
            warnings.warn(
                "the gates of this model were never trained, nor were its learners taught: what it spends less it "
                "loses in accuracy; see foveate.encode.adaptive_computation_training.",
                stacklevel=2,
            )
        return super().report(pixels)

    @staticmethod
    def _tokens(host: ViT, pixels: Tensor | None = None) -> int:
        return host.prefixes + math.prod(host.native_grid if pixels is None else host.grid(pixels))

    @staticmethod
    def conformance_example() -> tuple[nn.Module, tuple[Tensor]]:
        """transformers' own class, made small."""
        from transformers import ViTConfig, ViTModel

        sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
        host = ViTModel(ViTConfig(**sizes, image_size=64, patch_size=8)).eval()
        return host, (torch.rand(2, 3, 64, 64),)


class Joined(nn.Module):
    """Layers on the same tokens, their outputs side by side."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(x) for layer in self.layers], -1)


def spent_per_token(record: Sequence[Choice]) -> Tensor:
    """Share of all layers' learners that each token ran, weighed by cost. Shape: [B, N], with gradients to gates."""
    full = sum(choice.layer.cost * choice.layer.learners for choice in record)
    return torch.stack([choice.runs * (choice.layer.cost / full) for choice in record]).sum(0)


def learner_share(record: Sequence[Choice]) -> Tensor:
    """The same, of each picture. Shape: [B]."""
    return spent_per_token(record).mean(-1)


def learners_for(mlp: nn.Module, dim: int, count: int, gate: int = 16) -> Learners:
    """Learners in the place of an MLP, starting with its own hidden units where it has such; its last bias is lost.

    Raises: InputError for a module that does not keep the number of channels.
    """
    linear = [layer for layer in find(mlp, nn.Linear).values() if isinstance(layer, nn.Linear)]
    if not linear or linear[0].in_features != dim or linear[-1].out_features != dim:
        raise InputError(f"learners need an MLP of linear layers from and to {dim} channels.")
    made = Learners(dim, dim, _hidden(linear, count), count, gate=gate).to(linear[0].weight)
    if len(linear) == 2 and linear[0].out_features == linear[1].in_features and linear[0].bias is not None:
        (w1, b1), w2 = (linear[0].weight, linear[0].bias), linear[1].weight.mT
        order = (w1.norm(dim=1) * w2.norm(dim=1)).argsort(descending=True)[: made.b1.numel()]
        _start(made, w1[order], b1[order], w2[order])
    return made.train(mlp.training)


def projection_learners(layer: nn.Linear, parts: int, count: int, gate: int = 16) -> list[Learners]:
    """Learners in the place of a projection, or of each of the parts that are one layer; at best of rank L b."""
    made = []
    for i, weight in enumerate(layer.weight.chunk(parts)):
        outputs, inputs = weight.shape
        parameters = weight.numel() + (0 if layer.bias is None else outputs)
        hidden = max(1, round(parameters / (count * (inputs + outputs + 1))))
        one = Learners(inputs, outputs, hidden, count, least=1, linear=True, gate=gate).to(weight)
        wide = weight.detach().float()
        directions = torch.linalg.eigh(wide @ wide.mT).eigenvectors.flip(1)[:, : one.b1.numel()].mT  # [L b, O]
        bias = wide.new_zeros(outputs) if layer.bias is None else layer.bias.detach().float().chunk(parts)[i]
        _start(one, directions @ wide, directions @ bias, directions)
        made.append(one.train(layer.training))
    return made


def _hidden(linear: Sequence[nn.Linear], count: int) -> int:
    dim = linear[0].in_features
    parameters = sum(p.numel() for layer in linear for p in layer.parameters())
    return max(1, round(parameters / (count * (2 * dim + 1))))


@torch.no_grad()
def _start(layer: Learners, w1: Tensor, b1: Tensor, w2: Tensor) -> None:
    """Write hidden units over the first ones of a layer. Shape: [h, D], [h], [h, O]."""
    for parameter, given in ((layer.w1, w1), (layer.b1, b1), (layer.w2, w2)):
        parameter.flatten(0, 1)[: len(given)] = given.to(parameter)


def _as_they_are(scores: Tensor) -> Tensor:
    return scores
