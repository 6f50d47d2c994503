"""Drafting with a smaller model of the same vocabulary, which has a memory of its own.

Before each round the model reads what was committed since its last one; what it had read of drafts
that were rejected is taken back first. So nothing has to be done at `commit`, and rounds may be
left out: a sequence that decoded plainly, was preempted or had other drafts only has more to read.

Shapes: B sequences, V vocabulary of the target.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from outdraft.cache.memory import Memory, Span
from outdraft.config import EngineConfig
from outdraft.errors import CapacityError, PairingError
from outdraft.models.registry import Target, load_target
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.drafter import Draft, SequenceView, Taps, TargetView, no_drafts, with_own
from outdraft.text.tokenizer import Tokenizer
from outdraft.weights.loading import Loading

CATCH_UP = (
    512  # rows of one sequence that a round reads at most; with more to come it has no drafts
)
REPLAYED = 64  # passes of at most so many rows ask for the scores of all, which can be recorded


class Scores(Protocol):
    """Of the rows that were asked for: fp32 logits and the lowest id of the largest, int32."""

    @property
    def logits_RV(self) -> Tensor:
        """Logits [R, V]."""
        ...

    @property
    def best_R(self) -> Tensor:
        """Argmax [R]."""
        ...


class ModelPass(Protocol):
    """Runs rows of a model over its memory; see `engine.graphs.TargetPass`."""

    def run(self, tokens: list[int], spans: Sequence[Span], wanted: list[int]) -> Scores:
        """One pass; the tensors may be overwritten by the next."""
        ...


class DraftModelDrafter:
    """Proposes with a model of its own (a `Drafter`)."""

    name = "draft-model"

    def __init__(
        self,
        model_pass: ModelPass,
        memory: Memory,
        n_vocab: int,
        n_known: int,
        *,
        sample_drafts: bool = True,
    ) -> None:
        """`n_vocab` is the target's and `n_known` its own number of ids, padding included.

        A sequence with an id that it does not know has no drafts.
        """
        self.model_pass = model_pass
        self.memory = memory
        self.n_vocab = n_vocab
        self.n_known = n_known
        self.sample_drafts = sample_drafts
        self.needs = Taps()
        self._read: dict[str, list[int]] = {}  # tokens whose rows are in memory
        self._equal: dict[str, int] = {}  # so many of them are known to be committed

    def open(self, sequence: str) -> None:
        """A sequence begins; it is read when drafts are first asked for."""
        self.memory.open(sequence)
        self._read[sequence] = []
        self._equal[sequence] = 0

    def close(self, sequence: str) -> None:
        """Its memory is free again."""
        if sequence in self._read:
            self.memory.close(sequence)
            del self._read[sequence], self._equal[sequence]

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Nothing to do: the next round compares what was read with what was committed."""

    @property
    def n_bytes(self) -> int:
        """Bytes of its keys and values."""
        return self.memory.n_bytes

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`. Sequences that it cannot draft for have a length of 0."""
        pending = {s.id: self._rewind(s) for s in view.sequences}
        able = [
            s
            for s in view.sequences
            if max(pending[s.id]) < self.n_known and self._room(s.id, len(pending[s.id]), k)
        ]
        reading = [s for s in able if len(pending[s.id]) > CATCH_UP]
        if reading:
            self._run([(s.id, pending[s.id][:CATCH_UP]) for s in reading], scores=False)
        ready = [s for s in able if len(pending[s.id]) <= CATCH_UP]
        draft = no_drafts(len(view.sequences), k)
        if not ready:
            return draft
        own = self._chain(ready, [(s.id, pending[s.id]) for s in ready], k)
        names = {s.id for s in ready}
        return with_own(draft, own, [b for b, s in enumerate(view.sequences) if s.id in names])

    def _chain(
        self, ready: list[SequenceView], first: list[tuple[str, list[int]]], k: int
    ) -> Draft:
        rows: list[tuple[str, list[int]]] | None = first

        def step(newest_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            nonlocal rows
            if rows is None:
                newest = newest_B.tolist()
                rows = [(s.id, [token]) for s, token in zip(ready, newest, strict=True)]
            scores = self._run(rows, scores=True)
            rows = None
            assert scores is not None
            logits_BV, best_B = scores
            best_B1 = best_B[:, None].long()
            sure_B = torch.exp(logits_BV.gather(1, best_B1)[:, 0] - logits_BV.logsumexp(dim=1))
            return logits_BV, best_B, sure_B

        return draft_chain(ready, k, step, sample_drafts=self.sample_drafts)

    def _rewind(self, sequence: SequenceView) -> list[int]:
        """Forget rows of tokens that were not committed; the tokens that are to be read."""
        if sequence.id not in self._read:
            self.open(sequence.id)
        read = self._read[sequence.id]
        n = min(len(read), sequence.n - 1)  # the newest is always read, for its scores
        # What was found equal once stays so: committed tokens do not change.
        known = self._equal[sequence.id]
        n = next((i for i in range(known, n) if read[i] != sequence.tokens[i]), n)
        self._equal[sequence.id] = n
        self.memory.rollback(sequence.id, len(read) - n)
        del read[n:]
        self.memory.trim(sequence.id)
        return sequence.tokens[n:]

    def _room(self, sequence: str, n_pending: int, k: int) -> bool:
        """Whether its rows fit; if not, its memory is given to the others."""
        try:
            self.memory.reserve(sequence, min(n_pending, CATCH_UP) + k)
        except CapacityError:
            self.close(sequence)
            self.open(sequence)
            return False
        return True

    def _run(
        self, rows: list[tuple[str, list[int]]], *, scores: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Read these tokens; logits [B, V] and argmax [B] behind the last of each."""
        tokens: list[int] = []
        spans, last = [], []
        for name, own in rows:
            self.memory.reserve(name, len(own))
            spans.append(Span(name, len(tokens), len(own)))
            tokens += own
            last.append(len(tokens) - 1)
        replayed = scores and len(tokens) <= REPLAYED
        wanted = list(range(len(tokens))) if replayed else last if scores else []
        done = self.model_pass.run(tokens, spans, wanted)
        for name, own in rows:
            self.memory.advance(name, len(own))
            self._read[name] += own
        if not scores:
            return None
        logits, best = done.logits_RV, done.best_R
        if replayed and len(last) < len(tokens):
            at = torch.tensor(last)
            logits, best = logits[at], best[at]
        return self._fit(logits, best)

    def _fit(self, logits_BV: Tensor, best_B: Tensor) -> tuple[Tensor, Tensor]:
        """The same over the target's vocabulary."""
        own = logits_BV.shape[1]
        if own > self.n_vocab:
            logits_BV = logits_BV[:, : self.n_vocab]
            return logits_BV, logits_BV.argmax(dim=1).int()
        if own < self.n_vocab:
            padding = logits_BV.new_full((logits_BV.shape[0], self.n_vocab - own), float("-inf"))
            logits_BV = torch.cat((logits_BV, padding), dim=1)
        return logits_BV, best_B


def check_vocabularies(target: Tokenizer, draft: Tokenizer) -> None:
    """Every id must stand for the same token in both; sizes alone prove nothing.

    Raises:
        PairingError: it does not, with the first id that differs.
    """
    for token_id in range(max(target.vocab_size, draft.vocab_size)):
        of_target, of_draft = target.id_to_token(token_id), draft.id_to_token(token_id)
        if of_target != of_draft:
            raise PairingError(
                f"the vocabularies differ: token {token_id} is {_name(of_target)} for the target "
                f"and {_name(of_draft)} for the draft model",
                "use a draft model with the target's tokenizer",
            )


def load_draft_model(
    target: Target,
    path: Path,
    config: EngineConfig,
    make_pass: Callable[[Target, Memory], ModelPass],
    n_draft_max: int,
    loading: Loading | None = None,
) -> DraftModelDrafter:
    """Read a draft model, check that it speaks the target's tokens, and plan its memory.

    Raises:
        ModelError: it cannot be used, or is of another vocabulary.
    """
    check_vocabularies(Tokenizer.load(target.path), Tokenizer.load(path))
    model = load_target(path, replace(config, ctx_size=target.ctx_size, adapter=None), loading)
    if model.ctx_size < target.ctx_size:
        raise PairingError(
            f"the draft model's context is {model.ctx_size} tokens, the target's {target.ctx_size}",
            f"use --ctx-size {model.ctx_size}",
        )
    memory = Memory(
        model.family.memory_layers(model.config),
        max_sequences=config.max_sequences,
        max_tokens=target.ctx_size + n_draft_max,
        max_rows=CATCH_UP + n_draft_max,
        dtype=model.ops.kv_dtype,
        device=model.ops.device,
        pool_tokens=config.kv_cache_tokens or min(4, config.max_sequences) * target.ctx_size,
        n_draft_max=n_draft_max,
    )
    return DraftModelDrafter(
        make_pass(model, memory),
        memory,
        target.config.vocab_size,
        model.config.vocab_size,
        sample_drafts=config.sample_drafts,
    )


def _name(token: str | None) -> str:
    return "missing" if token is None else repr(token)
