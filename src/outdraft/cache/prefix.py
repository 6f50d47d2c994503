"""The prefix cache: which full pages hold which tokens, so that a prompt can begin where one ends.

A radix tree whose edges are the tokens of one page. A node has a page of every group of layers;
those of sliding groups may be missing, and a hit then ends earlier: it needs the pages that the
window of its next row covers. A model with recurrent layers needs a state, too: nodes may have the
one behind their page, and a hit ends at one that has. Only rows that the target has verified get
here (books.py). What nobody uses is evicted when pages or states run out, least recently used
first. No tensors here.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from outdraft.cache.pages import PagePool

Key = tuple[int, ...]


@dataclass(eq=False, slots=True)
class Node:
    """One page of tokens behind those of its parents. `pages`: by group; roots have none.

    `state`: of recurrent layers, behind all these tokens.
    """

    key: Key
    parent: "Node | None"
    children: dict[Key, "Node"] = field(default_factory=dict)
    pages: dict[str, int] = field(default_factory=dict)
    state: int | None = None


@dataclass(frozen=True, slots=True)
class GroupRule:
    """How a group of layers takes part. `window` None: full attention."""

    pool: PagePool
    window: int | None


class PrefixCache:
    """A tree for every salt: requests with different salts never share a page."""

    def __init__(
        self, groups: Mapping[str, GroupRule], page_slots: int, states: PagePool | None = None
    ) -> None:
        """`states`: of recurrent layers, if the model has some."""
        self.groups = dict(groups)
        self.states = states
        # Oldest first. True: kept for certain; False: on the chance, and the first to go.
        self.kept: dict[bool, OrderedDict[Node, None]] = {False: OrderedDict(), True: OrderedDict()}
        self.page_slots = page_slots
        self.roots: dict[str, Node] = {}
        # Oldest first. Every node is in each order in which it has a page.
        self.orders: dict[str, OrderedDict[Node, None]] = {g: OrderedDict() for g in self.groups}
        self.n_asked = 0
        self.n_hit = 0

    def match(self, tokens: Sequence[int], salt: str, most: int) -> list[Node]:
        """The longest usable chain of pages that `tokens` begins with, of at most `most` tokens."""
        chain = self._known(tokens, salt, most)
        while chain and not (self._covers(chain) and self._has_state(chain[-1])):
            chain.pop()
        return chain

    def reach(self, tokens: Sequence[int], salt: str, most: int) -> int:
        """How many tokens the pages cover, whether there is a state behind them or not."""
        chain = self._known(tokens, salt, most)
        while chain and not self._covers(chain):
            chain.pop()
        return len(chain) * self.page_slots

    def _known(self, tokens: Sequence[int], salt: str, most: int) -> list[Node]:
        node = self.roots.get(salt)
        chain: list[Node] = []
        size = self.page_slots
        while node is not None and (len(chain) + 1) * size <= most:
            at = len(chain) * size
            node = node.children.get(tuple(tokens[at : at + size]))
            if node is not None:
                chain.append(node)
        return chain

    def _has_state(self, node: Node) -> bool:
        return self.states is None or node.state is not None

    def first_needed(self, group: str, n_tokens: int) -> int:
        """The first page that a row at position `n_tokens` or later may see."""
        window = self.groups[group].window
        return 0 if window is None else max(0, n_tokens - window) // self.page_slots

    def _covers(self, chain: list[Node]) -> bool:
        n_tokens = len(chain) * self.page_slots
        return all(
            group in node.pages
            for group in self.groups
            for node in chain[self.first_needed(group, n_tokens) :]
        )

    def root(self, salt: str) -> Node:
        """Where the chains of a salt begin."""
        return self.roots.setdefault(salt, Node((), None))

    def add(self, parent: Node, key: Key, pages: Mapping[str, int]) -> tuple[Node, dict[str, int]]:
        """Put a page of verified rows behind `parent`.

        Returns:
            The node, and the cache's own pages where it already had these tokens: their bits are
            the same, so the sequence may use them and give back its own.
        """
        node = parent.children.get(key)
        if node is None:
            node = parent.children[key] = Node(key, parent)
        known = {group: page for group, page in node.pages.items() if group in pages}
        for group, page in pages.items():
            if group not in node.pages:
                self.groups[group].pool.put_in_cache(page)
                node.pages[group] = page
            self.orders[group][node] = None
            self.orders[group].move_to_end(node)
        return node, known

    def touch(self, chain: Sequence[Node]) -> None:
        """These were used now: the deepest counts as the oldest, so that leaves go first."""
        n_tokens = len(chain) * self.page_slots
        for group, order in self.orders.items():
            for node in reversed(chain[self.first_needed(group, n_tokens) :]):
                if group in node.pages:
                    order.move_to_end(node)

    def evict(self, group: str, n: int) -> bool:
        """Free n pages of a group; False if there are not so many that nobody uses."""
        pool, order = self.groups[group].pool, self.orders[group]
        if pool.n_idle < n:
            return False
        full = self.groups[group].window is None
        while n > 0:
            before = n
            for node in list(order):
                # A node of a full group has to be a leaf: what hangs below it would be unreachable.
                if n == 0 or not pool.idle(node.pages[group]) or (full and node.children):
                    continue
                n -= 1
                for name in list(self.groups) if full else [group]:
                    self._drop(node, name)
                self._prune(node)
            assert n < before, "who holds a page holds all pages before it"
        return True

    def clear(self) -> None:
        """Forget everything that nobody uses."""
        for group, rule in self.groups.items():
            self.evict(group, rule.pool.n_idle)

    def held(self) -> dict[str, list[int]]:
        """All pages in the cache, by group: for checking the books."""
        return {
            group: [node.pages[group] for node in order] for group, order in self.orders.items()
        }

    def keep_state(self, node: Node, state: int, *, sure: bool) -> None:
        """A state that the pool counts as cached is behind this page; see `kept`."""
        node.state = state
        self.kept[sure][node] = None

    def use_state(self, node: Node, *, sure: bool = True) -> None:
        """It was used now, or with `sure` False: it goes before others from now on."""
        if node.state is not None:
            self.kept[not sure].pop(node, None)
            self.kept[sure][node] = None
            self.kept[sure].move_to_end(node)

    def evict_state(self, sure: bool) -> bool:
        """Free a state that nobody uses; one kept for certain only where `sure` is True."""
        assert self.states is not None
        for kind in (False, True) if sure else (False,):
            for node in self.kept[kind]:
                if node.state is not None and self.states.idle(node.state):
                    self._drop_state(node)
                    return True
        return False

    def held_states(self) -> list[int]:
        """All states in the cache: for checking the books."""
        kept = (node.state for order in self.kept.values() for node in order)
        return [state for state in kept if state is not None]

    def _drop_state(self, node: Node) -> None:
        if node.state is not None and self.states is not None:
            self.states.take_from_cache(node.state)
            node.state = None
            for order in self.kept.values():
                order.pop(node, None)

    def _drop(self, node: Node, group: str) -> None:
        if group in node.pages:
            self.groups[group].pool.take_from_cache(node.pages.pop(group))
            del self.orders[group][node]

    def _prune(self, node: Node) -> None:
        """Take nodes without pages and children out of the tree."""
        while node.parent is not None and not node.children and not node.pages:
            self._drop_state(node)
            del node.parent.children[node.key]
            node = node.parent
        if node.parent is None and not node.children:
            self.roots = {salt: root for salt, root in self.roots.items() if root is not node}
