"""Draft lengths chosen from measured costs, for the engine. No tensors.

Here: which controller a batch is for, and what of a step it may learn. Not here: the choice
(speculate/length.py), the costs that are measured at the start (costs.py).

A length that depends on measured time differs from run to run. Greedy text, and sampled text whose
drafts are not drawn, do not depend on lengths; text with drawn drafts does, though its distribution
does not. So requests with a seed get drafts that are not drawn (`draws`), and stay repeatable.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

from outdraft.engine.sequence import Sequence
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import draws
from outdraft.speculate.length import LengthController


@dataclass(frozen=True, slots=True)
class StepCosts:
    """One decoding step: rows that ran, depth of the draft round, seconds of its parts.

    `rest_s` is what came behind the pass. `blocks` has of each sequence that brought drafts their
    number and how many stayed. `clean` is false if a prompt, a failure or a first time was in it.
    """

    n_sequences: int
    n_rows: int
    depth: int
    draft_s: float
    pass_s: float
    rest_s: float
    blocks: dict[str, tuple[int, int]]
    clean: bool = True


SPEED_UP_DECAY = 0.995


class AutoLengths:
    """Controllers for batches with drawn drafts and without: their rounds cost differently."""

    def __init__(self, n_draft_max: int, *, sample_drafts: bool) -> None:
        self.sample_drafts = sample_drafts
        self.likeliest = LengthController(n_draft_max)
        self.drawn = LengthController(n_draft_max)
        self._seen: set[tuple[bool, int, int, int]] = set()
        self._spent_s = self._plain_s = 0.0

    @property
    def speed_up(self) -> float | None:
        """Steps of late over plain decoding of as many sequences, in tokens per second.

        None until steps were timed whose batch size was also timed plain.
        """
        return self._plain_s / self._spent_s if self._spent_s else None

    def draws(self, params: SamplingParams) -> bool:
        """Whether drafts of such a request are drawn from the drafter's distribution."""
        return self.sample_drafts and draws(params)

    def choose(self, decoding: list[Sequence]) -> list[int]:
        """The scheduler's `DraftLengths`."""
        return self._of(decoding).choose([s.id for s in decoding])

    def close(self, sequence_id: str) -> None:
        """Forget a sequence."""
        self.likeliest.close(sequence_id)
        self.drawn.close(sequence_id)

    def observe(self, sequences: Seq[Sequence], step: StepCosts) -> None:
        """Learn from a step of these sequences.

        The first step of a size is not timed: it may have been recorded in it. With drawn drafts
        what follows the pass is not either: it takes longer or shorter by the tokens of drafts
        behind the first rejection, which no later length may depend on.
        """
        controller = self._of(sequences)
        for sequence_id, (n_drafted, n_accepted) in step.blocks.items():
            controller.observe_block(sequence_id, n_drafted, n_accepted)
        drawn = controller is self.drawn
        size = (drawn, step.n_sequences, step.n_rows, step.depth)
        if step.clean and size in self._seen:
            target_s = step.pass_s if drawn else step.pass_s + step.rest_s
            controller.observe_step(
                step.n_sequences, step.n_rows, step.depth, target_s, step.draft_s
            )
            self._compare(step, target_s, controller)
        if step.clean:
            self._seen.add(size)

    def _compare(self, step: StepCosts, target_s: float, controller: LengthController) -> None:
        n = step.n_sequences
        plain_s = controller.target.seconds.get(n, {}).get(n)
        if plain_s is not None:
            n_tokens = n + sum(n_accepted for _, n_accepted in step.blocks.values())
            self._plain_s = SPEED_UP_DECAY * self._plain_s + n_tokens / n * plain_s
            self._spent_s = SPEED_UP_DECAY * self._spent_s + target_s + step.draft_s

    def _of(self, sequences: Seq[Sequence]) -> LengthController:
        drawn = any(self.draws(s.request.params) for s in sequences)
        return self.drawn if drawn else self.likeliest
