"""Packed weights that outlive the process: one file for a checkpoint and a way of packing it.

Here: what a file is called after, when one is written, which ones are removed. Not here: what is in
one (packed_file.py). Nothing that goes wrong with the cache keeps a model from loading: it is noted
and the weights are packed from the checkpoint.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from outdraft.errors import WeightsError
from outdraft.ops.packed import LAYOUT, Format, PackedLinear
from outdraft.ops.stored import Packer, StoredWeight, pack_stored
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.header import DOWNLOAD_AGAIN, LENGTH_BYTES
from outdraft.weights.loading import Loading
from outdraft.weights.packed_file import PART, VERSION, PackedFile, PackedWriter

SUFFIX = ".packed"
_STALE_S = 24 * 3600.0  # a file still unfinished after that belongs to a process that died
_SPARE_BYTES = 1 << 30  # left free on the disk
_BYTES_PER_PARAM: dict[Format, float] = {"bf16": 2.0, "w8": 1.0, "w4": 0.57}


@dataclass(frozen=True, slots=True)
class PackedCache:
    """A directory of packed weights.

    Attributes:
        directory: made when the first file is written.
        min_bytes: models that take less, packed, are not worth a file.
        max_bytes: of all files; the least recently used go first. None: no limit.
    """

    directory: Path
    min_bytes: int = 0
    max_bytes: int | None = None

    def path(self, key: str) -> Path:
        """Where the file of a key is or would be."""
        return self.directory / f"{key[:32]}{SUFFIX}"

    def open(self, key: str, loading: Loading) -> PackedFile | None:
        """The file of a key, None if there is none that can be used."""
        path = self.path(key)
        try:
            found = PackedFile.open(path, key, loading)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except WeightsError as error:
            loading.notes.append(f"{error.message}; {error.hint}")
            return None
        with suppress(OSError):
            path.touch()  # the time of its last use
        return found

    def wants(self, n_bytes: int, loading: Loading) -> bool:
        """Whether to write a file of about that size."""
        if n_bytes < self.min_bytes:
            return False
        if self.max_bytes is not None and n_bytes > self.max_bytes:
            loading.notes.append(
                f"packed weights are not kept: {n_bytes / 1e9:.1f} GB are more than the cache's "
                f"limit of {self.max_bytes / 1e9:.1f} GB"
            )
            return False
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
        except OSError as error:
            loading.notes.append(_not_kept(error))
            return False
        if n_bytes + _SPARE_BYTES > free:
            loading.notes.append(
                f"packed weights are not kept: {self.directory} has {free / 1e9:.1f} GB free and "
                f"{n_bytes / 1e9:.1f} GB are needed, with {_SPARE_BYTES / 1e9:.1f} GB to spare"
            )
            return False
        return True

    def make_room(self, keep: Path) -> None:
        """Remove files, least recently used first, until the rest is within the limit.

        A process that has one mapped keeps it until it ends.
        """
        found: list[tuple[float, int, Path]] = []
        for path in _files(self.directory):
            try:
                stat = path.stat()
                if path.name.endswith(PART):
                    if time.time() - stat.st_mtime > _STALE_S:
                        path.unlink()
                    continue
                found.append((stat.st_mtime, stat.st_size, path))
            except OSError:  # another process was faster
                continue
        total = sum(size for _, size, _ in found)
        for _, size, path in sorted(found):
            if self.max_bytes is None or total <= self.max_bytes:
                return
            if path != keep:
                path.unlink(missing_ok=True)
                total -= size


@dataclass(frozen=True, slots=True)
class CacheFile:
    """The file of one checkpoint. `n_bytes`: about what its packed weights take."""

    cache: PackedCache
    key: str
    n_bytes: int


@contextmanager
def packer(
    checkpoint: Checkpoint, n_bytes: int, file: CacheFile | None, loading: Loading
) -> Iterator[Packer]:
    """Packs the weights of a checkpoint, or takes them from its file.

    A file is written if there is none that can be used; it appears when the block ends well.

    Args:
        n_bytes: that are read of the checkpoint.
        file: where packed weights are kept; None: nowhere.
    """
    found = None if file is None else file.cache.open(file.key, loading)
    if found is not None:
        yield _Reader(found)
        return
    writer = _Writer(None, loading)
    if file is not None and file.cache.wants(file.n_bytes, loading):
        writer.begin(file.cache.path(file.key), file.key, str(checkpoint.directory))
    loading.begin("packing weights", n_bytes)
    checkpoint.on_read = loading.advance
    try:
        yield writer
        if writer.finish() and file is not None:
            file.cache.make_room(keep=file.cache.path(file.key))
    finally:
        checkpoint.on_read = None
        writer.discard()


def packing_key(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    format: Format,
    candidates: int,
    dtype: torch.dtype,
    adapter: str | None = None,
) -> str:
    """Names everything that the packed bytes of a checkpoint depend on, as 64 hexadecimal digits.

    Of each weights file its name, size, time of change and header count, not its data: those would
    have to be read, which is what the cache is there to avoid.

    Args:
        config: the model's config.json.
        format: how the operations store linear layers.
        candidates: scales tried when quantising.
        dtype: what stored values are converted to before they are packed.
        adapter: digest of what is added to the weights, if anything is.

    Raises:
        WeightsError: a file has gone.
    """
    files = []
    for name in checkpoint.files():
        path = checkpoint.directory / name
        try:
            with path.open("rb") as stream:
                stat = os.fstat(stream.fileno())
                length = int.from_bytes(stream.read(LENGTH_BYTES), "little")
                header = hashlib.sha256(stream.read(length)).hexdigest()
        except OSError as error:
            raise WeightsError(f"{path} cannot be read: {error}", DOWNLOAD_AGAIN) from error
        files.append([name, stat.st_size, stat.st_mtime_ns, header])
    parts = [VERSION, LAYOUT, format, candidates, str(dtype), dict(config), files, adapter]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def estimated_bytes(n_params: int, format: Format) -> int:
    """About what so many parameters take when packed."""
    return int(n_params * _BYTES_PER_PARAM[format])


@dataclass(frozen=True, slots=True)
class _Reader:
    """Takes weights from a file; packs what the file should have and has not."""

    file: PackedFile

    def __call__(self, weight: StoredWeight, format: Format, candidates: int) -> PackedLinear:
        found = self.file.get(weight, format)
        return pack_stored(weight, format, candidates) if found is None else found


@dataclass(slots=True)
class _Writer:
    """Packs weights and writes them down for as long as that works."""

    file: PackedWriter | None
    loading: Loading

    def __call__(self, weight: StoredWeight, format: Format, candidates: int) -> PackedLinear:
        packed = pack_stored(weight, format, candidates)
        if self.file is not None:
            try:
                self.file.add(weight.key, packed)
            except OSError as error:
                self._give_up(error)
        return packed

    def begin(self, path: Path, key: str, about: str) -> None:
        """Start the file."""
        try:
            self.file = PackedWriter(path, key, about)
        except OSError as error:
            self.loading.notes.append(_not_kept(error))

    def finish(self) -> bool:
        """Give the file its name; False if there is none."""
        try:
            if self.file is not None:
                self.file.finish()
        except OSError as error:
            self._give_up(error)
        return self.file is not None

    def discard(self) -> None:
        """Remove an unfinished file."""
        if self.file is not None:
            self.file.discard()

    def _give_up(self, error: OSError) -> None:
        self.loading.notes.append(_not_kept(error))
        assert self.file is not None
        self.file.discard()
        self.file = None


def _not_kept(error: OSError) -> str:
    return f"packed weights are not kept: {error.filename or 'the cache'}: {error.strerror}"


def _files(directory: Path) -> list[Path]:
    try:
        return [p for p in directory.iterdir() if p.name.endswith((SUFFIX, PART))]
    except OSError:
        return []
