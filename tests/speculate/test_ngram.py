"""The suffix automaton against a search of the whole sequence; the drafters around it."""

import random
from typing import Any, cast

import torch

from outdraft.request import SamplingParams
from outdraft.speculate.compose import NgramFirst, union
from outdraft.speculate.drafter import Draft, SequenceView, Taps, TargetView
from outdraft.speculate.ngram import NgramDrafter, SuffixAutomaton


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


def view_of(**texts: list[int]) -> TargetView:
    nothing = cast(Any, None)
    views = [SequenceView(name, t, SamplingParams(), 0, None) for name, t in texts.items()]
    return TargetView(views, nothing, nothing, nothing)


REPEATS = [5, 6, 7, 8, 9, 10, 5, 6, 7, 8]
FRESH = [1, 2, 3, 4, 5, 6]


def test_only_sequences_with_a_match_get_drafts() -> None:
    drafter = NgramDrafter()
    drafter.open("a")
    drafter.open("b")
    draft = drafter.propose(view_of(a=REPEATS, b=FRESH), 3)
    assert draft.lengths == [3, 0] and draft.probs == [None, None]
    assert draft.tokens_BK[0].tolist() == [9, 10, 5]


def test_drafts_are_a_function_of_the_committed_tokens() -> None:
    """Whatever was drafted and rejected before, and after a preemption, a fresh one says the same.

    A drafter that read its own drafts would differ behind the first rejection.
    """
    rng = random.Random(3)
    drafter, tokens = NgramDrafter(min_match=2), [rng.randrange(3) for _ in range(9)]
    drafter.open("a")
    n_drafted = 0
    for step in range(60):
        fresh = NgramDrafter(min_match=2)
        fresh.open("a")
        want, got = (d.propose(view_of(a=tokens), 4) for d in (fresh, drafter))
        assert torch.equal(got.tokens_BK, want.tokens_BK) and got.lengths == want.lengths
        n_drafted += got.lengths[0]
        n_kept = rng.randint(0, got.lengths[0])
        drafter.commit(view_of(a=tokens), [n_kept])
        tokens = [*tokens, *got.tokens_BK[0, :n_kept].tolist(), rng.randrange(3)]
        if step % 7 == 0:
            drafter.open("a")
    assert n_drafted > 60


class Counting:
    """Drafts 40, 41, ... with distributions, and keeps what it is told."""

    name, needs = "counting", Taps(final_hidden=True, kv_groups=("full_attention",))

    def __init__(self) -> None:
        self.told: list[object] = []

    def open(self, sequence: str) -> None:
        self.told.append(("open", sequence))

    def close(self, sequence: str) -> None:
        self.told.append(("close", sequence))

    def propose(self, view: TargetView, k: int) -> Draft:
        n = len(view.sequences)
        return Draft(torch.arange(40, 40 + k).repeat(n, 1), [torch.ones(k, 2)] * n, [k] * n)

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        self.told.append(("commit", [s.id for s in view.sequences], n_accepted))


def test_each_sequence_gets_the_drafts_of_one_drafter() -> None:
    other = Counting()
    both = NgramFirst(NgramDrafter(), other)
    assert both.name == "ngram+counting" and both.needs == union(Taps(), other.needs) == other.needs
    for name in "abc":
        both.open(name)
    view = view_of(a=FRESH, b=REPEATS, c=FRESH)
    draft = both.propose(view, 3)
    assert draft.tokens_BK.tolist() == [[40, 41, 42], [9, 10, 5], [40, 41, 42]]
    assert draft.lengths == [3, 3, 3]
    assert [p is None for p in draft.probs] == [False, True, False]
    both.commit(view, [1, 2, 3])
    both.close("b")
    assert other.told[3:] == [("commit", ["a", "c"], [1, 3]), ("close", "b")]
