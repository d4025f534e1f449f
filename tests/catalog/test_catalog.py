"""The catalogue: 119 well-formed cards, lookup that forgives spelling, errors that help."""

import subprocess
import sys
from collections import Counter
from dataclasses import FrozenInstanceError, fields, replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate import catalog, weights
from foveate.catalog import KINDS, WINGS, Card
from foveate.errors import InputError, NotBuiltError, UnknownSystemError

CARDS = catalog.load()
PER_WING = {
    "encode": 22,
    "restore": 19,
    "compress": 7,
    "generate": 16,
    "recognize": 11,
    "scenes": 5,
    "language": 9,
    "adapt": 9,
    "learn": 6,
    "curate": 4,
    "evaluate": 7,
    "protect": 1,
    "ops": 3,
}
PER_KIND = {"job": 33, "model": 30, "plugin": 31, "tool": 25}
BARE = """
[pcsr]
title = "T"
paper = "arXiv:2407.21448"
year = 2024
wing = "restore"
kind = "job"
adapts = "A"
claim = "C"
"""


@pytest.fixture
def made_up() -> Card:
    return Card("made-up", "T", "arXiv:2407.21448", 2024, "restore", "job", "A", "C", "fractions:Fraction", "math:gcd")


def test_every_system_of_the_index_has_a_card() -> None:
    assert len(CARDS) == 119
    assert Counter(c.wing for c in CARDS.values()) == PER_WING
    assert Counter(c.kind for c in CARDS.values()) == PER_KIND
    assert tuple(PER_WING) == WINGS
    assert set(PER_KIND) == set(KINDS)


def test_cards_stand_in_the_order_of_wings_then_slugs() -> None:
    assert list(CARDS) == sorted(CARDS, key=lambda slug: (WINGS.index(CARDS[slug].wing), slug))


@pytest.mark.parametrize("c", CARDS.values(), ids=CARDS.keys())
def test_a_card_reads_well(c: Card) -> None:
    assert 10 < len(c.claim) < 160
    assert 10 < len(c.adapts) < 90
    for text in (c.title, c.adapts, c.claim):
        assert text == " ".join(text.split())
        assert not text.endswith(".")
        assert " :" not in text
    assert not any(word.endswith("times1") or word == "times" for word in c.title.split())
    prefix, _, number = c.paper.partition(":")
    assert prefix == "arXiv"
    # The first public version is the arXiv one, but for a report of 2008 that was put there two years later.
    assert c.year == (2008 if c.slug == "predictive-sparse-decomposition" else 2000 + int(number[:2]))


def test_papers_titles_and_claims_are_not_shared() -> None:
    for key in ("paper", "title", "claim"):
        assert max(Counter(getattr(c, key) for c in CARDS.values()).values()) == 1


def test_addresses_lie_in_their_wing_and_names_are_unambiguous() -> None:
    names = [slug.replace("-", "") for slug in CARDS]
    for c in CARDS.values():
        assert c.works == (c.entry is not None)
        if c.entry is None:
            continue
        module, _, name = c.entry.partition(":")
        assert module == f"foveate.{c.wing}.{c.slug.replace('-', '_')}"
        if c.proof is not None:
            assert c.proof == f"foveate.proofs.{c.wing}.{c.slug.replace('-', '_')}:prove"
        if name.lower() != c.slug.replace("-", ""):
            names.append(name.lower())
    assert len(set(names)) == len(names)


def test_load_hands_out_a_copy() -> None:
    catalog.load().clear()
    assert len(catalog.load()) == 119
    with pytest.raises(FrozenInstanceError):
        CARDS["pcsr"].slug = "other"  # type: ignore[misc]


@settings(deadline=None, max_examples=50)
@given(slug=st.sampled_from(sorted(CARDS)), separator=st.sampled_from(["-", "_", " ", ""]), upper=st.booleans())
def test_a_slug_is_found_however_it_is_written(slug: str, separator: str, upper: bool) -> None:
    name = slug.replace("-", separator)
    assert catalog.card(name.upper() if upper else name).slug == slug


@settings(deadline=None, max_examples=12)
@given(slug=st.sampled_from([s for s in CARDS if len(s) > 6]), at=st.integers(min_value=0, max_value=5))
def test_a_slug_with_a_letter_missing_is_suggested_first(slug: str, at: int) -> None:
    damaged = slug[:at] + slug[at + 1 :]
    if damaged.replace("-", "") == slug.replace("-", ""):  # only the hyphen went
        assert catalog.card(damaged).slug == slug
        return
    with pytest.raises(UnknownSystemError, match=rf"{damaged!r}. Nearest: {slug}\b"):
        catalog.card(damaged)


@settings(deadline=None, max_examples=20)
@given(text=st.text(max_size=12))
def test_any_text_gets_a_card_or_a_helpful_error(text: str) -> None:
    try:
        assert catalog.card(text).slug in CARDS
    except UnknownSystemError as error:
        assert repr(text) in str(error)  # noqa: PT017
        assert "`foveate list`" in str(error)  # noqa: PT017


@pytest.mark.parametrize(("name", "slug"), [("PCSR", "pcsr"), ("APE", "adaptive-patch-exiting"), ("ESPCN", "espcn")])
def test_a_class_name_finds_its_system(name: str, slug: str) -> None:
    assert catalog.card(name).slug == slug


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("pixel level clasification", ["pcsr"]),
        ("llava", ["avg-llava", "llava-uhd"]),
        ("mixture of experts", ["scattermoe", "mone"]),
        ("xyzzyq", []),
        ("", []),
    ],
)
def test_suggestions_come_from_slugs_and_titles(name: str, nearest: list[str]) -> None:
    with pytest.raises(UnknownSystemError) as caught:
        catalog.card(name)
    hint = f"Nearest: {', '.join(nearest)}. " if nearest else ""
    assert str(caught.value) == f"No system is called {name!r}. {hint}`foveate list` shows all 119."


def test_search_filters_are_a_conjunction() -> None:
    assert catalog.search() == list(CARDS.values())
    assert [c.slug for c in catalog.search("PIXEL-LEVEL")] == ["pcsr"]
    assert [c.slug for c in catalog.search("2D gaussian", kind="job")] == ["gsasr", "gaussian-image", "image-gs"]
    assert [c.slug for c in catalog.search("arXiv:2407.21448")] == ["pcsr"]
    assert catalog.search("gaussian", wing="language") == []
    for wing in WINGS:
        assert [c.wing for c in catalog.search(wing=wing)] == [wing] * PER_WING[wing]


def test_search_by_what_works_splits_the_catalogue() -> None:
    built = {c.slug for c in catalog.search(works=True)}
    assert {"espcn", "scnet", "pcsr", "adaptive-patch-exiting"} <= built
    assert built.isdisjoint(c.slug for c in catalog.search(works=False))
    assert len(built) + len(catalog.search(works=False)) == 119


@pytest.mark.parametrize("condition", [{"wing": "resotre"}, {"kind": "modle"}])
def test_search_names_the_choices(condition: dict[str, str]) -> None:
    (what, value), *_ = condition.items()
    with pytest.raises(InputError, match=f"no {what} is called '{value}'. Choose one of .*(restore|model)"):
        catalog.search(**condition)  # type: ignore[arg-type]


def test_addresses_are_followed(made_up: Card) -> None:
    assert made_up.target() is Fraction
    assert made_up.proof_function()(12, 18) == 6


def test_a_system_without_code_names_what_works_beside_it() -> None:
    unbuilt = Card("made-up", "T", "arXiv:2407.21448", 2024, "restore", "job", "A", "C")
    assert not unbuilt.works
    for ask, noun in ((unbuilt.target, "code"), (unbuilt.proof_function, "proof")):
        with pytest.raises(NotBuiltError, match=rf"'made-up' has a card but no {noun} yet.*\(restore\): .*\bpcsr\b"):
            ask()


def test_a_wing_without_code_names_what_works_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    cards = catalog.parse(BARE + BARE.replace("[pcsr]", "[xt]").replace("restore", "encode"))
    monkeypatch.setattr(catalog, "_all", lambda: cards)
    with pytest.raises(NotBuiltError, match=r"'xt' has a card but no code yet\. With code so far: none\."):
        catalog.resolve("xt")
    cards |= catalog.parse(BARE + 'entry = "fractions:Fraction"')
    assert catalog.resolve("PCSR") is Fraction
    with pytest.raises(NotBuiltError, match=r"With code so far: pcsr\."):
        catalog.resolve("xt")


def test_parse_reads_what_load_reads() -> None:
    (only,) = catalog.parse(BARE).values()
    assert only == Card("pcsr", "T", "arXiv:2407.21448", 2024, "restore", "job", "A", "C")


@pytest.mark.parametrize(
    "key", [f.name for f in fields(Card) if f.name not in ("slug", "entry", "network", "proof", "verb")]
)
def test_every_required_key_is_missed(key: str) -> None:
    text = "\n".join(line for line in BARE.splitlines() if not line.startswith(key))
    with pytest.raises(InputError, match=rf"systems.toml, card \[pcsr\]: {key} missing"):
        catalog.parse(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BARE + 'colour = "red"', r"unknown key 'colour'. Use title, paper"),
        (BARE.replace('"restore"', '"restroe"'), r"\[pcsr\]: no wing is called 'restroe'. Choose one of encode"),
        (BARE.replace('"job"', '"jobs"'), r"\[pcsr\]: no kind is called 'jobs'. Choose one of job, model"),
        (BARE.replace("2024", '"2024"'), r"year = '2024'; expected a non-empty int"),
        (BARE.replace("2024", "true"), r"year = True; expected a non-empty int"),
        (BARE.replace('"C"', '""'), r"claim = ''; expected a non-empty str"),
        (BARE.replace('"C"', "3"), r"claim = 3; expected a non-empty str"),
        (BARE + 'entry = "foveate.restore.pcsr"', r'entry = .*; expected "module:name"'),
        (BARE + 'proof = "foveate.proofs.restore.pcsr:prove"', r"a proof without an entry"),
        (BARE + BARE, r"systems.toml is not valid TOML"),
        ("pcsr = 3", r"pcsr = 3 stands outside a card"),
    ],
)
def test_a_misshapen_card_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        catalog.parse(text)


def test_the_catalogue_needs_the_standard_library_only() -> None:
    code = "import sys, foveate.catalog as c; c.load(); print({'torch', 'numpy', 'PIL'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_size_is_part_of_a_name():
    found, settings = catalog.sized("flash_intern_image_t")
    assert found.slug == "dcnv4"
    assert settings == catalog.sized("DCNv4-T")[1] != {}
    assert catalog.sized("pcsr") == (catalog.card("pcsr"), {})


def test_an_unknown_size_names_the_known_ones():
    with pytest.raises(InputError, match="no size 'q'; use one of 't', 's', 'b'"):
        catalog.sized("lsnet_q")
    with pytest.raises(UnknownSystemError, match="pcsr"):
        catalog.sized("pcrs_t")


def test_commands_are_those_of_the_wing_or_of_the_verb_and_need_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    found = CARDS["pcsr"]
    assert found.command == "foveate upscale in.jpg out.png --method pcsr"
    assert replace(found, verb="downscale").command == "foveate downscale in.jpg out.png --method pcsr"
    assert replace(found, kind="model").command is None
    monkeypatch.setattr(weights, "ship", lambda slug: False)
    assert found.command is None
