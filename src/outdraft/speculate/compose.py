"""Two drafters in one batch: a long match in the text first, a model's guess otherwise.

Who drafts for a sequence is chosen by its committed tokens and, where someone counts them, by how
many drafts of either were kept, so not by drafts behind a rejection (verify.py).
Not here: either drafter, or how many tokens to draft.

Shapes: B sequences, K draft length.
"""

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import replace

from outdraft.speculate.drafter import Draft, Drafter, Taps, TargetView, with_own
from outdraft.speculate.ngram import NgramDrafter, point_masses


class NgramFirst:
    """The n-gram's drafts for sequences with a match, another drafter's for the rest."""

    def __init__(self, ngram: NgramDrafter, other: Drafter) -> None:
        self.ngram = ngram
        self.other = other
        self.name = f"{ngram.name}+{other.name}"
        self.needs = union(ngram.needs, other.needs)
        self._matched: set[str] = set()  # sequences whose last drafts were the n-gram's
        self._chosen: Mapping[str, tuple[str, int]] = {}

    def open(self, sequence: str) -> None:
        """Open it for both."""
        self.ngram.open(sequence)
        self.other.open(sequence)

    def close(self, sequence: str) -> None:
        """Close it for both."""
        self._matched.discard(sequence)
        self.ngram.close(sequence)
        self.other.close(sequence)

    def sources(self, sequence: str, tokens: list[int]) -> Seq[str]:
        """See `ManySources`: a match in the text, and the other drafter."""
        return (*self.ngram.sources(sequence, tokens), self.other.name)

    def use(self, chosen: Mapping[str, tuple[str, int]]) -> None:
        """See `ManySources`."""
        self._chosen = chosen

    def propose(self, view: TargetView, k: int) -> Draft:
        """See `Drafter.propose`. The other drafter is asked only for sequences without a match,
        and for those that it was chosen for.
        """
        chosen, self._chosen = self._chosen, {}
        other = {s for s, (source, _) in chosen.items() if source == self.other.name}
        found = [[] if s.id in other else self.ngram.continuation(s, k) for s in view.sequences]
        self._matched -= {s.id for s in view.sequences}
        self._matched |= {s.id for s, tokens in zip(view.sequences, found, strict=True) if tokens}
        rest = [b for b, tokens in enumerate(found) if not tokens]
        if len(rest) == len(found):
            return self.other.propose(view, k)
        draft = point_masses(found, k)
        if not rest:
            return draft
        own_k = max(1, *(chosen.get(view.sequences[b].id, ("", k))[1] for b in rest))
        return with_own(draft, self.other.propose(_part(view, rest), own_k), rest)

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        """Tell each of the sequences that it drafted for."""
        matched = [b for b, s in enumerate(view.sequences) if s.id in self._matched]
        rest = [b for b, s in enumerate(view.sequences) if s.id not in self._matched]
        for drafter, own in ((self.ngram, matched), (self.other, rest)):
            if own:
                drafter.commit(_part(view, own), [n_accepted[b] for b in own])


def union(a: Taps, b: Taps) -> Taps:
    """What both read."""
    return Taps(
        final_hidden=a.final_hidden or b.final_hidden,
        hidden_layers=tuple(sorted({*a.hidden_layers, *b.hidden_layers})),
        kv_groups=tuple(dict.fromkeys((*a.kv_groups, *b.kv_groups))),
    )


def _part(view: TargetView, members: Seq[int]) -> TargetView:
    return replace(view, sequences=[view.sequences[b] for b in members])
