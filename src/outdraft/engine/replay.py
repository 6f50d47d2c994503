"""What a learner is given of finished requests, and how much of it is kept.

Here: plain data without tensors. Tokens alone are kept: the target's states are computed again from
them when they are needed, which costs idle time instead of a thousand times the memory. Not here:
the learner's process (learning.py), learning (train/learner.py).
"""

from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from outdraft.engine.sequence import Sequence as Request
from outdraft.request import FinishReason

OVERHEAD_BYTES = 400  # of a text beside its tokens
LEAST_OUTPUT = 8  # tokens; shorter answers say too little


@dataclass(frozen=True, slots=True)
class ServedText:
    """The tokens of a request that has ended. `version` is the drafter's at its end."""

    tokens: "array[int]"
    n_prompt: int
    version: int = 0

    @property
    def n_bytes(self) -> int:
        """In memory, about."""
        return len(self.tokens) * self.tokens.itemsize + OVERHEAD_BYTES

    @property
    def n_output(self) -> int:
        """Tokens that the target wrote."""
        return len(self.tokens) - self.n_prompt


def served_text(request: Request, version: int) -> ServedText | None:
    """What there is to learn from a request, if anything is and it may be kept."""
    n_prompt = len(request.request.prompt_tokens)
    if not request.request.store or len(request.tokens) - n_prompt < LEAST_OUTPUT:
        return None
    if request.finish_reason not in (FinishReason.STOP, FinishReason.LENGTH):
        return None
    return ServedText(array("i", request.tokens), n_prompt, version)


@dataclass(slots=True)
class ReplayBuffer:
    """The newest texts, of at most so many bytes; the oldest are forgotten."""

    max_bytes: int
    texts: deque[ServedText] = field(default_factory=deque)
    n_bytes: int = 0
    n_tokens: int = 0
    n_added: int = 0

    def add(self, text: ServedText) -> Sequence[ServedText]:
        """Keep a text, unless it is larger than all that may be kept; those that went for it."""
        if text.n_bytes > self.max_bytes:
            return ()
        self.n_added += 1
        self.texts.append(text)
        self._count(text, 1)
        gone = []
        while self.n_bytes > self.max_bytes:
            gone.append(self.texts.popleft())
            self._count(gone[-1], -1)
        return gone

    def since(self, n_added: int) -> list[ServedText]:
        """Texts that were added after so many, and are still there."""
        n = min(self.n_added - n_added, len(self.texts))
        return [self.texts[i] for i in range(len(self.texts) - n, len(self.texts))]

    def _count(self, text: ServedText, sign: int) -> None:
        self.n_bytes += sign * text.n_bytes
        self.n_tokens += sign * len(text.tokens)


@dataclass(slots=True)
class LearnStats:
    """How learning is. Counts are since the start.

    Attributes:
        state: `waiting` (for texts, or for idle time), `learning`, `paused` while requests run,
            `restarting` or `failed`.
        version: of the drafter in use: 0 is the one that was loaded, others count candidates.
        n_texts, n_tokens, n_bytes: kept now.
        n_steps: updates of the weights.
        seconds: of processor time that the learner took.
        n_candidates: drafters that were compared with the one in use.
        n_swaps: those that were better and came into use.
        n_refused: those that were not.
        n_rollbacks: times one came back that had been in use before.
        n_restarts: times the learner's process was started anew because it had died.
        live, candidate: tokens per pass of the last comparison on texts held out: of the drafter
            in use then, and of the new one.
    """

    state: str = "waiting"
    version: int = 0
    n_texts: int = 0
    n_tokens: int = 0
    n_bytes: int = 0
    n_steps: int = 0
    seconds: float = 0.0
    n_candidates: int = 0
    n_swaps: int = 0
    n_refused: int = 0
    n_rollbacks: int = 0
    n_restarts: int = 0
    live: float | None = None
    candidate: float | None = None
    last_error: str = ""
