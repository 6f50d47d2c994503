"""Token windows of a fixed length, and which of them a training step sees.

The batch of a step is a function of the seed and the step alone, so a resumed run sees the same
text as one that was never stopped. Not here: finding text (corpus.py).

Shapes: N tokens, B windows, S tokens of context; a window has S + 1 ids, `<bos>` first.
"""

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import tokenizers
import torch
from torch import Tensor

from outdraft.errors import TrainingError
from outdraft.train.tokenizer import BOS_ID, EOS_ID

_SEED_FACTOR = 1_000_003  # keeps (seed, epoch) pairs apart


def encode_texts(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> Tensor:
    """All texts as one int32 stream [N], each followed by `<eos>`."""
    encoded = tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
    ids = [np.array([*one.ids, EOS_ID], dtype=np.int32) for one in encoded]
    return torch.from_numpy(np.concatenate(ids) if ids else np.empty(0, np.int32))


class Windows:
    """A stream of tokens cut into windows, in another order and at other places every epoch."""

    def __init__(self, stream_N: Tensor, context: int, seed: int) -> None:
        """Raises TrainingError when the stream is shorter than two windows."""
        self.stream_N = stream_N
        self.context = context
        self.seed = seed
        # One window's worth is left over, so that every epoch can start at another place.
        self.n_windows = len(stream_N) // context - 1
        if self.n_windows < 1:
            raise TrainingError(
                f"the text has {len(stream_N)} tokens, windows have {context}",
                "give more text with --data",
            )

    def batch(self, step: int, size: int) -> Tensor:
        """The windows of a step: int64 [B, S + 1]."""
        first = step * size
        return torch.stack([self.window(index) for index in range(first, first + size)])

    def window(self, index: int) -> Tensor:
        """Window number `index` of the endless sequence of epochs: int64 [S + 1]."""
        epoch, place = divmod(index, self.n_windows)
        offset, order = _epoch_order(self.seed, epoch, self.n_windows, self.context)
        start = offset + int(order[place]) * self.context
        text = self.stream_N[start : start + self.context].long()
        return torch.cat((torch.tensor([BOS_ID]), text))


@lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, n_windows: int, context: int) -> tuple[int, Tensor]:
    """Where an epoch's first window starts, and the order of its windows."""
    generator = torch.Generator().manual_seed(seed * _SEED_FACTOR + epoch)
    offset = int(torch.randint(context, (), generator=generator))
    return offset, torch.randperm(n_windows, generator=generator)
