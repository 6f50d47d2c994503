"""How often a target accepts its drafter's greedy drafts, on texts that are the same for all.

Here: at every position of a given text the drafter proposes from the true text before it, the
target verifies, and then the text goes on as given, whatever was accepted. So targets that differ
in their weights alone are compared at the same positions, and the error of a difference is small.
Not here: which texts (quality.py).

Shapes: P positions counted in a text, K drafts a round.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from outdraft.cache.memory import Span
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import Drafter, SequenceView, TargetView

GREEDY = SamplingParams()


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, `<bos>` first. Rounds are counted behind `first` tokens and each one after."""

    tokens: list[int]
    first: int

    def __post_init__(self) -> None:
        assert 2 <= self.first <= len(self.tokens), "a drafter needs a token that was computed"


@dataclass(frozen=True, slots=True)
class Scored:
    """What happened in a text: the target's own next token [P], the drafts [P, K], -1 where there
    was none, and how many of them were accepted [P]."""

    best_P: Tensor
    drafts_PK: Tensor
    accepted_P: Tensor


@dataclass(slots=True)
class _Reader:
    """A text being read: `n` tokens are committed, of which the newest is not computed."""

    id: str
    text: Text
    n: int
    hidden_H: Tensor
    best: list[int] = field(default_factory=list)
    drafts: list[list[int]] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)


@torch.inference_mode()
def score_texts(
    llm: LLM, texts: Sequence[Text], k: int, progress: Callable[[int], None] = lambda n: None
) -> list[Scored]:
    """All texts, as many at once as the engine was made for.

    Args:
        k: drafts a round.
        progress: is told how many more positions are done.
    """
    drafter = llm.pairing.drafter
    assert drafter is not None and not llm.scheduler.busy
    results = []
    for at in range(0, len(texts), llm.config.max_sequences):
        part = texts[at : at + llm.config.max_sequences]
        readers = [_open(llm, drafter, f"acceptance{i}", text) for i, text in enumerate(part)]
        try:
            while reading := [r for r in readers if r.n <= len(r.text.tokens)]:
                _round(llm, drafter, reading, k)
                progress(len(reading))
        finally:
            for reader in readers:
                drafter.close(reader.id)
                llm.memory.close(reader.id)
        results += [_scored(reader) for reader in readers]
    return results


def _open(llm: LLM, drafter: Drafter, name: str, text: Text) -> _Reader:
    """Compute all that stands before the first round's newest token."""
    llm.memory.open(name)
    drafter.open(name)
    known, step = text.tokens[: text.first - 1], llm.config.prefill_chunk
    hidden_TH = torch.empty(0)
    for at in range(0, len(known), step):
        rows = known[at : at + step]
        llm.memory.reserve(name, len(rows))
        done = llm.runner.target_pass.run(rows, [Span(name, 0, len(rows))], [])
        hidden_TH = done.hidden_TH[: len(rows)]
        llm.memory.advance(name, len(rows))
        llm.memory.trim(name)
    return _Reader(name, text, text.first, hidden_TH[-1].clone())


def _round(llm: LLM, drafter: Drafter, readers: Sequence[_Reader], k: int) -> None:
    """Propose, verify, forget the drafts, go on by one token of the text."""
    memory = llm.memory
    views = [SequenceView(r.id, r.text.tokens[: r.n], GREEDY, 0, r.hidden_H) for r in readers]
    view = TargetView(views, memory, llm.target.model.embed, llm.target.ops)
    draft = drafter.propose(view, k)
    rows: list[int] = []
    spans: list[Span] = []
    proposed = []
    for reader, tokens, length in zip(
        readers, draft.tokens_BK.tolist(), draft.lengths, strict=True
    ):
        own = tokens[: min(k, length)]
        proposed.append(own)
        spans.append(Span(reader.id, len(rows), 1 + len(own)))
        rows += [reader.text.tokens[reader.n - 1], *own]
        memory.reserve(reader.id, 1 + len(own))
    done = llm.runner.target_pass.run(rows, spans, list(range(len(rows))))
    best = done.best_R.tolist()
    for reader, own, span in zip(readers, proposed, spans, strict=True):
        mine = best[span.start : span.start + span.n_rows]
        wrong = (i for i, token in enumerate(own) if token != mine[i])
        reader.best.append(mine[0])
        reader.drafts.append(own + [-1] * (k - len(own)))
        reader.accepted.append(next(wrong, len(own)))
        reader.hidden_H = done.hidden_TH[span.start].clone()
        reader.n += 1
        memory.advance(reader.id, span.n_rows)
        memory.rollback(reader.id, len(own))
        memory.trim(reader.id)
    drafter.commit(view, [0] * len(readers))


def _scored(reader: _Reader) -> Scored:
    return Scored(*(torch.tensor(part) for part in (reader.best, reader.drafts, reader.accepted)))


def acceptance_figures(own: Sequence[Scored], base: Sequence[Scored] | None) -> dict[str, Any]:
    """Acceptance by position, and its change from that of `base` at the same positions.

    `conditional` i: of the rounds whose first i drafts were accepted, those whose next one was.
    `accepted`: of all drafts. Standard errors are over texts, whose positions are not independent.
    `first_of_bf16_drafts`, `bf16_of_first_drafts`: the first drafts of one judged by the other.
    """
    k = own[0].drafts_PK.shape[1]
    shares = [_ratio(*_counts(own, i)) for i in range(k)]
    n_positions = sum(len(scored.best_P) for scored in own)
    figures: dict[str, Any] = {
        "n_texts": len(own),
        "n_positions": n_positions,
        "conditional": shares,
        "conditional_standard_error": [_error(*_counts(own, i)) for i in range(k)],
        "accepted": _ratio(*_all_counts(own)),
        "tokens_per_pass": 1 + sum(int(s.accepted_P.sum()) for s in own) / n_positions,
    }
    if base is None:
        return figures
    pairs = [(_counts(own, i), _counts(base, i)) for i in range(k)]
    pairs.append((_all_counts(own), _all_counts(base)))
    changes = [_ratio(*mine) - _ratio(*theirs) for mine, theirs in pairs]
    errors = [_error_of_difference(mine, theirs) for mine, theirs in pairs]
    return figures | {
        "conditional_change": changes[:-1],
        "conditional_change_standard_error": errors[:-1],
        "accepted_change": changes[-1],
        "accepted_change_standard_error": errors[-1],
        "first_of_bf16_drafts": _first_share(base, own),
        "bf16_of_first_drafts": _first_share(own, base),
        "same_top": _share_of(own, base, lambda a, b: a.best_P == b.best_P),
        "same_first_draft": _share_of(
            own, base, lambda a, b: a.drafts_PK[:, 0] == b.drafts_PK[:, 0]
        ),
    }


def _first_share(drafted: Sequence[Scored], judged: Sequence[Scored]) -> float:
    return _share_of(drafted, judged, lambda a, b: a.drafts_PK[:, 0] == b.best_P)


def _share_of(
    one: Sequence[Scored], other: Sequence[Scored], same: Callable[[Scored, Scored], Tensor]
) -> float:
    found = torch.cat([same(a, b) for a, b in zip(one, other, strict=True)])
    return float(found.double().mean())


def _counts(texts: Sequence[Scored], position: int) -> tuple[Tensor, Tensor]:
    """By text: drafts at a position that were accepted, and that could have been."""
    reached = [(s.accepted_P >= position) & (s.drafts_PK[:, position] >= 0) for s in texts]
    accepted = [s.accepted_P > position for s in texts]
    return _sums(accepted), _sums(reached)


def _all_counts(texts: Sequence[Scored]) -> tuple[Tensor, Tensor]:
    return _sums([s.accepted_P for s in texts]), _sums([s.drafts_PK >= 0 for s in texts])


def _sums(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.sum().double() for part in parts])


def _ratio(part: Tensor, whole: Tensor) -> float:
    return float(part.sum() / whole.sum().clamp_min(1))


def _influence(part: Tensor, whole: Tensor) -> Tensor:
    """How much each text moves the ratio of sums (linearised)."""
    return (part - _ratio(part, whole) * whole) / whole.sum().clamp_min(1)


def _error(part: Tensor, whole: Tensor) -> float | None:
    return _root(_influence(part, whole))


def _error_of_difference(
    mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]
) -> float | None:
    return _root(_influence(*mine) - _influence(*theirs))


def _root(influence: Tensor) -> float | None:
    n = len(influence)
    return float((influence.square().sum() * n / (n - 1)).sqrt()) if n > 1 else None


def continuations(llm: LLM, starts: Sequence[list[int]], n_tokens: int) -> Iterator[Text]:
    """The texts that greedy decoding makes of these beginnings; counted behind them."""
    params = SamplingParams(max_tokens=n_tokens, ignore_eos=True)
    for done in llm.generate_all(starts, params):
        yield Text([*done.prompt_tokens, *done.tokens], len(done.prompt_tokens))
