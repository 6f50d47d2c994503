"""Draft lengths chosen from measured costs, for the engine. No tensors.

Here: which controller a batch is for, and what of a step it may learn. Not here: the choice
(speculate/length.py), the costs that are measured at the start (costs.py).

A length that depends on measured time differs from run to run. Greedy text, and sampled text whose
drafts are not drawn, do not depend on lengths; text with drawn drafts does, though its distribution
does not. So requests with a seed get drafts that are not drawn (`draws`), and stay repeatable.
"""

import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from outdraft.engine.sequence import Sequence
from outdraft.request import SamplingParams
from outdraft.speculate.drafter import Draft, Drafter, ManySources, draws
from outdraft.speculate.length import FREE, Choice, LengthController
from outdraft.speculate.trial import Trial, Trials

MODEL = ("model",)  # the one source of a drafter that says nothing of its own


@dataclass(frozen=True, slots=True)
class StepCosts:
    """One decoding step: rows that ran, depth of the draft round, seconds of its parts.

    `rest_s` is what came behind the pass. `blocks` has of each sequence that brought drafts their
    number and how many stayed. `clean` is false if a prompt, a failure or a first time was in it.
    """

    n_sequences: int
    n_rows: int
    draft_s: float
    pass_s: float
    rest_s: float
    blocks: dict[str, tuple[int, int]]
    clean: bool = True


SPEED_UP_DECAY = 0.995
SETTLED = 128  # steps that were looked at, after which
EVERY = 4  # only each fourth is
THOUGHT_S = 0.003  # what the rows of drafts take, from which on it is asked which are worth it
MISMEASURED = 1.3  # steps that take so many times less than was measured at the start
FIRST = 8  # whole steps draft as much as can be, so that acceptance is known at all positions
UNLOOKED = 7  # plain steps behind one that was looked at,
HELD = 3  # and steps with the same number of drafts behind one, of which blocks alone are learned,
SHORT_S = 0.002  # if they are so short that choosing is a good part of them
PAUSED = 2.0  # whoever steps the engine did something else if a step took so many times its parts


class AutoLengths:
    """Controllers for batches with drawn drafts and without: their rounds cost differently."""

    def __init__(
        self, n_draft_max: int, *, sample_drafts: bool, drafter: Drafter | None = None
    ) -> None:
        self.sample_drafts = sample_drafts
        self.drafter = drafter if isinstance(drafter, ManySources) else None
        self.likeliest = LengthController(n_draft_max)
        self.drawn = LengthController(n_draft_max)
        self.trials = {False: Trials(), True: Trials()}  # with drawn drafts, and without
        self._chosen: dict[str, Choice] = {}
        self._leaves_out = False
        self._n_decoding = 0
        self._alike = False
        self._n_steps = 0
        self._seen: set[tuple[bool, int, int, int]] = set()
        self._sure: tuple[list[str], list[int], NDArray[np.float32]] | None = None
        """What the drafter said of its drafts, by sequence, where some could be left out."""
        self._repeatable: tuple[list[str], list[int]] = ([], [])
        self._repeats_left = self._n_repeated = 0
        self._spent_s = self._plain_s = 0.0
        self.whole_steps = False
        """Whether a step of one sequence is timed from end to end: parts say little (whole.py)."""
        self._drawn_rest_s: dict[int, float] = {}  # of whole steps, by drafts
        self._ended: tuple[str, float] = ("", 0.0)
        self._unlooked = 0
        self._skipping = False
        self._held = self._n_run = self._n_first = 0
        self._began = 0.0
        self._was_plain = False

    @property
    def speed_up(self) -> float | None:
        """Steps of late over plain decoding of as many sequences, in tokens per second.

        None until steps were timed; the cost of plain ones is modelled.
        """
        return self._plain_s / self._spent_s if self._spent_s else None

    @property
    def mismeasured(self) -> bool:
        """Whether steps take so much less than was measured that something was in the way then."""
        return any(c.costs.speed < 1 / MISMEASURED for c in (self.likeliest, self.drawn))

    def draws(self, params: SamplingParams) -> bool:
        """Whether drafts of such a request are drawn from the drafter's distribution."""
        return self.sample_drafts and draws(params)

    def begin_whole(
        self, params: SamplingParams, n_drafts: int, draft_s: float, pass_s: float, rest_s: float
    ) -> None:
        """Whole steps of one sequence take so long, and are timed so from now on."""
        self.whole_steps, drawn = True, self.draws(params)
        controller = self.drawn if drawn else self.likeliest
        controller.costs.whole_step(n_drafts, draft_s, pass_s + rest_s)
        if drawn:
            self._drawn_rest_s[n_drafts] = rest_s

    def choose(self, decoding: list[Sequence]) -> list[int]:
        """The scheduler's `DraftLengths`."""
        self._skipping = self._unlooked > 0 and [s.id for s in decoding] == [self._ended[0]]
        if self._skipping:
            self._unlooked -= 1
            return [self._held]
        names = [s.id for s in decoding]
        self._n_decoding, self._sure = len(names), None
        if self._repeats_left and names == self._repeatable[0]:
            self._repeats_left -= 1
            self._n_repeated += 1
            return self._repeatable[1]
        self._repeats_left = self._n_repeated = 0
        drafter = self.drafter
        if drafter is None:
            asked = [(name, MODEL) for name in names]
        else:
            asked = [(s.id, drafter.sources(s.id, s.tokens)) for s in decoding]
        controller = self._of(decoding)
        if len(decoding) > 1:
            n_tokens = sum(len(s.tokens) for s in decoding)
            controller.costs.read_back(n_tokens / len(decoding))
        choices = controller.choose(asked)
        whole = self._is_whole(decoding)
        first = whole and drafter is None and self._n_first < FIRST
        if first:
            choices, self._n_first = [Choice(controller.n_draft_max, MODEL[0])], self._n_first + 1
        self._alike = not any(choice.n_drafts for choice in choices)
        trial = self._trial(controller, max(1, len(decoding)))
        if decoding and trial.decodes_plainly:
            choices = [Choice(0, choice.source) for choice in choices]
        self._unlooked = 0
        if whole and controller.costs.at(1, 1) < SHORT_S:
            self._held = choices[0].n_drafts
            settled = drafter is None and not first and not trial.trying
            if settled and self._held != 1:  # 1 may be a trial, too
                self._unlooked = HELD if self._held else UNLOOKED
        self._chosen = {s.id: choice for s, choice in zip(decoding, choices, strict=True)}
        if drafter is not None:
            drafter.use({name: (c.source, c.n_drafts) for name, c in self._chosen.items()})
        found = [choice.n_drafts for choice in choices]
        self._leaves_out = False
        if drafter is None and controller is self.likeliest and controller.costs.known:
            n, costs = len(found), controller.costs
            rows_s = costs.pass_s(n + sum(found), n) - costs.pass_s(n, n)
            self._leaves_out = rows_s > THOUGHT_S
        if drafter is None and not whole and not trial.trying:
            self._repeatable, self._repeats_left = (names, found), controller.take_uses()
        return found

    def worth_verifying(self, asking: Seq[Sequence], lengths: list[int], draft: Draft) -> list[int]:
        """Of each sequence that drafted, how many drafts to verify: at most so many.

        All, where the drafter does not say how sure it is, where thinking about it takes a good
        part of what it could save, and where drafts were drawn: those must not be left out for
        what they are.
        """
        if draft.confidence_BK is None or not self._leaves_out:
            return lengths
        confidence_BK = draft.confidence_BK.numpy()[:, : max(lengths)]
        if np.isnan(confidence_BK).any():
            return lengths
        n_decoding = max(len(asking), self._n_decoding)
        self._sure = [s.id for s in asking], lengths, confidence_BK
        return self.likeliest.worth_verifying(n_decoding, confidence_BK, lengths)

    def close(self, sequence_id: str) -> None:
        """Forget a sequence."""
        self.likeliest.close(sequence_id)
        self.drawn.close(sequence_id)

    def looks(self, n_sequences: int) -> bool:
        """Whether `observe` wants the step that ends now; if not, its end is noted."""
        if self._n_repeated and self._n_steps > SETTLED:
            return self._n_repeated % EVERY == 0
        if not self._skipping or n_sequences > 1 or self._held:
            return True
        self._ended = self._ended[0], time.perf_counter()
        self._n_run += 1
        return False

    def _is_whole(self, sequences: Seq[Sequence]) -> bool:
        one = self.whole_steps and len(sequences) == 1
        return one and self._of(sequences) is self.likeliest

    def observe(self, sequences: Seq[Sequence], step: StepCosts) -> None:
        """Learn from a step of these sequences.

        The first step of a size is not timed: it may have been recorded in it. With drawn drafts
        what follows the pass is not either: it takes longer or shorter by the tokens of drafts
        behind the first rejection, which no later length may depend on.
        """
        controller = self._of(sequences)
        whole = self._is_whole(sequences)
        if whole:
            step = self._whole(sequences[0].id, step)
        else:
            self._ended, self._n_run = ("", 0.0), 0
        self._observe_blocks(controller, step)
        if whole and self._skipping:
            return
        drawn = controller is self.drawn
        in_round = [
            c.n_drafts
            for c in self._chosen.values()
            if c.n_drafts > 0 and not c.source.startswith(FREE)
        ]
        n_drafting, depth = len(in_round), max(in_round, default=0)
        if drawn and len(sequences) == 1:  # as it was at the start, whatever the tokens
            step = replace(step, pass_s=step.pass_s + self._drawn_rest_s.get(depth, 0.0))
        size = (drawn, step.n_rows, n_drafting, depth)
        target_s = step.pass_s if drawn else step.pass_s + step.rest_s
        timed = step.clean and size in self._seen
        if step.clean:
            self._seen.add(size)
        if timed:
            n_tokens = step.n_sequences + sum(n_accepted for _, n_accepted in step.blocks.values())
            trial = self._trial(controller, step.n_sequences)
            seconds, promise = target_s + step.draft_s, controller.promise
            trial.observe(n_tokens, seconds, alike=self._alike, promise=promise)
            if trial.trying:
                self._repeats_left = 0
        self._n_steps += 1
        if whole and self._n_steps > SETTLED and self._n_steps % EVERY and not self._unlooked:
            return  # learning costs time, too
        if timed:
            controller.observe_step(
                step.n_sequences,
                step.n_rows,
                n_drafting,
                depth,
                step.pass_s,
                step.draft_s,
                None if drawn or whole else step.rest_s,
            )
            self._compare(step, target_s, controller)

    def _observe_blocks(self, controller: LengthController, step: StepCosts) -> None:
        blocks, sure_of = step.blocks, {}
        if self._sure is not None:
            names, asked, confidence_BK = self._sure
            rows = zip(names, asked, confidence_BK.tolist(), strict=True)
            sure_of = {name: own[:n] for name, n, own in rows}
            blocks = dict.fromkeys(names, (0, 0)) | blocks
            self._sure = None
        for sequence_id, (n_drafted, n_accepted) in blocks.items():
            choice = self._chosen.get(sequence_id)
            if choice is not None and choice.source:
                sure = sure_of.get(sequence_id, ())
                controller.observe_block(sequence_id, choice.source, n_drafted, n_accepted, sure)

    def _whole(self, sequence_id: str, step: StepCosts) -> StepCosts:
        """The step from the end of the one before to now; all but its round is its pass."""
        last_id, last = self._ended
        now = time.perf_counter()
        n_run, began = self._n_run, self._began
        self._ended, self._n_run, self._began = (sequence_id, now), 0, now
        own_s, whole_s = step.draft_s + step.pass_s + step.rest_s, now - last
        if n_run and step.n_rows == 1:  # the mean of a row of plain steps, with what choosing took
            whole_s = (now - began) / (n_run + 1)
            self.likeliest.passed(n_run * whole_s)
        plain, self._was_plain = self._was_plain, step.n_rows == 1
        anew = self._was_plain and not plain  # a row of plain steps begins: nothing was launched
        if last_id != sequence_id or anew or whole_s > PAUSED * own_s:
            return replace(step, clean=False)
        return replace(step, pass_s=whole_s - step.draft_s, rest_s=0.0)

    def _compare(self, step: StepCosts, target_s: float, controller: LengthController) -> None:
        n = step.n_sequences
        if controller.costs.known:
            plain_s = controller.costs.at(n, n)
            n_tokens = n + sum(n_accepted for _, n_accepted in step.blocks.values())
            self._plain_s = SPEED_UP_DECAY * self._plain_s + n_tokens / n * plain_s
            self._spent_s = SPEED_UP_DECAY * self._spent_s + target_s + step.draft_s

    def _trial(self, controller: LengthController, n_sequences: int) -> Trial:
        return self.trials[controller is self.drawn].of(n_sequences)

    def _of(self, sequences: Seq[Sequence]) -> LengthController:
        drawn = any(self.draws(s.request.params) for s in sequences)
        return self.drawn if drawn else self.likeliest
