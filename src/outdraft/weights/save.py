"""Writing a checkpoint so that it is there completely or not at all.

Here: the atomic directory, sharding, the index. Not here: what a trainer stores besides weights
(train) and quantising (quantise).
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from outdraft.errors import TrainingError
from outdraft.weights.checkpoint import INDEX_NAME, SINGLE_NAME
from outdraft.weights.config import CONFIG_NAME

DEFAULT_SHARD_BYTES = 4_000_000_000
_METADATA = {"format": "pt"}  # what transformers and vLLM require in the header


def save_checkpoint(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    config: Mapping[str, Any],
    *,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    extra_files: Sequence[Path] = (),
) -> None:
    """Writes config.json, the weights and copies of `extra_files` into a new directory.

    Raises:
        TrainingError: `directory` is there already and not empty, or writing failed (disk full, no
            permission); then nothing of it is left.
    """
    with new_directory(directory) as unfinished:
        write_json(unfinished / CONFIG_NAME, config)
        write_weights(unfinished, tensors, max_shard_bytes)
        for path in extra_files:
            shutil.copyfile(path, unfinished / path.name)


@contextmanager
def new_directory(final: Path) -> Iterator[Path]:
    """A temporary directory that becomes `final`, synced to disk, when the block ends well.

    An existing `final` is never touched (unless empty): a trainer writes a new directory for every
    checkpoint and removes old ones afterwards, so a kill at any moment leaves the last one whole.

    Raises:
        TrainingError: as `save_checkpoint`.
    """
    try:
        if final.exists() and (not final.is_dir() or any(final.iterdir())):
            raise TrainingError(
                f"{final} exists already", "choose another directory, or remove this one first"
            )
        final.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            prefix=f".{final.name}.", dir=final.parent, ignore_cleanup_errors=True
        ) as name:
            unfinished = Path(name) / "unfinished"
            unfinished.mkdir()
            yield unfinished
            for path in [*unfinished.rglob("*"), unfinished]:
                _sync(path)
            unfinished.replace(final)
            _sync(final.parent)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{final} could not be written: {error}",
            "free some space or choose another directory; earlier checkpoints are untouched",
        ) from error


def write_weights(
    directory: Path,
    tensors: Mapping[str, torch.Tensor],
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """model.safetensors in `directory`, or shards and their index above `max_shard_bytes`."""
    shards = _split(tensors, max_shard_bytes)
    if len(shards) == 1:
        _save(directory / SINGLE_NAME, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(directory / file, shard)
        weight_map.update(dict.fromkeys(shard, file))
    total_bytes = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_json(directory / INDEX_NAME, index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """`value` as indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _split(
    tensors: Mapping[str, torch.Tensor], max_shard_bytes: int
) -> list[dict[str, torch.Tensor]]:
    """Fills shards in order; a tensor larger than a shard gets one of its own."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    used_bytes = 0
    for name, tensor in tensors.items():
        if shards[-1] and used_bytes + tensor.nbytes > max_shard_bytes:
            shards.append({})
            used_bytes = 0
        shards[-1][name] = tensor
        used_bytes += tensor.nbytes
    return shards


def _save(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    # safetensors refuses tensors that share storage or are not contiguous
    owned = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in tensors.items()
    }
    path.touch()
    mode = path.stat().st_mode
    save_file(owned, path, metadata=_METADATA)
    path.chmod(mode)  # safetensors makes it readable by its owner only; the umask decides here


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
