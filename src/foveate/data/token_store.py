"""Sets of pictures kept as tokens: about one byte for each, in shards that are checked before they are believed.

The bytes are those of SeiT (Park et al. 2023, arXiv:2303.11114). Words are sorted by how often they are chosen, so that
most tokens are below 255:

    token t < 255    one byte t
    255 <= t < 510   two bytes, 255 and t - 255

A store is a folder: `store.json` (grid, words, classes, SHA-256 of every other file), `codebook.safetensors`,
and shards of some thousand pictures, Parquet where pyarrow is there, else NumPy's compressed archives (`.npz`). Tokens
mean nothing with another codebook, so the codebook's checksum is part of what is checked. Nothing is ever unpickled.
"""

import hashlib
import io
import json
from collections.abc import Iterable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from foveate.data.files import Partial
from foveate.errors import BitstreamError, InputError, MissingExtraError

VERSION = 1
MOST_WORDS = 510
_MANIFEST, _CODEBOOK = "store.json", "codebook.safetensors"
_FRESH = "tokenise the pictures again, or get a fresh copy"
Ints = npt.NDArray[np.int64]


def pack(tokens: npt.ArrayLike) -> bytes:
    """Tokens as bytes.

    Raises: InputError for a token outside 0 to 509.

    >>> pack([3, 254, 255, 300]).hex()
    '03feff00ff2d'
    """
    ids = np.asarray(tokens).reshape(-1)
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= MOST_WORDS):
        raise InputError(f"tokens are whole numbers from 0 to {MOST_WORDS - 1}, got {ids.dtype} up to {ids.max()}.")
    escaped = ids >= 255
    ends = (1 + escaped).cumsum()
    out = np.full(ends[-1] if ids.size else 0, 255, np.uint8)
    out[ends - 1] = np.where(escaped, ids - 255, ids)
    return out.tobytes()


def unpack(data: bytes, count: int) -> Ints:
    """Bytes as `count` tokens.

    Raises: BitstreamError when they are no such number of tokens.

    >>> unpack(bytes.fromhex("03feff00ff2d"), 4).tolist()
    [3, 254, 255, 300]
    """
    raw = np.frombuffer(data, np.uint8)
    escape = raw == 255
    if raw.size and (escape[-1] or (escape[1:] & escape[:-1]).any()):
        raise BitstreamError(f"These are no tokens: an escape is followed by none or by another; {_FRESH}.")
    ids = (raw.astype(np.int64) + 255 * np.concatenate([[False], escape[:-1]]))[~escape] if raw.size else raw
    if ids.size != count:
        raise BitstreamError(f"{len(data)} bytes hold {ids.size} tokens, {count} are expected; {_FRESH}.")
    return ids.astype(np.int64)


def digest(codebook: Tensor) -> str:
    """SHA-256 of a codebook's shape and values."""
    values = codebook.detach().cpu().float().contiguous().numpy()
    return hashlib.sha256(str(values.shape).encode() + values.tobytes()).hexdigest()


class TokenStore:
    """A stored set, opened for reading; an item is (tokens int64 [h, w], class).

    Args:
        folder: what `write` made.
        codebook: the one that the reader is going to use; the store's own when None.

    Attributes: folder, grid (h, w), classes, codebook [K, D].

    Raises: BitstreamError for a folder that is no store, or a damaged one (a shard is checked when it is first read);
        InputError for another codebook than the tokens were made with.
    """

    def __init__(self, folder: str | Path, codebook: Tensor | None = None) -> None:
        self.folder = Path(folder)
        try:
            self._manifest: dict[str, Any] = json.loads((self.folder / _MANIFEST).read_text())
            if self._manifest["version"] != VERSION:
                raise BitstreamError(f"{str(folder)!r} is of version {self._manifest['version']}, not {VERSION}.")
            self.grid = (int(self._manifest["grid"][0]), int(self._manifest["grid"][1]))
            self.classes = tuple(map(str, self._manifest["classes"]))
            self._sizes = [int(shard["pictures"]) for shard in self._manifest["shards"]]
            self._files = [(str(shard["file"]), str(shard["sha256"])) for shard in self._manifest["shards"]]
            tensors = load(self._checked(_CODEBOOK, self._manifest["codebook_sha256"]))
            self.codebook = tensors["codebook"]
        except (OSError, ValueError, KeyError, TypeError, IndexError, SafetensorError) as error:
            if isinstance(error, BitstreamError):
                raise
            raise BitstreamError(f"{str(folder)!r} is no store of tokens ({error}); {_FRESH}.") from error
        if codebook is not None and digest(codebook) != digest(self.codebook):
            raise InputError(f"the tokens in {str(folder)!r} were made with another codebook; use the store's own.")
        self._starts = np.concatenate([[0], np.cumsum(self._sizes)])
        self._shard = lru_cache(maxsize=2)(self._read)

    @classmethod
    def write(
        cls,
        folder: str | Path,
        batches: Iterable[tuple[Tensor, Tensor]],
        codebook: Tensor,
        classes: Iterable[str],
        *,
        kind: str | None = None,
        per_shard: int = 10_000,
    ) -> "TokenStore":
        """Write a set; the manifest comes last, so that a store is whole or none.

        Args:
            folder: made when it is not there.
            batches: (tokens [B, h, w], classes [B]) in order.
            codebook: [K, D], at most 510 words.
            classes: their names.
            kind: "parquet" or "npz"; Parquet where pyarrow is there when None.
            per_shard: pictures in a shard.

        Raises: InputError for a folder that holds a store already, no pictures, or tokens and classes out of range;
            MissingExtraError for Parquet without pyarrow.
        """
        folder, names = Path(folder), tuple(map(str, classes))
        kind = kind or ("parquet" if find_spec("pyarrow") else "npz")
        if kind not in _KINDS:
            raise InputError(f"kind={kind!r} is not known; use one of {', '.join(map(repr, _KINDS))}.")
        if (folder / _MANIFEST).exists():
            raise InputError(f"{str(folder)!r} holds a store already; name another folder.")
        if codebook.dim() != 2 or not 1 <= len(codebook) <= MOST_WORDS or not names or per_shard < 1:
            raise InputError(f"a store has 1 to {MOST_WORDS} words [K, D] and classes, got {tuple(codebook.shape)}.")
        folder.mkdir(parents=True, exist_ok=True)
        grid: tuple[int, ...] | None = None
        shards: list[dict[str, Any]] = []
        pictures = 0
        for tokens, labels in _rebatched(batches, per_shard):
            grid = grid or tuple(tokens.shape[1:])
            _check(tokens, labels, grid, len(codebook), len(names))
            packed = [pack(one) for one in tokens.numpy()]
            name = f"shard-{len(shards):05d}.{kind}"
            data = _KINDS[kind][0](packed, labels.numpy())
            _put(folder / name, data)
            shards.append({"file": name, "pictures": len(packed), "sha256": hashlib.sha256(data).hexdigest()})
            pictures += len(packed)
        if grid is None:
            raise InputError("there are no pictures to store; give at least one batch.")
        book = save({"codebook": codebook.detach().cpu().float().contiguous()})
        _put(folder / _CODEBOOK, book)
        manifest = {
            "version": VERSION,
            "grid": list(grid),
            "words": len(codebook),
            "pictures": pictures,
            "classes": list(names),
            "codebook_sha256": hashlib.sha256(book).hexdigest(),
            "shards": shards,
        }
        _put(folder / _MANIFEST, (json.dumps(manifest, indent=1) + "\n").encode())
        return cls(folder)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"picture {index} of {len(self)}")
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        tokens, labels = self._shard(shard)
        place = index - int(self._starts[shard])
        return tokens[place].long(), int(labels[place])

    def all(self) -> tuple[Tensor, Tensor]:
        """All tokens, int16 [N, h, w], and classes, int64 [N], in memory."""
        parts = [self._read(shard) for shard in range(len(self._sizes))]
        return torch.cat([tokens for tokens, _ in parts]), torch.cat([labels for _, labels in parts])

    @property
    def total_bytes(self) -> int:
        """What the store takes on disk, codebook and manifest included."""
        return sum(path.stat().st_size for path in self.folder.iterdir() if path.is_file())

    @property
    def entropy(self) -> float:
        """Bits that a token needs at least when each is coded for itself: the entropy of the words' histogram."""
        counts = torch.bincount(self.all()[0].reshape(-1).long(), minlength=len(self.codebook)).double()
        share = counts[counts > 0] / counts.sum()
        return float(-(share * share.log2()).sum())

    def _read(self, shard: int) -> tuple[Tensor, Tensor]:
        name, expected = self._files[shard]
        data = self._checked(name, expected)
        kind, count = name.rpartition(".")[2], self._sizes[shard]
        if kind not in _KINDS:
            raise BitstreamError(f"{name!r} is no kind of shard that is known; {_FRESH}.")
        try:
            packed, labels = _KINDS[kind][1](data)
        except MissingExtraError:
            raise
        except Exception as error:  # whatever a reader says of bytes that are not its own
            raise BitstreamError(f"{name!r} cannot be read ({error}); {_FRESH}.") from error
        if len(packed) != count or labels.shape != (count,) or labels.dtype.kind not in "iu":
            raise BitstreamError(f"{name!r} does not hold the {count} pictures that it should; {_FRESH}.")
        tokens = np.stack([unpack(one, self.grid[0] * self.grid[1]) for one in packed]).reshape(count, *self.grid)
        if tokens.max() >= len(self.codebook) or not 0 <= labels.min() <= labels.max() < len(self.classes):
            raise BitstreamError(f"{name!r} holds tokens or classes that there are none of; {_FRESH}.")
        return torch.from_numpy(tokens.astype(np.int16)), torch.from_numpy(labels.astype(np.int64))

    def _checked(self, name: str, expected: str) -> bytes:
        """The bytes of a file of the store, once they are those that were written."""
        if Path(name).name != name:
            raise BitstreamError(f"{name!r} is no file of the store; {_FRESH}.")
        try:
            data = (self.folder / name).read_bytes()
        except OSError as error:
            raise BitstreamError(f"{name!r} of the store cannot be read ({error.strerror}); {_FRESH}.") from error
        if hashlib.sha256(data).hexdigest() != expected:
            raise BitstreamError(f"{name!r} of the store is damaged: its checksum differs; {_FRESH}.")
        return data


def _to_npz(packed: list[bytes], labels: Ints) -> bytes:
    stream, offsets = io.BytesIO(), np.cumsum([0, *map(len, packed)], dtype=np.int64)
    content = np.frombuffer(b"".join(packed), np.uint8)
    np.savez_compressed(stream, bytes=content, offsets=offsets, labels=labels.astype(np.int64))
    return stream.getvalue()


def _from_npz(data: bytes) -> tuple[list[bytes], Ints]:
    with np.load(io.BytesIO(data), allow_pickle=False) as archive:
        content, offsets, labels = archive["bytes"], archive["offsets"], archive["labels"]
    if content.dtype != np.uint8 or offsets.dtype != np.int64 or offsets.ndim != 1 or offsets.size < 2:
        raise ValueError("no tokens in it")
    if offsets[0] != 0 or offsets[-1] != content.size or (np.diff(offsets) < 0).any():
        raise ValueError("its offsets make no sense")
    whole = content.tobytes()
    return [whole[a:b] for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)], labels


def _to_parquet(packed: list[bytes], labels: Ints) -> bytes:
    arrow, parquet = _pyarrow()
    table = arrow.table({"tokens": arrow.array(packed, arrow.binary()), "label": arrow.array(labels, arrow.int64())})
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="gzip", use_dictionary=["label"])
    return stream.getvalue()


def _from_parquet(data: bytes) -> tuple[list[bytes], Ints]:
    _, parquet = _pyarrow()
    table = parquet.read_table(io.BytesIO(data), columns=["tokens", "label"])
    packed = table["tokens"].to_pylist()
    if not all(isinstance(one, bytes) for one in packed):
        raise ValueError("no tokens in it")
    return packed, table["label"].to_numpy()


_KINDS: dict[str, tuple[Any, Any]] = {"parquet": (_to_parquet, _from_parquet), "npz": (_to_npz, _from_npz)}


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow  # type: ignore[import-not-found, unused-ignore]
        import pyarrow.parquet  # type: ignore[import-not-found, unused-ignore]
    except ImportError as error:
        raise MissingExtraError("Parquet needs pyarrow; run `pip install foveate[parquet]`, or use .npz.") from error
    return pyarrow, pyarrow.parquet


def _put(path: Path, data: bytes) -> None:
    part = Partial(path)
    try:
        part.file.write(data)
        part.commit()
    except BaseException:
        part.discard()
        raise


def _rebatched(batches: Iterable[tuple[Tensor, Tensor]], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same pictures in batches of one size, but for the last."""
    waiting: list[tuple[Tensor, Tensor]] = []
    for batch in batches:
        waiting.append((batch[0].detach().cpu(), batch[1].detach().cpu()))
        while sum(len(labels) for _, labels in waiting) >= size:
            tokens, labels = (torch.cat(part) for part in zip(*waiting, strict=True))
            yield tokens[:size], labels[:size]
            waiting = [(tokens[size:], labels[size:])]
    tokens, labels = (torch.cat(part) for part in zip(*waiting, strict=True)) if waiting else (torch.empty(0),) * 2
    if len(labels):
        yield tokens, labels


def _check(tokens: Tensor, labels: Tensor, grid: tuple[int, ...], words: int, classes: int) -> None:
    if tokens.dim() != 3 or tuple(tokens.shape[1:]) != grid or labels.shape != tokens.shape[:1] or not tokens.numel():
        raise InputError(f"tokens are [B, h, w] of one grid and labels [B], got {[*tokens.shape]}, {[*labels.shape]}.")
    if tokens.is_floating_point() or int(tokens.min()) < 0 or int(tokens.max()) >= words:
        raise InputError(f"tokens are whole numbers below {words}, got {tokens.dtype} up to {tokens.max()}.")
    if labels.is_floating_point() or int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise InputError(f"labels are whole numbers below {classes}, got {labels.dtype} up to {labels.max()}.")
