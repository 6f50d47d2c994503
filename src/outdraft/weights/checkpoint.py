"""The tensors of a model directory by name, from one safetensors file or several.

Here: finding the files, the shard index, a checked list of tensors, reading one at a time. Not
here: which tensors a model expects (load). Pickle files are never opened.
"""

from collections.abc import Callable
from io import FileIO
from pathlib import Path
from typing import Any, Self

import torch

from outdraft.errors import ModelError, WeightsError
from outdraft.weights.config import CONFIG_NAME, read_json
from outdraft.weights.header import DOWNLOAD_AGAIN, TensorSpec, read_header

SINGLE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
SUFFIX = ".safetensors"
_PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")


class Checkpoint:
    """All tensors of a model directory; headers are checked on opening, data is read on demand."""

    def __init__(self, directory: Path, specs: dict[str, TensorSpec]) -> None:
        self.directory = directory
        self._specs = specs
        self._open_files: dict[str, FileIO] = {}
        self.on_read: Callable[[int], None] | None = None
        """Told the number of bytes after every read."""

    @classmethod
    def open(cls, directory: Path) -> Self:
        """Looks for model.safetensors, then its shard index, then a single *.safetensors.

        Raises:
            WeightsError: no weights, several files without an index, a damaged file, or an index
                that does not agree with the shards.
        """
        if (directory / SINGLE_NAME).is_file():
            return cls(directory, read_header(directory / SINGLE_NAME))
        if (directory / INDEX_NAME).is_file():
            return cls(directory, _read_shards(directory))
        found = sorted(directory.glob(f"*{SUFFIX}"))
        if len(found) == 1:
            return cls(directory, read_header(found[0]))
        if found:
            raise WeightsError(
                f"{directory} has {len(found)} safetensors files but no {INDEX_NAME}",
                "copy the index from where the weights came from into the same directory",
            )
        raise _no_weights(directory)

    def __contains__(self, name: str) -> bool:
        return name in self._specs

    def names(self) -> list[str]:
        """Names of all tensors, as they stand in the files."""
        return list(self._specs)

    def files(self) -> list[str]:
        """Names of the files that hold tensors."""
        return sorted({spec.file for spec in self._specs.values()})

    def spec(self, name: str) -> TensorSpec:
        """Shape, dtype and file of one tensor; `name` must be one of `names()`."""
        return self._specs[name]

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in the file's dtype, in memory of its own.

        Raises:
            WeightsError: the file has changed or gone since the checkpoint was opened.
        """
        spec = self._specs[name]
        return self._read(name, 0, spec.n_params).view(spec.shape)

    def rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows `first` onwards of a tensor of at least one dimension; see `get`."""
        spec = self._specs[name]
        assert first >= 0 and first + count <= spec.shape[0]
        width = spec.n_params // max(1, spec.shape[0])
        return self._read(name, first * width, count * width).view(count, *spec.shape[1:])

    def flat_rows(self, name: str, first: int, count: int) -> torch.Tensor:
        """Rows of a tensor [E, N, K] seen as [E * N, K]; see `get`."""
        width = self._specs[name].shape[-1]
        return self._read(name, first * width, count * width).view(count, width)

    def _read(self, name: str, first: int, count: int) -> torch.Tensor:
        """Elements of a tensor.

        Read, not mapped: mapped pages would count as this process's memory until the system wants
        them back, may be unaligned, and end the process when the file shrinks.
        """
        spec = self._specs[name]
        if count == 0:
            return torch.empty(0, dtype=spec.dtype)
        path = self.directory / spec.file
        buffer = bytearray(count * spec.dtype.itemsize)
        try:
            if spec.file not in self._open_files:
                self._open_files[spec.file] = path.open("rb", buffering=0)
            stream = self._open_files[spec.file]
            stream.seek(spec.begin + first * spec.dtype.itemsize)
            view, done = memoryview(buffer), 0
            while done < len(buffer):
                n_read = stream.readinto(view[done:])
                if not n_read:
                    raise WeightsError(
                        f"{path}: {name!r} cannot be read: it ends too early", DOWNLOAD_AGAIN
                    )
                done += n_read
        except OSError as error:
            raise WeightsError(
                f"{path}: {name!r} cannot be read: {error}", DOWNLOAD_AGAIN
            ) from error
        if self.on_read is not None:
            self.on_read(len(buffer))
        return torch.frombuffer(buffer, dtype=spec.dtype)

    @property
    def n_bytes(self) -> int:
        """Size of all tensors in the files, bytes."""
        return sum(spec.n_bytes for spec in self._specs.values())


def _no_weights(directory: Path) -> WeightsError:
    pickles = sorted(path.name for pattern in _PICKLE_PATTERNS for path in directory.glob(pattern))
    if pickles:
        return WeightsError(
            f"{directory} has only pickle files ({pickles[0]}), which can run code when opened "
            "and are never opened here",
            "use a safetensors version of the model, or convert it to safetensors",
        )
    if (directory / CONFIG_NAME).is_file():
        return WeightsError(
            f"{directory} has a {CONFIG_NAME} but no weights",
            "download the model's *.safetensors files into it",
        )
    return WeightsError(
        f"{directory} has no safetensors weights", "give a directory with *.safetensors files"
    )


def _read_shards(directory: Path) -> dict[str, TensorSpec]:
    files = _read_index(directory / INDEX_NAME)
    specs: dict[str, TensorSpec] = {}
    for file in sorted(set(files.values())):
        for name, spec in read_header(_shard_path(directory, file)).items():
            if files.get(name) != file:
                listed = f"lists it in {files[name]}" if name in files else "does not list it"
                raise WeightsError(
                    f"{file} holds {name!r}, but {INDEX_NAME} {listed}", _mixed_hint(directory)
                )
            specs[name] = spec
    absent = [name for name in files if name not in specs]
    if absent:
        raise WeightsError(
            f"{INDEX_NAME} lists {absent[0]!r} in {files[absent[0]]}, which does not hold it "
            f"({len(absent)} such tensors)",
            _mixed_hint(directory),
        )
    return specs


def _mixed_hint(directory: Path) -> str:
    return f"index and shards are of different downloads: download all of {directory} again"


def _shard_path(directory: Path, file: str) -> Path:
    path = directory / file
    if not path.is_file():
        raise WeightsError(
            f"the shard {path} is missing", "download it into the directory of the others"
        )
    return path


def _read_index(path: Path) -> dict[str, str]:
    """Tensor name to file name. Anything but a plain file name could point out of the directory."""
    try:
        weight_map = read_json(path, "the shard index").get("weight_map")
    except ModelError as error:
        raise WeightsError(error.message, error.hint) from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f'{path} has no "weight_map"', DOWNLOAD_AGAIN)
    for name, file in weight_map.items():
        if not _is_plain_file_name(file):
            raise WeightsError(
                f"{path}: the file {file!r:.80} of {name!r:.80} is not a plain *.safetensors name",
                "do not use this model: its index points outside its directory",
            )
    return weight_map


def _is_plain_file_name(file: Any) -> bool:
    return (
        isinstance(file, str)
        and file.endswith(SUFFIX)
        and not file.startswith(".")
        and file.isprintable()
        and not any(separator in file for separator in "/\\:")
    )
