"""What tuning does differently where the drafter is the target's own head.

Here: finding it, the engine with a candidate, the objective, candidates as stitched copies of the
target. Not here: the stages, which are those of any drafter (tune.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import PairingError
from outdraft.models.qwen3_5_config import MODEL_TYPES, Qwen35Config
from outdraft.speculate.mtp import find_head
from outdraft.train.native import HeadTuning
from outdraft.train.served import head_leaves, served_hybrid
from outdraft.train.stitch import head_tensors, write_stitched
from outdraft.train.tune_settings import TuneSettings
from outdraft.train.tuning import Texts
from outdraft.train.weights import make_trainable
from outdraft.weights.config import read_config


def has_own_head(target: Path) -> bool:
    """Whether a target is of a family with native heads."""
    return read_config(target).get("model_type") in MODEL_TYPES


def find_own_head(target: Path, assistant: str | None) -> Path:
    """The stock drafter: the target itself.

    Raises:
        PairingError: it has no head that can be used, or another drafter was named.
        TrainingError: the head is not stored in floating point.
    """
    if assistant is not None:
        raise PairingError(
            f"{target} is tuned with the head in its checkpoint", "leave --assistant out"
        )
    if reason := find_head(target, Qwen35Config.from_hf(read_config(target))):
        raise PairingError(
            f"{target} has no MTP head: {reason}",
            "put mtp.* tensors back from the model it was made of",
        )
    head_tensors(target)
    return target


def head_engine(path: Path, config: EngineConfig, n: int) -> LLM:
    """A target, or a stitched copy, that drafts n tokens with its head."""
    return LLM(str(path), replace(config, spec_type="mtp", draft_n=n))


def head_objective(
    target: Path,
    engine: EngineConfig,
    texts: Sequence[tuple[Sequence[int], int]],
    batch: int,
    n_steps: int,
    settings: TuneSettings,
    dtype: torch.dtype,
) -> Callable[[], HeadTuning]:
    """Makes objectives that begin with the stock head; see `HeadTuning`."""
    served, stock = served_hybrid(target, engine), head_leaves(target)

    def make() -> HeadTuning:
        return HeadTuning(
            served,
            make_trainable(stock, torch.device("cpu")),
            Texts.of(texts),
            batch=batch,
            n_steps=n_steps,
            loss=settings.loss,
            seed=settings.seed,
            dtype=dtype,
        )

    return make


def export_head(directory: Path, target: Path, stored: Mapping[str, Tensor]) -> None:
    """A candidate: the target with the head in a checkpoint of the training."""
    names = head_tensors(target)
    write_stitched(
        directory, target, {name: stored[own] for own, name in names.items() if own in stored}
    )
