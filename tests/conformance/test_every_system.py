"""Laws of every working system, whatever its kind."""

import importlib
import inspect

import pytest
import torch
from torch import nn

import foveate
from foveate.catalog import Card


def test_the_card_resolves_into_its_wing(card: Card) -> None:
    assert callable(card.target())
    assert str(card.entry).startswith(f"foveate.{card.wing}.")
    assert str(card.proof).startswith(f"foveate.proofs.{card.wing}.")


def test_the_docstring_names_the_paper(card: Card) -> None:
    text = importlib.import_module(str(card.entry).partition(":")[0]).__doc__ or ""
    assert card.paper.removeprefix("arXiv:") in text
    assert card.target().__doc__


def test_the_proof_takes_a_context(card: Card) -> None:
    (context,) = inspect.signature(card.proof_function()).parameters.values()
    assert context.kind is not inspect.Parameter.KEYWORD_ONLY


def test_the_same_seed_builds_the_same_network(card: Card) -> None:
    if card.kind not in ("job", "model") or not isinstance(card.target(), type) or card.wing == "compress":
        pytest.skip("not a network, or a codec")
    built = []
    for _ in range(2):
        torch.manual_seed(3)
        built.append(foveate.create(card.slug))
    assert isinstance(built[0], nn.Module)
    first, second = (network.state_dict() for network in built)
    assert list(first) == list(second)
    assert all(torch.equal(first[key], second[key]) for key in first)
