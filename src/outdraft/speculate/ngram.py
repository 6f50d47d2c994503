"""The continuation of the longest earlier match, found by a suffix automaton. No tensors.

One automaton per sequence reads its committed tokens, prompt and output, as they come. Not here:
the drafter around it, or whether its guess is worth a row of the target.
"""


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
