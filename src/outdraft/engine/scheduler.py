"""Who runs in the next step: a decision over plain data, without tensors.

First come, first served. A request is admitted when the pages that are really free cover its need
and what the admitted ones may still ask for, up to a horizon; should they run out all the same, the
newest gives its pages back and computes them again later. Every decoding sequence is in every step;
prompts share the rows that are left, whoever waited longest first. Not here: doing it (runner.py),
who has which page (cache/books.py).
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from outdraft.cache.books import PageBooks
from outdraft.engine.plan import StepPlan, Work
from outdraft.engine.sequence import Sequence
from outdraft.errors import QueueFull

DraftLengths = Callable[[list[Sequence]], list[int]]
"""How many tokens to draft for each of these sequences, which all decode in this step."""

HORIZON_TOKENS = 256
"""A request is admitted with room for so many tokens more, if it may get so long."""


@dataclass(slots=True)
class SchedulerStats:
    """Counts since the start."""

    n_admitted: int = 0
    n_preempted: int = 0
    n_refused: int = 0
    n_draft_length_failures: int = 0


class Scheduler:
    """Waiting and running sequences."""

    def __init__(
        self,
        *,
        books: PageBooks,
        max_sequences: int,
        prefill_chunk: int,
        n_draft_max: int,
        max_queue: int = 2**20,
    ) -> None:
        self.books = books
        self.max_sequences = max_sequences
        self.prefill_chunk = prefill_chunk
        self.n_draft_max = n_draft_max
        self.max_queue = max_queue
        self.horizon_tokens = HORIZON_TOKENS
        self.draft_lengths: DraftLengths = lambda decoding: [self.n_draft_max] * len(decoding)
        self.waiting: deque[Sequence] = deque()
        self.running: dict[str, Sequence] = {}
        self.stats = SchedulerStats()
        self._n_arrived = 0
        self._step = 0

    @property
    def busy(self) -> bool:
        """True while any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def add(self, sequence: Sequence) -> None:
        """Put a sequence at the end of the queue.

        Raises:
            QueueFull: more wait than may, beyond those that can start at once.
        """
        room = max(0, self.max_sequences - len(self.running))
        if len(self.waiting) >= self.max_queue + room:
            self.stats.n_refused += 1
            raise QueueFull(
                f"{len(self.waiting)} requests wait already", "try again later, or raise max_queue"
            )
        sequence.arrival = self._n_arrived
        self._n_arrived += 1
        self.waiting.append(sequence)

    def admit_next(self) -> Sequence | None:
        """Move the first of the queue into progress, if it fits; its memory is opened at once."""
        if not self.waiting or len(self.running) >= self.max_sequences:
            return None
        if not self._fits(self.waiting[0]):
            return None
        sequence = self.waiting.popleft()
        self.running[sequence.id] = sequence
        self.stats.n_admitted += 1
        return sequence

    def remove(self, sequence_id: str) -> Sequence | None:
        """Forget a sequence, waiting or running; None if it is not here."""
        if sequence_id in self.running:
            return self.running.pop(sequence_id)
        found = next((s for s in self.waiting if s.id == sequence_id), None)
        if found is not None:
            self.waiting.remove(found)
        return found

    def plan(self) -> StepPlan:
        """The next step's work. Preempted sequences wait again, without memory."""
        self._step += 1
        drafts = self._drafts()
        chunks = self._chunks(sum(1 + n for n in drafts.values()))
        work = []
        for sequence in self.running.values():
            if sequence.decoding:
                work.append(Work(sequence.id, 1, drafts[sequence.id]))
            elif chunks.get(sequence.id):
                work.append(Work(sequence.id, chunks[sequence.id], 0))
        preempted: list[str] = []
        while not self.books.fits((w.sequence, w.n_rows + w.n_drafts) for w in work):
            assert len(self.running) > 1, "memory holds at least one sequence"
            newest = max(self.running.values(), key=lambda s: s.arrival)
            self._preempt(newest)
            preempted.append(newest.id)
            work = [w for w in work if w.sequence != newest.id]
        for w in work:
            if w.n_rows > 1 or w.n_drafts == 0:
                self.running[w.sequence].served = self._step
        return StepPlan(work, preempted)

    def check(self) -> None:
        """The books agree with themselves and with who is running."""
        self.books.check()
        assert self.books.lengths.keys() == self.running.keys(), "memory of who does not run"
        for sequence in self.running.values():
            assert self.books.lengths[sequence.id] == sequence.n_computed, sequence.id

    def _drafts(self) -> dict[str, int]:
        """How many drafts each decoding sequence may bring."""
        decoding = [s for s in self.running.values() if s.decoding]
        try:
            wanted = self.draft_lengths(decoding)
            assert len(wanted) == len(decoding)
            most = self.n_draft_max
            pairs = zip(decoding, wanted, strict=True)
            wanted = [max(n, min(s.n_forced, most)) for s, n in pairs]
        except Exception:  # choosing a length must not cost a request
            self.stats.n_draft_length_failures += 1
            wanted = [0] * len(decoding)
        return {
            s.id: max(0, min(n, s.draft_room, self.n_draft_max if cap is None else cap))
            for s, n in zip(decoding, wanted, strict=True)
            for cap in (s.request.draft_n_max,)
        }

    def _chunks(self, n_decode_rows: int) -> dict[str, int]:
        """Rows of prompts. At least a quarter of the budget is theirs, however many decode."""
        prompts = [s for s in self.running.values() if not s.decoding]
        left = max(self.prefill_chunk - n_decode_rows, -(-self.prefill_chunk // 4))
        prompts.sort(key=lambda s: (s.served, s.arrival))
        chunks = dict.fromkeys((s.id for s in prompts), 0)
        for i, sequence in enumerate(prompts):  # an equal share of what is left
            share = -(-left // (len(prompts) - i))
            chunks[sequence.id] = min(share, sequence.n_prefill)
            left -= chunks[sequence.id]
        for sequence in prompts:  # and what the short ones did not need
            more = min(left, sequence.n_prefill - chunks[sequence.id])
            chunks[sequence.id] += more
            left -= more
        return chunks

    def _preempt(self, sequence: Sequence) -> None:
        """Back to the head of the queue, by age; it keeps its tokens."""
        del self.running[sequence.id]
        self.books.close(sequence.id)
        sequence.n_computed = 0
        sequence.n_preempted += 1
        self.stats.n_preempted += 1
        at = sum(s.arrival < sequence.arrival for s in self.waiting)
        self.waiting.insert(at, sequence)

    def _fits(self, candidate: Sequence) -> bool:
        """The candidate's need, and what the others may still need, against free pages."""
        books = self.books
        chain = books.match(candidate.tokens, candidate.request.cache_salt, most_cached(candidate))
        need = books.worst(self._horizon(candidate))
        for sequence in self.running.values():
            held = books.held(sequence.id)
            for name, n in books.worst(self._horizon(sequence)).items():
                need[name] += max(0, n - held[name])
        for name, group in books.groups.items():
            used = [node.pages[name] for node in chain if name in node.pages]
            if group.window is None:  # pages that a running sequence holds need no room
                need[name] -= sum(not group.pool.idle(page) for page in used)
            if need[name] > group.pool.n_available:
                return False
        return True

    def _horizon(self, sequence: Sequence) -> int:
        rows = max(self.n_draft_max + 1, self.horizon_tokens)
        return min(sequence.limit, len(sequence.tokens) + rows)


def most_cached(sequence: Sequence) -> int:
    """The longest beginning that may come from the cache.

    One row is left to compute, because the token after it needs its scores; for a sequence that
    has emitted tokens one more, because drafting needs the last hidden state. A prompt whose
    log-probabilities are asked for is computed as a whole.
    """
    prompt = sequence.request.prompt_tokens
    wanted = sequence.request.params.prompt_logprobs is not None
    if wanted and len(sequence.prompt_logprobs) < len(prompt):
        return 0
    has_output = len(sequence.tokens) > len(prompt)
    return len(sequence.tokens) - (2 if has_output else 1)
