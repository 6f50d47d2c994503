"""What a user asks of tuning, checked, and a digest of the data. Not here: the run (tune.py)."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from outdraft.config import Quant
from outdraft.errors import TrainingError
from outdraft.train.losses import DRAFT_LOSSES

LEAST_HELDOUT = 8
NEW = "new"
"""In place of a stock drafter: make one."""


@dataclass(frozen=True, slots=True)
class TuneSettings:
    """What the user asks for. `steps` and `samples`, where given, replace what fits in `minutes`.

    `assistant` is a stock drafter's directory or name, None for the one beside the target, or
    "new"; `adapter` is added to the target.

    Raises:
        TrainingError: a value is impossible.
    """

    target: str
    data: tuple[str, ...]
    heldout: tuple[str, ...] = ()
    assistant: str | None = None
    adapter: str | None = None
    quant: Quant = "auto"
    minutes: float = 15.0
    steps: int | None = None
    samples: int | None = None
    loss: str = "kl"
    draft_n: int | None = None
    n_heldout: int = 48
    prompt_tokens: int = 64
    new_tokens: int = 128
    seed: int = 0
    force: bool = False

    def __post_init__(self) -> None:
        for name, low, high in (
            ("minutes", 1e-3, 1e6),
            ("steps", 1, 1e9),
            ("samples", 1, 1e9),
            ("draft_n", 2, 16),
            ("n_heldout", LEAST_HELDOUT * 2, 1e6),
            ("prompt_tokens", 2, 1e6),
            ("new_tokens", 8, 1e6),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"{name} is {value}", f"use {low:g} to {high:g}")
        if self.loss not in DRAFT_LOSSES:
            raise TrainingError(f"loss is {self.loss!r}", f"use one of {', '.join(DRAFT_LOSSES)}")

    @property
    def new(self) -> bool:
        """Whether there is no stock drafter to start from."""
        return self.assistant == NEW


def data_digest(settings: TuneSettings) -> str:
    """Of the contents of all data files.

    Raises:
        TrainingError: one cannot be read.
    """
    digest = hashlib.sha256()
    for name in (*settings.data, *settings.heldout):
        try:
            digest.update(Path(name).read_bytes())
        except OSError as error:
            raise TrainingError(f"{name} cannot be read: {error}", "check --data") from error
    return digest.hexdigest()[:16]
