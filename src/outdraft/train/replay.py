"""The texts that a learner learns from and those it compares drafters by; no text is both.

Which side a text is on is decided by a hash of its prompt, so what is written again after the same
prompt stays on one side. Texts whose drafts fail more often are drawn more often. Here: plain
bookkeeping. Not here: states and losses (live.py), the engine's own buffer (engine/replay.py).
"""

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from outdraft.engine.replay import ReplayBuffer, ServedText
from outdraft.speculate.stats import DraftStats
from outdraft.train.live import Piece, pieces

HELDOUT_PART = 4
"""One text in so many is held out."""
MOST_HELDOUT = 32
"""As many of them, the newest, are compared by."""
LEAST = 8
"""Texts on each side before anything is learned."""


@dataclass(slots=True, eq=False)
class Learned:
    """A text, and what drafters would have done in it, by their number."""

    served: ServedText
    pieces: list[Piece]
    scores: dict[int, DraftStats] = field(default_factory=dict)

    @property
    def difficulty(self) -> float:
        """Passes a token, by the newest drafter it was replayed with."""
        if not self.scores:
            return 1.0
        newest = self.scores[max(self.scores)]
        return newest.n_passes / max(1, newest.n_emitted)


def is_heldout(prompt: Sequence[int]) -> bool:
    """Which side a text after this prompt is on."""
    digest = hashlib.sha256(array("i", prompt).tobytes()).digest()
    return digest[0] % HELDOUT_PART == 0


@dataclass(slots=True)
class Split:
    """The texts there are, of at most so many bytes."""

    max_bytes: int
    train: list[Learned] = field(default_factory=list)
    heldout: list[Learned] = field(default_factory=list)
    n_fresh: int = 0
    """Tokens to learn from that came since a round began."""
    _buffer: ReplayBuffer = field(init=False)

    def __post_init__(self) -> None:
        self._buffer = ReplayBuffer(self.max_bytes)

    def add(self, text: ServedText) -> Learned | None:
        """A new text; None where it has nothing to offer."""
        found = Learned(text, pieces(text.tokens, text.n_prompt))
        if not found.pieces or text.n_bytes > self.max_bytes:
            return None
        side = self.heldout if is_heldout(text.tokens[: text.n_prompt]) else self.train
        side.append(found)
        if side is self.train:
            self.n_fresh += text.n_output
        gone = {id(old) for old in self._buffer.add(text)}
        if gone:
            for texts in (self.train, self.heldout):
                texts[:] = [t for t in texts if id(t.served) not in gone]
        return found

    @property
    def enough(self) -> bool:
        """Whether both sides have what it takes."""
        return min(len(self.train), len(self.heldout)) >= LEAST

    def newest_heldout(self) -> list[Learned]:
        """Those to compare by."""
        return self.heldout[-MOST_HELDOUT:]

    def draw(self, n: int, generator: torch.Generator) -> list[Piece]:
        """Pieces to learn from, with replacement: hard texts, and long ones, more often."""
        texts = self.train
        odds = torch.tensor([t.difficulty * len(t.pieces) for t in texts])
        chosen = torch.multinomial(odds, n, replacement=True, generator=generator).tolist()
        parts = torch.rand(n, generator=generator).tolist()
        return [
            texts[i].pieces[int(part * len(texts[i].pieces))]
            for i, part in zip(chosen, parts, strict=True)
        ]
