"""One file of packed weights: written once, mapped read-only by every later start.

Here: the format, a writer that leaves a whole file or none, a reader that trusts nothing in it. Not
here: which file belongs to a model and where it lies (packed_cache.py), the packed layout itself
(ops/packed.py).

Format: 8 bytes magic, then little-endian where the header begins and how long it is (64 bits each)
and its SHA-256; from byte 4096 on the parts of all weights in the order they came, each at a
multiple of 64 bytes and large ones at a multiple of 4096, the bytes between them zero; last the
header, JSON: {"version", "key", "about", "sum", "weights": {name: {"format", "n", "k", "group",
"n_blocks", "zero_points", "at": [data, scales, zeros]}}}. How long a part is follows from the
weight's shape. "sum" adds up the file from byte 4096 to the header as 64-bit words.
"""

import hashlib
import json
import mmap
import os
import struct
import tempfile
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, get_args

import torch
from torch import Tensor

from outdraft.errors import WeightsError
from outdraft.ops.packed import (
    GROUP_SIZES,
    MAX_INPUTS,
    Format,
    PackedLinear,
    part_bytes,
    part_types,
)
from outdraft.ops.stored import StoredWeight, packed_groups
from outdraft.weights.header import MAX_HEADER_BYTES
from outdraft.weights.loading import Loading

VERSION = 1
PART = ".part"  # of a file that is being written
_MAGIC = b"outdraft"
_HEAD = struct.Struct("<8sQQ32s")
_BEGIN = 4096
_ALIGN, _ALIGN_LARGE = 64, 4096
_LARGE = 1 << 16
_PIECE = 64 << 20
_WORD = 2**64
_PACK_AGAIN = "it is packed again"


@dataclass(frozen=True, slots=True)
class Entry:
    """A packed weight in the file; `at` are the bytes where its three parts begin."""

    format: Format
    n: int
    k: int
    group: int
    n_blocks: int
    zero_points: bool
    at: tuple[int, int, int]

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Bytes of the three parts."""
        return part_bytes(
            self.format,
            self.n,
            self.k,
            group=self.group,
            n_blocks=self.n_blocks,
            zero_points=self.zero_points,
        )

    def as_json(self) -> dict[str, Any]:
        """As it stands in the header."""
        return {name: getattr(self, name) for name in self.__slots__}


class PackedWriter:
    """Writes packed weights beside `path`, which appears when `finish` is called.

    Errors are `OSError`s; `discard` removes what is there.
    """

    def __init__(self, path: Path, key: str, about: str) -> None:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path, self.key, self.about = path, key, about
        self.entries: dict[str, Entry] = {}
        self._sum = 0
        handle, name = tempfile.mkstemp(prefix=".", suffix=PART, dir=path.parent)
        self._unfinished = Path(name)
        self._stream: BinaryIO = os.fdopen(handle, "wb", buffering=0)
        try:
            self._write(bytes(_BEGIN))
        except OSError:
            self.discard()
            raise

    def add(self, name: str, weight: PackedLinear) -> None:
        """Write one weight."""
        assert name not in self.entries
        at = []
        for part in (weight.data, weight.scales, weight.zeros):
            content = part.view(torch.uint8)
            align = _ALIGN_LARGE if content.numel() >= _LARGE else _ALIGN
            self._write(bytes(-self._stream.tell() % align))
            at.append(self._stream.tell())
            self._write(content.numpy().data)
            self._write(bytes(-content.numel() % _ALIGN))
            self._sum = (self._sum + _sum_of_words(content)) % _WORD
        self.entries[name] = Entry(
            weight.format,
            weight.n,
            weight.k,
            weight.group,
            weight.n_blocks,
            weight.format == "w4" and weight.zeros.numel() > 0,
            (at[0], at[1], at[2]),
        )

    def finish(self) -> None:
        """Write the header, bring all of it to disk and give it its name."""
        header = {
            "version": VERSION,
            "key": self.key,
            "about": self.about,
            "sum": self._sum,
            "weights": {name: entry.as_json() for name, entry in self.entries.items()},
        }
        raw = json.dumps(header).encode()
        begin = self._stream.tell()
        self._write(raw)
        self._stream.seek(0)
        self._write(_HEAD.pack(_MAGIC, begin, len(raw), hashlib.sha256(raw).digest()))
        os.fsync(self._stream.fileno())
        self._stream.close()
        self._unfinished.replace(self.path)
        directory = os.open(self.path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)

    def discard(self) -> None:
        """Remove the unfinished file; nothing happens if it is finished."""
        self._stream.close()
        self._unfinished.unlink(missing_ok=True)

    def _write(self, content: bytes | memoryview) -> None:
        view, done = memoryview(content), 0
        while done < len(view):
            done += self._stream.write(view[done:])


class PackedFile:
    """A file of packed weights, mapped; the weights taken from it keep the mapping alive."""

    def __init__(self, path: Path, entries: Mapping[str, Entry], content: Tensor) -> None:
        self.path = path
        self.entries = entries
        self._content = content

    @classmethod
    def open(cls, path: Path, key: str, loading: Loading | None = None) -> "PackedFile":
        """Map a file and check all of it.

        Args:
            key: what the header must say it was packed from.
            loading: told how far the check is.

        Raises:
            WeightsError: it is not of this format or key, or is damaged. A hint says what follows.
            FileNotFoundError, NotADirectoryError: there is none.
        """
        header, end, content = _read(path)
        if header.get("version") != VERSION or header.get("key") != key:
            raise _bad(path, "belongs to other weights or another version")
        entries = _parse_entries(path, header.get("weights"), end)
        if _checked_sum(content[_BEGIN:end], loading or Loading()) != header.get("sum"):
            raise _bad(path, "is damaged: its sum is not that of its header")
        return cls(path, entries, content)

    def get(self, weight: StoredWeight, format: Format) -> PackedLinear | None:
        """The packed form of a weight in a format; None if the file does not have that."""
        entry = self.entries.get(weight.key)
        if entry is None:
            return None
        n_blocks, n, k = weight.sizes
        group, zero_points = packed_groups(weight, format)
        group = group if format == "w4" else 0
        wanted = Entry(format, n, k, group, n_blocks, zero_points, entry.at)
        if entry != wanted:
            return None
        data, scales, zeros = (
            self._content[at : at + size].view(dtype)
            for at, size, dtype in zip(entry.at, entry.sizes, part_types(format), strict=True)
        )
        return PackedLinear.of_memory(
            format, n, k, data, scales, zeros, group=group, n_blocks=n_blocks
        )


def _bad(path: Path, what: str) -> WeightsError:
    return WeightsError(f"the packed weights in {path}: the file {what}", _PACK_AGAIN)


def _read(path: Path) -> tuple[dict[str, Any], int, Tensor]:
    """The header, the byte where it begins, and all bytes of the file, mapped."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            if size <= _BEGIN:
                raise _bad(path, "is cut off")
            mapped = mmap.mmap(stream.fileno(), size, access=mmap.ACCESS_READ)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                with suppress(OSError):  # a kernel that has them for memory only
                    mapped.madvise(mmap.MADV_HUGEPAGE)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise _bad(path, f"cannot be read: {error.strerror}") from error
    magic, begin, length, digest = _HEAD.unpack_from(mapped)
    if magic != _MAGIC:
        raise _bad(path, "is not one of packed weights")
    if length > MAX_HEADER_BYTES or begin < _BEGIN or begin % _ALIGN or begin + length != size:
        raise _bad(path, "is cut off or too long")
    raw = mapped[begin : begin + length]
    if hashlib.sha256(raw).digest() != digest:
        raise _bad(path, "has a damaged header")
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError):
        raise _bad(path, "has a header that is not JSON") from None
    if not isinstance(header, dict):
        raise _bad(path, "has a header that is not a JSON object")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a tensor cannot say that it is read-only
        return header, begin, torch.frombuffer(mapped, dtype=torch.uint8)


def _parse_entries(path: Path, found: Any, end: int) -> dict[str, Entry]:
    """All weights of the header, whose parts must be aligned, inside the file, and not overlap."""
    if not isinstance(found, dict):
        raise _bad(path, "has a header without weights")
    entries = {name: _parse_entry(path, name, entry) for name, entry in found.items()}
    spans = sorted(
        (at, at + size)
        for entry in entries.values()
        for at, size in zip(entry.at, entry.sizes, strict=True)
    )
    position = _BEGIN
    for begin, after in spans:
        if begin < position or begin % _ALIGN or after > end:
            raise _bad(path, f"has a part where none can be, at byte {begin}")
        position = after
    return entries


def _parse_entry(path: Path, name: str, found: Any) -> Entry:
    fields = Entry.__slots__
    if not isinstance(found, dict) or set(found) != set(fields):
        raise _bad(path, f"does not describe {name!r:.80}")
    at = found["at"]
    numbers = [found[field] for field in ("n", "k", "group", "n_blocks")]
    whole = isinstance(at, list) and len(at) == 3
    whole = whole and all(type(x) is int and 0 <= x < 2**48 for x in [*numbers, *at])
    if not whole or not _plausible(found):
        raise _bad(path, f"has an impossible shape of {name!r:.80}")
    values = {field: found[field] for field in fields}
    return Entry(**(values | {"at": tuple(at)}))


def _plausible(found: Mapping[str, Any]) -> bool:
    """Whether the kernels could read a weight like that at all."""
    w4 = found["format"] == "w4"
    return (
        found["format"] in get_args(Format)
        and 0 < found["n"] < 2**31
        and 0 < found["k"] <= MAX_INPUTS
        and 0 < found["n_blocks"] < 2**31
        and (found["group"] in GROUP_SIZES if w4 else found["group"] == 0)
        and type(found["zero_points"]) is bool
        and (w4 or not found["zero_points"])
    )


def _checked_sum(content: Tensor, loading: Loading) -> int:
    """The sum of a file's words; reading all of it also brings it into memory."""
    loading.begin("reading packed weights", content.numel())
    total = 0
    for first in range(0, content.numel(), _PIECE):
        piece = content[first : first + _PIECE]
        total += _sum_of_words(piece)
        loading.advance(piece.numel())
    return total % _WORD


def _sum_of_words(content: Tensor) -> int:
    """Of bytes as 64-bit words, as if zeros followed the last; modulo 2^64."""
    whole = content.numel() // 8 * 8
    total = int(content[:whole].view(torch.int64).sum()) if whole else 0
    rest = bytes(content[whole:].tolist())
    return (total + int.from_bytes(rest, "little")) % _WORD
