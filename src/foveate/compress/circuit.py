"""Hidden Chow-Liu trees: probabilistic circuits whose marginals are exact, and cheap one variable after the other.

Liu, Mandt, Van den Broeck 2022 (arXiv:2111.11632), on hidden Chow-Liu trees of Liu, Van den Broeck 2021.

The variables x_1 .. x_D (symbols 0 .. S - 1) are joined to a tree of the greatest mutual information, and every one
gets a hidden twin z_i with M states. As a circuit, bottom up, with z the state of node i and y that of its parent:

    v_i(z)  =  P(x_i | z)  prod_{c child of i} u_c(z)         product units       [N, M]
    u_i(y)  =  sum_z A_i[y, z] v_i(z)                         sum units           [N, M]
    p(x)    =  sum_z pi(z) v_root(z)

A variable that is not known has P(x_i | z) = 1 for all z: any marginal is one such pass. Learning is expectation
maximisation; the expected counts (the flows of the circuit) are the parameters times the derivatives of log p by them.

Coding asks for P(x_1), P(x_1, x_2), ...  In the order of `coding_order`, the heavier subtree first, `prefix_marginals`
evaluates for the i-th only the nodes from its own up to the first whose subtree holds all that is known, and closes
with the top-down probabilities of that node: O(D log D) nodes in a balanced tree instead of D^2. Where top-down
messages are kept up to date as well, it is enough to walk from node to node (`walk`): 2 D at most, in every tree.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.errors import InputError

Ints = npt.NDArray[np.int64]
UP, DOWN, CODE = 0, 1, 2
"""Instructions of a walk: send a message from a node to its parent, from its parent to a node, code a node."""


def mutual_information(symbols: npt.ArrayLike, alphabet: int, pseudocount: float = 0.1) -> npt.NDArray[np.float64]:
    """Mutual information of every two variables in nats.

    Args:
        symbols: whole numbers 0 to alphabet - 1; merge rare ones first, this takes (D * alphabet)^2 numbers.
        pseudocount: added to each pair of symbols.

    Shape: [N, D] -> [D, D].
    """
    x = torch.as_tensor(np.asarray(symbols)).long()
    hot = F.one_hot(x, alphabet).flatten(1).float()
    joint = (hot.T @ hot).double().reshape(x.shape[1], alphabet, x.shape[1], alphabet).transpose(1, 2) + pseudocount
    joint = joint / joint.sum((2, 3), keepdim=True)
    apart = joint.sum(3, keepdim=True) * joint.sum(2, keepdim=True)
    return (joint * (joint / apart).log()).sum((2, 3)).numpy()


def chow_liu(information: npt.NDArray[np.float64]) -> Ints:
    """The spanning tree of the greatest sum of mutual information, as the parent of each node.

    Returns: parents [D]; the root is the centre of the tree, its parent -1.
    """
    weights = np.array(information, np.float64)
    count = len(weights)
    joined, best, towards = np.zeros(count, bool), np.full(count, -np.inf), np.zeros(count, np.int64)
    neighbours: list[list[int]] = [[] for _ in range(count)]
    best[0] = 0
    for step in range(count):
        node = int(np.where(joined, -np.inf, best).argmax())
        joined[node] = True
        if step:
            neighbours[node].append(int(towards[node]))
            neighbours[towards[node]].append(node)
        nearer = ~joined & (weights[node] > best)
        best[nearer], towards[nearer] = weights[node][nearer], node

    def search(root: int) -> tuple[Ints, int]:
        parents, reached, depth = np.full(count, -1, np.int64), [root], [0]
        for node, level in zip(reached, depth, strict=False):  # both grow while they are read
            for other in neighbours[node]:
                if other != parents[node]:
                    parents[other] = node
                    reached.append(other)
                    depth.append(level + 1)
        return parents, depth[-1]

    return min((search(root) for root in range(count)), key=lambda found: found[1])[0]


class Tree(NamedTuple):
    """A rooted tree: parents [D], children of each node (heavier subtree first), nodes from the root down, sizes."""

    parents: Ints
    children: list[list[int]]
    downwards: list[int]
    sizes: Ints

    @classmethod
    def of(cls, parents: npt.ArrayLike) -> "Tree":
        """Build from parents. Raises: InputError when they are no tree with one root, marked by -1."""
        given = np.asarray(parents).astype(np.int64)
        children: list[list[int]] = [[] for _ in given]
        for node, parent in enumerate(given):
            if parent >= 0:
                children[min(parent, len(given) - 1)].append(node)
        downwards = [int(root) for root in np.flatnonzero(given < 0)]
        if len(downwards) != 1 or given.max(initial=-1) >= len(given):
            raise InputError(f"parents={given.tolist()} have {len(downwards)} roots; a tree has one, marked by -1.")
        for node in downwards:
            downwards.extend(children[node])
        if len(downwards) != len(given):
            raise InputError(f"parents={given.tolist()} run in a circle; every node must lead to the root.")
        sizes = np.ones(len(given), np.int64)
        for node in reversed(downwards[1:]):
            sizes[given[node]] += sizes[node]
        return cls(given, [sorted(c, key=lambda node: -sizes[node]) for c in children], downwards, sizes)


def coding_order(tree: Tree) -> list[int]:
    """Variables as the leaves of the vtree from left to right: at every node the heavier subtree first, itself last."""
    order, open_nodes = [], [tree.downwards[0]]
    while open_nodes:
        node = open_nodes.pop()
        order.append(node)
        open_nodes.extend(tree.children[node])
    return order[::-1]


def touched(tree: Tree) -> list[list[int]]:
    """For each variable in coding order, the nodes to evaluate: its own, then up until all known ones are below."""
    below, paths = np.zeros(len(tree.parents), np.int64), []
    for count, variable in enumerate(coding_order(tree), 1):
        path = [variable]
        below[variable] += 1
        while below[path[-1]] < count:
            path.append(int(tree.parents[path[-1]]))
            below[path[-1]] += 1
        for node in _ancestors(tree, path[-1]):
            below[node] += 1
        paths.append(path)
    return paths


def _ancestors(tree: Tree, node: int) -> Iterator[int]:
    while (node := int(tree.parents[node])) >= 0:
        yield node


def walk(tree: Tree, coded: Sequence[int], known: Sequence[int] = ()) -> list[tuple[int, int]]:
    """Instructions that code variables in an order, given others: messages between nodes, each only where one changed.

    All messages towards the current node are right at any time; a step to the next node needs only those on the way.
    """
    informed = np.zeros(len(tree.parents), bool)
    informed[list(known)] = True
    program = []
    for node in reversed(tree.downwards[1:]):
        if informed[node]:
            program.append((UP, node))
            informed[tree.parents[node]] = True
    here = tree.downwards[0]
    for variable in coded:
        up, down, start, end = [], [], here, variable
        rank = {node: place for place, node in enumerate(tree.downwards)}
        while start != end:
            if rank[start] > rank[end]:  # the one further down is never an ancestor of the other
                up.append((UP, start))
                start = int(tree.parents[start])
            else:
                down.append((DOWN, end))
                end = int(tree.parents[end])
        program += [*up, *reversed(down), (CODE, variable)]
        here = variable
    return program


class HiddenChowLiuTree(nn.Module):
    """A circuit over D variables; see the module's docstring. Parameters are logits.

    Args:
        parents: of the tree, -1 at the root.
        states: M of each hidden variable.
        alphabet: S symbols of each variable.
        tables: which emission table each variable uses; one of its own when None.
        seed: of the random start.

    Shape: x [N, D] of 0 .. S - 1 -> log p(x) [N] in nats.
    """

    def __init__(
        self,
        parents: npt.ArrayLike,
        states: int,
        alphabet: int = 256,
        tables: npt.ArrayLike | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.tree, self.states, self.alphabet = Tree.of(parents), states, alphabet
        count = len(self.tree.parents)
        self.tables = torch.arange(count) if tables is None else torch.as_tensor(np.asarray(tables)).long()
        random = torch.Generator().manual_seed(seed)

        def start(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.4 * torch.randn(*shape, generator=random))

        self.prior = start(states)
        self.transitions = start(count, states, states)
        self.emissions = start(int(self.tables.max()) + 1, states, alphabet)
        depth = np.zeros(count, np.int64)
        for node in self.tree.downwards[1:]:
            depth[node] = depth[self.tree.parents[node]] + 1
        self._levels = [torch.from_numpy(np.flatnonzero(depth == d)) for d in range(depth.max(), -1, -1)]

    def probabilities(self) -> tuple[Tensor, Tensor, Tensor]:
        """pi [M], A [D, M, M] (parent's state, own state), and emissions [tables, M, S]."""
        return self.prior.softmax(-1), self.transitions.softmax(-1), self.emissions.softmax(-1)

    def forward(
        self, x: Tensor, known: Tensor | None = None, probabilities: tuple[Tensor, Tensor, Tensor] | None = None
    ) -> Tensor:
        """log p of the known variables.

        Args:
            known: which variables count, all when None; the others are summed out. Shape: [D] or [N, D], bool.
            probabilities: in place of the module's own.
        """
        fits = x.dim() == 2 and x.shape[1] == len(self.tables)
        if not fits or (x.numel() and not 0 <= int(x.min()) <= int(x.max()) < self.alphabet):
            raise InputError(f"expected symbols [N, {len(self.tables)}] below {self.alphabet}, got {tuple(x.shape)}.")
        prior, transitions, emissions = probabilities or self.probabilities()
        rows = emissions.transpose(1, 2).reshape(-1, self.states)
        symbols = x.T.long() + self.alphabet * self.tables[:, None]
        mask = None if known is None else known.expand(x.shape).T
        messages = rows.new_zeros(x.shape[1], len(x), self.states)  # logarithms of prod u_c
        total = rows.new_zeros(len(x))
        for nodes in self._levels:
            below = messages[nodes]
            top = below.amax(2, keepdim=True).detach()
            emitted = F.embedding(symbols[nodes], rows)
            if mask is not None:
                emitted = torch.where(mask[nodes, :, None], emitted, emitted.new_ones(()))
            v = emitted * (below - top).exp()
            scale = v.sum(2, keepdim=True)
            total = total + (scale.log() + top).sum((0, 2))
            parents = torch.from_numpy(self.tree.parents)[nodes]
            if int(parents[0]) < 0:
                return total + (v[0] / scale[0] @ prior).log()
            u = torch.bmm(v / scale, transitions[nodes].transpose(1, 2))
            messages = messages.index_add(0, parents, u.log())
        raise AssertionError("a tree has a root")

    def em_step(
        self, x: Tensor, known: Tensor | None = None, *, inertia: float = 0.0, pseudocount: float = 0.1
    ) -> float:
        """One step of (mini-batch) expectation maximisation: parameters <- inertia * old + (1 - inertia) * new.

        Args:
            known: as for `forward`.
            pseudocount: added to the expected counts of each distribution, shared among its symbols or states.

        Returns: mean log p before the step.
        """
        old = [p.detach().requires_grad_() for p in self.probabilities()]
        total = self(x, known, (old[0], old[1], old[2])).sum()
        flows = torch.autograd.grad(total, old, allow_unused=True)
        with torch.no_grad():
            for logits, p, flow in zip((self.prior, self.transitions, self.emissions), old, flows, strict=True):
                counts = p * (torch.zeros_like(p) if flow is None else flow)
                sums = counts.sum(-1, keepdim=True)
                new = (counts + pseudocount / p.shape[-1]) / (sums + pseudocount)
                new = torch.where(sums + pseudocount > 0, new, p)
                logits.copy_((inertia * p + (1 - inertia) * new).clamp_min(1e-30).log())
        return float(total.detach()) / len(x)


def prefix_marginals(model: HiddenChowLiuTree, x: Tensor) -> Tensor:
    """log P(x_o1), log P(x_o1, x_o2), ... in coding order, by partial evaluation in float64.

    Shape: x [N, D] -> [N, D], column i for the first i + 1 variables of the order.
    """
    tree, order = model.tree, coding_order(model.tree)
    with torch.no_grad():
        prior, transitions, emissions = (p.double() for p in model.probabilities())
        above = {tree.downwards[0]: prior}  # top-down probabilities of a node's states
        for node in tree.downwards[1:]:
            above[node] = above[int(tree.parents[node])] @ transitions[node]
        nothing = prior.new_zeros(len(x), model.states)
        emitted, u, found = dict.fromkeys(order, nothing), dict.fromkeys(order, nothing), []
        for variable, path in zip(order, touched(tree), strict=True):
            emitted[variable] = emissions[model.tables[variable]].log().T[x[:, variable].long()]
            for node in path:
                v = emitted[node] + sum((u[child] for child in tree.children[node]), nothing)
                top = v.amax(1, keepdim=True)
                u[node] = ((v - top).exp() @ transitions[node].T).log() + top
            found.append(torch.logsumexp(v + above[path[-1]].log(), 1))
    return torch.stack(found, 1)
