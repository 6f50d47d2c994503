"""The suffix automaton against a search of the whole sequence."""

import random

from outdraft.speculate.ngram import SuffixAutomaton


def longest_earlier(tokens: list[int]) -> tuple[int, int]:
    for n in range(len(tokens) - 1, 0, -1):
        for start in range(len(tokens) - n):
            if tokens[start : start + n] == tokens[-n:]:
                return n, start + n
    return 0, 0


def test_the_longest_earlier_match_is_found_whatever_the_text() -> None:
    rng = random.Random(7)
    for _ in range(40):
        n_symbols = rng.randint(1, 4)
        automaton, tokens = SuffixAutomaton(), []
        for _ in range(30):
            tokens.append(rng.randrange(n_symbols))
            automaton.read(tokens[-1:])
            n, start = longest_earlier(tokens)
            assert automaton.match_length == n
            expected = tokens[start : start + 5] if n >= 2 else []
            assert automaton.continuation(5, 2) == expected
