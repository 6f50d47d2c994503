"""Served texts as a learner sees them: states recomputed by the engine's own kernels, the loss over
their rounds, and what a drafter would have drafted in them.

The target runs as it is served, packed weights and all, over pages as in decoding; its states are
those that drafting begins with. The drafter's network is trained in PyTorch and replayed with the
kernels that serve it. Here: one text at a time. Not here: which texts, and when (learner.py).

Shapes: S tokens of a text, A rounds ("anchors"), K draft steps, N keys, G key/value heads, D head
dimension, V vocabulary.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from outdraft.cache.attend import first_visible
from outdraft.cache.memory import Memory, Span
from outdraft.engine.engine import LLM
from outdraft.models.gemma4_assistant import Gemma4Assistant
from outdraft.models.gemma4_config import AssistantConfig
from outdraft.ops.base import PAGE_SLOTS, Heads, KvPages
from outdraft.ops.batched import BatchedOps
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import SequenceView, TargetView
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.speculate.stats import DraftStats
from outdraft.train.attention import OPS, KeysValues, attend
from outdraft.train.losses import draft_loss, step_weights

MAX_TOKENS = 1024
"""Most tokens of a piece; of a longer text the beginning is left out, but for the first token."""
MAX_OUTPUT = 256
"""Most tokens of a piece that the target wrote. A longer answer is several pieces."""

_NAME = "text"


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens, of which those from `given` on are the target's."""

    tokens: tuple[int, ...]
    given: int


def pieces(tokens: Sequence[int], n_prompt: int) -> list[Piece]:
    """A served text in pieces; each written token is in one of them."""
    found = []
    for start in range(n_prompt, len(tokens), MAX_OUTPUT):
        end = min(start + MAX_OUTPUT, len(tokens))
        first = max(0, end - MAX_TOKENS)
        cut = (*tokens[:1], *tokens[first + 1 : end])
        found.append(Piece(cut, start - first))
    return found


@dataclass(frozen=True, slots=True)
class States:
    """What the target says about a piece; its keys and values are in memory while it is open."""

    piece: Piece
    view: TargetView
    hidden_SK: Tensor


@contextmanager
def opened(llm: LLM, piece: Piece) -> Iterator[States]:
    """Run the target over a piece, in one pass or several; the block has its states."""
    memory, tokens = llm.memory, list(piece.tokens)
    memory.open(_NAME)
    try:
        parts = []
        for start in range(0, len(tokens), llm.config.prefill_chunk):
            rows = tokens[start : start + llm.config.prefill_chunk]
            memory.reserve(_NAME, len(rows))
            with torch.inference_mode():
                done = llm.runner.target_pass.run(rows, [Span(_NAME, 0, len(rows))], [])
            parts.append(done.hidden_TH[: len(rows)].clone())
            memory.advance(_NAME, len(rows))
        own = SequenceView(_NAME, tokens, SamplingParams(), 0, None)
        model = llm.target.model
        view = TargetView([own], memory, model.embed, llm.target.ops)
        yield States(piece, view, torch.cat(parts))
    finally:
        memory.close(_NAME)


def replayed(states: States, drafter: Gemma4AssistantDrafter, k: int) -> DraftStats:
    """Greedy drafts of k against the tokens that were written, as decoding would have had it."""
    tokens, first = states.piece.tokens, states.piece.given
    stats = DraftStats()
    newest = range(first, len(tokens) - 1)
    if not newest:
        return stats
    with torch.inference_mode():
        hidden_AH = states.hidden_SK[first - 1 : len(tokens) - 2]
        drafts = drafter.replay(states.view, newest, hidden_AH, k).tolist()
    at = first
    while at < len(tokens) - 1:
        left = len(tokens) - 1 - at
        own = drafts[at - first][:left]
        right = next((i for i, d in enumerate(own) if d != tokens[at + 1 + i]), len(own))
        emitted = min(right + 1, left)
        stats.count(len(own), right, emitted)
        at += emitted
    return stats


def piece_loss(
    states: States,
    llm: LLM,
    config: AssistantConfig,
    weights: Mapping[str, Tensor],
    kv_layers: Mapping[str, int],
    n_steps: int,
) -> Tensor | None:
    """KL of the drafter from the target over all rounds of a piece (train/gemma4_assistant.py).

    Returns:
        Weighted mean over the steps of a round, nats, with a graph to `weights`; None where the
        piece is too short for a round.
    """
    first, end = states.piece.given, len(states.piece.tokens) - n_steps + 1
    if first >= end:
        return None
    newest_A = torch.arange(first, end)
    with torch.no_grad():
        model = llm.target.model
        probs_SV = torch.softmax(model.logits(states.hidden_SK[first:]).float(), dim=-1)
        tokens_S = torch.tensor(states.piece.tokens[first:], dtype=torch.int32)
        embedded_SK = model.embed(tokens_S).float()
    assistant = Gemma4Assistant(config, weights, BatchedOps(), MAX_TOKENS + 1)
    attention = _Anchored(config, _keys_values(states.view.memory, kv_layers, end), newest_A)
    state_AK = states.hidden_SK[first - 1 : end - 1].float()
    total = torch.zeros(())
    # The head is used as the full one: the groups of an ordered head stay as they are.
    for k, weight in enumerate(step_weights(n_steps)):
        rows = slice(k, k + len(newest_A))
        normed_Ah = assistant.step(embedded_SK[rows], state_AK, newest_A, attention)
        total = total + weight * draft_loss("kl", normed_Ah, probs_SV[rows], assistant.text.logits)
        state_AK = assistant.carry(normed_Ah)
    return total


class _Anchored:
    """The assistant's `Attend`: rounds of one text over the target's keys and values.

    With the token at position n the newest, keys 0 .. n - 1 are seen, in sliding layers the last
    `window` of them.
    """

    def __init__(
        self, config: AssistantConfig, keys_values: Mapping[str, KeysValues], newest_A: Tensor
    ) -> None:
        self.kinds: tuple[str, ...] = config.text.layer_types
        self.keys_values = keys_values
        windows = {"full_attention": None, "sliding_attention": config.text.sliding_window}
        self.masks = {}
        for kind, kv in keys_values.items():
            key_N = torch.arange(kv.k_BGSD.shape[2])
            hi_A = newest_A - 1
            lo_A = torch.as_tensor(first_visible(hi_A.numpy(), windows[kind]))
            self.masks[kind] = (key_N <= hi_A[:, None]) & (key_N >= lo_A.expand(len(hi_A))[:, None])

    def __call__(self, layer: int, q: Heads, k: Heads | None, v: Heads | None, /) -> Tensor:
        """See `Attend`."""
        assert k is None and v is None
        kind = self.kinds[layer]
        return attend(q.value(OPS), self.keys_values[kind], self.masks[kind])


def _keys_values(memory: Memory, kv_layers: Mapping[str, int], n: int) -> dict[str, KeysValues]:
    """The first n keys and values of the open piece, fp32 [1, G, N, D], by kind of layer."""
    found = {}
    for kind, layer in kv_layers.items():
        group = memory.groups[kind]
        table = memory.books.groups[kind].tables[_NAME]
        assert table.first_page == 0, "nothing of a piece is trimmed"
        pages = torch.tensor(table.pages[: -(-n // PAGE_SLOTS)])
        store = group.layers[layer]
        found[kind] = KeysValues(*(_rows(store, pages, n, key=key) for key in (True, False)))
    return found


def _rows(store: KvPages, pages: Tensor, n: int, *, key: bool) -> Tensor:
    data = store.k_PGSD if key else store.v_PGSD
    scales = store.k_scales_PGS if key else store.v_scales_PGS
    rows_PGSD = data[pages].float()
    if scales is not None:
        rows_PGSD = rows_PGSD * scales[pages][..., None]
    return rows_PGSD.transpose(0, 1).flatten(1, 2)[None, :, :n]
