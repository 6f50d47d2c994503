"""Measuring: the same prompts through several ways of decoding, one after the other and back.

Here: what an arm of the comparison is, our own two arms, and the order of the runs. Not here:
which prompts (prompts.py) and what is made of the measurements (report.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from outdraft.bench.prompts import Prompt
from outdraft.engine.engine import LLM
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from outdraft.speculate.stats import DraftStats, StepTimes

PLAIN, DRAFT, AUTO = "plain", "draft", "auto"
WARM_UP_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Measurement:
    """One request. `prefill_s` is up to the first token, `decode_s` from there to the last.

    `stats` and `times` are empty for an engine that does not tell them. `wall_s` is of the whole
    request as its caller sees it, where the other times are a server's own.
    """

    tokens: list[int]
    prefill_s: float
    decode_s: float
    stats: DraftStats = field(default_factory=DraftStats)
    times: StepTimes = field(default_factory=StepTimes)
    wall_s: float | None = None

    @property
    def decode_tok_s(self) -> float:
        """Tokens per second after the first, which belongs to the prompt."""
        return (len(self.tokens) - 1) / self.decode_s if self.decode_s > 0 else 0.0

    @property
    def total_tok_s(self) -> float:
        """Tokens per second, the prompt's time included."""
        return len(self.tokens) / self.total_s

    @property
    def total_s(self) -> float:
        """Of the whole request, as its caller sees it."""
        return self.prefill_s + self.decode_s if self.wall_s is None else self.wall_s


@dataclass(frozen=True, slots=True)
class Arm:
    """One way of decoding."""

    name: str
    measure: Callable[[Sequence[int], SamplingParams], Measurement]


@dataclass(frozen=True, slots=True)
class Peer:
    """Another engine on the same weights: its plain arm, then those that draft, and facts."""

    arms: list[Arm]
    about: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Run:
    """A measurement and what it is of: arm, prompt (its index) and repeat."""

    arm: str
    kind: str
    prompt: int
    repeat: int
    result: Measurement


def own_arms(llm: LLM, k: int) -> list[Arm]:
    """Plain decoding, k drafts a step, and as many as pay off: one engine, the same weights."""

    def with_drafts(n: int | None) -> Callable[[Sequence[int], SamplingParams], Measurement]:
        def measure(tokens: Sequence[int], params: SamplingParams) -> Measurement:
            if n is None:
                llm.set_draft_auto()
            else:
                llm.set_draft_n_max(n)
            done = llm.generate(tokens, params)
            if done.error is not None:
                raise OutdraftError(f"the engine failed: {done.error}", "see `outdraft doctor`")
            return Measurement(done.tokens, done.prefill_s, done.decode_s, done.stats, done.times)

        return measure

    return [Arm(PLAIN, with_drafts(0)), Arm(DRAFT, with_drafts(k)), Arm(AUTO, with_drafts(None))]


def warm_up(arms: Sequence[Arm], prompt: Prompt, params: SamplingParams) -> None:
    """Run every arm once, briefly, so that no measurement pays for first times."""
    for arm in arms:
        arm.measure(prompt.tokens, replace(params, max_tokens=WARM_UP_TOKENS))


def measure_all(
    arms: Sequence[Arm], prompts: Sequence[Prompt], params: SamplingParams, repeats: int
) -> Iterator[Run]:
    """Every prompt through every arm, `repeats` times.

    The arms take turns on each prompt, and every other round goes through them backwards (A B B A),
    so that a slow drift of the machine's speed falls on all alike. `params.seed` is the first of
    the seeds: one a prompt and repeat, the same for all arms.
    """
    assert params.seed is not None
    for index, prompt in enumerate(prompts):
        for repeat in range(repeats):
            seeded = replace(params, seed=params.seed + index * repeats + repeat)
            backwards = (index + repeat) % 2 == 1
            for arm in reversed(arms) if backwards else arms:
                result = arm.measure(prompt.tokens, seeded)
                yield Run(arm.name, prompt.kind, index, repeat, result)
