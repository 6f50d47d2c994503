"""Whether drafting pays, by trying: plain decoding against the chosen lengths, a few steps each.

Costs that were measured apart can be wrong: what a step costs around its passes, a machine that is
busy at times, kernels that are built while it runs. So every now and then a few steps are run the
other way, and their tokens per second are compared with those of the steps just before. Several
such trials decide, each batch size for itself. Not here: which lengths (length.py). No tensors.
"""

from dataclasses import dataclass, field

STEPS = 4  # of a trial, behind one that is not counted
FIRST_WAIT = 6  # steps before the first trials
MOST_WAIT = 512
WAIT_GROWTH = 2.0
FAR = 1.25  # where drafting promises so many times plain decoding,
FAR_WAIT = 8  # the first trials come so many times later
WORSE = 0.85  # a way that is so much worse is tried less often, and not to the end
KEPT = 5  # trials that are looked at
ENOUGH = 3
PROMISED = 2  # as many count as if they had shown what was promised
BETTER = 1.02  # what the other way must gain in the median of the trials


@dataclass(slots=True)
class _Window:
    tokens: int = 0
    seconds: float = 0.0
    steps: int = 0

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass(slots=True)
class Trial:
    """Of one batch size. `plain`: the way that is used now."""

    plain: bool = False
    _wait: float = FIRST_WAIT
    _left: float = FIRST_WAIT
    _trying: bool = False
    _skip: bool = False
    _before: list[tuple[int, float]] = field(default_factory=list)
    _now: _Window = field(default_factory=_Window)
    _gains: list[float] = field(default_factory=list)
    _promise: float = 1.0

    @property
    def trying(self) -> bool:
        """Whether a trial is under way."""
        return self._trying

    @property
    def decodes_plainly(self) -> bool:
        """Whether the next step has no drafts."""
        return self.plain != self._trying

    def observe(self, tokens: int, seconds: float, *, alike: bool, promise: float = 1.0) -> None:
        """A step that was timed.

        Args:
            alike: the lengths that would have been chosen are all 0, so there is nothing to try.
            promise: what drafting should be, of plain decoding.
        """
        self._promise = promise
        if self._trying:
            self._tried(tokens, seconds)
            return
        self._before = [*self._before[1 - STEPS :], (tokens, seconds)]
        if alike and not self.plain:
            return
        self._left -= 1 / FAR_WAIT if promise > FAR and not self.plain else 1
        if self._left <= 0 and len(self._before) == STEPS:
            self._trying, self._skip, self._now = True, True, _Window()

    def _tried(self, tokens: int, seconds: float) -> None:
        if self._skip:
            self._skip = False
            return
        self._now.tokens += tokens
        self._now.seconds += seconds
        self._now.steps += 1
        before = _Window(sum(t for t, _ in self._before), sum(s for _, s in self._before))
        hopeless = 2 * self._now.steps >= STEPS and self._now.rate < WORSE**2 * before.rate
        if self._now.steps < STEPS and not hopeless:
            return
        self._trying, self._before = False, []
        if before.rate > 0:
            self._gains = [*self._gains[1 - KEPT :], self._now.rate / before.rate]
        self._decide()

    def _decide(self) -> None:
        if len(self._gains) < ENOUGH and self._gains and self._gains[-1] < WORSE:
            self._wait *= WAIT_GROWTH**2
        promised = self._promise if self.plain else 1 / self._promise
        gains = sorted([*self._gains, *[promised] * PROMISED])
        middle = gains[len(gains) // 2]
        if len(self._gains) >= ENOUGH:
            if middle > BETTER:
                self.plain = not self.plain
                self._gains = [1 / gain for gain in self._gains if gain > 0]
                self._wait = FIRST_WAIT
            growth = WAIT_GROWTH**2 if middle < WORSE or middle > 1 / WORSE else WAIT_GROWTH
            self._wait = min(MOST_WAIT, self._wait * growth)
        self._left = self._wait


class Trials:
    """Trials by batch size: 1, 2, 3 to 4, 5 to 8 and so on are one each."""

    def __init__(self) -> None:
        self._by_band: dict[int, Trial] = {}

    def of(self, n_sequences: int) -> Trial:
        """That of so many sequences."""
        return self._by_band.setdefault((n_sequences - 1).bit_length(), Trial())
