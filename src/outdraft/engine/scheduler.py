"""Who runs in the next step: a decision over plain data, without tensors.

First come, first served, up to a number of sequences at once; every sequence in progress is in
every step, with a chunk of its prompt or with its newest token and drafts. Memory is planned for
the worst case, so a sequence that was admitted always goes on. Not here: doing it (step.py).
"""

from collections import deque
from collections.abc import Callable

from outdraft.engine.plan import StepPlan, Work
from outdraft.engine.sequence import Sequence

DraftLengths = Callable[[list[Sequence]], list[int]]
"""How many tokens to draft for each of these sequences, which all decode in this step."""


class Scheduler:
    """Waiting and running sequences."""

    def __init__(self, *, max_sequences: int, prefill_chunk: int, n_draft_max: int) -> None:
        self.max_sequences = max_sequences
        self.prefill_chunk = prefill_chunk
        self.n_draft_max = n_draft_max
        self.draft_lengths: DraftLengths = lambda decoding: [self.n_draft_max] * len(decoding)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}

    @property
    def busy(self) -> bool:
        """True while any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue."""
        self.waiting.append(sequence)

    def admit(self) -> list[Sequence]:
        """Move sequences from the queue into progress; they are returned."""
        admitted = []
        while self.waiting and len(self.running) < self.max_sequences:
            sequence = self.waiting.popleft()
            self.running[sequence.id] = sequence
            admitted.append(sequence)
        return admitted

    def remove(self, sequence_id: str) -> Sequence | None:
        """Forget a sequence, waiting or running; None if it is not here."""
        if sequence_id in self.running:
            return self.running.pop(sequence_id)
        found = next((s for s in self.waiting if s.id == sequence_id), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def plan(self) -> StepPlan:
        """The next step's work for all running sequences."""
        decoding = [s for s in self.running.values() if s.n_pending == 1]
        wanted = dict(zip((s.id for s in decoding), self.draft_lengths(decoding), strict=True))
        budget = self.prefill_chunk
        work = []
        for sequence in self.running.values():
            if sequence.n_pending == 1:
                n_drafts = max(0, min(wanted[sequence.id], _draft_room(sequence)))
                work.append(Work(sequence.id, 1, n_drafts))
            elif budget > 0:
                n_rows = min(sequence.n_pending, budget)
                budget -= n_rows
                work.append(Work(sequence.id, n_rows, 0))
        return StepPlan(work)


def _draft_room(sequence: Sequence) -> int:
    """None before the first row was run: a drafter reads the state it left behind."""
    return 0 if sequence.n_computed == 0 else sequence.draft_room
