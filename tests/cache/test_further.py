"""Numbers of the next row of a sequence, made of those of this one."""

import torch

from outdraft.cache.attend import causal_numbers, further_numbers
from outdraft.cache.memory import KVLayer, Memory, Span


def test_they_are_those_that_the_next_call_makes() -> None:
    layers = [KVLayer("full", 1, 8, None, 0), KVLayer("sliding", 1, 8, 16, 1)]
    memory = Memory(layers, max_sequences=2, max_tokens=256, max_rows=8, dtype=torch.float32)
    memory.open("other")
    memory.open("a")
    memory.reserve("a", 5)
    memory.advance("a", 5)
    n_pages = n_trimmed = 0
    for token in range(100, 230):
        memory.reserve("a", 1)
        numbers = causal_numbers(memory, [Span("a", 0, 1)], [token])
        before = numbers.clone()
        further = further_numbers(memory, numbers, 1)
        assert torch.equal(numbers, before)
        memory.advance("a", 1)
        memory.trim("a")
        memory.reserve("a", 1)
        if further is None:  # another page
            n_pages += 1
            assert memory.lengths["a"] % 64 == 0
            continue
        want = causal_numbers(memory, [Span("a", 0, 1)], [token])
        assert torch.equal(further[:8], want[:8])
        n_trimmed += not torch.equal(further, want)  # tables without pages that are out of sight
    assert n_pages == 2 and 0 < n_trimmed <= 2
