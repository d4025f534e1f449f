"""What each part deserves: from scores and costs to a choice that keeps to the budget.

Choosing among tokens, patches or pixels (masks over scores, batched over leading dimensions):
- `top_k`, `top_p`: the k best; the fewest that hold a share p of the mass.
- `expert_choice`, `expert_preferred`: experts choose their items, with or without sharing them.
- `threshold_for`, `calibrate`: one number that splits easy from hard, from sample scores or from a measured cost.

Choosing settings, layer by layer or picture by picture:
- `knapsack`: one option per group, max sum of values subject to sum of costs <= capacity, exactly.
- `proportional_shares`: integers with n_i ~ w_i, floor_i <= n_i <= ceiling_i, sum n_i = total, exactly.
- `evolve`: evolutionary search over integer genomes when only trying a setting tells its worth.
"""

import bisect
import math
import random
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from foveate.errors import BudgetError, InputError

Genome = tuple[int, ...]


def top_k(scores: Tensor, k: int) -> Tensor:
    """Mark the k largest scores of each row; among equal ones the first come first.

    Args:
        scores: [..., N].
        k: how many, 0 to N.

    Shape: [..., N] -> bool [..., N] with exactly k marks per row.

    >>> top_k(torch.tensor([0.2, 0.9, 0.9, 0.1]), 1).tolist()
    [False, True, False, False]
    """
    n = scores.shape[-1]
    if not 0 <= k <= n:
        raise InputError(f"top_k needs k between 0 and the {n} scores of a row, got {k}.")
    best = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def top_p(scores: Tensor, p: float) -> Tensor:
    """Mark the fewest items of each row whose scores hold at least a share p of the row's sum.

    Args:
        scores: [..., N], not negative; a row of zeros counts as uniform.
        p: share of the mass, in (0, 1]; 1 keeps every score above zero.

    Shape: [..., N] -> bool [..., N].
    """
    if not 0 < p <= 1:
        raise InputError(f"top_p needs a share p in (0, 1], got {p}.")
    if not bool((scores >= 0).all()):
        raise InputError("top_p needs scores that are not negative and not NaN; apply softmax first.")
    mass = scores.double()
    mass = torch.where((mass == 0).all(-1, keepdim=True), torch.ones_like(mass), mass)
    value, index = mass.sort(dim=-1, descending=True, stable=True)
    cumulative = value.cumsum(-1)
    before = torch.cat([torch.zeros_like(value[..., :1]), cumulative[..., :-1]], -1)
    keep = before < p * cumulative[..., -1:]
    return torch.zeros_like(keep).scatter_(-1, index, keep)


def _check_capacities(scores: Tensor, capacities: Sequence[int], name: str) -> None:
    n, experts = scores.shape[-2:]
    if len(capacities) != experts:
        raise InputError(f"{name} needs one capacity for each of the {experts} experts, got {len(capacities)}.")
    if any(not 0 <= c <= n for c in capacities):
        raise InputError(f"{name} needs capacities between 0 and the {n} items, got {list(capacities)}.")


def expert_choice(scores: Tensor, capacities: Sequence[int]) -> Tensor:
    """Let every expert take its highest-scoring items; an item may be taken by several experts or by none.

    Args:
        scores: affinity of N items to E experts.
        capacities: items per expert.

    Shape: scores [..., N, E] -> bool [..., N, E] with capacities[e] marks in column e.
    Source: Zhou et al. 2022, arXiv:2202.09368.
    """
    _check_capacities(scores, capacities, "expert_choice")
    columns = [top_k(scores[..., e], capacity) for e, capacity in enumerate(capacities)]
    return torch.stack(columns, -1)


def expert_preferred(scores: Tensor, capacities: Sequence[int]) -> Tensor:
    """Let the experts choose in turn, the last (largest) first, each among the items still free.

    Items that nobody took go to expert 0, whose own capacity is therefore not binding.

    Args:
        scores: affinity of N items to E experts ordered from the cheapest to the costliest.
        capacities: items per expert.

    Shape: scores [..., N, E] -> int64 [..., N], the expert of each item.
    Raises: BudgetError when experts 1 to E-1 would take more than the N items.
    Source: Expert Preferred Routing of Jain et al. 2024, arXiv:2407.19985 (Mixture of Nested Experts).
    """
    _check_capacities(scores, capacities, "expert_preferred")
    n = scores.shape[-2]
    if sum(capacities[1:]) > n:
        raise BudgetError(f"All experts but the first would take {sum(capacities[1:])} of {n} items; ask for fewer.")
    expert = torch.zeros(scores.shape[:-1], dtype=torch.int64, device=scores.device)
    for e in range(len(capacities) - 1, 0, -1):
        # Sorting by (free, score) and not by a score of -inf: a free item may itself score -inf.
        by_score = scores[..., e].sort(dim=-1, descending=True, stable=True).indices
        taken = (expert.gather(-1, by_score) > 0).to(torch.uint8)
        free_first = by_score.gather(-1, taken.sort(dim=-1, stable=True).indices)
        expert.scatter_(-1, free_first[..., : capacities[e]], e)
    return expert


def threshold_for(scores: Tensor, share: float) -> float:
    """Find the threshold t for which the share of scores above t is as near as possible below the share asked for.

    t lies midway between two neighbouring scores, so rounding noise in the scores does not flip decisions; equal
    scores stay on one side. When no score may pass t is inf, when all may it is -inf.

    Args:
        scores: sample scores of any shape.
        share: in 0..1.

    Raises: InputError when there are no scores, or NaN among them, or the share is outside 0..1.

    >>> threshold_for(torch.tensor([0.1, 0.4, 0.2, 0.8]), 0.5)
    0.300...
    """
    flat = scores.detach().flatten()
    n = flat.numel()
    if n == 0 or bool(flat.isnan().any()):
        raise InputError(f"threshold_for needs scores without NaN, and at least one; got {n} scores.")
    if not 0 <= share <= 1:
        raise InputError(f"threshold_for needs a share in 0..1, got {share}.")
    k = math.floor(share * n + 1e-6)  # 0.29 * 100 is a little less than 29
    if k >= n:
        return -math.inf
    wide = flat.float() if flat.dtype == torch.bfloat16 else flat  # NumPy has none
    ordered = torch.from_numpy(np.partition(wide.numpy(force=True), n - k - 1))
    below, above = ordered[n - k - 1], ordered[n - k :]
    above = above[above > below]
    if above.numel() == 0:
        return math.inf
    lowest_above = above.min()
    middle = ((below.double() + lowest_above.double()) / 2).to(flat.dtype)
    # Neighbouring floating point numbers have no middle; t = below still splits them, for the test is "above t".
    return float(middle if bool(middle < lowest_above) else below)


def calibrate(
    cost_of_threshold: Callable[[float], float], target: float, lo: float, hi: float, tol: float = 1e-6
) -> float:
    """Find by bisection the threshold whose cost is the largest that does not exceed the target.

    Args:
        cost_of_threshold: cost measured or computed at a threshold; monotone, rising or falling.
        target: what may be spent, in the unit of the cost.
        lo, hi: ends of the interval to search; the whole range of costs should lie between them.
        tol: stop when the interval is this small, in the unit of the threshold.

    Returns: a threshold with cost <= target, within `tol` of where the cost would exceed it.

    Raises: BudgetError when both ends cost more than the target (the message names the floor).

    >>> calibrate(lambda t: 100 * (1 - t), target=40, lo=0, hi=1)
    0.6...
    """
    if not (lo < hi and tol > 0):
        raise InputError(f"calibrate needs lo < hi and tol > 0, got lo={lo}, hi={hi}, tol={tol}.")
    cost_lo, cost_hi = cost_of_threshold(lo), cost_of_threshold(hi)
    if min(cost_lo, cost_hi) > target:
        raise BudgetError(f"A cost of {target:g} cannot be met: the floor is {min(cost_lo, cost_hi):g}; ask for more.")
    if max(cost_lo, cost_hi) <= target:
        return lo if cost_lo >= cost_hi else hi
    good, bad = (lo, hi) if cost_lo <= target else (hi, lo)
    while abs(good - bad) > tol:
        middle = (good + bad) / 2
        if middle in (good, bad):
            break
        if cost_of_threshold(middle) <= target:
            good = middle
        else:
            bad = middle
    return good


def knapsack(values: Sequence[Sequence[float]], costs: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """Choose one option per group so that the summed value is greatest and the summed cost at most the capacity.

    Exact dynamic program, best_g(c) = max_o best_{g-1}(c - cost_o) + value_o, in O(options * capacity) time and
    O(groups * capacity) memory, costs divided by their common divisor first. Among equal values the cheapest wins.

    Args:
        values: for each group, the value of each of its options.
        costs: for each group, the cost of each option: whole numbers, not negative.
        capacity: what the choice may cost in all.

    Returns: the index of the chosen option in each group.

    Raises: BudgetError when even the cheapest options exceed the capacity; InputError for lists that do not match,
        empty groups, costs that are not whole numbers, or values that are not finite.

    >>> knapsack([[0, 5], [0, 4], [0, 3]], [[0, 4], [0, 3], [0, 2]], capacity=5)
    [0, 1, 1]
    """
    if [len(v) for v in values] != [len(c) for c in costs] or any(len(v) == 0 for v in values):
        raise InputError("knapsack needs as many costs as values in every group, and at least one option in each.")
    worth = [np.asarray(v, dtype=np.float64) for v in values]
    price = [np.asarray(c) for c in costs]
    if any(not np.issubdtype(c.dtype, np.integer) or (c < 0).any() for c in price):
        raise InputError("knapsack needs whole costs of at least 0; round them up to multiples of a small unit.")
    if any(not np.isfinite(v).all() for v in worth):
        raise InputError("knapsack needs finite values; leave out an option that must not be chosen.")
    floor = sum(int(c.min()) for c in price)
    if floor > capacity:
        raise BudgetError(f"A capacity of {capacity} cannot be met: the cheapest options cost {floor}; ask for more.")
    # Only what exceeds the cheapest option of a group is at stake, in steps of the common divisor.
    extra = [c.astype(np.int64) - int(c.min()) for c in price]
    unit = max(1, math.gcd(*(int(e) for c in extra for e in c)))
    steps = [c // unit for c in extra]
    size = int(min((capacity - floor) // unit, sum(int(s.max()) for s in steps)))

    best = np.zeros(size + 1)
    choice = np.zeros((len(worth), size + 1), dtype=np.int32)
    for g, (value, step) in enumerate(zip(worth, steps, strict=True)):
        after = np.full(size + 1, -np.inf)
        for option, (v, s) in enumerate(zip(value, step, strict=True)):
            if s > size:
                continue
            candidate = best[: size + 1 - s] + v
            better = candidate > after[s:]
            after[s:][better] = candidate[better]
            choice[g, s:][better] = option
        best = after

    left = int(best.argmax())
    chosen = []
    for g in reversed(range(len(worth))):
        option = int(choice[g, left])
        chosen.append(option)
        left -= int(steps[g][option])
    return chosen[::-1]


def proportional_shares(
    weights: Sequence[float],
    total: int,
    floors: int | Sequence[int] = 0,
    ceilings: int | Sequence[int] | None = None,
) -> list[int]:
    """Divide a whole number among parts in proportion to their weights, within bounds, to the last unit.

    Real shares are clip(s * w_i, floor_i, ceiling_i) with the one scale s that makes them sum to the total; they are
    rounded down and the rest goes to the largest remainders, so no part is a whole unit or more from its real share.
    Parts of weight 0 get their floor, and more only once all others are at their ceilings.

    Args:
        weights: not negative; all zero counts as all equal.
        total: what is to be divided.
        floors: least share, one for all or one each; default 0.
        ceilings: greatest share, one for all or one each; default the total.

    Raises: BudgetError when the total lies outside the summed floors and ceilings; InputError for bad weights.

    >>> proportional_shares([5, 3, 2], total=12, floors=1, ceilings=5)
    [5, 4, 3]
    """
    w = np.asarray(weights, dtype=np.float64)
    if w.ndim != 1 or w.size == 0 or not np.isfinite(w).all() or (w < 0).any():
        raise InputError(f"proportional_shares needs weights that are finite and not negative, got {list(weights)}.")
    lo = np.broadcast_to(np.asarray(floors, dtype=np.int64), w.shape)
    hi = np.broadcast_to(np.asarray(total if ceilings is None else ceilings, dtype=np.int64), w.shape)
    if (lo > hi).any() or (lo < 0).any():
        raise InputError(f"proportional_shares needs 0 <= floors <= ceilings, got {lo.tolist()} and {hi.tolist()}.")
    if not lo.sum() <= total <= hi.sum():
        raise BudgetError(f"A total of {total} cannot be divided: the bounds allow {lo.sum()} to {hi.sum()}.")

    w = w / w.max() if w.any() else np.ones_like(w)
    w[w < 1e-12] = 0  # too little for a unit of any total, and a division by it would overflow
    weighty = w > 0
    if hi[weighty].sum() + lo[~weighty].sum() < total:
        w, lo = np.where(weighty, 0.0, 1.0), np.where(weighty, hi, lo)
        weighty = ~weighty

    def at(scale: float) -> np.ndarray:
        return np.where(weighty, np.clip(scale * w, lo, hi), lo)

    # The sum is piecewise linear in the scale, with a knot wherever a part meets one of its bounds.
    knots = np.unique(np.concatenate([[0.0], lo[weighty] / w[weighty], hi[weighty] / w[weighty]]))
    i = bisect.bisect_left(knots, total, key=lambda scale: at(scale).sum())
    i = min(i, len(knots) - 1)
    start, end = at(knots[i - 1]) if i else at(0.0), at(knots[i])
    rise = end.sum() - start.sum()
    real = start + (end - start) * ((total - start.sum()) / rise) if rise > 0 else end

    shares = np.minimum(np.floor(real + 1e-9).astype(np.int64), hi)
    by_remainder = np.argsort(shares - real, kind="stable")
    missing = int(total - shares.sum())
    shares[by_remainder[shares[by_remainder] < hi[by_remainder]][:missing]] += 1
    return [int(s) for s in shares]


def evolve(
    fitness: Callable[[Genome], float],
    options: Sequence[int],
    *,
    feasible: Callable[[Genome], bool] = lambda genome: True,
    repair: Callable[[Genome], Genome] = lambda genome: genome,
    start: Sequence[Genome] = (),
    population: int = 100,
    parents: int = 25,
    generations: int = 20,
    mutation: float = 0.1,
    seed: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[Genome, float]:
    """Search integer genomes for the greatest fitness, keeping only feasible ones.

    Each generation keeps the best `parents` of all seen; half of the next are mutations of one parent, half take each
    gene from one of two parents. A genome's fitness is asked for once. The same seed gives the same search.

    Args:
        fitness: worth of a genome, greater is better.
        options: for each gene, how many values it may take; gene i lies in range(options[i]).
        feasible: whether a genome keeps to the budget; others are discarded before their fitness is asked for.
        repair: brings a new genome into order (e.g. sorts the ratios of one stage); applied before `feasible`.
        start: genomes to begin with, e.g. the best uniform setting; the result is never worse than these.
        population: genomes per generation.
        parents: how many of the best breed.
        generations: how often to breed.
        mutation: chance for each gene to be drawn anew.
        seed: of the search's own random numbers.
        progress: called after each generation with its number and the best fitness so far.

    Returns: the best genome and its fitness.

    Raises: BudgetError when no feasible genome turns up; InputError for settings out of range.
    Source: the search of Chen et al. 2023, arXiv:2303.17605 (SparseViT).
    """
    if not options or min(options) < 1:
        raise InputError(f"evolve needs at least one gene, each with at least one option, got {list(options)}.")
    if not (population >= 1 and parents >= 1 and generations >= 0 and 0 <= mutation <= 1):
        raise InputError("evolve needs population and parents >= 1, generations >= 0 and mutation in 0..1.")
    rng = random.Random(seed)
    seen: dict[Genome, float] = {}

    def admit(genome: Genome) -> bool:
        genome = repair(genome)
        if genome in seen or not feasible(genome):
            return False
        seen[genome] = fitness(genome)
        return True

    def breed(make: Callable[[], Genome], wanted: int) -> None:
        # A space that is small or nearly all infeasible runs out of new genomes: stop trying after a while.
        for _ in range(100 * wanted):
            if wanted <= 0:
                return
            wanted -= admit(make())

    def drawn() -> Genome:
        return tuple(rng.randrange(n) for n in options)

    def mutated() -> Genome:
        parent = rng.choice(elite)
        return tuple(rng.randrange(n) if rng.random() < mutation else g for g, n in zip(parent, options, strict=True))

    def crossed() -> Genome:
        return tuple(rng.choice(pair) for pair in zip(rng.choice(elite), rng.choice(elite), strict=True))

    for genome in start:
        admit(tuple(genome))
    breed(drawn, max(0, population - len(seen)))
    if not seen:
        raise BudgetError("evolve found no setting that keeps to the budget; allow more, or pass one as `start`.")
    for generation in range(generations):
        elite = sorted(seen, key=seen.__getitem__, reverse=True)[:parents]
        breed(mutated, population // 2)
        breed(crossed, population - population // 2)
        if progress is not None:
            progress(generation, max(seen.values()))
    best = max(seen, key=seen.__getitem__)
    return best, seen[best]
