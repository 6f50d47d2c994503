"""The Gemma 4 assistant: a few layers that guess the next tokens from the target's own state.

Here: its tensors and one step of its recurrence. It has no keys, values or state of its own. Not
here: the round (speculate/gemma4_assistant.py) and training (train/gemma4_assistant.py).
Protocol: transformers `models/gemma4_assistant`, vLLM `gemma4_mtp.py`.

Shapes: T rows, K target hidden size, h own hidden size, V vocabulary, C centroids.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from outdraft.errors import PairingError
from outdraft.models.gemma4 import Gemma4
from outdraft.models.gemma4 import expected_tensors as text_tensors
from outdraft.models.gemma4_config import KINDS, AssistantConfig, Gemma4Config
from outdraft.models.layers import Attend
from outdraft.ops.base import Ops, Weight
from outdraft.weights.load import ExpectedTensor, IgnoreRule

PREFIXES = ("model.",)


def expected_tensors(config: AssistantConfig) -> dict[str, ExpectedTensor]:
    """Canonical name -> shape of every tensor the assistant needs."""
    own, backbone = config.text.hidden_size, config.backbone_hidden_size
    expected = text_tensors(config.text)
    expected["pre_projection.weight"] = ExpectedTensor((own, 2 * backbone))
    expected["post_projection.weight"] = ExpectedTensor((backbone, own))
    if config.ordered:
        vocab = (config.text.vocab_size,)
        expected["masked_embedding.centroids.weight"] = ExpectedTensor((config.n_centroids, own))
        expected["masked_embedding.token_ordering"] = ExpectedTensor(vocab, dtype=torch.int64)
    return expected


def ignore_rules(config: AssistantConfig) -> list[IgnoreRule]:
    """Tensors that an assistant's checkpoint may carry without being used."""
    if config.text.tie_word_embeddings:
        return [IgnoreRule(r"lm_head\.weight", "the head is tied to the embedding")]
    return []


def check_pair(target: Gemma4Config, assistant: AssistantConfig) -> None:
    """Refuse an assistant that was made for another target.

    Raises:
        PairingError: naming the first property that differs.
    """
    own = assistant.text
    differences: list[tuple[str, object, object]] = [
        ("vocab_size", own.vocab_size, target.vocab_size),
        ("backbone hidden size", assistant.backbone_hidden_size, target.hidden_size),
        ("sliding_window", own.sliding_window, target.sliding_window),
    ]
    for kind in KINDS:
        if kind not in own.layer_types:
            continue
        if kind not in target.layer_types:
            raise PairingError(
                f"the assistant reads {kind} layers and the target has none", PAIRING_HINT
            )
        mine = own.attention[own.layer_types.index(kind)]
        theirs = target.attention[target.last_owner(kind)]
        if mine.n_heads % theirs.n_kv_heads:  # its own count of them is not used
            raise PairingError(
                f"the assistant's {mine.n_heads} query heads do not divide over the target's "
                f"{theirs.n_kv_heads} key/value heads in {kind} layers",
                PAIRING_HINT,
            )
        differences += [
            (f"head_dim of {kind}", mine.head_dim, theirs.head_dim),
            (f"rope of {kind}", own.rope[kind], target.rope[kind]),
        ]
    for name, mine_, theirs_ in differences:
        if mine_ != theirs_:
            raise PairingError(
                f"the assistant belongs to another target: its {name} is {mine_}, "
                f"the target's is {theirs_}",
                PAIRING_HINT,
            )


PAIRING_HINT = "give the matching drafter with --assistant, or decode plainly with --spec-type off"


class Gemma4Assistant:
    """An assistant over given weights and operations."""

    def __init__(
        self,
        config: AssistantConfig,
        weights: Mapping[str, Any],
        ops: Ops,
        n_positions: int | None = None,
    ) -> None:
        """`weights` and `n_positions` as for `Gemma4`; the names are `expected_tensors`'."""
        self.config = config
        self.ops = ops
        self.text = Gemma4(config.text, weights, ops, n_positions)
        self.pre_projection = ops.pack(weights["pre_projection.weight"])
        self.post_projection = ops.pack(weights["post_projection.weight"])
        self.centroids: Weight = None
        self.ordering_CN: Tensor | None = None
        if config.ordered:
            self.centroids = ops.pack(weights["masked_embedding.centroids.weight"])
            ordering = weights["masked_embedding.token_ordering"]
            self.ordering_CN = ordering.view(config.n_centroids, -1).int()
            # As many blocks as centroids, so that the tokens of one are read together.
            self.blocks = ops.pack_blocks(weights["embed_tokens.weight"], self.ordering_CN)

    def step(
        self, embedded_TK: Tensor, hidden_TK: Tensor, position_T: Tensor, attend: Attend
    ) -> Tensor:
        """One step: the target's scaled embedding of a token and the hidden state before it.

        Returns:
            Normed states [T, h]: `logits` scores the next token from them, `carry` makes the
            hidden state of the next step.
        """
        x = self.ops.linear(self.ops.concat(embedded_TK, hidden_TK), self.pre_projection)
        return self.text.layers_forward(x, position_T, attend)

    def carry(self, normed_Th: Tensor) -> Tensor:
        """The hidden state [T, K] that the next step of the round reads."""
        return self.ops.linear(normed_Th, self.post_projection)

    def logits(self, normed_Th: Tensor) -> Tensor:
        """fp32 scores [T, V], without a soft-cap; `-inf` where the centroid head did not look."""
        if self.ordering_CN is None:
            return self.text.logits(normed_Th)
        return self.ops.score_blocks(
            normed_Th,
            self.blocks,
            self.ordering_CN,
            self._likeliest_blocks(normed_Th),
            self.config.text.vocab_size,
        )

    def best(self, normed_Th: Tensor) -> tuple[Tensor, Tensor]:
        """The id of the largest of `logits`, and what softmax over them gives it."""
        if self.ordering_CN is None:
            return self.ops.best(self.text.logits(normed_Th))
        return self.ops.best_of_blocks(
            normed_Th, self.blocks, self.ordering_CN, self._likeliest_blocks(normed_Th)
        )

    def _likeliest_blocks(self, normed_Th: Tensor) -> Tensor:
        scores_TC = self.ops.linear(normed_Th, self.centroids, torch.float32)
        return self.ops.top(scores_TC, self.config.centroid_top_k)
