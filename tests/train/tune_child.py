"""A tuning run as a process of its own, to be killed: `python -m tests.train.tune_child ...`.

Arguments: output, target, drafter, data, and whether to save every step slowly.
"""

import sys
import time
from pathlib import Path

import torch

from outdraft.train import tune as tuning_run
from outdraft.train import work
from outdraft.train.trainer import Progress
from outdraft.train.tune import tune
from outdraft.train.tune_settings import TuneSettings


def settings(target: str, assistant: str, data: str) -> TuneSettings:
    """Of a run of seconds."""
    return TuneSettings(
        target=target,
        assistant=assistant,
        data=(data,),
        steps=40,
        samples=32,
        draft_n=2,
        n_heldout=16,
        prompt_tokens=8,
        new_tokens=12,
    )


def show(state: Progress) -> None:
    """Where it is, and slow enough to be killed there."""
    print(state.phase, state.step, flush=True)
    time.sleep(0.01)


if __name__ == "__main__":
    torch.set_num_threads(1)
    tuning_run.is_better = lambda change: True  # type: ignore[assignment]
    work.fastest_dtype = lambda device: torch.float32  # type: ignore[assignment]
    tuning_run._CHUNK = 8
    out, *rest = sys.argv[1:]
    tune(Path(out), settings(*rest), show)
