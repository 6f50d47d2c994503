"""Drafting over a part of the vocabulary: the rows of the output head that are scored for drafts.

A large vocabulary is most of a native head's step. A token outside the part is never drafted: its
q is 0, which every rule of verification allows, so nothing that is emitted changes. Not here: who
drafts (mtp.py).

Shapes: B rows, K hidden size, N ids of the part, V vocabulary.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from outdraft.config import EngineConfig
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target, open_weights, packing
from outdraft.ops.base import Ops, Weight
from outdraft.ops.stored import reorder
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.checkpoint import Checkpoint
from outdraft.weights.config import read_config
from outdraft.weights.load import IgnoreRule

HEADS = ("lm_head.weight", "embed_tokens.weight", "embeddings.weight")  # tied where not of its own
MULTIPLE = 64  # rows that a packed weight is made of


@dataclass(frozen=True, slots=True)
class DraftVocab:
    """The part: ids int64 [N], ascending, and the packed rows of the head."""

    ids_N: Tensor
    weight: Weight
    ops: Ops
    n_vocab: int

    def logits(self, hidden_BK: Tensor) -> Tensor:
        """fp32 [B, N]."""
        return self.ops.linear(hidden_BK, self.weight, torch.float32)

    def whole(self, logits_BN: Tensor) -> Tensor:
        """fp32 [B, V], -inf outside the part."""
        logits_BV = logits_BN.new_full((logits_BN.shape[0], self.n_vocab), float("-inf"))
        logits_BV[:, self.ids_N] = logits_BN
        return logits_BV


def choose_ids(
    n: int, n_vocab: int, always: Iterable[int], text_ids: Iterable[int] = ()
) -> list[int]:
    """n ids, rounded up to what is packed at once: `always`, the most frequent of a text, then the
    lowest, which byte-pair encodings give to what is frequent.
    """
    n = min(-(-n // MULTIPLE) * MULTIPLE, n_vocab)
    frequent = (token for token, _ in Counter(text_ids).most_common())
    ordered = (t for part in (always, frequent, range(n_vocab)) for t in part if t < n_vocab)
    chosen: dict[int, None] = {}
    for token in ordered:
        if len(chosen) == n:
            break
        chosen[token] = None
    return sorted(chosen)


def load_draft_vocab(target: Target, config: EngineConfig) -> DraftVocab | None:
    """The part that is asked for, its rows read from the target's checkpoint and packed once.

    Raises:
        OutdraftError: the text cannot be read.
    """
    shape = target.config
    if config.draft_vocab is None or config.draft_vocab >= shape.vocab_size:
        return None
    tokenizer = Tokenizer.load(target.path)
    text_ids: list[int] = []
    if config.draft_vocab_text is not None:
        text_ids = tokenizer.encode(_read(config.draft_vocab_text), add_special_tokens=False)
    chosen = choose_ids(config.draft_vocab, shape.vocab_size, tokenizer.eos_ids, text_ids)
    ids_N = torch.tensor(chosen)
    expected = target.family.expected_tensors(shape)
    name = next(name for name in HEADS if name in expected)
    raw = read_config(target.path)
    weights, _, _ = open_weights(
        Checkpoint.open(target.path),
        raw,
        {name: expected[name]},
        [IgnoreRule(rf"(?!.*{name}).*", "not the output head")],
        prefixes=target.family.prefixes,
        dtype=target.dtype,
    )
    with packing(target.ops, weights, raw, replace(config, cache_dir=None)):
        weight = target.ops.pack(reorder(weights[name], ids_N), "embedding")
    return DraftVocab(ids_N, weight, target.ops, shape.vocab_size)


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise OutdraftError(
            f"the text of the draft vocabulary cannot be read: {error}", "check the file"
        ) from error
