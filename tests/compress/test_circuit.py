"""Hidden Chow-Liu trees: exact marginals, cheap prefixes, learning that rises."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.compress.circuit import (
    CODE,
    DOWN,
    UP,
    HiddenChowLiuTree,
    Tree,
    chow_liu,
    coding_order,
    mutual_information,
    prefix_marginals,
    touched,
    walk,
)
from foveate.errors import InputError

trees = st.integers(1, 14).flatmap(
    lambda n: st.tuples(*(st.integers(0, max(0, i - 1)) for i in range(1, n))).map(lambda p: [-1, *p])
)


def balanced(levels: int) -> list[int]:
    return [(node - 1) // 2 for node in range(2**levels - 1)]


def test_probabilities_sum_to_one_and_every_marginal_is_the_sum_of_what_it_leaves_out() -> None:
    model = HiddenChowLiuTree([1, -1, 1], states=4, alphabet=3)
    every = torch.tensor(list(itertools.product(range(3), repeat=3)))
    with torch.no_grad():
        p = model(every).exp()
        assert p.sum().item() == pytest.approx(1, abs=1e-6)
        for known in itertools.product([False, True], repeat=3):
            mask = torch.tensor(known)
            marginal = model(every, mask).exp()
            for row, value in zip(every, marginal, strict=True):
                same = (every[:, mask] == row[mask]).all(1)
                assert value.item() == pytest.approx(p[same].sum().item(), abs=1e-6)


def test_a_mask_for_each_row_is_the_mask_of_that_row() -> None:
    model = HiddenChowLiuTree([-1, 0, 0, 1], states=3, alphabet=5)
    x, known = torch.randint(0, 5, (6, 4)), torch.rand(6, 4) > 0.5
    with torch.no_grad():
        apart = torch.cat([model(x[i : i + 1], known[i]) for i in range(6)])
        assert torch.allclose(model(x, known), apart, atol=1e-6)


@settings(deadline=None, max_examples=30)
@given(trees)
def test_partial_evaluation_is_full_evaluation(parents: list[int]) -> None:
    model = HiddenChowLiuTree(parents, states=3, alphabet=4).double()
    x = torch.randint(0, 4, (5, len(parents)), generator=torch.Generator().manual_seed(0))
    found, known = prefix_marginals(model, x), torch.zeros(len(parents), dtype=torch.bool)
    for place, variable in enumerate(coding_order(model.tree)):
        known[variable] = True
        with torch.no_grad():
            assert torch.allclose(found[:, place], model(x, known), atol=1e-9)


@settings(deadline=None, max_examples=40)
@given(trees)
def test_the_order_takes_heavier_subtrees_first_and_a_walk_takes_each_edge_twice_at_most(parents: list[int]) -> None:
    tree = Tree.of(parents)
    order = coding_order(tree)
    assert sorted(order) == list(range(len(parents)))
    place = {node: i for i, node in enumerate(order)}
    for node, children in enumerate(tree.children):
        assert all(place[child] < place[node] for child in children)
        assert [int(tree.sizes[c]) for c in children] == sorted((int(tree.sizes[c]) for c in children), reverse=True)
        first = [min(place[d] for d in range(len(parents)) if _below(parents, d, c)) for c in children]
        assert first == sorted(first)
    steps = walk(tree, order)
    assert [node for what, node in steps if what == CODE] == order
    assert sum(what != CODE for what, _ in steps) <= 2 * (len(parents) - 1)


def _below(parents: list[int], node: int, top: int) -> bool:
    while node != top and node >= 0:
        node = parents[node]
    return node == top


@settings(deadline=None, max_examples=40)
@given(trees, st.data())
def test_a_walk_moves_along_edges_and_hears_all_evidence_first(parents: list[int], data: st.DataObject) -> None:
    known = sorted(data.draw(st.sets(st.integers(0, len(parents) - 1))))
    coded = [n for n in range(len(parents)) if n not in known]
    heard, here = set(), 0
    steps = walk(Tree.of(parents), coded, known)
    for place, (what, node) in enumerate(steps):
        if what == CODE:
            assert node == here
            above = {n for k in known for n in _line(parents, k)}
            assert heard >= {n for n in above if n > 0 and not _below(parents, here, n)}
        elif what == UP:
            heard.add(node)
            if CODE in [w for w, _ in steps[:place]]:
                assert node == here
                here = parents[node]
        else:
            assert what == DOWN
            assert parents[node] == here
            here = node


def _line(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [node, *_line(parents, parents[node])]


def test_partial_evaluation_takes_d_log_d_nodes_of_a_balanced_tree() -> None:
    for levels in (4, 6, 8):
        tree = Tree.of(balanced(levels))
        count = len(tree.parents)
        spent = sum(map(len, touched(tree)))
        assert spent <= count * math.log2(count + 1)
        assert spent < count * count / (count / (4 * math.log2(count)))


def test_the_tree_of_a_chain_is_the_chain_and_its_root_the_centre() -> None:
    random = np.random.default_rng(0)
    x = np.zeros((4000, 7), np.int64)
    x[:, 3] = random.integers(0, 3, 4000)
    for node, near in ((2, 3), (1, 2), (0, 1), (4, 3), (5, 4), (6, 5)):
        x[:, node] = np.where(random.random(4000) < 0.8, x[:, near], random.integers(0, 3, 4000))
    information = mutual_information(x, 3)
    assert np.allclose(information, information.T)
    assert chow_liu(information).tolist() == [1, 2, 3, -1, 3, 4, 5]
    shares = np.bincount(x[:, 3]) / 4000
    assert information[3, 3] == pytest.approx(-(shares * np.log(shares)).sum(), abs=1e-2)


def test_likelihood_never_falls_over_full_batches_and_finds_structure() -> None:
    torch.manual_seed(0)
    coin = torch.randint(0, 2, (400, 1))
    x = torch.where(torch.rand(400, 6) < 0.9, coin, 1 - coin)
    model = HiddenChowLiuTree([-1, 0, 0, 0, 1, 1], states=2, alphabet=2)
    rise = [model.em_step(x, pseudocount=0.0) for _ in range(40)]
    assert all(b >= a - 1e-5 for a, b in itertools.pairwise(rise))
    assert rise[-1] > -6 * math.log(2) + 1.2


def test_one_state_is_the_independent_model() -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 4, (200, 3)) * torch.randint(0, 2, (200, 3))
    model = HiddenChowLiuTree([-1, 0, 1], states=1, alphabet=4)
    model.em_step(x, pseudocount=0.0)
    shares = torch.stack([torch.bincount(column, minlength=4) / 200 for column in x.T])
    expected = shares.gather(1, x.T).log().sum(0)
    with torch.no_grad():
        assert torch.allclose(model(x), expected, atol=1e-4)


def test_inertia_keeps_and_a_pseudocount_leaves_nothing_impossible() -> None:
    x = torch.zeros(10, 2, dtype=torch.long)
    model = HiddenChowLiuTree([-1, 0], states=2, alphabet=3)
    before = model.probabilities()[2].detach()
    model.em_step(x, inertia=1.0)
    assert torch.allclose(model.probabilities()[2], before, atol=1e-6)
    model.em_step(x, pseudocount=0.1)
    assert model(torch.full((1, 2), 2)).item() > -40


def test_unknown_variables_do_not_count_in_learning() -> None:
    x = torch.zeros(10, 2, dtype=torch.long)
    known = torch.tensor([True, False])
    model = HiddenChowLiuTree([-1, 0], states=2, alphabet=3)
    before = model.probabilities()[2][1].detach()
    model.em_step(x, known, pseudocount=0.0)
    assert torch.allclose(model.probabilities()[2][1], before, atol=1e-6)


@pytest.mark.parametrize("parents", [[0], [-1, -1], [-1, 5], [-1, 2, 1], []])
def test_what_is_no_tree_is_refused(parents: list[int]) -> None:
    with pytest.raises(InputError, match="parents"):
        Tree.of(parents)


def test_symbols_outside_the_alphabet_are_refused() -> None:
    model = HiddenChowLiuTree([-1, 0], states=2, alphabet=3)
    for x in (torch.tensor([[0, 3]]), torch.tensor([[0, -1]]), torch.zeros(2, 3, dtype=torch.long)):
        with pytest.raises(InputError, match="expected symbols"):
            model(x)
