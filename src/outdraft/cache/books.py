"""The page tables of many sequences over pools that they share. Plain Python, no tensors.

Here: who has which pages, how many more a step or a request needs, and what goes into the prefix
cache. Not here: what is in the pages (memory.py), who runs when (engine/).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

from outdraft.cache.pages import PagePool
from outdraft.cache.prefix import GroupRule, Node, PrefixCache
from outdraft.cache.states import StateBooks, worth_keeping


@dataclass(slots=True)
class Table:
    """A sequence's pages in one group; `first_page` counts those already freed in front."""

    first_page: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def end(self) -> int:
        """Pages up to here, freed ones included."""
        return self.first_page + len(self.pages)


@dataclass(slots=True)
class GroupBooks:
    """Layers that share page tables. `max_pages`: the most that one sequence holds at a time."""

    window: int | None
    max_pages: int
    pool: PagePool
    tables: dict[str, Table] = field(default_factory=dict)


class PageBooks:
    """Lengths, page tables and states. Allocated pages are reported to the caller, who clears
    them.
    """

    def __init__(
        self,
        groups: Mapping[str, GroupBooks],
        page_slots: int,
        *,
        prefix_cache: bool,
        states: StateBooks | None = None,
    ) -> None:
        """`states`: of recurrent layers, if the model has some."""
        self.groups = dict(groups)
        self.page_slots = page_slots
        self.lengths: dict[str, int] = {}
        rules = {name: GroupRule(g.pool, g.window) for name, g in self.groups.items()}
        self.states = states
        self.prefix: PrefixCache | None = None
        if prefix_cache:
            self.prefix = PrefixCache(rules, page_slots, None if states is None else states.pool)
            if states is not None:
                states.evict = self.prefix.evict_state
        self.newest: dict[str, Node] = {}
        """The page of each sequence's output whose state was kept last."""
        self.chains: dict[str, list[Node]] = {}
        self.salts: dict[str, str] = {}
        self.slots: dict[str, int] = {}
        """A small number of each sequence, its own while it is open."""
        self.changed: set[str] = set()
        """Sequences whose tables changed; whoever keeps copies of them clears it."""
        self._free_slots: list[int] = []

    def match(self, tokens: Sequence[int], salt: str, most: int) -> list[Node]:
        """Pages of the cache that a sequence of these tokens could begin with."""
        return [] if self.prefix is None else self.prefix.match(tokens, salt, most)

    def open(self, sequence: str, tokens: Sequence[int] = (), salt: str = "", most: int = 0) -> int:
        """A sequence begins, with what the cache has of its first `most` tokens.

        Returns:
            Its length: how many tokens need not be computed.
        """
        assert sequence not in self.lengths
        chain = self.match(tokens, salt, most)
        length = len(chain) * self.page_slots
        for name, group in self.groups.items():
            first = 0 if self.prefix is None else self.prefix.first_needed(name, length)
            table = Table(first, [node.pages[name] for node in chain[first:]])
            for page in table.pages:
                group.pool.hold(page)
            group.tables[sequence] = table
        if self.prefix is not None:
            self.prefix.n_asked += len(tokens)
            self.prefix.n_hit += length
            self.prefix.touch(chain)
            self._open_states(sequence, chain, tokens, salt, most)
        elif self.states is not None:
            self.states.open(sequence)
        self.lengths[sequence], self.chains[sequence] = length, chain
        self.salts[sequence] = salt
        self.slots[sequence] = heappop(self._free_slots) if self._free_slots else len(self.slots)
        self.changed.add(sequence)
        return length

    def _open_states(
        self, sequence: str, chain: list[Node], tokens: Sequence[int], salt: str, most: int
    ) -> None:
        if self.states is None or self.prefix is None:
            return
        length, size = len(chain) * self.page_slots, self.page_slots
        reach, last = self.prefix.reach(tokens, salt, most), most // size * size
        wanted = worth_keeping(length, last, reach, size, self.states.n_kept // 2)
        state = None
        if chain:
            state = chain[-1].state
            self.prefix.use_state(chain[-1])
        self.states.open(sequence, length, state, wanted, last)

    def skip(self, sequence: str, length: int) -> None:
        """A new sequence begins behind so many tokens, whole pages, of which it has none.

        Its rows must see nothing before them, and nothing of it may be shared.
        """
        assert length % self.page_slots == 0 and self.states is None
        for group in self.groups.values():
            table = group.tables[sequence]
            group.pool.release(table.pages)
            table.pages, table.first_page = [], length // self.page_slots
        self.lengths[sequence], self.chains[sequence] = length, []
        self.changed.add(sequence)

    def close(self, sequence: str) -> None:
        """A sequence is forgotten; its verified pages stay in the cache until they are needed."""
        del self.lengths[sequence], self.salts[sequence]
        heappush(self._free_slots, self.slots.pop(sequence))
        chain = self.chains.pop(sequence)
        if self.prefix is not None:
            self.prefix.touch([node for node in chain if node.pages])
        if self.states is not None:
            self.states.close(sequence)
            self.newest.pop(sequence, None)
        for group in self.groups.values():
            group.pool.release(group.tables.pop(sequence).pages)

    def missing(self, sequence: str, n_rows: int) -> dict[str, int]:
        """Pages that n rows behind the length need beyond those in the tables, by group."""
        end = -(-(self.lengths[sequence] + n_rows) // self.page_slots)
        return {name: max(0, end - g.tables[sequence].end) for name, g in self.groups.items()}

    def fits(self, rows: Iterable[tuple[str, int]]) -> bool:
        """True if all these sequences can bring so many rows in one step."""
        size = self.page_slots
        ends = [(name, -(-(self.lengths[name] + n_rows) // size)) for name, n_rows in rows]
        for group in self.groups.values():
            tables = group.tables
            missing = sum(max(0, end - tables[name].end) for name, end in ends)
            if missing > group.pool.n_available:
                return False
        return True

    def worst(self, n_tokens: int) -> dict[str, int]:
        """The most pages that a sequence holds on its way to so many tokens."""
        pages = -(-n_tokens // self.page_slots)
        return {name: min(pages, g.max_pages) for name, g in self.groups.items()}

    def held(self, sequence: str) -> dict[str, int]:
        """Pages in a sequence's tables."""
        return {name: len(g.tables[sequence].pages) for name, g in self.groups.items()}

    def reserve(self, sequence: str, n_rows: int) -> dict[str, list[int]]:
        """Make room for n rows behind the length; new pages by group, {} if none were needed.

        Raises:
            CapacityError: too few pages; none is taken. The scheduler sees to it beforehand.
        """
        assert self._own(sequence), "the next row would change a page of others"
        end = -(-(self.lengths[sequence] + n_rows) // self.page_slots)
        for group in self.groups.values():
            if group.tables[sequence].end < end:
                break
        else:
            return {}
        self.changed.add(sequence)
        new: dict[str, list[int]] = {}
        for name, n in self.missing(sequence, n_rows).items():
            pool = self.groups[name].pool
            if self.prefix is not None and n > pool.n_free:
                self.prefix.evict(name, n - pool.n_free)
            try:
                new[name] = pool.allocate(n)
            except Exception:
                for other, pages in new.items():
                    self.groups[other].pool.release(pages)
                raise
        for name, pages in new.items():
            self.groups[name].tables[sequence].pages += pages
        return new

    def _own(self, sequence: str) -> bool:
        """True if the page of the next row, where it is there already, is the sequence's alone."""
        at = self.lengths[sequence] // self.page_slots
        for group in self.groups.values():
            table = group.tables[sequence]
            if at < table.end and group.pool.holds[table.pages[at - table.first_page]] > 1:
                return False
        return True

    def advance(self, sequence: str, n_rows: int) -> None:
        """n rows were written behind the length."""
        if self.states is not None:
            self.states.advance(sequence, self.lengths[sequence], n_rows)
        self.lengths[sequence] += n_rows

    def rollback(self, sequence: str, n_rows: int) -> None:
        """Forget the last n rows. They are not erased: the next rows overwrite them."""
        assert 0 <= n_rows <= self.lengths[sequence]
        self.lengths[sequence] -= n_rows
        if self.states is not None:
            self.states.rollback(sequence, self.lengths[sequence])

    def share(self, sequence: str, tokens: Sequence[int]) -> None:
        """Put pages whose rows are all verified into the cache.

        `tokens` are the sequence's, of which the first `length` are in memory. The length must be
        final (rollback comes first) and pages behind the window still be there (trim comes last).
        """
        if self.prefix is None:
            return
        chain, size = self.chains[sequence], self.page_slots
        n_full = min(self.lengths[sequence], len(tokens)) // size
        while len(chain) < n_full:
            i = len(chain)
            pages = {
                name: g.tables[sequence].pages[i - g.tables[sequence].first_page]
                for name, g in self.groups.items()
                if i >= g.tables[sequence].first_page
            }
            parent = chain[-1] if chain else self.prefix.root(self.salts[sequence])
            key = tuple(tokens[i * size : (i + 1) * size])
            node, known = self.prefix.add(parent, key, pages)
            for name, page in known.items():
                self._swap(name, sequence, i, page)
            chain.append(node)
            self._share_state(sequence, node, len(chain) * size)

    def _share_state(self, sequence: str, node: Node, at: int) -> None:
        """Keep the state behind a page if it is worth it: all its rows are verified."""
        if self.states is None or self.prefix is None:
            return
        ring = self.states.rings[sequence]
        of_output = at > ring.written
        sure = of_output or ring.wanted.get(at, False)
        if not of_output and at not in ring.wanted:
            return
        if node.state is not None:  # another sequence's, of the same tokens: the same bits
            self.states.drop(sequence, at)
            self.prefix.use_state(node, sure=sure)
            return
        state = self.states.keep(sequence, at, sure=sure)
        if state is None:
            return
        self.prefix.keep_state(node, state, sure=sure)
        if of_output:  # what continues the text begins with the newest one
            if sequence in self.newest:
                self.prefix.use_state(self.newest[sequence], sure=False)
            self.newest[sequence] = node

    def _swap(self, name: str, sequence: str, index: int, page: int) -> None:
        """Use the cache's page instead of the sequence's own: the same tokens, the same bits."""
        group = self.groups[name]
        table = group.tables[sequence]
        own = table.pages[index - table.first_page]
        if own != page:
            group.pool.hold(page)
            table.pages[index - table.first_page] = page
            group.pool.release([own])
            self.changed.add(sequence)

    def trim(self, sequence: str) -> None:
        """Free pages that no later row sees. The length must be final: rollback comes first."""
        for group in self.groups.values():
            if group.window is None:
                continue
            table = group.tables[sequence]
            oldest = max(0, self.lengths[sequence] - group.window)  # an assistant sees this one
            n_freed = oldest // self.page_slots - table.first_page
            if n_freed > 0:
                group.pool.release(table.pages[:n_freed])
                del table.pages[:n_freed]
                table.first_page += n_freed
                self.changed.add(sequence)

    def check(self) -> None:
        """Compare the books with the tables: free + used = total, and every hold has a holder."""
        cached = self.prefix.held() if self.prefix is not None else {}
        for name, group in self.groups.items():
            pool = group.pool
            holds = [0] * pool.n_pages
            flags = bytearray(pool.n_pages)
            for table in group.tables.values():
                for page in table.pages:
                    holds[page] += 1
            for page in cached.get(name, ()):
                holds[page] += 1
                flags[page] = 1
            assert holds == pool.holds and flags == pool.cached, f"{name}: a hold without a holder"
            assert pool.n_free + sum(h > 0 for h in holds) == pool.n_pages, f"{name}: a leak"
            idle = sum(h == 1 and c for h, c in zip(holds, flags, strict=True))
            assert pool.n_idle == idle, f"{name}: idle pages"
            assert group.tables.keys() == self.lengths.keys(), f"{name}: a table without a sequence"
        self._check_states()
        assert self.slots.keys() == self.lengths.keys(), "a slot without a sequence"
        assert len({*self.slots.values()}) == len(self.slots), "a slot twice"

    def _check_states(self) -> None:
        if self.states is None:
            return
        pool, cached = self.states.pool, self.prefix.held_states() if self.prefix else []
        held = [s for ring in self.states.rings.values() for s in self.states.held(ring)] + cached
        holds = [0] * pool.n_pages
        for state in held:
            holds[state] += 1
        assert holds == pool.holds, "states: a hold without a holder"
        assert sorted(cached) == [i for i, c in enumerate(pool.cached) if c], "states: the cache"
        assert self.states.rings.keys() == self.lengths.keys(), "a ring without a sequence"
        assert self.states.n_spare >= 0, "states: too few are left for rings"
