"""Memory of recorded calls: pieces in use never overlap, and free ones are found again."""

import itertools
import random

import torch
from torch import Tensor

from outdraft.ops.arena import ALIGN, FIRST_BYTES, Arena


def span(x: Tensor) -> tuple[int, int]:
    return x.data_ptr(), x.data_ptr() + x.nbytes


def test_pieces_in_use_do_not_overlap() -> None:
    seed = random.randrange(10**9)
    print("seed", seed)
    rng, arena = random.Random(seed), Arena()
    live: list[Tensor] = []
    for _ in range(2000):
        if live and rng.random() < 0.5:
            live.pop(rng.randrange(len(live)))
        else:
            made = arena.empty((rng.randrange(1, 5), rng.randrange(1, 9000)), torch.float32)
            live.append(rng.choice([made, made[:1], made.view(-1)[1:], made.view(torch.uint8)]))
            del made
        spans = sorted(span(x) for x in live)
        assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
        assert all(arena.holds(x) for x in live)
    live.clear()
    for chunk in arena.chunks:
        assert len(chunk.free) == 1 and chunk.free[0][1] >= chunk.memory.size - ALIGN


def test_a_view_keeps_its_piece() -> None:
    arena = Arena()
    view = arena.empty((4, 8), torch.float32)[1:, 2:]
    others = [arena.empty((4, 8), torch.float32) for _ in range(9)]
    assert not any(low <= view.data_ptr() < high for low, high in map(span, others))


def test_memory_is_reused_within_and_between_programs() -> None:
    arena = Arena()
    for _ in range(3):
        arena.start()
        for _ in range(50):
            arena.empty((FIRST_BYTES // 8,), torch.uint8)
        kept = [arena.empty((100,), torch.bfloat16) for _ in range(50)]
        assert arena.n_bytes <= FIRST_BYTES + ALIGN
    arena.start()
    new = [arena.empty((100,), torch.bfloat16) for _ in range(50)]
    assert {span(x) for x in new} & {span(x) for x in kept}
    del kept  # of another program: what is now in its place does not become free
    new += [arena.empty((100,), torch.bfloat16) for _ in range(50)]
    assert len({span(x) for x in new}) == 100


def test_large_and_empty_tensors() -> None:
    arena = Arena()
    large = arena.empty((3 * FIRST_BYTES,), torch.uint8)
    nothing = arena.empty((0, 7), torch.float32)
    assert large.data_ptr() % ALIGN == 0 and nothing.shape == (0, 7)
    assert not arena.holds(torch.empty(4))
