"""The drafter of a shape, with made-up weights: any kind, and rounds of it to be timed.

Not here: the shapes (shapes.py), the weights (synthetic.py), the timing (shape.py).

Shapes: T rows, K hidden size.
"""

from typing import Any

import torch

from outdraft.bench.made_up import SEQUENCE, as_target
from outdraft.bench.shapes import Shape
from outdraft.bench.synthetic import (
    nothing_but_shape,
    synthetic_assistant,
    synthetic_head,
    synthetic_target,
)
from outdraft.cache.memory import LayerMemory, Memory
from outdraft.engine.graphs import TargetPass
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.models.heads import head_family
from outdraft.models.layers import TargetModel
from outdraft.ops.base import Ops
from outdraft.request import SamplingParams
from outdraft.speculate.draft_model import CATCH_UP, DraftModelDrafter
from outdraft.speculate.draft_vocab import DraftVocab, choose_ids
from outdraft.speculate.drafter import Drafter, ReadsStates, SequenceView, TargetView
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from outdraft.speculate.mtp import MtpDrafter


def synthetic_vocab(shape: Shape, target: TargetModel, n_ids: int) -> DraftVocab:
    """A part of the vocabulary, of made-up rows as the target's head has."""
    n_vocab = shape.target.vocab_size
    ids = choose_ids(n_ids, n_vocab, ())
    rows = nothing_but_shape((len(ids), shape.target.hidden_size))
    weight = target.ops.pack(rows, "embedding")  # type: ignore[arg-type]
    return DraftVocab(torch.tensor(ids), weight, target.ops, n_vocab)


def count_drafter(shape: Shape, ops: Ops) -> None:
    """Pack a drafter's weights by operations that only count."""
    if isinstance(shape.drafter, AssistantConfig):
        synthetic_assistant(shape.drafter, ops, 1)
    elif shape.drafter is shape.target:
        synthetic_head(shape.target, ops, 1)
    else:
        synthetic_target(shape.drafter, ops, 1, shape.family)


def synthetic_drafter(
    shape: Shape, target: TargetModel, ops: Ops, n_positions: int
) -> Gemma4AssistantDrafter | MtpDrafter | DraftModelDrafter:
    """The drafter of a shape, over weights that `ops` makes up."""
    own = shape.drafter
    if isinstance(own, AssistantConfig):
        assert isinstance(shape.target, Gemma4Config)
        kinds = dict.fromkeys(own.text.layer_types)
        kv_layers: dict[str, int] = {kind: shape.target.last_owner(kind) for kind in kinds}
        return Gemma4AssistantDrafter(synthetic_assistant(own, ops, n_positions), kv_layers)

    def memory(layers: list[LayerMemory]) -> Memory:
        return Memory(
            layers,
            max_sequences=1,
            max_tokens=n_positions,
            max_rows=CATCH_UP,
            dtype=torch.bfloat16,
            device=ops.device,
        )

    if own is shape.target:
        head = synthetic_head(own, ops, n_positions)
        return MtpDrafter(head, target, memory([*head_family(own).memory_layers(own)]))
    model = synthetic_target(own, ops, n_positions, shape.family)
    its_memory = memory([*shape.family.memory_layers(own)])
    its_pass = TargetPass(as_target(shape.family, own, model, ops, n_positions), its_memory)
    n_vocab = shape.target.vocab_size
    return DraftModelDrafter(its_pass, its_memory, n_vocab, own.vocab_size)


class Rounds:
    """Rounds of one drafter behind a context, one after another."""

    def __init__(
        self, drafter: Drafter, memory: Memory, target: Any, tokens: list[int], k: int
    ) -> None:
        """Let the drafter read the context as it does behind a prompt, and run a first round.

        Args:
            memory: the target's, which holds all of `tokens` but the newest.
            target: the target's model.
            k: drafts a round.
        """
        self.drafter, self.memory, self.target, self.k = drafter, memory, target, k
        self.tokens = tokens
        self.hidden_K = torch.randn(target.config.hidden_size, device=memory.device)
        drafter.open(SEQUENCE)
        self._read(0, len(tokens) - 1)
        while not self._propose():
            pass

    def next(self) -> None:
        """One more round. A drafter that reads states has read that of one more token."""
        if isinstance(self.drafter, ReadsStates):
            self.tokens.append(self.tokens[-1])
            self._read(len(self.tokens) - 2, 1)
        drafted = self._propose()
        assert drafted == self.k

    def _read(self, first: int, n_rows: int) -> None:
        if isinstance(self.drafter, ReadsStates):
            self.drafter.read(SEQUENCE, first, self.hidden_K.expand(n_rows, -1))

    def _propose(self) -> int:
        sequence = SequenceView(SEQUENCE, self.tokens, SamplingParams(), 0, self.hidden_K)
        view = TargetView([sequence], self.memory, self.target.embed, self.target.ops)
        return self.drafter.propose(view, self.k).lengths[0]
