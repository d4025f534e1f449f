"""Stores of tokens: bytes there and back, and every kind of damage refused in words."""

import hashlib
import io
import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.data.token_store import TokenStore, digest, pack, unpack
from foveate.errors import BitstreamError, InputError, MissingExtraError

KINDS = ["npz", pytest.param("parquet", marks=pytest.mark.skipif(not find_spec("pyarrow"), reason="needs pyarrow"))]


def _write(folder: Path, kind: str = "npz", count: int = 25, per_shard: int = 10) -> tuple[TokenStore, torch.Tensor]:
    torch.manual_seed(0)
    tokens, labels = torch.randint(0, 300, (count, 4, 3)), torch.arange(count) % 3
    batches = zip(tokens.split(7), labels.split(7), strict=True)
    return TokenStore.write(folder, batches, torch.randn(300, 5), "abc", kind=kind, per_shard=per_shard), tokens


def test_all_tokens_come_back_and_no_others_go_in() -> None:
    every = np.arange(510)
    assert np.array_equal(unpack(pack(every), 510), every)
    for wrong in ([510], [-1], [0.5]):
        with pytest.raises(InputError, match="0 to 509"):
            pack(wrong)
    assert unpack(pack([]), 0).size == 0


@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 509), max_size=60))
def test_bytes_are_one_for_a_token_and_one_more_from_255_on(tokens: list[int]) -> None:
    data = pack(np.array(tokens, np.int64))
    assert len(data) == len(tokens) + sum(token >= 255 for token in tokens)
    assert unpack(data, len(tokens)).tolist() == tokens
    with pytest.raises(BitstreamError, match="are expected"):
        unpack(data, len(tokens) + 1)


@pytest.mark.parametrize("data", [b"\xff", b"\x01\xff", b"\xff\xff\x01"])
def test_escapes_of_nothing_are_refused(data: bytes) -> None:
    with pytest.raises(BitstreamError, match="no tokens"):
        unpack(data, 2)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_stored_comes_back(tmp_path: Path, kind: str) -> None:
    store, tokens = _write(tmp_path / "set", kind)
    again = TokenStore(tmp_path / "set", store.codebook)
    found, labels = again.all()
    assert torch.equal(found.long(), tokens)
    assert labels.tolist() == [i % 3 for i in range(25)]
    assert (len(again), again.grid, again.classes) == (25, (4, 3), ("a", "b", "c"))
    assert again[19][1] == 1
    assert torch.equal(again[19][0], tokens[19])
    assert sorted(path.suffix for path in again.folder.iterdir()) == sorted(
        [f".{kind}"] * 3 + [".json", ".safetensors"]
    )
    assert again.total_bytes == sum(path.stat().st_size for path in again.folder.iterdir())
    with pytest.raises(IndexError):
        again[25]


def test_entropy_is_that_of_the_words(tmp_path: Path) -> None:
    tokens = torch.tensor([0, 0, 1, 2]).view(1, 2, 2)
    store = TokenStore.write(tmp_path, [(tokens, torch.zeros(1).long())], torch.randn(9, 2), ["one"], kind="npz")
    assert store.entropy == pytest.approx(1.5)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a shard with a bit flipped": lambda folder: _flip(folder / "shard-00001.npz"),
    "a shard cut off": lambda folder: (folder / "shard-00001.npz").write_bytes(b"PK"),
    "a shard away": lambda folder: (folder / "shard-00001.npz").unlink(),
    "two shards exchanged": lambda folder: (folder / "shard-00000.npz").replace(folder / "shard-00001.npz"),
    "the codebook flipped": lambda folder: _flip(folder / "codebook.safetensors"),
    "no manifest": lambda folder: (folder / "store.json").unlink(),
    "an empty manifest": lambda folder: (folder / "store.json").write_text("{}"),
    "another manifest": lambda folder: (folder / "store.json").write_text("[1]"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found(tmp_path: Path, damage: str) -> None:
    _write(tmp_path / "set")
    DAMAGE[damage](tmp_path / "set")
    with pytest.raises(BitstreamError) as caught:
        TokenStore(tmp_path / "set").all()
    assert "\n" not in str(caught.value)


def _forge(folder: Path, **arrays: np.ndarray) -> None:
    """Put another shard in, with a checksum that is right."""
    with np.load(folder / "shard-00000.npz") as archive:
        content = dict(archive)
    stream = io.BytesIO()
    np.savez(stream, allow_pickle=True, **(content | arrays))  # type: ignore[arg-type]
    (folder / "shard-00000.npz").write_bytes(stream.getvalue())
    manifest = json.loads((folder / "store.json").read_text())
    manifest["shards"][0]["sha256"] = hashlib.sha256(stream.getvalue()).hexdigest()
    (folder / "store.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    "arrays",
    [
        {"labels": np.array([{}] * 10, object)},
        {"labels": np.full(10, 3)},
        {"labels": np.zeros(9, np.int64)},
        {"offsets": np.zeros(11, np.int64)},
        {"offsets": np.arange(11)[::-1].astype(np.int64)},
        {"offsets": np.arange(11) * 2**40},
        {"bytes": np.zeros(4, np.float32)},
        {"bytes": np.full(2000, 255, np.uint8)},
    ],
)
def test_forged_shards_do_no_harm(tmp_path: Path, arrays: dict[str, np.ndarray]) -> None:
    _write(tmp_path)
    _forge(tmp_path, **arrays)
    with pytest.raises(BitstreamError):
        TokenStore(tmp_path).all()


def test_a_path_out_of_the_store_is_refused(tmp_path: Path) -> None:
    _write(tmp_path / "set")
    manifest = json.loads((tmp_path / "set" / "store.json").read_text())
    manifest["shards"][0]["file"] = "../secret.npz"
    (tmp_path / "set" / "store.json").write_text(json.dumps(manifest))
    with pytest.raises(BitstreamError, match="no file of the store"):
        TokenStore(tmp_path / "set").all()


def test_tokens_mean_nothing_with_another_codebook(tmp_path: Path) -> None:
    store, _ = _write(tmp_path)
    with pytest.raises(InputError, match="another codebook"):
        TokenStore(tmp_path, store.codebook + 1)
    assert digest(torch.zeros(2, 3)) != digest(torch.zeros(3, 2))


def test_what_cannot_be_stored_is_refused(tmp_path: Path) -> None:
    one, book = torch.zeros(1).long(), torch.randn(4, 2)
    for tokens, labels in ((torch.full((1, 2, 2), 4), one), (torch.zeros(1, 2, 2).long(), one + 1)):
        with pytest.raises(InputError, match="below"):
            TokenStore.write(tmp_path / "x", [(tokens, labels)], book, ["a"], kind="npz")
    with pytest.raises(InputError, match="no pictures"):
        TokenStore.write(tmp_path / "x", [], book, ["a"], kind="npz")
    with pytest.raises(InputError, match="1 to 510"):
        TokenStore.write(tmp_path / "x", [], torch.randn(511, 2), ["a"], kind="npz")
    with pytest.raises(InputError, match="kind='zip'"):
        TokenStore.write(tmp_path / "x", [], book, ["a"], kind="zip")
    with pytest.raises(BitstreamError, match="no store"):
        TokenStore(tmp_path / "x")
    _write(tmp_path / "y")
    with pytest.raises(InputError, match="holds a store already"):
        _write(tmp_path / "y")


@pytest.mark.skipif(bool(find_spec("pyarrow")), reason="pyarrow is there")
def test_parquet_without_pyarrow_names_the_extra(tmp_path: Path) -> None:
    with pytest.raises(MissingExtraError, match=r"foveate\[parquet\]"):
        _write(tmp_path, "parquet")
