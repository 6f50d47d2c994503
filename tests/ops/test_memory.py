"""Memory of weights and keys: zeroed, apart from each other, gone with its last tensor."""

import gc

import torch

from outdraft.ops.memory import zeros


def test_pieces_are_zero_and_do_not_overlap() -> None:
    sizes = [1, 7, 128, 4096, 100_003, 3 << 20]
    pieces = [zeros([size], torch.uint8) for size in sizes]
    for value, piece in enumerate(pieces):
        assert piece.data_ptr() % 128 == 0 and (piece == 0).all()
        piece.fill_(value + 1)
    for value, piece in enumerate(pieces):
        assert (piece == value + 1).all()


def test_shapes_and_types() -> None:
    x = zeros((3, 2, 5), torch.bfloat16)
    assert x.shape == (3, 2, 5) and x.dtype == torch.bfloat16 and x.is_contiguous()
    assert zeros([0], torch.uint8).numel() == 0


def test_memory_that_is_given_back_comes_back_as_zeros() -> None:
    for _ in range(5):
        piece = zeros([70 << 20], torch.uint8)
        assert int(piece[::4096].sum()) == 0
        piece[::4096] = 1
        del piece
        gc.collect()


def test_a_piece_outlives_the_others() -> None:
    kept, other = zeros([1000], torch.int8), zeros([1000], torch.int8)
    kept.fill_(3)
    view = kept[10:20]
    del kept, other
    gc.collect()
    later = zeros([1 << 20], torch.uint8)
    later.fill_(9)
    assert (view == 3).all()
