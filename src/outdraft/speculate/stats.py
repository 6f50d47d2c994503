"""What drafting brought: counts by position, and where the time of a step went."""

from dataclasses import dataclass, field


@dataclass(slots=True)
class DraftStats:
    """Counts over verified blocks. Position i is the i-th draft of a block, from 0.

    Tokens that a grammar forces are drafted without a drafter and are counted apart.
    """

    n_passes: int = 0
    n_emitted: int = 0
    drafted: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    n_forced: int = 0
    n_forced_accepted: int = 0

    def count(
        self, n_drafted: int, n_accepted: int, n_emitted: int, *, forced: bool = False
    ) -> None:
        """One block was verified: `n_emitted` tokens of it were kept."""
        self.n_passes += 1
        self.n_emitted += n_emitted
        if forced:
            self.n_forced += n_drafted
            self.n_forced_accepted += n_accepted
            return
        missing = n_drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for i in range(n_drafted):
            self.drafted[i] += 1
            self.accepted[i] += i < n_accepted

    def merge(self, other: "DraftStats") -> None:
        """Add another's counts."""
        self.n_passes += other.n_passes
        self.n_emitted += other.n_emitted
        self.n_forced += other.n_forced
        self.n_forced_accepted += other.n_forced_accepted
        for name in ("drafted", "accepted"):
            mine, theirs = getattr(self, name), getattr(other, name)
            mine += [0] * (len(theirs) - len(mine))
            for i, value in enumerate(theirs):
                mine[i] += value

    @property
    def n_drafted(self) -> int:
        """Draft tokens that were verified."""
        return sum(self.drafted)

    @property
    def n_accepted(self) -> int:
        """Draft tokens that the target accepted."""
        return sum(self.accepted)

    @property
    def tokens_per_pass(self) -> float:
        """Emitted tokens per pass of the target; 1 is plain decoding."""
        return self.n_emitted / self.n_passes if self.n_passes else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Share of the drafts at a position that were accepted, all earlier ones included."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def conditional_acceptance(self) -> list[float]:
        """The same among the blocks whose earlier drafts were all accepted."""
        reached = self.drafted[:1] + self.accepted
        return [a / r if r else 0.0 for a, r in zip(self.accepted, reached, strict=False)]


@dataclass(slots=True)
class StepTimes:
    """Seconds spent in parts of the steps."""

    draft_s: float = 0.0
    forward_s: float = 0.0
    rest_s: float = 0.0

    @property
    def total_s(self) -> float:
        """All parts."""
        return self.draft_s + self.forward_s + self.rest_s
