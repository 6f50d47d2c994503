"""Which state of recurrent layers belongs to whom: rings of sequences, and states kept for later.

A sequence owns a ring of states. It stands on one of them; a pass puts the state behind each of its
last rows into others and leaves that one as it was, so a pass can be repeated, and taking back
rejected drafts is to stand on another state. With drafts of up to k tokens a ring has k + 2 states.

The state behind a full page of verified rows can be kept for later sequences (prefix.py says which
are, and which go). Nothing is ever copied: where a page ends inside a chunk of a prompt, the pass
writes that state to where it stays; where it ends among the last rows, the ring gives the state
away and takes a free one in; and who begins with a kept state reads it where it is.

No tensors here; the states themselves are in recurrent.py.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from outdraft.cache.pages import PagePool


@dataclass(slots=True)
class Ring:
    """Of one sequence.

    `behind`: the state behind each of its last lengths, its own or a kept one. `ahead`: states that
    the pass in progress writes inside a prompt, by length. `wanted`: lengths below `written` whose
    state is worth keeping, and whether others make room for it; behind `written`, which is the end
    of what was known when it began, every page's is.
    """

    own: list[int]
    wanted: Mapping[int, bool]
    written: int
    behind: dict[int, int] = field(default_factory=dict)
    ahead: dict[int, int] = field(default_factory=dict)


class StateBooks:
    """Who has which state; a fixed number of them, enough for the rings of all sequences."""

    def __init__(self, *, max_sequences: int, n_ring: int, n_kept: int = 0) -> None:
        """`n_ring` states a sequence, at least 2, and `n_kept` for later sequences."""
        assert n_ring >= 2
        self.max_sequences, self.n_ring, self.n_kept = max_sequences, n_ring, n_kept
        self.pool = PagePool(max_sequences * n_ring + n_kept)
        self.rings: dict[str, Ring] = {}
        self.evict: Callable[[bool], bool] = lambda sure: False
        """Frees a kept state that nobody uses, if there is one; set by who knows them."""

    @property
    def n_spare(self) -> int:
        """Free states that no ring will need."""
        return self.pool.n_free - (self.max_sequences - len(self.rings)) * self.n_ring

    def open(
        self,
        sequence: str,
        length: int = 0,
        state: int | None = None,
        wanted: Mapping[int, bool] | None = None,
        written: int = 0,
    ) -> None:
        """A sequence begins, behind `length` tokens with a kept state, or with nothing before it.

        Args:
            wanted: see `Ring`.
            written: see `Ring`.
        """
        assert len(self.rings) < self.max_sequences, "more sequences than states were planned for"
        ring = Ring(self.pool.allocate(self.n_ring), wanted or {}, written)
        self.rings[sequence] = ring
        if state is not None:
            self.pool.hold(state)
            ring.behind[length] = state

    def close(self, sequence: str) -> None:
        """A sequence is forgotten; what was kept of it stays."""
        self.pool.release(self.held(self.rings.pop(sequence)))

    def held(self, ring: Ring) -> list[int]:
        """All states that a sequence holds."""
        foreign = [state for state in ring.behind.values() if state not in ring.own]
        return [*ring.own, *foreign, *ring.ahead.values()]

    def numbers(self, sequence: str, length: int, n_rows: int) -> tuple[int, list[tuple[int, int]]]:
        """What the next n rows read, -1 for nothing, and (row, state) where they write.

        It may be asked again, of a pass that is repeated.
        """
        ring = self.rings[sequence]
        writes = self._places(ring, length, n_rows)
        for at, sure in ring.wanted.items():
            if not length < at <= length + n_rows - len(writes):
                continue
            if at not in ring.ahead and (state := self._allocate(sure=sure)) is not None:
                ring.ahead[at] = state
        writes += [(at - length - 1, s) for at, s in ring.ahead.items() if at > length]
        return ring.behind[length] if length > 0 else -1, writes

    def advance(self, sequence: str, length: int, n_rows: int) -> None:
        """The next n rows behind `length` were run."""
        ring = self.rings[sequence]
        places = self._places(ring, length, n_rows)
        written = {state for _, state in places}
        # No later pass goes back behind the beginning of this one over a state given away.
        gone = {at for at, s in ring.behind.items() if at < length and s not in ring.own}
        self.pool.release(ring.behind[at] for at in gone)
        ring.behind = {
            at: s for at, s in ring.behind.items() if s not in written and at not in gone
        }
        ring.behind |= {length + row + 1: state for row, state in places}

    def rollback(self, sequence: str, length: int) -> None:
        """Only so many rows count; the state behind them is still there."""
        ring = self.rings[sequence]
        assert length == 0 or length in ring.behind, "more rows taken back than there are states"
        late = {at: s for at, s in ring.behind.items() if at > length and s not in ring.own}
        self.pool.release(late.values())
        ring.behind = {at: s for at, s in ring.behind.items() if at <= length}
        for at in [at for at in ring.ahead if at > length]:
            self.drop(sequence, at)

    def keep(self, sequence: str, length: int, *, sure: bool) -> int | None:
        """Put the state behind `length` tokens, all of them verified, into the cache.

        Returns:
            The state; None if it is not there any more, or if there is no room.
        """
        ring = self.rings[sequence]
        state = ring.ahead.pop(length, None)
        if state is not None:
            self.pool.put_in_cache(state)
            self.pool.release([state])
            return state
        state = ring.behind.get(length)
        if state is None or state not in ring.own:
            return None
        fresh = self._allocate(sure=sure)
        if fresh is None:
            return None
        ring.own[ring.own.index(state)] = fresh
        self.pool.put_in_cache(state)
        return state

    def drop(self, sequence: str, length: int) -> None:
        """A state that was written inside a prompt is of no use."""
        state = self.rings[sequence].ahead.pop(length, None)
        if state is not None:
            self.pool.release([state])

    def _places(self, ring: Ring, length: int, n_rows: int) -> list[tuple[int, int]]:
        """(row, state) of the last rows: into states of no use first, then over the oldest."""
        current = ring.behind.get(length)
        ages = {state: at for at, state in ring.behind.items()}
        free = [state for state in ring.own if state != current]
        free.sort(key=lambda state: ages.get(state, -1))
        n_kept = min(n_rows, self.n_ring - 1)
        return list(zip(range(n_rows - n_kept, n_rows), free[:n_kept], strict=True))

    def _allocate(self, *, sure: bool) -> int | None:
        if self.n_spare < 1 and not self.evict(sure):
            return None
        return self.pool.allocate(1)[0]


def worth_keeping(length: int, last: int, reach: int, step: int, n_most: int) -> dict[int, bool]:
    """At which lengths of a prompt the state is kept, and whether others make room for it.

    The last page's end is, for the same prompt and what continues it; so is the end of the pages
    that the cache had without a state, where prompts part. Between them pages' ends at equal
    distances, as room allows.

    Args:
        length: what the cache had with a state.
        last: the end of the last page that a later prompt could use.
        reach: what the cache had of pages.
        step: tokens of a page.
        n_most: of the states between.
    """
    distance = step * max(1, -(-(last - length) // (step * max(1, n_most))))
    found = dict.fromkeys(range(last, length, -distance), False)
    return found | {at: True for at in (last, reach) if at > length}
