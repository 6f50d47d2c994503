"""The directory of work beside an output, and what was decided once in it.

A run leaves every result there, so that the same command goes on after a kill, and the output
appears whole. Here: its name, its decisions, whether it belongs to this command. Not here: what is
computed (tune.py, distill.py, hybrid_run.py); `outdraft train` works in its output itself (run.py).
"""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from outdraft.errors import TrainingError
from outdraft.models.registry import DTYPES
from outdraft.train.checkpoint import replace_json
from outdraft.train.weights import fastest_dtype
from outdraft.weights.config import read_json

RUN_NAME = "run.json"


def work_beside(out: Path, ending: str) -> Path:
    """Where a run for `out` works.

    Raises:
        TrainingError: something is at `out` already.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise TrainingError(f"{out} exists already", "choose another --out")
    return out.parent / f".{out.name}.{ending}"


def open_work(
    work: Path, settings: Mapping[str, Any], *, fresh: bool, **more: Any
) -> dict[str, Any]:
    """What was decided in `work` so far; it is made if it is not there, anew if `fresh`.

    Decided at the beginning are the settings, the type of products and the number of threads,
    which is set: another one adds in another order.

    Args:
        settings: what the run has to have been asked for.
        more: further decisions of a new run.

    Raises:
        TrainingError: the run in it was asked for differently.
    """
    if fresh:
        shutil.rmtree(work, ignore_errors=True)
    wanted = {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}
    if (work / RUN_NAME).exists():
        decided = read_json(work / RUN_NAME, "run")
        _check_same(work, wanted, decided["settings"])
    else:
        work.mkdir(parents=True, exist_ok=True)
        dtype = str(fastest_dtype(torch.device("cpu"))).removeprefix("torch.")
        decided = {"settings": wanted, "dtype": dtype, "threads": torch.get_num_threads(), **more}
        keep_decided(work, decided)
    torch.set_num_threads(decided["threads"])
    return decided


def keep_decided(work: Path, decided: Mapping[str, Any]) -> None:
    """Write what was decided."""
    replace_json(work / RUN_NAME, decided)


def decided_dtype(decided: Mapping[str, Any]) -> torch.dtype:
    """The type of products."""
    return DTYPES[decided["dtype"]]


def _check_same(work: Path, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
    for key, value in wanted.items():
        if key not in stored or stored[key] != value:
            what = f"{key} = {stored.get(key)!r:.80}, not {value!r:.80}"
            raise TrainingError(
                f"{work} holds a run with other settings or data: "
                f"{'files have changed' if key == 'digest' else what}",
                "repeat its settings to resume it, or start over with --fresh",
            )
