"""What a step costs, from measurements: passes by rows, draft rounds by sequences and depth.

Costs are kept in the machine's usual speed. Every pass of a known size says how fast the machine is
just now, and the median of the passes around it is divided out before a size learns from it. So a
disturbance, or a machine that slows down for a while, changes no choice. No tensors, no clocks.
"""

from bisect import bisect_left
from collections import deque
from statistics import median

LEARN = 0.05  # of a size seen often; a size seen seldom learns faster
CHANGED = 2.0  # a machine so many times faster or slower than usual: the costs are others
OUTLIER = 2.0  # a measurement counts as at most so many times what was expected
SPEED_STEPS = 15
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


class StepModel:
    """Expected seconds of a step, learned while running."""

    def __init__(self) -> None:
        self.passes = RowCosts()
        self.rounds = DraftCosts()
        self.draft_factor = 1.0
        self.rest_s = 0.0
        """What follows the pass, a sequence."""
        self._steps: deque[tuple[int, float, float]] = deque(maxlen=SPEED_STEPS)
        self._n_seen: dict[int, int] = {}
        self._n_rounds = 0
        self._speed = 1.0

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
        draft_s = self.draft_factor * self.rounds.at(n_drafting, depth) if depth else 0.0
        return self.passes.at(n_rows) + draft_s + self.rest_s * n_sequences

    def observe_pass(self, n_rows: int, seconds: float) -> None:
        """A pass of so many rows took so long."""
        if n_rows not in self.passes:
            self.passes.set(n_rows, seconds / self._speed)
            return
        self._steps.append((n_rows, seconds, seconds / self.passes.at(n_rows)))
        self._speed = median(ratio for _, _, ratio in self._steps)
        if len(self._steps) < SPEED_STEPS:
            return
        n_rows, seconds, _ = self._steps[SPEED_STEPS // 2]  # both sides of the middle are known
        usual = self.passes.at(n_rows)
        if not 1 / CHANGED < self._speed < CHANGED:
            self._begin_again()
            return
        self._n_seen[n_rows] = seen = self._n_seen.get(n_rows, 0) + 1
        share = max(LEARN, 1 / (seen + 1))
        self.passes.set(n_rows, _towards(usual, seconds / self._speed, share))

    def _begin_again(self) -> None:
        """Keep what the last steps say, and learn the rest anew: other sizes may cost anything."""
        steps, self.passes, self.rounds = list(self._steps), RowCosts(), DraftCosts()
        for size in {n_rows for n_rows, _, _ in steps}:
            self.passes.set(size, median(s for n_rows, s, _ in steps if n_rows == size))
        self._steps.clear()
        self._n_seen.clear()
        self._speed, self.draft_factor, self._n_rounds, self.rest_s = 1.0, 1.0, 0, 0.0

    def observe_round(self, n_drafting: int, depth: int, seconds: float) -> None:
        """A draft round took so long."""
        own_s = seconds / self._speed
        usual = self.rounds.at(n_drafting, depth)
        if usual == 0.0:
            self.rounds.set(n_drafting, depth, own_s)
        else:
            self._n_rounds += 1
            share = max(LEARN, 1 / (self._n_rounds + 1))
            self.draft_factor *= _towards(1.0, own_s / (usual * self.draft_factor), share)

    def observe_rest(self, n_sequences: int, seconds: float) -> None:
        """What followed a pass took so long."""
        own_s = seconds / n_sequences / self._speed
        self.rest_s = own_s if self.rest_s == 0.0 else _towards(self.rest_s, own_s)


def _towards(usual: float, seen: float, share: float = LEARN) -> float:
    return usual + share * (min(seen, OUTLIER * usual) - usual)
