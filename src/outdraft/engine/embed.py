"""Embeddings of a text: the target's final hidden states, pooled. No drafts, nothing is cached.

The model was trained to continue texts, not to embed them; the vectors are as good as that allows.
Not here: which texts (server/).

Shapes: T rows, H hidden size.
"""

from collections.abc import Sequence as Seq
from typing import Literal, get_args

import torch
from torch import Tensor

from outdraft.cache.memory import Span
from outdraft.engine.runner import Runner
from outdraft.errors import OutdraftError

Pooling = Literal["mean", "last"]
_NAME = "embedding"


@torch.inference_mode()
def embed(runner: Runner, tokens: Seq[int], pooling: Pooling, chunk: int) -> Tensor:
    """One text's vector, fp32 [H], of length 1.

    The text goes through the target in pieces of `chunk` rows, between two steps, over pages that
    are free; they are given back. Row-invariance makes the vector independent of `chunk`.

    Args:
        tokens: the text's, checked to fit the context.
        pooling: `mean` of all positions, or the `last` one's.

    Raises:
        CapacityError: too few pages are free now.
        OutdraftError: the pooling is unknown, or the states are not finite.
    """
    if pooling not in get_args(Pooling):
        raise OutdraftError(f"pooling {pooling!r} is unknown", f"use one of {get_args(Pooling)}")
    memory = runner.memory
    memory.open(_NAME)
    try:
        total_H = torch.zeros(0)
        last_H = torch.zeros(0)
        for start in range(0, len(tokens), chunk):
            piece = list(tokens[start : start + chunk])
            memory.reserve(_NAME, len(piece))
            done = runner.target_pass.run(piece, [Span(_NAME, 0, len(piece))], [])
            rows_TH = done.hidden_TH[: len(piece)].float()
            total_H = rows_TH.sum(0) if start == 0 else total_H + rows_TH.sum(0)
            last_H = rows_TH[-1].clone()
            memory.advance(_NAME, len(piece))
            memory.trim(_NAME)
    finally:
        memory.close(_NAME)
    vector_H = total_H if pooling == "mean" else last_H
    length = vector_H.norm()
    if not bool(torch.isfinite(length)) or length == 0:
        raise OutdraftError("the hidden states are not finite", "check the weights")
    return torch.div(vector_H, length)
