"""The training loop that all phases share: steps, loss log, checkpoints, stopping and resuming.

Here: everything that does not depend on what is trained. Not here: the objectives (pretrain.py,
gemma4_assistant.py) and the order of the phases (recipe.py).
"""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor

from outdraft.errors import TrainingError
from outdraft.train.checkpoint import CheckpointStore, restore
from outdraft.train.optimiser import Optimiser, OptimiserConfig, schedule

LOG_NAME = "loss.jsonl"
_TIMED_STEPS = 8


class TrainingStopped(Exception):
    """Training was asked to stop and has: what was reached is saved and can be resumed."""


class StopFlag:
    """Set by SIGINT or SIGTERM; the work in progress ends at the next safe place."""

    def __init__(self) -> None:
        self.requested = False

    def check(self) -> None:
        """Raises TrainingStopped once a stop was asked for."""
        if self.requested:
            raise TrainingStopped

    @contextmanager
    def installed(self) -> Iterator["StopFlag"]:
        """Catch the signals within the block; only possible in the main thread."""
        signals = (signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, self._request) for number in signals]
        try:
            yield self
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


class Objective(Protocol):
    """What a phase trains. The loss of a step depends on the weights and the step alone."""

    weights: dict[str, Tensor]
    tokens_per_step: int

    def loss(self, step: int) -> Tensor:
        """The loss of a step's batch, a scalar with a graph back to the weights."""
        ...


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase is. `loss` is None before the first step."""

    phase: str
    step: int
    n_steps: int
    loss: float | None = None
    tokens_per_s: float = 0.0


Report = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Phase:
    """One phase of a run: its name, length, checkpoints and optimiser."""

    name: str
    n_steps: int
    save_every: int
    store: CheckpointStore
    optimiser: OptimiserConfig
    iteration_dtype: torch.dtype

    @property
    def log_path(self) -> Path:
        """The loss of every step, one JSON object a line."""
        return self.store.directory / LOG_NAME


def run_phase(phase: Phase, objective: Objective, report: Report, stop: StopFlag) -> None:
    """Train to the end of the phase, from its last checkpoint if there is one.

    Raises:
        TrainingStopped: a stop was asked for; a checkpoint of the last step is saved.
        TrainingError: the checkpoint is another run's, the disk is full, or the loss is not a
            finite number.
    """
    optimiser = Optimiser(objective.weights, phase.optimiser, phase.iteration_dtype)
    state = objective.weights | optimiser.state
    step = max(phase.store.steps(), default=0)
    if step:
        restore(phase.store.load(step), state)
    phase.store.directory.mkdir(parents=True, exist_ok=True)
    truncate_log(phase.log_path, step)
    report(Progress(phase.name, step, phase.n_steps))
    with deterministic(), phase.log_path.open("a", encoding="utf-8") as log:
        while step < phase.n_steps:
            start = time.perf_counter()
            loss = _update(phase, objective, optimiser, step)
            step += 1
            log.write(json.dumps({"step": step, "loss": loss}) + "\n")
            log.flush()
            stopping = stop.requested  # asked once: a signal may come while the step is saved
            if step % phase.save_every == 0 or step == phase.n_steps or stopping:
                os.fsync(log.fileno())
                phase.store.save(step, state)
            rate = objective.tokens_per_step / (time.perf_counter() - start)
            report(Progress(phase.name, step, phase.n_steps, loss, rate))
            if stopping:
                raise TrainingStopped


def _update(phase: Phase, objective: Objective, optimiser: Optimiser, step: int) -> float:
    loss = objective.loss(step)
    value = loss.item()
    if not math.isfinite(value):
        raise TrainingError(
            f"the loss of {phase.name} is {value} at step {step + 1}",
            "look at the text for long runs of one token, or use another --seed",
        )
    loss.backward()  # type: ignore[no-untyped-call]
    optimiser.step(step, schedule(step, phase.n_steps, phase.optimiser))
    return value


def seconds_per_step(objective: Objective, phase: Phase) -> float:
    """The time of a step, when nothing else slows the machine: the least of a few.

    It trains the objective's weights: give it an objective of its own.
    """
    optimiser = Optimiser(objective.weights, phase.optimiser, phase.iteration_dtype)
    times = []
    with deterministic():
        for step in range(_TIMED_STEPS):
            start = time.perf_counter()
            _update(phase, objective, optimiser, step)
            times.append(time.perf_counter() - start)
    return min(times)


def read_log(path: Path) -> list[float]:
    """The losses of a log in step order; a line that was cut off by a kill ends it."""
    losses = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []:
        if not line.endswith("\n"):
            break
        losses.append(float(json.loads(line)["loss"]))
    return losses


def truncate_log(path: Path, step: int) -> None:
    """Drop what was logged after `step`: it is computed again, with the same result.

    Raises:
        TrainingError: the log is shorter than the checkpoint.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    if len(lines) < step:
        raise TrainingError(
            f"{path} ends at step {len(lines)}, the last checkpoint is of step {step}",
            "start over with --fresh",
        )
    if len(lines) > step:
        with path.open("r+b") as file:
            file.truncate(sum(len(line.encode()) for line in lines[:step]))


@contextmanager
def deterministic() -> Iterator[None]:
    """Within the block, operations give the same bits every time (where PyTorch knows how)."""
    settings: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # a twentieth of the time, to find bugs elsewhere
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        settings.fill_uninitialized_memory = before[1]
