"""How many tokens to draft for each sequence of a batch, and from which source. No tensors.

The rate to maximise is expected tokens over expected seconds of one step. For every depth of the
draft round, drafts are added in the order of their expected gain, and the best rate of all is kept,
so that a step in the cost curve does not stop it. Acceptance is counted apart by source (a model's
guesses, matches in the text by their length). Only what was seen up to the first rejection is used.
What steps take beyond the costs of their parts is learned by depth. Not here: measuring time, costs
(costs.py), or drafting.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from outdraft.speculate.confidence import Confidence, worth_verifying
from outdraft.speculate.costs import StepModel

DECAY = 0.98
SHARED_DECAY = 0.997  # of many sequences at once: their blocks of a few steps are not enough
FADE = 0.99
PRIOR = 0.6
PRIOR_WEIGHT = 4.0
PROBE_SHARE = 0.01  # of the time, for one draft where otherwise none would be,
HOPE = 1.05  # what leaving drafts out may gain more in a deeper round, until it is known,
HOPED = 8  # as if so many rounds had said so
LEARN_GAIN = 0.02
FEW_SEEN = 8  # steps that a first belief counts as
PROBES = 3  # of which so many may follow one another
USES = 8  # steps of one sequence that a choice serves,
BATCH_USES = 4  # and of many
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

    def observe(
        self, n_drafted: int, n_accepted: int, decay: float = DECAY, left_out: Sequence[float] = ()
    ) -> None:
        """One block; positions behind the first rejection tell nothing.

        `left_out`: chances of the drafts behind those, which were not verified. Where all before
        them stayed they count as that much of a draft.
        """
        for j in range(min(n_drafted, n_accepted + 1)):
            self.tried[j] = decay * self.tried[j] + 1
            self.kept[j] = decay * self.kept[j] + (j < n_accepted)
        if n_drafted > n_accepted:
            return
        reached = 1.0
        for j, chance in enumerate(left_out, n_drafted):
            forget = 1 - reached * (1 - decay)
            self.tried[j] = forget * self.tried[j] + reached
            reached *= chance
            self.kept[j] = forget * self.kept[j] + reached
        n_drafted += len(left_out)
        if 0 < n_drafted < len(self.tried):
            # One more would have been looked at: what is known of it fades, or a few unlucky
            # drafts would stop it for good.
            self.tried[n_drafted] *= FADE
            self.kept[n_drafted] *= FADE

    def fade(self, n_steps: int) -> None:
        """It could have been used and was not: what is known of it counts less."""
        self.version += 1
        self.tried = [FADE**n_steps * n for n in self.tried]
        self.kept = [FADE**n_steps * n for n in self.kept]

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
        self._n_served = 1  # steps by the last choice
        self.promise = 1.0
        """Expected tokens per second of the last choice, over those of plain decoding."""
        self.rate = 0.0
        """The better of the two, in tokens per second."""
        self.confidence = Confidence()
        self._gain: dict[tuple[int, int], tuple[int, float]] = {}
        self._row_costs: dict[tuple[int, int], NDArray[np.float64]] = {}
        self._bias: dict[tuple[int, int], tuple[int, float]] = {}
        self._total_s = 0.0
        self._probe_s = 0.0

    def close(self, sequence: str) -> None:
        """Forget a sequence."""
        for source in self._sources.pop(sequence, ()):
            self._own.pop((sequence, source), None)

    def observe_block(
        self,
        sequence: str,
        source: str,
        n_verified: int,
        n_accepted: int,
        sure: Sequence[float] = (),
    ) -> None:
        """One sequence's block from a source was verified.

        `sure`: what the drafter said of its drafts, also of those behind the verified ones.
        """
        own, shared = self._of(sequence, source), self._shared_of(source)
        left_out = self.confidence.chances(sure[n_verified:]) if len(sure) > n_verified else ()
        own.observe(n_verified, n_accepted, left_out=left_out)
        shared.observe(n_verified, n_accepted, SHARED_DECAY, left_out)
        if sure:
            self.confidence.observe(sure, n_verified, n_accepted)
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
        if rest_s is not None and self.costs.known:
            expected_s = self.costs.speed * self.costs.at(n_sequences, n_rows, n_drafting, depth)
            self._learn_bias(n_sequences, depth, (pass_s + draft_s + rest_s) / expected_s)
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
            self._n_served += 1
            return self._last[1]
        sources = [self._source(name, own, n) for name, own in sequences]
        gains = [
            self._gains(name, source) if source else []
            for (name, _), source in zip(sequences, sources, strict=True)
        ]
        lengths, loss_s = self._best(gains, [not s.startswith(FREE) for s in sources])
        probed = False
        if loss_s > 0.0:
            lengths = self._probe(lengths, loss_s, sources)
            probed = any(lengths)
        self._n_served = 1
        choices = [Choice(k, s) for k, s in zip(lengths, sources, strict=True)]
        self._last, self._uses_left = (list(sequences), choices), 0
        if not probed:
            self._uses_left = (USES if n == 1 else BATCH_USES) - 1
        return choices

    def worth_verifying(
        self, n_sequences: int, confidence_BK: NDArray[np.float32], lengths: Sequence[int]
    ) -> list[int]:
        """Of each sequence that drafted, how many of its drafts to verify.

        Args:
            n_sequences: all that decode in this step.
            confidence_BK: what the drafter says of each draft, of which `lengths[b]` count.
        """
        n, n_drafts = len(lengths), sum(lengths)
        key = n_sequences, n_drafts
        cost_M = self._row_costs.get(key)
        if cost_M is None:
            cost_M = self._row_costs[key] = self._cost_of_rows(n_sequences, n_drafts)
        reached_BK = self.confidence.reached(confidence_BK, lengths)
        found, kept, drafted = worth_verifying(reached_BK, cost_M)
        size = n_sequences.bit_length(), reached_BK.shape[1]
        n_seen, mean = self._gain.get(size) or (HOPED, self._gain_of(n_sequences, size[1]))
        costs = self.costs
        apart_s = costs.draft_s(n, size[1]) + costs.rest_s(n_sequences, drafted=True)
        before_s = costs.pass_s(n_sequences + n_drafts, n_sequences) + apart_s
        after_s = costs.pass_s(n_sequences + sum(found), n_sequences) + apart_s
        gain = (n_sequences + kept) / after_s * before_s / (n_sequences + drafted)
        share = max(LEARN_GAIN, 1 / (n_seen + 1))
        self._gain[size] = n_seen + 1, mean + share * (gain - mean)
        return found

    def _cost_of_rows(self, n_sequences: int, n_drafts: int) -> NDArray[np.float64]:
        """Tokens that could be had at the usual rate in the time of 1 to n_drafts more rows."""
        plain_s = self.costs.pass_s(n_sequences, n_sequences)
        sizes = range(n_sequences + 1, n_sequences + n_drafts + 1)
        return np.array(
            [
                self.rate * (self.costs.pass_s(size, n_sequences) - plain_s)
                if is_usual(size) or size == sizes[-1]
                else np.inf
                for size in sizes
            ]
        )

    def _learn_bias(self, n_sequences: int, depth: int, ratio: float) -> None:
        size = n_sequences.bit_length(), depth
        n_seen, mean = self._bias.get(size) or (FEW_SEEN, self._bias_of(n_sequences, depth))
        share = max(LEARN_GAIN, 1 / (n_seen + 1))
        ratio = min(max(ratio, 0.5), 2.0)
        self._bias[size] = n_seen + 1, mean + share * (ratio - mean)

    def _bias_of(self, n_sequences: int, depth: int) -> float:
        """What steps of this depth take, of what their parts cost; of the nearest that was seen."""
        size = n_sequences.bit_length()
        found = self._bias.get((size, depth))
        if found is None and depth:
            near = [d for b, d in self._bias if b == size and d]
            nearest = min(near, key=lambda d: abs(d - depth), default=None)
            found = None if nearest is None else self._bias[size, nearest]
        return 1.0 if found is None else found[1]

    def _gain_of(self, n_sequences: int, depth: int) -> float:
        """What leaving drafts out gains: of a depth that was not tried more than of the last."""
        size = n_sequences.bit_length()
        for known in range(depth, 0, -1):
            if (size, known) in self._gain:
                gain = self._gain[size, known][1]
                return gain if known == depth else gain * HOPE
        return 1.0

    def take_uses(self) -> int:
        """How many more steps of the same sequences the last choice serves; the caller's now."""
        n, self._uses_left = self._uses_left, 0
        return n

    def _probe(self, lengths: list[int], loss_s: float, sources: list[str]) -> list[int]:
        """Drafts to learn from, if there is time to spend on them.

        The best lengths, where they lose little against plain decoding; or one draft.
        """
        n, costs = len(sources), self.costs
        i = next((i for i, source in enumerate(sources) if source), None)
        if i is None:
            return [0] * n
        extra_s = costs.at(n, n + 1, int(not sources[i].startswith(FREE)), 1) - costs.at(n, n)
        if not any(lengths) or extra_s < loss_s:
            lengths, loss_s = [int(at == i) for at in range(n)], max(extra_s, 0.0)
        share_s = PROBE_SHARE * self._total_s
        self._probe_s = max(self._probe_s, share_s - PROBES * loss_s)  # what was not used is gone
        if self._probe_s + loss_s > share_s:
            return [0] * n
        self._probe_s += loss_s
        return lengths

    def _best(self, gains: list[list[float]], modelled: list[bool]) -> tuple[list[int], float]:
        """Lengths of the best rate of all with drafts, and what is lost with them in a step.

        That is 0 where they are better than plain decoding by the margin. `modelled` are those
        whose drafts need a draft round.
        """
        n, costs = len(gains), self.costs
        # A gain is never larger than the one before it, so the order keeps each sequence's own.
        order = sorted((-g, j, i) for i, own in enumerate(gains) for j, g in enumerate(own))
        best: list[tuple[float, int, int]] = []
        best_rate = expected = 0.0
        for depth in range(int(all(modelled)), self.n_draft_max + 1):
            own = [d for d in order if d[1] < depth or not modelled[d[2]]]
            m, rate, tokens = self._best_of(n, depth, own, modelled)
            rate *= self._gain_of(n, depth) / self._bias_of(n, depth)
            if rate > best_rate:
                best, best_rate, expected = own[:m], rate, tokens
        lengths = [0] * n
        for _, j, i in best:
            lengths[i] = max(lengths[i], j + 1)
        plain = n / costs.at(n, n) / self._bias_of(n, 0)
        self._row_costs.clear()
        self.promise, self.rate = best_rate / plain, max(best_rate, plain)
        margin = MARGIN if n == 1 else BATCH_MARGIN
        if best_rate > margin * plain:
            return lengths, 0.0
        return lengths, expected * (margin / best_rate - 1 / plain) if best else 1 / plain

    def _best_of(
        self, n: int, depth: int, order: list[tuple[float, int, int]], modelled: list[bool]
    ) -> tuple[int, float, float]:
        """How many drafts of this order promise most in a round of this depth: rate and tokens."""
        costs, rest_s = self.costs, self.costs.rest_s(n, drafted=True)
        expected, n_drafting, round_s = float(n), 0, 0.0
        best_m, best_rate, best_expected = 0, 0.0, 0.0
        for m, (gain, j, i) in enumerate(order, 1):
            expected -= gain
            if j == 0 and modelled[i]:
                n_drafting += 1
                round_s = costs.draft_s(n_drafting, depth)
            if is_usual(n + m) or m == len(order):
                rate = expected / (costs.pass_s(n + m, n) + round_s + rest_s)
                if rate > best_rate:
                    best_m, best_rate, best_expected = m, rate, expected
        return best_m, best_rate, best_expected

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
                self._shared_of(source).fade(self._n_served)
                own = self._of(sequence, source)
                own.fade(self._n_served)
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
            shared = self._shared[source] = Acceptance.empty(self.n_draft_max)
            shared.version = 0  # own ones begin before it: their gains are not known yet
        return self._shared[source]

    def _of(self, sequence: str, source: str) -> Acceptance:
        own = self._own.get((sequence, source))
        if own is None:
            own = self._own[sequence, source] = Acceptance.empty(self.n_draft_max)
            self._sources.setdefault(sequence, set()).add(source)
        return own
