"""What a step costs, from measurements: passes by rows, draft rounds by sequences and depth.

A pass costs what its rows cost one sequence, and the same for each further sequence, whose keys and
values are read. Matrix products take rows in tiles, so a few rows more can cost less.

Costs are kept in the machine's usual speed. Every pass of a known size says how fast the machine is
just now, and the median of the passes around it is divided out before sizes learn from it. So a
disturbance, or a machine that slows down for a while, changes no choice. No tensors, no clocks.
"""

from bisect import bisect_left
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from math import log2
from statistics import median

LEARN = 0.1  # of sizes seen often; those seen seldom learn faster
OCTAVE_PARTS = 2  # sizes are corrected together, by so many factors for each doubling of rows
LOOK_EVERY = 3  # steps: to learn from each would cost more than it brings
CHANGED = 2.0  # a machine so many times faster or slower than usual: the costs are others
OUTLIER = 2.0  # a measurement counts as at most so many times what was expected
MOST_OTHERS = 0.4  # of a pass, for all sequences but one
KNOWN = 10.0  # passes that costs measured at the start count as
FADE = 0.95  # a looked-at step without drafts
SPEED_STEPS = 11
ENOUGH_OTHERS = 3  # passes of other sizes say best how fast the machine is
TOOTH = 1.3  # fewer rows may cost so many times what more rows do: a tile that is not full
GUESSED_SLOPE = 0.05  # of a first pass, for each further row, until two sizes are known


class RowCosts:
    """Seconds of a pass by its rows: measured sizes, and straight lines between them."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self._at: list[float] = []  # by rows; what lies behind the last size is added when asked

    def __contains__(self, n_rows: int) -> bool:
        i = bisect_left(self.sizes, n_rows)
        return i < len(self.sizes) and self.sizes[i] == n_rows

    def at(self, n_rows: int) -> float:
        """Seconds; some size must be known."""
        while n_rows >= len(self._at):
            self._at.append(self._beyond(len(self._at)))
        return self._at[n_rows]

    def set(self, n_rows: int, seconds: float) -> None:
        """The cost of a size is this."""
        i = bisect_left(self.sizes, n_rows)
        if i == len(self.sizes) or self.sizes[i] != n_rows:
            self.sizes.insert(i, n_rows)
        del self._at[self.sizes[-1] + 1 :]
        self._at += [seconds] * (self.sizes[-1] + 1 - len(self._at))
        self._at[n_rows] = seconds
        below = self.sizes[i - 1] if i > 0 else None
        above = self.sizes[i + 1] if i + 1 < len(self.sizes) else None
        if below is None:
            for rows in range(n_rows):
                self._at[rows] = seconds
        else:
            self._line(below, n_rows)
        if above is not None:
            self._line(n_rows, above)

    def straighten(self) -> None:
        """Fewer rows cost hardly more than many: what says otherwise was disturbed."""
        lowest = float("inf")
        for size in reversed(self.sizes):
            lowest = min(lowest, self._at[size])
            if self._at[size] > TOOTH * lowest:
                self.set(size, lowest)

    def _line(self, low: int, high: int) -> None:
        step = (self._at[high] - self._at[low]) / (high - low)
        for rows in range(low + 1, high):
            self._at[rows] = self._at[low] + step * (rows - low)

    def _beyond(self, n_rows: int) -> float:
        last = self.sizes[-1]
        if len(self.sizes) == 1:
            return self._at[last] * (1 + GUESSED_SLOPE * (n_rows - last))
        low = next((s for s in reversed(self.sizes) if 2 * s <= last), self.sizes[0])
        slope = (self._at[last] - self._at[low]) / (last - low)
        return self._at[last] + max(0.0, slope) * (n_rows - last)


class DraftCosts:
    """Seconds of a draft round by sequences and depth, both interpolated; zero until measured."""

    def __init__(self) -> None:
        self.by_batch: dict[int, dict[int, float]] = {}
        self._found: dict[tuple[int, int], float] = {}

    def __contains__(self, size: tuple[int, int]) -> bool:
        return size[1] in self.by_batch.get(size[0], {})

    def at(self, n_sequences: int, depth: int) -> float:
        """Seconds of a round; 0 for nobody or no depth."""
        found = self._found.get((n_sequences, depth))
        if found is None:
            found = self._found[n_sequences, depth] = self._between(n_sequences, depth)
        return found

    def set(self, n_sequences: int, depth: int, seconds: float) -> None:
        """The cost of a size is this."""
        self.by_batch.setdefault(n_sequences, {})[depth] = seconds
        self._found.clear()

    def _between(self, n: int, depth: int) -> float:
        if not self.by_batch or n == 0 or depth == 0:
            return 0.0
        known = sorted(self.by_batch)
        above = min((m for m in known if m >= n), default=known[-1])
        below = max((m for m in known if m <= n), default=known[0])
        low, high = self._of_depth(below, depth), self._of_depth(above, depth)
        share = (n - below) / (above - below) if above > below else 0.0
        return low + share * (high - low)

    def _of_depth(self, n: int, depth: int) -> float:
        """A line through the two nearest depths; through nothing where only one is known."""
        depths = self.by_batch[n]
        if depth in depths:
            return depths[depth]
        nearest = sorted(depths, key=lambda d: abs(d - depth))[:2]
        if len(nearest) == 1:
            return depths[nearest[0]] * depth / nearest[0]
        a, b = sorted(nearest)
        step = (depths[b] - depths[a]) / (b - a)
        return max(0.0, depths[a] + step * (depth - a))


@dataclass(slots=True)
class _Learned:
    """Of passes of batches of about one size: factors by octave of rows, and steps behind each."""

    factors: list[float]
    n_seen: list[float]


class StepModel:
    """Expected seconds of a step, learned while running."""

    def __init__(self) -> None:
        self.passes = RowCosts()
        self.rounds = DraftCosts()
        self._draft_s: dict[tuple[int, int], float] = {}
        self._n_rounds = 0
        self._round_extra_s = ByBatch(0.0)
        self._rests = ByBatch(0.0)
        self._drafted_rests = ByBatch(0.0)
        self._sequence_s = 0.0
        self._context, self._context_share = 1, 1.0
        self._steps: deque[tuple[int, int, float, float]] = deque(maxlen=SPEED_STEPS)
        self._speed = 1.0
        self._n_passes = 0
        self._measured = False
        self._pass_s: dict[int, list[float]] = {}  # by size of batch, so that what is
        self._learned: dict[int, _Learned] = {}  # wrong of one says nothing of the others

    @property
    def known(self) -> bool:
        """Whether any pass was measured."""
        return bool(self.passes.sizes)

    @property
    def speed(self) -> float:
        """Seconds of late over what they usually are."""
        return self._speed

    def at(self, n_sequences: int, n_rows: int, n_drafting: int = 0, depth: int = 0) -> float:
        """Seconds of a step at the usual speed; `n_drafting` sequences are in the draft round."""
        draft_s = self.draft_s(n_drafting, depth) if depth else 0.0
        rest_s = self.rest_s(n_sequences, drafted=n_rows > n_sequences)
        return self.pass_s(n_rows, n_sequences) + draft_s + rest_s

    def draft_s(self, n_drafting: int, depth: int) -> float:
        """Of a draft round."""
        found = self._draft_s.get((n_drafting, depth))
        if found is None:
            first_s = self.rounds.at(n_drafting, depth)
            found = max(0.0, first_s + self._round_extra_s.at(n_drafting)) if first_s else 0.0
            self._draft_s[n_drafting, depth] = found
        return found

    def rest_s(self, n_sequences: int, *, drafted: bool = False) -> float:
        """Of what follows a pass: it takes longer where more tokens come of it."""
        if drafted and n_sequences in self._drafted_rests:
            return self._drafted_rests.at(n_sequences)
        return self._rests.at(n_sequences)

    def pass_s(self, n_rows: int, n_sequences: int = 1) -> float:
        """Of a pass: what was measured first, times what was learned about sizes like it."""
        band = n_sequences.bit_length()
        known = self._pass_s.get(band)
        if known is None:
            known = self._pass_s[band] = []
        while n_rows >= len(known):
            known.append(self._corrected(len(known), band))
        return known[n_rows] + self._others_s(n_sequences)

    def _others_s(self, n_sequences: int) -> float:
        return (n_sequences - 1) * self._sequence_s * self._context_share

    def read_back(self, n_tokens: float) -> None:
        """Sequences have so many tokens on average: fewer than measured with cost less."""
        self._context_share = min(1.0, n_tokens / self._context)

    def _corrected(self, n_rows: int, band: int) -> float:
        learned, i, share = self._place(n_rows, band)
        factor = (1 - share) * learned.factors[i] + share * learned.factors[i + 1]
        return self.passes.at(n_rows) * factor

    def _place(self, n_rows: int, band: int) -> tuple["_Learned", int, float]:
        """The factors on both sides of a size: the first one's index, the share of the second."""
        at = OCTAVE_PARTS * log2(max(1, n_rows))
        learned = self._learned.setdefault(band, _Learned([], []))
        while len(learned.factors) < at + 2:
            learned.factors.append(1.0)
            learned.n_seen.append(KNOWN if self._measured else 0.0)
        return learned, int(at), at - int(at)

    def observe_pass(self, n_rows: int, seconds: float, n_sequences: int = 1) -> None:
        """A pass of so many rows took so long."""
        others_s, band = self._others_s(n_sequences), n_sequences.bit_length()
        if n_rows not in self.passes and not self._measured:
            self.passes.set(n_rows, seconds / self._speed)
            self.passes.set(n_rows, seconds**2 / self._speed**2 / self._corrected(n_rows, band))
            self._pass_s.clear()
            return
        self._n_passes += 1
        if self._n_passes % LOOK_EVERY:
            return
        expected_s = self.pass_s(n_rows, n_sequences)
        self._steps.append((n_rows, n_sequences, seconds, seconds / expected_s))
        self._speed = median(ratio for *_, ratio in self._steps)
        if len(self._steps) < SPEED_STEPS:
            return
        # Both sides of the middle are known.
        n_rows, n_sequences, seconds, _ = self._steps[SPEED_STEPS // 2]
        others = [ratio for size, _, _, ratio in self._steps if size != n_rows]
        speed = median(others) if len(others) >= ENOUGH_OTHERS else self._speed
        if not 1 / CHANGED < self._speed < CHANGED:
            # Or the sizes of late were measured wrongly: each is believed anew when it comes.
            for learned in self._learned.values():
                learned.n_seen = [0.0] * len(learned.n_seen)
            self._round_extra_s.doubt()
        others_s = self._others_s(n_sequences)
        own_s = self.pass_s(n_rows, n_sequences) - others_s
        ratio = max(0.0, seconds / speed - others_s) / own_s
        self._learn(n_rows, n_sequences.bit_length(), ratio)

    def _learn(self, n_rows: int, band: int, ratio: float) -> None:
        learned, i, share = self._place(n_rows, band)
        for at, weight in ((i, 1 - share), (i + 1, share)):
            learned.n_seen[at] += weight
            step = weight * max(LEARN, 1 / (learned.n_seen[at] + 1))
            learned.factors[at] *= _towards(1.0, ratio, step)
        self._pass_s.pop(band, None)

    def measured(self, passes: Mapping[int, float]) -> None:
        """Seconds of passes by rows, all measured at one time; what others cost is between them.

        What was learned beside earlier measurements is forgotten.
        """
        if len(passes) > 1:
            self._forget()
        for n_rows, seconds in passes.items():
            self.passes.set(n_rows, seconds)
        self.passes.straighten()
        self._measured = len(passes) > 1
        self._pass_s.clear()

    def measured_batches(self, passes: Mapping[tuple[int, int], float], context: int) -> None:
        """Seconds of passes by sequences of so many tokens and rows, all measured at one time.

        What a further sequence costs is seen where as many rows are of fewer and of more sequences.
        """
        by_rows: dict[int, dict[int, float]] = {}
        for (n_sequences, n_rows), seconds in passes.items():
            by_rows.setdefault(n_rows, {})[n_sequences] = seconds
        slopes = [
            (of[max(of)] - of[min(of)]) / (max(of) - min(of))
            for of in by_rows.values()
            if len(of) > 1
        ]
        # Most of a pass is its rows': what says otherwise was disturbed.
        most_s = min(
            (MOST_OTHERS * s / (n - 1) for (n, _), s in passes.items() if n > 1), default=0
        )
        sequence_s = min(max(0.0, median(slopes)), most_s) if slopes else 0.0
        own = {
            n_rows: min(s - (n - 1) * sequence_s for n, s in of.items())
            for n_rows, of in by_rows.items()
        }
        self.measured(own)
        self._sequence_s, self._context = sequence_s, max(1, context)

    def whole_step(self, n_drafts: int, draft_s: float, other_s: float) -> None:
        """A step of one sequence takes so long, its draft round apart; nothing follows its pass."""
        self.passes.set(1 + n_drafts, other_s)
        if n_drafts:
            self.rounds.set(1, n_drafts, draft_s)
        self._rests.observe(1, 0.0)
        self._pass_s.clear()
        self._draft_s.clear()

    def _forget(self) -> None:
        self._speed, self._learned = 1.0, {}
        self._steps.clear()
        self._draft_s.clear()
        self._round_extra_s, self._rests = ByBatch(0.0), ByBatch(0.0)
        self._drafted_rests, self._sequence_s = ByBatch(0.0), 0.0

    def observe_round(self, n_drafting: int, depth: int, seconds: float) -> None:
        """A draft round took so long.

        What it takes beyond what was measured first is mostly the engine's own work around it, and
        hardly more for many sequences than for one. So it is added, not multiplied: one sequence
        that drafts in a batch to try it out must not make drafting look dear for all of them.
        """
        own_s = seconds / self._speed
        first_s = self.rounds.at(n_drafting, depth)
        self._n_rounds += 1
        if first_s > 0.0 and self._n_rounds % LOOK_EVERY:
            return
        if first_s == 0.0:
            self.rounds.set(n_drafting, depth, own_s)
        else:
            own_s = min(own_s, OUTLIER * max(first_s, self.draft_s(n_drafting, depth)))
            self._round_extra_s.observe(n_drafting, own_s - first_s)
        self._draft_s.clear()

    def fade_round(self, n_sequences: int) -> None:
        """None of so many sequences drafted: what rounds take beyond the first cost is believed
        less, or one that was disturbed could end drafting for good."""
        self._round_extra_s.fade(n_sequences)
        self._draft_s.clear()

    def observe_rest(self, n_sequences: int, seconds: float, *, drafted: bool = False) -> None:
        """What followed a pass took so long."""
        rests = self._drafted_rests if drafted else self._rests
        usual, own_s = self.rest_s(n_sequences, drafted=drafted), seconds / self._speed
        rests.observe(n_sequences, min(own_s, OUTLIER * usual) if usual else own_s)


class ByBatch:
    """A running mean for batches of about one size: 1, 2 and 3, 4 to 7, and so on."""

    def __init__(self, unknown: float) -> None:
        self.unknown = unknown
        self._mean: dict[int, float] = {}
        self._n_seen: dict[int, int] = {}

    def __contains__(self, n_sequences: int) -> bool:
        return n_sequences.bit_length() in self._mean

    def at(self, n_sequences: int) -> float:
        """Of the nearest size that was seen."""
        size = n_sequences.bit_length()
        if size in self._mean:
            return self._mean[size]
        nearest = min(self._mean, key=lambda other: abs(other - size), default=None)
        return self.unknown if nearest is None else self._mean[nearest]

    def observe(self, n_sequences: int, value: float) -> None:
        """One more value."""
        size = n_sequences.bit_length()
        n_seen = self._n_seen[size] = self._n_seen.get(size, 0) + 1
        usual = self._mean.get(size)
        share = max(LEARN, 1 / (n_seen + 1))
        self._mean[size] = value if usual is None else usual + share * (value - usual)

    def fade(self, n_sequences: int) -> None:
        """The mean of this size comes closer to 0; where there is none, from the nearest one's."""
        self._mean[n_sequences.bit_length()] = FADE * self.at(n_sequences)

    def doubt(self) -> None:
        """Believe the next values more than the mean."""
        self._n_seen.clear()


def _towards(usual: float, seen: float, share: float = LEARN) -> float:
    return usual + share * (min(seen, OUTLIER * usual) - usual)
