"""A short training run as a process of its own, to be killed: `python -m tests.train.child DIR`."""

import sys
import time
from pathlib import Path

import torch

from outdraft.models import gemma4
from outdraft.models.gemma4_config import Gemma4Config
from outdraft.train.checkpoint import CheckpointStore, fingerprint
from outdraft.train.presets import TINY
from outdraft.train.pretrain import Pretraining
from outdraft.train.trainer import Phase, Progress, StopFlag, run_phase
from outdraft.train.weights import fresh_weights, make_trainable
from outdraft.train.windows import Windows

N_STEPS = 60


def phase(directory: Path, n_steps: int = N_STEPS) -> Phase:
    """A phase of the tiny target with a checkpoint every seven steps."""
    store = CheckpointStore(directory, fingerprint({"n_steps": n_steps}))
    return Phase("target", n_steps, 7, store, TINY.target_optimiser, torch.float32)


def objective() -> Pretraining:
    """The tiny target on a made-up text."""
    config = Gemma4Config.from_hf(TINY.target_config())
    generator = torch.Generator().manual_seed(0)
    # Low ids are frequent, so there is something to learn.
    text = (3 + 200 * torch.rand(4000, generator=generator) ** 3).to(torch.int32)
    fresh = fresh_weights(gemma4.expected_tensors(config), 0)
    weights = make_trainable(fresh, torch.device("cpu"))
    return Pretraining(config, weights, Windows(text, TINY.context, 0), 2, torch.float32)


def wait(state: Progress) -> None:
    """Slow enough to be killed somewhere in the middle."""
    time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with StopFlag().installed() as stop:
        run_phase(phase(Path(sys.argv[1])), objective(), wait, stop)
