"""The prefix cache over books without tensors: what matches, and what goes first."""

import pytest

from outdraft.cache.books import GroupBooks, PageBooks
from outdraft.cache.pages import PagePool

SLOTS = 4


def books(n_pages: int = 8) -> PageBooks:
    groups = {"full": GroupBooks(None, n_pages, PagePool(n_pages))}
    return PageBooks(groups, SLOTS, prefix_cache=True)


def run(b: PageBooks, name: str, tokens: list[int], salt: str = "") -> int:
    """A sequence computes these tokens and ends; how many of them the cache had."""
    cached = b.open(name, tokens, salt, len(tokens) - 1)
    n_rows = len(tokens) - cached
    b.reserve(name, n_rows)
    b.advance(name, n_rows)
    b.share(name, tokens)
    b.close(name)
    b.check()
    return cached


def known(b: PageBooks, tokens: list[int], salt: str = "") -> int:
    return len(b.match(tokens, salt, len(tokens)))


A, B, C, D = ([10 * i + j for j in range(2 * SLOTS)] for i in range(1, 5))


def test_the_least_recently_used_goes_first() -> None:
    b = books(8)
    for name, tokens in (("a", A), ("b", B), ("c", C)):
        assert run(b, name, tokens) == 0
    assert run(b, "a again", [*A, 1]) == 2 * SLOTS  # now b is the oldest
    assert [known(b, x) for x in (A, B, C)] == [2, 2, 2]
    run(b, "d", [*D, 1])  # two pages are free, a third is needed
    assert [known(b, x) for x in (A, B, C, D)] == [2, 1, 2, 2]
    run(b, "e", [99] * 2 * SLOTS)
    assert [known(b, x) for x in (A, B, C, D)] == [2, 0, 2, 2]
    run(b, "f", [98] * 2 * SLOTS)
    assert [known(b, x) for x in (A, B, C, D)] == [2, 0, 0, 2]


def test_the_end_of_a_chain_goes_before_its_beginning() -> None:
    b = books(4)
    run(b, "a", A + B)
    run(b, "c", C[:SLOTS])
    assert known(b, A + B) == 3


def test_pages_in_use_are_not_evicted() -> None:
    b = books(4)
    run(b, "a", A)
    b.open("user", A, "", len(A))
    run(b, "b", B)
    run(b, "c", C)
    assert known(b, A) == 2 and known(b, B) == 0
    b.close("user")
    b.check()


def test_salts_share_nothing() -> None:
    b = books()
    assert run(b, "a", [*A, 1], "x") == 0
    assert run(b, "b", [*A, 1], "y") == 0
    assert run(b, "c", [*A, 1], "x") == 2 * SLOTS
    assert known(b, A) == 0 and known(b, A, "x") == known(b, A, "y") == 2


def test_only_whole_pages_below_the_length_get_there() -> None:
    b = books()
    b.open("a", A, "", 0)
    b.reserve("a", len(A) + 3)
    b.advance("a", len(A) + 3)
    b.rollback("a", 4)  # the last token of the second page is taken back too
    b.share("a", A)
    assert known(b, A) == 1
    b.close("a")
    b.check()


def test_a_page_cannot_be_freed_twice() -> None:
    pool = PagePool(3)
    pages = pool.allocate(2)
    pool.release(pages)
    with pytest.raises(AssertionError):
        pool.release(pages)
