"""From a sequence's scores to what is emitted: which drafts stay and the token behind them.

Here: a request's parameters meet the rules of verification. Not here: the rules (speculate/), how
distributions are formed (sampling/), what happens to memory afterwards (runner.py).

Shapes: K drafts, R = K + 1 rows with logits, V vocabulary.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from outdraft.engine.graphs import Left
from outdraft.engine.plan import Work
from outdraft.engine.sequence import Sequence
from outdraft.errors import OutdraftError
from outdraft.models.registry import Target
from outdraft.ops.reference import pad_rows
from outdraft.request import Logprobs
from outdraft.sampling.logits import candidates, distribution, greedy, logprobs
from outdraft.sampling.sampler import Purpose, sample, uniform
from outdraft.speculate.drafter import Draft
from outdraft.speculate.verify import Verdict, verify_block, verify_own


@dataclass(slots=True)
class Block:
    """The drafts of one sequence in one step: ids, and the distributions they were drawn from.

    `forced`: a grammar gave them, not the drafter. `left`: the ids are to be read yet.
    """

    tokens: list[int]
    probs_KV: Tensor | None = None
    forced: bool = False
    left: Left | None = None


NO_DRAFTS = Block([])
PROMPT_ROWS = 32
BATCHED_SCORES = 2**17
"""Rows are formed in one call up to so many scores; beyond, memory for all costs more."""


def forced_block(sequence: Sequence, n: int) -> Block | None:
    """At most n tokens that the grammar lets follow whatever the model says, if there are any."""
    tokens = [] if sequence.sampler is None else sequence.sampler.forced_tokens()[:n]
    return Block(tokens, forced=True) if tokens else None


def forced_blocks(work: Seq[Work], sequences: Mapping[str, Sequence]) -> dict[str, Block]:
    """Blocks of those whose grammar says how they go on; the drafter is not asked for them."""
    blocks = {}
    for w in work:
        try:
            block = forced_block(sequences[w.sequence], w.n_drafts) if w.n_drafts else None
        except Exception:  # it comes again where the request fails of it alone
            block = None
        if block is not None:
            blocks[w.sequence] = block
    return blocks


def goes_on(work: Seq[Work], sequences: Mapping[str, Sequence]) -> bool:
    """Whether one sequence decodes plainly and greedily and will probably go on to do so."""
    if len(work) != 1:
        return False
    w, sequence = work[0], sequences[work[0].sequence]
    plain = w.n_rows == 1 and w.n_drafts == 0 and sequence.stats.n_passes > 0
    greedy = sequence.request.params.greedy and sequence.sampler is None
    return plain and greedy and len(sequence.tokens) + 1 < sequence.limit


def may_leave(work: Seq[Work], sequences: Mapping[str, Sequence]) -> bool:
    """Whether drafts are needed by the pass alone: of one sequence that decodes greedily."""
    if len(work) != 1 or work[0].n_rows != 1:
        return False
    sequence = sequences[work[0].sequence]
    return sequence.request.params.greedy and sequence.sampler is None


def left_of(work: Seq[Work], blocks: Mapping[str, Block]) -> Left | None:
    """Drafts that a pass of one sequence takes from the device; those of several are read now."""
    for w in work:
        block = blocks.get(w.sequence, NO_DRAFTS)
        if block.left is not None:
            if len(work) == 1:
                return block.left
            block.left.read()
            block.left = None
    return None


def check_draft(draft: Draft, tokens: list[list[int]], n: int, vocab: int) -> None:
    """A drafter that breaks its own rules must not get as far as the target's pass."""
    if not len(draft.tokens_BK) == len(draft.probs) == len(draft.lengths) == n:
        raise OutdraftError("the drafter answered for another number of sequences")
    if any(not 0 <= k <= draft.tokens_BK.shape[1] for k in draft.lengths):
        raise OutdraftError("the drafter gave a length that its tokens do not have")
    for own, k in zip(tokens, draft.lengths, strict=True):
        if any(not 0 <= token < vocab for token in own[:k]):
            raise OutdraftError("the drafter gave a token outside the vocabulary")


def admissible(sequence: Sequence, block: Block) -> Block:
    """The block up to the first draft that the grammar forbids.

    Drafts that were drawn end behind that one, not before it: that a draft is dropped must not
    depend on what was drawn (speculate/verify.py).
    """
    state = sequence.sampler
    if state is None or not block.tokens:
        return block
    n = state.n_allowed(block.tokens)
    if block.probs_KV is None:
        return replace(block, tokens=block.tokens[:n])
    return Block(block.tokens[: n + 1], block.probs_KV[: n + 1])


def decide(sequence: Sequence, block: Block, logits_RV: Tensor, best: list[int]) -> Verdict:
    """Verify a block. The sequence's sampler is left as it was; `Sequence.keep` advances it.

    Args:
        sequence: as it was when the block was drafted.
        block: its drafts.
        logits_RV: fp32, of the newest committed token and of every draft.
        best: the lowest id of the largest logit of each row.

    Raises:
        OutdraftError: this sequence cannot go on (a grammar without fuel, no token left).
    """
    params = sequence.request.params
    if params.greedy and sequence.sampler is None:
        return verify_own(block.tokens, best.__getitem__)
    rows = _Rows(sequence, block, logits_RV.cpu())
    state = sequence.sampler
    if state is not None:
        state.mark()
    try:
        if block.probs_KV is None:
            return _own(block, rows)
        return _drawn(sequence, block, rows)
    finally:
        if state is not None:
            state.rewind()


@dataclass(slots=True)
class _Rows:
    """The target's rows with the sequence's options, formed one after another as drafts stay."""

    sequence: Sequence
    block: Block
    logits_RV: Tensor
    n_stayed: int = 0

    def draw(self, i: int) -> int:
        """The target's own token of row i; called in order, when drafts 0 .. i - 1 have stayed."""
        self.n_stayed = i
        sequence, params, state = self.sequence, self.sequence.request.params, self.sequence.sampler
        if state is not None and i > 0:
            state.push(self.block.tokens[i - 1])
        forced = None if state is None else state.forced()
        if forced is not None:
            return forced
        row_V = self.logits_RV[i] if state is None else state.process(self.logits_RV[i])
        if params.greedy:
            return int(greedy(row_V[None])[0])
        ids_C, probs_C = candidates(row_V, params)
        at = sample(probs_C, uniform(sequence.seed, len(sequence.tokens) + i, Purpose.TARGET))
        return at if ids_C is None else int(ids_C[at])

    def probs(self, i: int) -> Tensor:
        """p of row i, [V]; called like `draw`."""
        params, state = self.sequence.request.params, self.sequence.sampler
        if state is not None and i > 0:
            state.push(self.block.tokens[i - 1])
        forced = None if state is None else state.forced()
        if forced is not None:
            point_V = torch.zeros_like(self.logits_RV[i])
            point_V[forced] = 1.0
            return point_V
        row_V = self.logits_RV[i] if state is None else state.process(self.logits_RV[i])
        return distribution(row_V[None], params)[0]


def _own(block: Block, rows: _Rows) -> Verdict:
    """Drafts that are the target's own tokens. If it has none behind some of them, those stay: the
    next step fails without them, as plain decoding does."""
    try:
        return verify_own(block.tokens, rows.draw)
    except OutdraftError:
        if rows.n_stayed == 0:
            raise
        return Verdict(rows.n_stayed - 1, block.tokens[rows.n_stayed - 1])


def _drawn(sequence: Sequence, block: Block, rows: _Rows) -> Verdict:
    """Drafts drawn from q. Rows behind one that p excludes are not formed: they cannot count."""
    n = len(sequence.tokens)
    if sequence.sampler is None and rows.logits_RV.numel() <= BATCHED_SCORES:
        p = list(distribution(rows.logits_RV, sequence.request.params))
    else:
        p = [rows.probs(0)]
        for i, token in enumerate(block.tokens):
            if not p[i][token] > 0:
                break
            p.append(rows.probs(i + 1))
        p += [p[-1]] * (len(block.tokens) + 1 - len(p))
    positions = range(n, n + len(block.tokens) + 1)
    accept_K = [uniform(sequence.seed, at, Purpose.ACCEPT, n) for at in positions[:-1]]
    final_R = [uniform(sequence.seed, at, Purpose.TARGET, n) for at in positions]
    drafts = torch.tensor(block.tokens, dtype=torch.int64)
    return verify_block(drafts, block.probs_KV, p, accept_K, final_R)


def reported(sequence: Sequence, tokens: list[int], logits_RV: Tensor) -> list[Logprobs] | None:
    """The target's own log-probabilities of emitted tokens, where the request asks for them."""
    n_top = sequence.request.params.logprobs
    if n_top is None:
        return None
    logits_RV = logits_RV.cpu()
    return [logprobs(logits_RV[i], token, n_top) for i, token in enumerate(tokens)]


def report_prompt(target: Target, sequence: Sequence, rows_H: Tensor) -> None:
    """Log-probabilities of the prompt's tokens, where asked for, from a chunk's hidden states.

    Args:
        target: scores the rows, some at a time: all of a chunk at once could be gigabytes.
        sequence: `n_computed` is still that of before the chunk.
        rows_H: final hidden states of the chunk.
    """
    n_top, prompt = sequence.request.params.prompt_logprobs, sequence.request.prompt_tokens
    if n_top is None or sequence.n_computed >= len(prompt):
        return
    found = sequence.prompt_logprobs
    if not found:
        found.append(None)
    for first in range(0, rows_H.shape[0], PROMPT_ROWS):
        chunk_H = rows_H[first : first + PROMPT_ROWS]
        logits_RV = target.model.logits(pad_rows(chunk_H, target.ops.row_multiple)).cpu()
        for i in range(chunk_H.shape[0]):
            at = sequence.n_computed + first + i + 1
            if at == len(found) and at < len(prompt):  # not those of a prompt computed again
                found.append(logprobs(logits_RV[i], prompt[at], n_top))
