"""The state of a training phase on disk: weights, optimiser state, step; safetensors and JSON only.

A checkpoint is a directory `step-00000100` that appears whole or not at all. Older ones are removed
after a newer one is on disk, so a kill or a full disk at any moment leaves the last one. No random
state is stored because there is none: batches depend on the seed and the step alone. Not here: the
loss log (trainer.py), the finished model (export.py).
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import OutdraftError, TrainingError
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_json
from outdraft.weights.save import new_directory, write_json, write_weights

STATE_NAME = "state.json"
KEPT = 2
_NAME = re.compile(r"step-(\d{8})")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """A digest of everything that has to be the same for a run to go on."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class CheckpointStore:
    """The checkpoints of one phase.

    `keep_every`: checkpoints of steps that it divides are never removed (0: none of them).
    """

    directory: Path
    fingerprint: str
    keep_every: int = 0

    def steps(self) -> list[int]:
        """Steps of the checkpoints on disk, oldest first."""
        found = (_NAME.fullmatch(path.name) for path in self.directory.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def kept_steps(self) -> list[int]:
        """Those never removed, and the last."""
        steps = self.steps()
        kept = [step for step in steps if self.keep_every and step % self.keep_every == 0]
        return sorted({*kept, *steps[-1:]})

    def path(self, step: int) -> Path:
        """The directory of a step's checkpoint."""
        return self.directory / f"step-{step:08d}"

    def save(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the checkpoint after `step` updates and remove those no longer needed.

        Raises:
            TrainingError: it could not be written; the ones before are untouched.
        """
        if self.path(step).exists():  # a resumed run that was stopped before its first update
            return
        with new_directory(self.path(step)) as unfinished:
            write_weights(unfinished, tensors)
            write_json(unfinished / STATE_NAME, {"step": step, "fingerprint": self.fingerprint})
        for old in self.steps()[:-KEPT]:
            if not (self.keep_every and old % self.keep_every == 0):
                shutil.rmtree(self.path(old))

    def load(self, step: int) -> dict[str, Tensor]:
        """The tensors of a checkpoint.

        Raises:
            TrainingError: it is damaged, or belongs to a run with other settings.
        """
        path = self.path(step)
        try:
            state = read_json(path / STATE_NAME, "checkpoint state")
            checkpoint = Checkpoint.open(path)
            tensors = {name: checkpoint.get(name).clone() for name in checkpoint.names()}
        except OutdraftError as error:
            raise TrainingError(
                f"the checkpoint {path} is damaged: {error.message}",
                "remove this directory to go on from the one before it",
            ) from error
        if state.get("fingerprint") != self.fingerprint:
            raise TrainingError(
                f"the checkpoint {path} belongs to a run with other settings",
                "repeat the settings of that run, choose another --out, or start over with --fresh",
            )
        return tensors


def replace_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file so that it is the old or the new one at any moment.

    Raises:
        TrainingError: it could not be written; the old one is untouched.
    """
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise TrainingError(
            f"{path} could not be written: {error}", "free some space or choose another --out"
        ) from error


def restore(stored: Mapping[str, Tensor], into: Mapping[str, Tensor]) -> None:
    """Copy stored tensors into live ones of the same names.

    Raises:
        TrainingError: names or shapes differ.
    """
    shapes = {name: tensor.shape for name, tensor in stored.items()}
    wanted = {name: tensor.shape for name, tensor in into.items()}
    if shapes != wanted:
        different = sorted(set(shapes.items()) ^ set(wanted.items()))[0][0]
        raise TrainingError(
            f"the checkpoint does not fit the model: {different} differs",
            "it was written by another version; start over with --fresh",
        )
    with torch.no_grad():
        for name, tensor in into.items():
            tensor.copy_(stored[name])
