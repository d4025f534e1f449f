"""Tape reading: nothing twice, stop when sure, and nobody's neighbours."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.errors import InputError
from foveate.layers.tape import TapeReader


def reading(seed, tokens=6, threshold=2.0, items=40, pictures=3, scale=3.0, split=2):
    torch.manual_seed(seed)
    reader = TapeReader(8, tokens, threshold, split).double().eval()
    query, bank = torch.randn(pictures, 8).double(), torch.randn(pictures, items, 8).double()
    with torch.no_grad():
        reader.norm.weight.mul_(scale)
    return reader, query, bank


def by_hand(reader, query, bank):
    """One picture, from the equations."""
    values = reader.norm(bank)
    q, keys = reader.norm(query)[: reader.keys], values[:, : reader.keys]
    k, halting, free, tape, ponder = int(reader.tokens // reader.threshold), 0.0, list(range(len(bank))), [], 0.0
    while halting < reader.threshold and len(tape) < reader.tokens:
        scores = keys @ q
        best = sorted(free, key=lambda i: -float(scores[i]))[:k]
        w = (scores[best] / math.sqrt(reader.keys)).softmax(0)
        tape.append((w[:, None] * values[best]).sum(0))
        halting, ponder = min(halting + float(w[0]), reader.threshold), ponder + 1 - float((w**2).sum())
        free = [i for i in free if i not in best]
        q = (q + tape[-1][: reader.keys]) / 2
    return torch.stack(tape), ponder


@given(st.integers(0, 99), st.sampled_from([(6, 2.0), (6, 3.0), (5, 2.0), (4, 1.0), (3, 3.0), (7, 2.5)]))
@settings(deadline=None, max_examples=30)
def test_it_is_the_published_loop(seed, setting):
    reader, query, bank = reading(seed, *setting)
    with torch.no_grad():
        tape = reader(query, bank)
        for i in range(3):
            tokens, ponder = by_hand(reader, query[i], bank[i])
            assert tape.steps[i] == len(tokens)
            torch.testing.assert_close(tape.tokens[i, : len(tokens)], tokens)
            assert float(tape.ponder[i]) == pytest.approx(ponder, abs=1e-5)


@given(st.integers(0, 99), st.sampled_from([(6, 2.0), (8, 2.0), (4, 1.0), (3, 3.0)]), st.floats(0.1, 9))
@settings(deadline=None, max_examples=30)
def test_length_is_within_bounds_and_no_item_is_read_twice(seed, setting, scale):
    reader, query, bank = reading(seed, *setting, scale=scale)
    tape, (tokens, threshold) = reader(query, bank), setting
    assert int(tape.steps.min()) >= math.ceil(threshold)
    assert int(tape.steps.max()) <= min(tokens, math.ceil(int(tokens // threshold) * threshold))
    assert tape.tokens.shape[1] == int(tape.steps.max())
    for read in tape.read.flatten(1):
        assert len(set(read.tolist())) == len(read)
    assert tape.mask.sum(1).tolist() == tape.steps.tolist()


def test_a_sure_reader_stops_early_and_an_unsure_one_goes_on():
    lengths = [int(r(q, b).steps.max()) for r, q, b in (reading(0, 8, 2.0, 40, scale=s) for s in (0.01, 30.0))]
    assert lengths[0] == 8  # weights of 1/4 each
    assert lengths[1] < 5


def test_batch_mates_and_the_order_of_the_bank_change_nothing():
    reader, query, bank = reading(3)
    whole, order = reader(query, bank), torch.randperm(40)
    for i in range(3):
        alone = reader(query[i : i + 1], bank[i : i + 1])
        torch.testing.assert_close(alone.tokens[0], whole.tokens[i, : int(whole.steps[i])])
        torch.testing.assert_close(alone.ponder[0], whole.ponder[i])
    mixed = reader(query, bank[:, order])
    torch.testing.assert_close(mixed.tokens, whole.tokens)
    assert torch.equal(order[mixed.read], whole.read)


def test_gradients_reach_query_bank_and_norm():
    reader, query, bank = reading(1)
    query.requires_grad_()
    bank.requires_grad_()
    tape = reader(query, bank)
    (tape.tokens.square().sum() + tape.ponder.sum()).backward()
    assert query.grad.any()
    assert bank.grad.any()
    assert all(p.grad.any() for p in reader.norm.parameters())


def test_at_most_as_many_as_asked_and_other_preferences():
    reader, query, bank = reading(2)
    whole = reader(query, bank)
    short = reader(query, bank, most=1)
    assert torch.equal(short.tokens, whole.tokens[:, :1])
    assert reader(query, bank, most=0).tokens.shape == (3, 0, 8)
    reader.prefer = torch.neg
    assert not torch.equal(reader(query, bank).read[:, 0], whole.read[:, 0])


def test_parts_of_the_bank_are_hidden_in_training_only():
    reader, query, bank = reading(4, items=12, tokens=2, threshold=1.0)
    quiet = reader(query, bank)
    reader.hidden, reader.noise = 0.6, 0.5
    assert torch.equal(reader(query, bank).read, quiet.read)
    torch.manual_seed(0)
    reader.train()
    assert len({tuple(reader(query, bank).read[:, 0].flatten().tolist()) for _ in range(5)}) > 1


def test_unusable_settings():
    for tokens, threshold in ((4, 0.0), (4, 5.0), (-1, 1.0)):
        with pytest.raises(InputError, match="threshold"):
            TapeReader(8, tokens, threshold, 2)
    with pytest.raises(InputError, match="divide"):
        TapeReader(8, split=3)
    reader, query, bank = reading(0, items=17)
    with pytest.raises(InputError, match="bank of 18, got 17"):
        reader(query, bank)
