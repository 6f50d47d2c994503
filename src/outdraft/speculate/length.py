"""How many tokens to draft for each sequence of a batch, from measured costs. No tensors.

The rate to maximise is expected tokens over expected seconds of one step. The greedy search adds
the draft row with the largest expected gain until none is left and keeps the best rate on the way,
so that a step in the cost curve does not stop it. Only what was seen up to the first rejection is
used. Not here: measuring time, or drafting.
"""

from dataclasses import dataclass, field

DECAY = 0.98
FADE = 0.99
PRIOR_WEIGHT = 4.0
PROBE_SHARE = 0.01


@dataclass(slots=True)
class CostCurve:
    """Seconds of a pass by (sequences, size), each a running estimate that clips outliers."""

    seconds: dict[int, dict[int, float]] = field(default_factory=dict)

    def observe(self, n_sequences: int, size: int, seconds: float) -> None:
        """One measured pass. A pass above twice the estimate counts as twice the estimate."""
        sizes = self.seconds.setdefault(n_sequences, {})
        old = sizes.get(size)
        sizes[size] = seconds if old is None else old + 0.2 * (min(seconds, 2 * old) - old)

    def at(self, n_sequences: int, size: int) -> float | None:
        """Of the nearest measured batch, with a guess between measured sizes; None if unknown."""
        if not self.seconds:
            return None
        sizes = self.seconds[min(self.seconds, key=lambda n: (abs(n - n_sequences), n))]
        if size in sizes:
            # Fewer rows cost no more: else one disturbed measurement would never be corrected.
            return min(s for n, s in sizes.items() if n >= size)
        below = max((s for s in sizes if s < size), default=None)
        above = min((s for s in sizes if s > size), default=None)
        if below is None:
            return sizes[min(sizes)]
        if above is None:
            # Assumed flat, so that a larger size is tried once and then measured.
            return sizes[below]
        if 2 * (size - below) >= n_sequences:
            # Assumed no dearer, so that it is tried once: a curve with steps would never be found
            # between two measured ends. Batches have many sizes and try some of them.
            return sizes[below]
        share = (size - below) / (above - below)
        return sizes[below] + share * (sizes[above] - sizes[below])


@dataclass(slots=True)
class Acceptance:
    """Decayed counts by draft position: how often it was reached and how often it was kept."""

    tried: list[float]
    kept: list[float]

    @classmethod
    def empty(cls, n_draft_max: int) -> "Acceptance":
        """No observation yet."""
        return cls([0.0] * n_draft_max, [0.0] * n_draft_max)

    def observe(self, n_drafted: int, n_accepted: int) -> None:
        """One block; positions behind the first rejection tell nothing."""
        for j in range(min(n_drafted, n_accepted + 1)):
            self.tried[j] = DECAY * self.tried[j] + 1
            self.kept[j] = DECAY * self.kept[j] + (j < n_accepted)
        if 0 < n_drafted == n_accepted < len(self.tried):
            # One more would have been looked at: what is known of it fades, or a few unlucky
            # drafts would stop it for good.
            self.tried[n_drafted] *= FADE
            self.kept[n_drafted] *= FADE

    def rate(self, j: int, prior: float) -> float:
        """Mean of the Beta posterior at position j."""
        return (self.kept[j] + PRIOR_WEIGHT * prior) / (self.tried[j] + PRIOR_WEIGHT)


class LengthController:
    """Chooses draft lengths and learns from each step. Deterministic given its observations."""

    def __init__(self, n_draft_max: int) -> None:
        self.n_draft_max = n_draft_max
        self.target = CostCurve()
        self.draft = CostCurve()
        self._shared = Acceptance.empty(n_draft_max)
        self._own: dict[str, Acceptance] = {}
        self._total_s = 0.0
        self._probe_s = 0.0

    def close(self, sequence: str) -> None:
        """Forget a sequence."""
        self._own.pop(sequence, None)

    def observe_block(self, sequence: str, n_drafted: int, n_accepted: int) -> None:
        """One sequence's block was verified."""
        own = self._own.setdefault(sequence, Acceptance.empty(self.n_draft_max))
        own.observe(n_drafted, n_accepted)
        self._shared.observe(n_drafted, n_accepted)

    def observe_step(
        self, n_sequences: int, n_rows: int, longest: int, target_s: float, draft_s: float
    ) -> None:
        """Seconds of one decoding step: `longest` draft rows deep, `n_rows` verified."""
        self.target.observe(n_sequences, n_rows, target_s)
        if longest > 0:
            self.draft.seconds.setdefault(n_sequences, {}).setdefault(0, 0.0)
            self.draft.observe(n_sequences, longest, draft_s)
        self._total_s += target_s + draft_s

    def choose(self, sequences: list[str]) -> list[int]:
        """Draft lengths for the sequences that decode in the next step."""
        if not sequences or self.n_draft_max == 0:
            return [0] * len(sequences)
        if len(sequences) not in self.target.seconds.get(len(sequences), {}):
            # A batch of this size was never run plain: without that cost, drafts would look free.
            return [0] * len(sequences)
        lengths = self._best(sequences)
        if any(lengths):
            return lengths
        n = len(sequences)
        extra = self._cost(n, n + 1, 1) - self._cost(n, n, 0)
        if self._probe_s + extra <= PROBE_SHARE * self._total_s:
            self._probe_s += max(extra, 0.0)
            return [1, *lengths[1:]]
        return lengths

    def _best(self, sequences: list[str]) -> list[int]:
        n = len(sequences)
        gains = [self._gains(s) for s in sequences]
        lengths = [0] * n
        expected, rows = float(n), n
        best, best_rate = list(lengths), expected / self._cost(n, rows, 0)
        while open_ := [i for i in range(n) if lengths[i] < self.n_draft_max]:
            i = open_[0]
            for other in open_[1:]:
                if gains[other][lengths[other]] > gains[i][lengths[i]]:
                    i = other
            expected += gains[i][lengths[i]]
            lengths[i] += 1
            rows += 1
            rate = expected / self._cost(n, rows, max(lengths))
            if rate > best_rate:
                best, best_rate = list(lengths), rate
        return best

    def _gains(self, sequence: str) -> list[float]:
        """Expected tokens that each further draft adds: it and all before it are kept."""
        own = self._own.get(sequence) or Acceptance.empty(self.n_draft_max)
        reached, gains = 1.0, []
        for j in range(self.n_draft_max):
            reached *= own.rate(j, self._shared.rate(j, 0.6))
            gains.append(reached)
        return gains

    def _cost(self, n: int, rows: int, longest: int) -> float:
        draft_s = self.draft.at(n, longest) if longest else 0.0
        return (self.target.at(n, rows) or 1.0) + (draft_s or 0.0)
