"""What one step will do. Plain data, no tensors."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's share of a step.

    Run its next `n_rows` committed tokens, then `n_drafts` drafted ones behind them. Drafts only
    follow the newest committed token: with them, `n_rows` is 1.
    """

    sequence: str
    n_rows: int
    n_drafts: int


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one step, in the order of its rows.

    `preempted` are sequences that gave up their memory for it; they wait and compute it again.
    """

    work: list[Work]
    preempted: list[str] = field(default_factory=list)

    @property
    def n_rows(self) -> int:
        """Rows of the target's forward pass."""
        return sum(w.n_rows + w.n_drafts for w in self.work)
