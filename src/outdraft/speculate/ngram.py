"""Drafts from the text itself: the continuation of the longest earlier match.

A suffix automaton per sequence reads its committed tokens, prompt and output, as they come. It
never sees a draft, so a rejection leaves nothing to undo. Not here: whether a guess is worth a row
of the target (length.py), who drafts where nothing matches (compose.py).

Shapes: B sequences, K draft length.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq

import torch

from outdraft.speculate.drafter import Draft, SequenceView, Taps, TargetView

MIN_MATCH = 4
LONGER = (8, 16)  # matches from so many tokens on are other sources, kept apart in statistics


class SuffixAutomaton:
    """Every substring of the tokens read so far; reading a token is amortised O(1).

    A state is a set of substrings with the same end positions. `_first_end` is the earliest of
    them, so the suffix link of the newest state names the longest suffix seen before and where.
    (Blumer et al. 1985.)
    """

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._next: list[dict[int, int]] = [{}]
        self._link = [-1]
        self._length = [0]
        self._first_end = [-1]
        self._last = 0

    def read(self, tokens: list[int]) -> None:
        """Append tokens."""
        for token in tokens:
            self._append(token)

    def continuation(self, k: int, min_match: int) -> list[int]:
        """At most k tokens that followed the longest earlier match; none if it is too short."""
        state = self._link[self._last]
        if state <= 0 or self._length[state] < min_match:
            return []
        start = self._first_end[state] + 1
        return self.tokens[start : start + k]

    @property
    def match_length(self) -> int:
        """Length of the longest suffix that also ends somewhere earlier."""
        return self._length[self._link[self._last]] if self._last else 0

    def _append(self, token: int) -> None:
        new = self._state({}, 0, self._length[self._last] + 1, len(self.tokens))
        self.tokens.append(token)
        state = self._last
        while state != -1 and token not in self._next[state]:
            self._next[state][token] = new
            state = self._link[state]
        if state != -1:
            self._link[new] = self._target(state, token)
        self._last = new

    def _target(self, state: int, token: int) -> int:
        """The state reached from `state`, split off if it also holds longer substrings."""
        reached = self._next[state][token]
        if self._length[reached] == self._length[state] + 1:
            return reached
        split = self._state(
            dict(self._next[reached]),
            self._link[reached],
            self._length[state] + 1,
            self._first_end[reached],
        )
        self._link[reached] = split
        while state != -1 and self._next[state].get(token) == reached:
            self._next[state][token] = split
            state = self._link[state]
        return split

    def _state(self, following: dict[int, int], link: int, length: int, first_end: int) -> int:
        self._next.append(following)
        self._link.append(link)
        self._length.append(length)
        self._first_end.append(first_end)
        return len(self._link) - 1


class NgramDrafter:
    """Proposes what followed the same tokens earlier in the text (a `Drafter`).

    A sequence whose last `min_match` tokens did not occur before gets no drafts.
    """

    name = "ngram"
    needs = Taps()

    def __init__(self, *, min_match: int = MIN_MATCH) -> None:
        self.min_match = min_match
        self._automata: dict[str, SuffixAutomaton] = {}

    def open(self, sequence: str) -> None:
        """Begin to read a sequence; one that was preempted goes on where its reading stopped."""
        self._automata.setdefault(sequence, SuffixAutomaton())

    def close(self, sequence: str) -> None:
        """Forget a sequence."""
        self._automata.pop(sequence, None)

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Nothing to keep: the tokens are read from the next view."""

    def sources(self, sequence: str, tokens: list[int]) -> Seq[str]:
        """See `ManySources`: the n-gram by the length of its match, if there is one."""
        length = self._read(sequence, tokens).match_length
        if length < self.min_match:
            return ()
        return (f"{self.name} {max((n for n in LONGER if n <= length), default=self.min_match)}",)

    def use(self, chosen: Mapping[str, tuple[str, int]]) -> None:
        """See `ManySources`: there is no choice."""

    def continuation(self, sequence: SequenceView, k: int) -> list[int]:
        """At most k tokens that may come next."""
        return self._read(sequence.id, sequence.tokens).continuation(k, self.min_match)

    def _read(self, sequence: str, tokens: list[int]) -> SuffixAutomaton:
        """Its automaton, after reading what was committed since the last call."""
        automaton = self._automata[sequence]
        if len(automaton.tokens) < len(tokens):
            automaton.read(tokens[len(automaton.tokens) :])
        return automaton

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`; every draft is a point mass."""
        return point_masses([self.continuation(s, k) for s in view.sequences], k)


def point_masses(drafts: list[list[int]], k: int) -> Draft:
    """A `Draft` of these tokens, at most k for each sequence, without distributions."""
    tokens_BK = torch.tensor([d + [0] * (k - len(d)) for d in drafts], dtype=torch.int64)
    return Draft(tokens_BK.view(len(drafts), k), [None] * len(drafts), [len(d) for d in drafts])
