"""How many tokens to draft for each sequence of a batch, and from which source. No tensors.

The rate to maximise is expected tokens over expected seconds of one step. For every depth of the
draft round, drafts are added in the order of their expected gain, and the best rate of all is kept,
so that a step in the cost curve does not stop it. Acceptance is counted apart by source (a model's guesses, matches in the
text by their length). Only what was seen up to the first rejection is used. Not here: measuring
time, costs (costs.py), or drafting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from outdraft.speculate.costs import StepModel

DECAY = 0.98
FADE = 0.99
PRIOR = 0.6
PRIOR_WEIGHT = 4.0
PROBE_SHARE = 0.01
USES = 8  # steps that a choice serves
OWN_ENOUGH = 16.0  # blocks of its own, from which on what others do changes little
MARGIN = 1.01  # drafting must promise so much more than plain decoding
BATCH_MARGIN = 1.02  # and so much in a batch, where choosing itself takes longer
USUAL = 4  # beyond `FEW` rows only multiples of this are chosen: the first pass of a size is slow
FEW = 16
FREE = "ngram"  # sources whose names begin so cost no draft round


def is_usual(n_rows: int) -> bool:
    """Whether passes of so many rows are chosen."""
    return n_rows <= FEW or n_rows % USUAL == 0


@dataclass(slots=True)
class Acceptance:
    """Decayed counts by draft position: how often it was reached and how often it was kept."""

    tried: list[float]
    kept: list[float]
    gains: list[float] = field(default_factory=list)
    """Expected tokens of each position, from counts as they were at `version`."""
    version: int = -1

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

    def fade(self) -> None:
        """It could have been used and was not: what is known of it counts less."""
        self.version += 1
        self.tried = [FADE * n for n in self.tried]
        self.kept = [FADE * n for n in self.kept]

    def rate(self, j: int, prior: float) -> float:
        """Mean of the Beta posterior at position j."""
        return (self.kept[j] + PRIOR_WEIGHT * prior) / (self.tried[j] + PRIOR_WEIGHT)


@dataclass(frozen=True, slots=True)
class Choice:
    """Drafts of one sequence in one step: how many, and whose."""

    n_drafts: int
    source: str


class LengthController:
    """Chooses draft lengths and learns from each step. Deterministic given its observations."""

    def __init__(self, n_draft_max: int) -> None:
        self.n_draft_max = n_draft_max
        self.costs = StepModel()
        self._shared: dict[str, Acceptance] = {}
        self._own: dict[tuple[str, str], Acceptance] = {}
        self._sources: dict[str, set[str]] = {}
        self._last: tuple[list[tuple[str, Sequence[str]]], list[Choice]] = ([], [])
        self._uses_left = 0
        self.promise = 1.0
        """Expected tokens per second of the last choice, over those of plain decoding."""
        self._total_s = 0.0
        self._probe_s = 0.0

    def close(self, sequence: str) -> None:
        """Forget a sequence."""
        for source in self._sources.pop(sequence, ()):
            self._own.pop((sequence, source), None)

    def observe_block(self, sequence: str, source: str, n_drafted: int, n_accepted: int) -> None:
        """One sequence's block from a source was verified."""
        own, shared = self._of(sequence, source), self._shared_of(source)
        own.observe(n_drafted, n_accepted)
        shared.observe(n_drafted, n_accepted)
        own.version = -1
        shared.version += 1

    def observe_step(
        self,
        n_sequences: int,
        n_rows: int,
        n_drafting: int,
        depth: int,
        pass_s: float,
        draft_s: float,
        rest_s: float | None = None,
    ) -> None:
        """Seconds of one decoding step of `n_rows`; `n_drafting` sequences drafted `depth` deep."""
        self.costs.observe_pass(n_rows, pass_s, n_sequences)
        if n_drafting > 0 and depth > 0:
            self.costs.observe_round(n_drafting, depth, draft_s)
        else:
            self.costs.fade_round(n_sequences)
        if rest_s is not None:
            self.costs.observe_rest(n_sequences, rest_s, drafted=n_rows > n_sequences)
        self._total_s += pass_s + draft_s

    def passed(self, seconds: float) -> None:
        """So long was decoded unobserved: a share of it may be spent on learning."""
        self._total_s += seconds

    def choose(self, sequences: Sequence[tuple[str, Sequence[str]]]) -> list[Choice]:
        """For the sequences that decode in the next step.

        Args:
            sequences: of each its name and the sources that could draft for it now, the preferred
                one first where they promise the same; none if nobody could.
        """
        n = len(sequences)
        if n == 0 or self.n_draft_max == 0 or not self.costs.known:
            return [Choice(0, "")] * n
        if self._uses_left > 0 and self._last[0] == sequences:
            self._uses_left -= 1
            return self._last[1]
        sources = [self._source(name, own, n) for name, own in sequences]
        gains = [
            self._gains(name, source) if source else []
            for (name, _), source in zip(sequences, sources, strict=True)
        ]
        lengths = self._best(gains, [not s.startswith(FREE) for s in sources])
        probed = not any(lengths) and self._probe(lengths, sources)
        choices = [Choice(k, s) for k, s in zip(lengths, sources, strict=True)]
        self._last, self._uses_left = (list(sequences), choices), 0 if probed else USES - 1
        return choices

    def _probe(self, lengths: list[int], sources: list[str]) -> bool:
        """One draft for one sequence, if there is time to spend on learning."""
        i = next((i for i, source in enumerate(sources) if source), None)
        if i is None:
            return False
        n, costs = len(lengths), self.costs
        extra_s = costs.at(n, n + 1, int(not sources[i].startswith(FREE)), 1) - costs.at(n, n)
        if self._probe_s + extra_s <= PROBE_SHARE * self._total_s:
            self._probe_s += max(extra_s, 0.0)
            lengths[i] = 1
            return True
        return False

    def _best(self, gains: list[list[float]], modelled: list[bool]) -> list[int]:
        """Lengths of the best rate; `modelled` are those whose drafts need a draft round."""
        n, costs = len(gains), self.costs
        # A gain is never larger than the one before it, so the order keeps each sequence's own.
        order = sorted((-g, j, i) for i, own in enumerate(gains) for j, g in enumerate(own))
        plain = n / costs.at(n, n)
        best: list[tuple[float, int, int]] = []
        best_rate = (MARGIN if n == 1 else BATCH_MARGIN) * plain
        for depth in range(int(all(modelled)), self.n_draft_max + 1):
            own = [d for d in order if d[1] < depth or not modelled[d[2]]]
            m, rate = self._best_of(n, depth, own, modelled)
            if rate > best_rate:
                best, best_rate = own[:m], rate
        self.promise = best_rate / plain if best else 1.0
        lengths = [0] * n
        for _, j, i in best:
            lengths[i] = max(lengths[i], j + 1)
        return lengths

    def _best_of(
        self, n: int, depth: int, order: list[tuple[float, int, int]], modelled: list[bool]
    ) -> tuple[int, float]:
        """How many drafts of this order promise most in a round of this depth, and what."""
        costs, rest_s = self.costs, self.costs.rest_s(n, drafted=True)
        expected, n_drafting, best_m, best_rate, round_s = float(n), 0, 0, 0.0, 0.0
        for m, (gain, j, i) in enumerate(order, 1):
            expected -= gain
            if j == 0 and modelled[i]:
                n_drafting += 1
                round_s = costs.draft_s(n_drafting, depth)
            if is_usual(n + m) or m == len(order):
                rate = expected / (costs.pass_s(n + m, n) + round_s + rest_s)
                if rate > best_rate:
                    best_m, best_rate = m, rate
        return best_m, best_rate

    def _source(self, sequence: str, sources: Sequence[str], n: int) -> str:
        """The source of the best rate, were all of the batch like this one; '' if there is none."""
        if len(sources) < 2:
            return sources[0] if sources else ""
        best, best_rate = sources[0], 0.0
        for source in sources:
            expected, modelled = 1.0, int(not source.startswith(FREE))
            for j, gain in enumerate(self._gains(sequence, source)):
                expected += gain
                rate = expected / self.costs.at(n, n * (j + 2), n * modelled, j + 1)
                if rate > best_rate:
                    best, best_rate = source, rate
        for source in sources:
            if source != best:
                self._shared_of(source).fade()
                own = self._of(sequence, source)
                own.fade()
                own.version = -1
        return best

    def _gains(self, sequence: str, source: str) -> list[float]:
        """Expected tokens that each further draft adds: it and all before it are kept."""
        own = self._of(sequence, source)
        shared = self._shared_of(source)
        if own.version != shared.version and (own.version < 0 or own.tried[0] < OWN_ENOUGH):
            reached, own.gains = 1.0, []
            for j in range(self.n_draft_max):
                reached *= own.rate(j, shared.rate(j, PRIOR))
                own.gains.append(reached)
            own.version = shared.version
        return own.gains

    def _shared_of(self, source: str) -> Acceptance:
        if source not in self._shared:
            self._shared[source] = Acceptance.empty(self.n_draft_max)
        return self._shared[source]

    def _of(self, sequence: str, source: str) -> Acceptance:
        own = self._own.get((sequence, source))
        if own is None:
            own = self._own[sequence, source] = Acceptance.empty(self.n_draft_max)
            self._sources.setdefault(sequence, set()).add(source)
        return own
