"""Scheduler and page books under load, without a model: 10,000 steps of random requests.

What stands in for keys and values is a number a slot: the hash of all tokens up to there. After
every step the books agree, every row that a sequence may still see holds the hash of its own
tokens, the order is first come, first served, and at the end nothing is left.
"""

import random
from dataclasses import dataclass, field

import pytest

from outdraft.cache.books import GroupBooks, PageBooks
from outdraft.cache.pages import PagePool
from outdraft.cache.states import StateBooks
from outdraft.engine import scheduler
from outdraft.engine.plan import Work
from outdraft.engine.scheduler import Scheduler, most_cached
from outdraft.engine.sequence import Sequence
from outdraft.errors import QueueFull
from outdraft.request import FinishReason, Request
from outdraft.text.stream import StopStrings

HORIZON = 6
SLOTS, CTX, CHUNK, K_MAX = 4, 96, 16, 4
VOCAB = 5
MAX_SEQUENCES, MAX_QUEUE = 6, 10
WAIT_MAX = 10 * CTX  # a request has at most 16 before it; alone, none takes more than CTX steps


@pytest.fixture(autouse=True)
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit with little room, so that it runs out."""
    monkeypatch.setattr(scheduler, "HORIZON_TOKENS", HORIZON)


class NoText:
    """A detokeniser of nothing."""

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


def following(row: int) -> int:
    """What the target says behind a row."""
    return row % 7919 % VOCAB


def rows_of(salt: str, tokens: list[int]) -> list[int]:
    """The hash of every beginning; salts enter it, so that a shared page would be noticed."""
    row, rows = len(salt), []
    for token in tokens:
        row = (row * 1_000_003 + token + 1) % (2**61 - 1)
        rows.append(row)
    return rows


@dataclass
class World:
    """A scheduler over small memory, with a fake runner that fails now and then."""

    seed: int
    windows: dict[str, int | None]
    prefix_cache: bool = True
    chunk: int = CHUNK
    recurrent: bool = False
    n_added: int = 0
    waited: int = 0
    n_cached: int = 0
    alive: dict[str, Sequence] = field(default_factory=dict)
    added_at: dict[str, int] = field(default_factory=dict)
    ended: dict[str, Sequence] = field(default_factory=dict)
    last_work: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        n_full = CTX // SLOTS + 1
        n_shared = self.random.choice([n_full + 7, 2 * n_full, 3 * n_full])
        groups = {}
        for name, window in self.windows.items():
            n_pages, n_pool = n_full, n_shared
            if window is not None:
                n_pages = -(-(window + CHUNK + SLOTS) // SLOTS) + 1
                n_pool = self.random.choice([n_pages + 5, n_shared])
            groups[name] = GroupBooks(window, n_pages, PagePool(max(n_pages, n_pool)))
        self.states: StateBooks | None = None
        if self.recurrent:
            n_kept = self.random.randrange(1, 9) if self.prefix_cache else 0
            self.states = StateBooks(max_sequences=MAX_SEQUENCES, n_ring=K_MAX + 2, n_kept=n_kept)
            self.state_store = [-1] * self.states.pool.n_pages
        self.books = PageBooks(groups, SLOTS, prefix_cache=self.prefix_cache, states=self.states)
        self.store = {name: [[-1] * SLOTS for _ in g.pool.holds] for name, g in groups.items()}
        self.scheduler = Scheduler(
            books=self.books,
            max_sequences=MAX_SEQUENCES,
            prefill_chunk=self.chunk,
            n_draft_max=K_MAX,
            max_queue=MAX_QUEUE,
        )
        self.scheduler.draft_lengths = self.lengths
        self.beginnings = [self.some(40) for _ in range(3)]

    def some(self, n: int) -> list[int]:
        return [self.random.randrange(VOCAB) for _ in range(n)]

    def lengths(self, decoding: list[Sequence]) -> list[int]:
        if self.random.random() < 0.02:
            raise RuntimeError("planted")
        return [self.random.randrange(-1, K_MAX + 1) for _ in decoding]

    def add(self) -> None:
        """A request, often with a beginning that others have."""
        start = self.random.choice(self.beginnings)[: self.random.choice([0, 7, 20, 40])]
        prompt = (start + self.some(self.random.randrange(30)))[: CTX - 1] or [1]
        salt = self.random.choice(["", "", "a", "bb"])
        limit = min(CTX, len(prompt) + self.random.randrange(1, 60))
        name = f"s{self.n_added}"
        sequence = Sequence(
            Request(name, tuple(prompt), cache_salt=salt),
            0,
            limit,
            frozenset(),
            NoText(),  # type: ignore[arg-type]
            StopStrings(()),
            tokens=list(prompt),
        )
        try:
            self.scheduler.add(sequence)
        except QueueFull:
            assert len(self.scheduler.waiting) >= MAX_QUEUE
            return
        self.n_added += 1
        self.alive[name] = sequence
        self.added_at[name] = self.scheduler._step

    def end(self, sequence: Sequence) -> None:
        was_running = sequence.id in self.scheduler.running
        assert self.scheduler.remove(sequence.id) is sequence
        if was_running:
            self.books.close(sequence.id)
        self.ended[sequence.id] = self.alive.pop(sequence.id)
        self.last_work.pop(sequence.id, None)

    def step(self) -> None:
        while (admitted := self.scheduler.admit_next()) is not None:
            admitted.n_computed = self.books.open(
                admitted.id, admitted.tokens, admitted.request.cache_salt, most_cached(admitted)
            )
            self.n_cached += admitted.n_computed
            self.last_work[admitted.id] = self.scheduler._step
            self.see(admitted)
        running = self.scheduler.running
        if not running:
            assert not self.scheduler.waiting, "an empty engine has room for any request"
            return
        oldest = min(running.values(), key=lambda s: s.arrival)
        plan = self.scheduler.plan()
        assert oldest.id in running, "the oldest is never preempted"
        assert plan.work
        for name in plan.preempted:
            self.last_work.pop(name)
        self.check_plan(plan.work)
        for w in plan.work:  # all rows have room before any is computed
            self.books_reserve(w)
        for w in plan.work:
            self.run(running[w.sequence], w)
        for sequence in [s for s in running.values() if s.finish_reason is not None]:
            self.end(sequence)

    def check_plan(self, work: list[Work]) -> None:
        running, waiting = self.scheduler.running, self.scheduler.waiting
        step = self.scheduler._step
        planned = {w.sequence for w in work}
        assert len(planned) == len(work)
        for sequence in running.values():
            assert sequence.id in planned or not sequence.decoding
        for name in planned:
            self.last_work[name] = step
        assert all(step - self.last_work[name] < 2 * MAX_SEQUENCES for name in running)
        arrivals = [s.arrival for s in waiting]
        assert arrivals == sorted(arrivals)
        assert not arrivals or max(s.arrival for s in running.values()) < arrivals[0]
        for w in work:
            s = running[w.sequence]
            assert 0 < w.n_rows <= s.n_pending and (w.n_drafts == 0 or s.decoding)
            assert len(s.tokens) + w.n_drafts + 1 <= s.limit
        n_prompt = sum(w.n_rows for w in work if not running[w.sequence].decoding)
        assert n_prompt <= self.chunk

    def books_reserve(self, work: Work) -> None:
        for name, pages in self.books.reserve(work.sequence, work.n_rows + work.n_drafts).items():
            for page in pages:
                self.store[name][page] = [-1] * SLOTS

    def run(self, s: Sequence, work: Work) -> None:
        """The pass and what follows it, with a failure at one of its seams."""
        failing = self.random.choice("abc") if self.random.random() < 0.01 else ""
        if failing == "a":
            s.abort(FinishReason.ERROR, "the pass")
            return
        salt = s.request.cache_salt
        truth = rows_of(salt, s.tokens)
        drafts: list[int] = []
        for _ in range(work.n_drafts):
            right = following(rows_of(salt, s.tokens + drafts)[-1])
            drafts.append(right if self.random.random() < 0.7 else self.random.randrange(VOCAB))
        given = s.tokens[: s.n_computed + work.n_rows] + drafts
        self.write(s, rows_of(salt, given)[s.n_computed :])
        self.write_states(s, rows_of(salt, given))
        self.books.advance(s.id, work.n_rows + len(drafts))
        if failing == "b":
            s.abort(FinishReason.ERROR, "behind the pass")
            return
        if work.n_rows < s.n_pending:
            s.n_computed += work.n_rows
        else:
            kept: list[int] = []
            row = truth[-1]
            for draft in drafts:
                if draft != following(row):
                    break
                kept.append(draft)
                row = rows_of(salt, s.tokens + kept)[-1]
            self.books.rollback(s.id, len(drafts) - len(kept))
            s.n_computed += work.n_rows + len(kept)
            if failing == "c":
                s.abort(FinishReason.ERROR, "behind the rollback")
                return
            s.keep([*kept, following(row)], len(kept))
        self.books.share(s.id, s.tokens)
        self.books.trim(s.id)

    def write(self, s: Sequence, rows: list[int]) -> None:
        length = self.books.lengths[s.id]
        for name, group in self.books.groups.items():
            table = group.tables[s.id]
            for p, row in enumerate(rows, length):
                page = table.pages[p // SLOTS - table.first_page]
                assert group.pool.holds[page] == 1, "rows go into a page of one's own"
                self.store[name][page][p % SLOTS] = row

    def write_states(self, s: Sequence, rows: list[int]) -> None:
        """The pass reads the state of the sequence's own tokens and writes into nobody else's."""
        if self.states is None:
            return
        length = self.books.lengths[s.id]
        n_rows = len(rows) - length
        read, writes = self.states.numbers(s.id, length, n_rows)
        if self.random.random() < 0.02:  # a pass that failed and is repeated
            assert (read, writes) == self.states.numbers(s.id, length, n_rows)
        assert read == -1 if length == 0 else self.state_store[read] == rows[length - 1]
        for row, state in writes:
            assert state != read and self.states.pool.holds[state] == 1
            assert not self.states.pool.cached[state]
            self.state_store[state] = rows[length + row]

    def see(self, s: Sequence) -> None:
        """Every row that the next one may look at is that of the sequence's own tokens."""
        length = self.books.lengths[s.id]
        rows = rows_of(s.request.cache_salt, s.tokens[:length])
        if self.states is not None and length > 0:
            assert self.state_store[self.states.rings[s.id].behind[length]] == rows[-1]
        for name, group in self.books.groups.items():
            table = group.tables[s.id]
            first = 0 if group.window is None else max(0, length - group.window)
            for p in range(first, min(length, len(rows))):
                page = table.pages[p // SLOTS - table.first_page]
                assert self.store[name][page][p % SLOTS] == rows[p], (name, s.id, p)


def simulate(world: World, n_steps: int) -> None:
    for _ in range(n_steps):
        if world.random.random() < 0.12:
            for _ in range(world.random.randrange(1, 8)):
                world.add()
        if world.alive and world.random.random() < 0.03:
            sequence = world.random.choice(list(world.alive.values()))
            sequence.abort(FinishReason.ABORT)
            world.end(sequence)
        world.step()
        world.scheduler.check()
        running = list(world.scheduler.running.values())
        if running:
            world.see(world.random.choice(running))
        for name in world.alive:
            wait = world.scheduler._step - world.added_at[name]
            assert wait <= WAIT_MAX, name
            world.waited = max(world.waited, wait)
    while world.scheduler.busy:
        world.step()
        world.scheduler.check()
    assert not world.alive and len(world.ended) == world.n_added
    for sequence in world.ended.values():
        salt, n = sequence.request.cache_salt, len(sequence.request.prompt_tokens)
        tokens = sequence.tokens
        rows = rows_of(salt, tokens)
        assert tokens[n:] == [following(row) for row in rows[n - 1 : -1]]
        assert sequence.finish_reason is not None
        if sequence.finish_reason is FinishReason.LENGTH:
            assert len(tokens) == sequence.limit
    if world.books.prefix is not None:
        world.books.prefix.clear()
        assert not world.books.prefix.roots
    if world.states is not None:
        assert world.states.pool.n_free == world.states.pool.n_pages
    world.books.check()
    assert all(g.pool.n_free == g.pool.n_pages for g in world.books.groups.values())


KINDS: dict[str, dict[str, int | None]] = {
    "both": {"full": None, "sliding": 10},
    "full": {"full": None},
    "two windows": {"full": None, "narrow": 3, "wide": 21},
}


def lively(world: World) -> None:
    """The simulation has been where it should be."""
    stats = world.scheduler.stats
    assert stats.n_preempted > 5 and stats.n_draft_length_failures > 20
    assert world.n_cached > 200 and world.n_added > 200


@pytest.mark.parametrize("seed,kind", list(enumerate(KINDS)))
def test_simulation(seed: int, kind: str) -> None:
    world = World(seed, KINDS[kind])
    simulate(world, 10_000)
    lively(world)


@pytest.mark.parametrize("seed,kind", list(zip((16, 11, 21), KINDS, strict=True)))
def test_simulation_with_states(seed: int, kind: str) -> None:
    """Every state that is read is that of the sequence's own verified tokens."""
    world = World(seed, KINDS[kind], recurrent=True)
    simulate(world, 5_000)
    stats = world.scheduler.stats
    assert stats.n_preempted > 5 and world.n_cached > 200 and world.n_added > 200


def test_prompts_share_few_rows() -> None:
    """Two rows a step for up to six prompts: whoever has waited longest is next."""
    world = World(4, KINDS["full"], chunk=2)
    simulate(world, 2_000)
    assert world.scheduler.stats.n_admitted > 50


def test_simulation_without_a_prefix_cache() -> None:
    world = World(3, KINDS["both"], prefix_cache=False)
    simulate(world, 2_000)
    assert world.n_cached == 0


@pytest.mark.prove
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(100, 120))
@pytest.mark.parametrize("recurrent", [False, True])
def test_many_simulations(seed: int, kind: str, recurrent: bool) -> None:
    world = World(seed, KINDS[kind], recurrent=recurrent)
    simulate(world, 10_000)
