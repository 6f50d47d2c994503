"""What a distilling run is asked for, and whether teacher and student speak alike.

Not here: the run (distill.py).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from outdraft.config import Quant
from outdraft.errors import PairingError, TrainingError
from outdraft.speculate.draft_model import check_vocabularies
from outdraft.text.chat import template_source
from outdraft.train.traces import Writer

LEAST_HELDOUT = 4


@dataclass(frozen=True, slots=True)
class DistillSettings:
    """What the user asks for. `steps`, where given, is the length of each stage of training.

    Raises:
        TrainingError: a value is impossible.
    """

    student: str
    data: tuple[str, ...]
    teacher: str | None = None
    heldout: tuple[str, ...] = ()
    traces: str = "auto"
    rounds: int = 3
    beta: float = 0.5
    quant: Quant = "auto"
    minutes: float = 15.0
    steps: int | None = None
    batch: int = 8
    lr: float = 1e-3
    n_heldout: int = 64
    max_tokens: int = 1024
    new_tokens: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("minutes", 1e-3, 1e6),
            ("steps", 1, 1e9),
            ("batch", 1, 4096),
            ("rounds", 0, 1000),
            ("beta", 0, 1),
            ("lr", 1e-9, 1),
            ("n_heldout", LEAST_HELDOUT, 1e6),
            ("max_tokens", 8, 1e6),
            ("new_tokens", 1, 1e6),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise TrainingError(f"{name} is {value}", f"use {low:g} to {high:g}")
        if self.traces not in ("auto", "data", "teacher"):
            raise TrainingError(f"traces is {self.traces!r}", "use auto, data or teacher")
        if self.teacher is None and self.traces == "teacher":
            raise TrainingError("there is no teacher to write traces", "give --teacher")


def check_pair(teacher: Path, student: Path) -> None:
    """Token ids and conversations must mean the same to both.

    Raises:
        PairingError: they do not, with the first difference.
    """
    check_vocabularies(Writer.load(teacher).tokenizer, Writer.load(student).tokenizer)
    ours, theirs = template_source(student) or "", template_source(teacher) or ""
    if ours != theirs:
        at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), -1)
        at = min(len(ours), len(theirs)) if at < 0 else at
        raise PairingError(
            f"the chat templates differ from character {at + 1} on: {theirs[at : at + 20]!r} for "
            f"the teacher and {ours[at : at + 20]!r} for the student",
            "copy the teacher's chat template to the student",
        )


def digest_of(settings: DistillSettings) -> str:
    """Of the contents of all data files."""
    digest = hashlib.sha256()
    for name in (*settings.data, *settings.heldout):
        try:
            digest.update(Path(name).read_bytes())
        except OSError as error:
            raise TrainingError(f"{name} cannot be read: {error}", "check --data") from error
    return digest.hexdigest()[:16]
