"""MoNE: each token of a vision transformer gets as many of its features to work with as it deserves.

Jain, Hegde, Kusupati, Nagrani, Buch, Jain, Arnab, Paul 2024, "Mixture of Nested Experts: Adaptive Processing of Visual
Tokens", arXiv:2407.19985.

Inside every matrix of a transformer of width D hide E = 4 smaller ones, experts of widths d_j = D / 2^(E - j); see
`foveate.layers.nested`. A router looks once at the tokens that enter the first block,

    r = softmax(W x + b)                                                    [N, E]

and experts choose in turn, the widest first, each the floor(c_j N) tokens still free that it likes best; the narrowest
takes the rest. So what a picture costs is known before it is seen. In every block, with token i at expert j(i),

    z_i = x_i + attention_j(norm(x))_i                                      among all tokens, at full width
    x_i = z_i + (1 + alpha r_i,j) MLP_j(norm(z_i))

where alpha, one per block, is learned from 0 on and leads gradients to the router. Capacities c come from the share of
linear work e = sum_j c_j d_j / D by

    max sum_j c_j / delta^(j - 1) - beta sum_j c_j log c_j                  beta = 10, delta = 2, sum_j c_j = 1

whose solution is c_j ~ exp((delta^(1 - j) + t d_j / D) / beta) with the one number t that meets e. Attention's two
products keep their cost, so a budget of FLOPs is turned into e by  (budget - rest) / (linear work at full width).

Features of an ordinary model are in no order, and a slice of them is no smaller model: it becomes one by training with
routing, here with e drawn anew at each step, after which any budget may be asked for.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from foveate.engine.allocate import calibrate, expert_preferred
from foveate.engine.budget import Budget
from foveate.engine.surgery import Handle, add, find, join, patch_forward
from foveate.errors import BudgetError, InputError
from foveate.hosts import vit
from foveate.hosts.plugin import Look, Report, TokenHandle
from foveate.hosts.vit import Block, ViT
from foveate.layers.nested import Nesting
from foveate.layers.transformer import VisionTransformer

DRAWN = tuple(0.15 + 0.1 * i for i in range(9))
"""Shares of linear work that training draws from."""


@cache
def capacities(share: float, experts: int = 4, beta: float = 10.0, delta: float = 2.0) -> tuple[float, ...]:
    """Shares of tokens that experts take, the narrowest first.

    Args:
        share: e, of linear work; from 1 / 2^(experts - 1) to 1.
        beta: weight of entropy.
        delta: how much less each wider expert is wanted for itself.

    Raises: BudgetError for a share out of reach.

    >>> [round(c, 3) for c in capacities(0.3)]
    [0.42, 0.315, 0.191, 0.073]
    """
    least = 0.5 ** (experts - 1)
    if not least - 1e-9 <= share <= 1:
        raise BudgetError(f"{experts} experts do from {least:g} to 1 of the linear work, not {share:g}.")
    if share in (least, 1.0) or share < least:
        return tuple(float(i == (experts - 1 if share == 1 else 0)) for i in range(experts))
    widths = [0.5 ** (experts - 1 - i) for i in range(experts)]

    def at(t: float) -> tuple[float, ...]:
        powers = [delta**-i / beta + t * width for i, width in enumerate(widths)]
        parts = [math.exp(power - max(powers)) for power in powers]
        return tuple(part / sum(parts) for part in parts)

    def spent(t: float) -> float:
        return sum(c * width for c, width in zip(at(t), widths, strict=True))

    return at(calibrate(spent, share, -1e4, 1e4, tol=1e-10))


class Experts(nn.Module):
    """What is learned beside the transformer: the router, and alpha of each block (no weight decay for it).

    Args:
        dim: D.
        experts: E; 2^(E - 1) divides D.
        depth: blocks.

    Raises: InputError for widths that are not whole.
    """

    def __init__(self, dim: int, experts: int, depth: int) -> None:
        super().__init__()
        if experts < 1 or dim % (1 << (experts - 1)):
            raise InputError(f"{experts} experts need a width that 2^{experts - 1} divides, got {dim}.")
        self.widths = tuple(dim >> (experts - 1 - i) for i in range(experts))
        self.router = nn.Linear(dim, experts)
        self.alpha = nn.Parameter(torch.zeros(depth))

    def forward(self, x: Tensor) -> Tensor:
        """The router's r. Shape: [B, N, D] -> [B, N, E]."""
        if self.training:
            with torch.no_grad():
                self.alpha.clamp_(0, 1)  # here and not in `gain`, where alpha would lose its gradient at the ends
        return self.router(x).softmax(-1)

    def gain(self, block: int, chosen: Tensor) -> Tensor:
        """1 + alpha r."""
        return 1 + self.alpha[block] * chosen

    @property
    def trained(self) -> bool:
        """Whether a step of training was made."""
        return bool(self.alpha.any())


class Mixture:
    """Run a transformer's own blocks as a mixture of nested experts.

    Attributes:
        budget: what may be spent; 1 runs every token at full width.
        shares: where not None, capacities to be used in place of the budget's, the narrowest expert first.
        drawn: shares of linear work, one of which is drawn at each forward pass in training; none keeps the budget.
        prefer: from the router's r [B, N, E] to the scores by which experts choose.
    """

    def __init__(self, host: ViT, experts: Experts, budget: Budget, drawn: Sequence[float] = DRAWN) -> None:
        self.host, self.experts, self.budget, self.drawn = host, experts, budget, tuple(drawn)
        self.shares: tuple[float, ...] | None = None
        self.prefer: Callable[[Tensor], Tensor] = _as_they_are
        self.prefixes = host.prefixes
        self.nesting: Nesting | None = None
        self.chosen: Tensor | None = None
        self.expert: Tensor | None = None
        self.layers = [_linear_layers(block, host.width) for block in host.blocks]
        self.linear_share(math.prod(host.native_grid))

    def patch(self) -> Handle:
        """Change the host."""
        handles: list[Handle] = []
        for i, (block, (reading, writing)) in enumerate(zip(self.host.blocks, self.layers, strict=True)):
            handles += [patch_forward(layer, partial(self._read, layer)) for layer in reading]
            handles += [patch_forward(layer, partial(self._write, layer)) for layer in writing]
            handles += [block.attention.patch(self._attend), patch_forward(block.mlp, partial(self._amplify, i))]
        handles += [patch_forward(module, self._drop_pictures) for module in self.host.drop_paths()]
        return join([*handles, self.host.blocks[0].patch(self._enter), self.host.blocks[-1].patch(self._leave)])

    def counts(self, n: int) -> tuple[int, ...]:
        """Of n patch tokens, those of each expert, the narrowest first."""
        shares = self.shares
        if shares is None:
            drawn = self.drawn if self.experts.training else ()
            share = drawn[int(torch.randint(len(drawn), ()))] if drawn else self.linear_share(n)
            shares = capacities(share, len(self.experts.widths))
        wide = [math.floor(c * n + 1e-6) for c in shares[1:]]
        return (n - sum(wide), *wide)

    def linear_share(self, n: int) -> float:
        """e, the share of linear work on n patch tokens that the budget leaves.

        Raises: BudgetError for a budget in another unit than share or GFLOPs, or too little for the narrowest expert.
        """
        host, tokens, widths = self.host, self.prefixes + n, self.experts.widths
        full = host.flops(n, (1, n))
        share = self.budget.share_of(gflops=full / 1e9)
        if share == 1:
            return 1.0
        linear = sum(2 * block.flops(1) - block.flops(2) // 2 for block in host.blocks)
        rest = full - linear * n + 2 * tokens * self.experts.router.weight.numel()
        found = (share * full - rest) / (linear * n)
        least = widths[0] / widths[-1]
        if found < least:
            floor = (rest + least * linear * n) / full
            raise BudgetError(
                f"A budget of {self.budget} does not pay for the narrowest expert, which takes a share of "
                f"{floor + 0.005:.2f} on {n} patches; ask for that much, or for more experts."
            )
        return min(found, 1.0)

    @contextmanager
    def spending(self, budget: Budget | float | str) -> Iterator[None]:
        """Keep to another budget while this is open, in training too."""
        before = self.budget, self.drawn
        self.budget, self.drawn = Budget.parse(budget), ()
        try:
            yield
        finally:
            self.budget, self.drawn = before

    def look(self, pixels: Tensor) -> Look:
        """Width of each patch over the full one."""
        rows, columns = self.host.grid(pixels)
        self.host.tokens(pixels)
        assert self.expert is not None
        widths = torch.tensor(self.experts.widths, device=pixels.device) / self.experts.widths[-1]
        effort = widths[self.expert[:, self.prefixes :]]
        worth = tuple(round(float(e)) for e in effort.sum(1))
        return Look(worth, rows * columns, effort.unflatten(1, (rows, columns)), unit="tokens of full width")

    # The places that are changed.

    def _enter(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        r = self.experts(x)
        counts, widest = self.counts(x.shape[1] - self.prefixes), r.shape[-1] - 1
        expert = expert_preferred(self.prefer(r[:, self.prefixes :]).detach(), counts)
        expert = torch.cat([expert.new_full((len(x), self.prefixes), widest), expert], 1)
        chosen = r.gather(-1, expert[..., None])
        self.nesting = None if sum(counts[:-1]) == 0 else Nesting.of(expert, self.experts.widths)
        self.expert, self.chosen = expert, chosen
        if self.nesting is not None:
            self.chosen, x = self.nesting.sort(chosen)[None], self.nesting.sort(x)[None]
        return block(x)

    def _leave(self, block: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, nesting = block(x), self.nesting
        self.nesting = self.chosen = None  # tensors of this call
        return y if nesting is None else nesting.restore(y[0])

    def _read(self, layer: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return forward(x) if self.nesting is None else self.nesting.read(x[0], layer)[None]

    def _write(self, layer: nn.Linear, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return forward(x) if self.nesting is None else self.nesting.write(x[0], layer)[None]

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
        if self.nesting is None:
            return nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.nesting.attend(q, k, v, dropout)

    def _amplify(self, block: int, forward: Callable[..., Tensor], x: Tensor, *more: Any) -> Tensor:
        assert self.chosen is not None
        return forward(x, *more) * self.experts.gain(block, self.chosen)

    def _drop_pictures(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """Stochastic depth drops pictures, and here all pictures are one sequence: let it choose on one number each."""
        if self.nesting is None:
            return forward(x)
        kept = forward(x.new_ones(self.nesting.pictures, 1, 1))[:, 0]
        return x * kept.repeat(x.shape[1] // len(kept), 1)


class MoNE(VisionTransformer):
    """A vision transformer of nested experts.

    In training, each forward pass without a budget draws the share of linear work anew.

    Args:
        img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, in_chans: see `VisionTransformer`.
        experts: E.

    Shape: [B, in_chans, H, W] -> [B, num_classes]; the head reads the mean of all tokens.

    >>> net = MoNE(img_size=32, patch_size=4, embed_dim=48, depth=2, num_heads=3, num_classes=10).eval()
    >>> net(torch.zeros(1, 3, 32, 32), budget=0.5).shape
    torch.Size([1, 10])
    """

    def __init__(
        self,
        img_size: int = 224,
        patch_size: int = 16,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        in_chans: int = 3,
        experts: int = 4,
    ) -> None:
        super().__init__(img_size, patch_size, embed_dim, depth, num_heads, mlp_ratio, num_classes, "avg", in_chans)
        self.experts = Experts(embed_dim, experts, depth)
        self.mixture = Mixture(vit(self), self.experts, Budget(1.0))
        self.mixture.patch()

    def forward_features(self, x: Tensor, budget: Budget | float | str | None = None) -> Tensor:
        """Tokens after the last norm, [B, N, C].

        Args:
            budget: a share of the FLOPs at full width, or GFLOPs; default all of them.
        """
        if budget is None:
            return super().forward_features(x)
        with self.mixture.spending(budget):
            return super().forward_features(x)

    def forward(self, x: Tensor, budget: Budget | float | str | None = None) -> Tensor:
        return self.forward_head(self.forward_features(x, budget))

    @classmethod
    def conformance_example(cls, larger: bool = False) -> tuple["MoNE", tuple[Tensor]]:
        """A small network that has left its beginning, where the router has no gradient."""
        net = cls(32, 8, 24, 2, 3, 2.0, num_classes=5)
        nn.init.constant_(net.experts.alpha, 0.5)
        return net, (torch.rand(3, 3, *((45, 37) if larger else (32, 32))),)


class MixtureHandle(TokenHandle):
    """As `TokenHandle`; the budget may be changed while it is applied.

    Attributes:
        mixture: what routes; see `Mixture`.
    """

    def __init__(self, handle: Handle, mixture: Mixture) -> None:
        super().__init__(handle, mixture.host, mixture.look)
        self.mixture = mixture

    @property
    def budget(self) -> Budget:
        """What may be spent in evaluation."""
        return self.mixture.budget

    @budget.setter
    def budget(self, budget: Budget | float | str) -> None:
        before, self.mixture.budget = self.mixture.budget, Budget.parse(budget)
        try:
            self.mixture.linear_share(math.prod(self.mixture.host.native_grid))
        except BudgetError:
            self.mixture.budget = before
            raise

    def report(self, pixels: Tensor | None = None) -> Report:
        if not self.mixture.experts.trained:
            warnings.warn(
                "this model was never trained with nested experts: its slices are no smaller models, and what it "
                "spends less it loses in accuracy; fine-tune it while the plug-in is applied.",
                stacklevel=2,
            )
        return super().report(pixels)


def plugin(
    model: nn.Module,
    budget: Budget | float | str = 0.5,
    experts: int = 4,
    drawn: Sequence[float] = DRAWN,
) -> MixtureHandle:
    """Make a vision transformer a mixture of nested experts.

    The model has to be fine-tuned while it is applied: in training mode each forward pass draws its share of linear
    work from `drawn`, so one training serves every budget. The host then holds `experts`, whose parameters train and
    save with it. Class token and registers always go at full width. Hidden states of inner layers, where asked for,
    are sorted by width, [1, T, C].

    Args:
        model: a host known to `foveate.hosts.vit`, changed in place.
        budget: a share of the host's FLOPs, or GFLOPs.
        experts: E; widths are D, D / 2, ..., D / 2^(E - 1).
        drawn: shares of linear work for training; none trains at the budget.

    Raises: InputError for a model that is no such host; BudgetError for a budget below the narrowest expert's. The
        model is unchanged then.
    """
    host = vit(model)
    learned = Experts(host.width, experts, len(host.blocks)).to(host.patches.weight)
    mixture = Mixture(host, learned.train(host.body.training), Budget.parse(budget), drawn)
    return MixtureHandle(join([add(host.body, "experts", learned), mixture.patch()]), mixture)


def _as_they_are(r: Tensor) -> Tensor:
    return r


def _linear_layers(block: Block, dim: int) -> tuple[list[nn.Linear], list[nn.Linear]]:
    """Those that read tokens and those that write them."""
    middle = [layer for layer in find(block.mlp, nn.Linear).values() if isinstance(layer, nn.Linear)]
    first, last = middle[:-1], middle[-1:]
    if not first or any(layer.in_features != dim for layer in first) or last[0].out_features != dim:
        raise InputError(f"nested experts need an MLP of linear layers from and to {dim} channels.")
    return [*block.attention.qkv, *first], [block.attention.out, *last]
