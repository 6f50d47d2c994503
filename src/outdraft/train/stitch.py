"""New values of some tensors in a copy of a model's directory; every other byte stays as it is.

Here: where a head's tensors are in the files, and writing over them. Not here: training.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from outdraft.errors import TrainingError
from outdraft.models import mtp
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.header import TensorSpec, read_header
from outdraft.weights.save import new_directory

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def head_tensors(source: Path) -> dict[str, str]:
    """Canonical name -> name in the checkpoint of every tensor of its head.

    Raises:
        TrainingError: some are not stored as floating-point numbers.
    """
    checkpoint = Checkpoint.open(source)
    names = checkpoint.names()
    prefix = next(p for p in mtp.PREFIXES if any(name.startswith(p) for name in names))
    found = {name.removeprefix(prefix): name for name in names if name.startswith(prefix)}
    for path in sorted(source.glob("*.safetensors")):
        for name, spec in read_header(path).items():
            if name.startswith(prefix) and spec.dtype not in _FLOATS:
                raise TrainingError(
                    f"{name} in {path.name} is stored as {spec.dtype}",
                    "a head is tuned where it is stored in floating point",
                )
    return found


def write_stitched(directory: Path, source: Path, weights: Mapping[str, Tensor]) -> None:
    """A directory like `source` with other values of some tensors, by their names in it.

    Files that hold none of them are symbolic links; `make_whole` puts copies in their place.

    Raises:
        TrainingError: the directory is there already, or cannot be written.
    """
    with new_directory(directory) as unfinished:
        for path in sorted(source.iterdir()):
            if not path.is_file():
                continue
            copy = unfinished / path.name
            specs = read_header(path) if path.suffix == ".safetensors" else {}
            if mine := {name: spec for name, spec in specs.items() if name in weights}:
                shutil.copyfile(path, copy)
                _write_over(copy, mine, weights)
            else:
                copy.symlink_to(path.resolve())


def make_whole(directory: Path) -> None:
    """Put copies in the place of symbolic links.

    Raises:
        TrainingError: the disk is full.
    """
    for path in sorted(directory.iterdir()):
        if path.is_symlink():
            copy = path.with_name(f".{path.name}.unfinished")
            try:
                shutil.copyfile(path, copy)
                copy.replace(path)
            except OSError as error:
                copy.unlink(missing_ok=True)
                raise TrainingError(
                    f"{path} could not be written: {error}", "free some space, then run it again"
                ) from error


def _write_over(file: Path, specs: Mapping[str, TensorSpec], weights: Mapping[str, Tensor]) -> None:
    with file.open("r+b") as stream:
        for name, spec in specs.items():
            weight = weights[name].detach().to(spec.dtype).contiguous()
            assert weight.shape == spec.shape, name
            stream.seek(spec.begin)
            stream.write(weight.view(torch.uint8).numpy().tobytes())
        stream.flush()
        os.fsync(stream.fileno())
