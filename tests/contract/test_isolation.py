"""No request feels another: whatever is added, aborted and preempted beside it, the same output.

Hypothesis drives one engine with little memory; each finished request is compared with a run of its
own in an engine without a prefix cache, where it has all memory to itself. The models are loaded
once; every example begins with an idle engine and an empty prefix cache, so it can be run again.
"""

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from outdraft.config import EngineConfig
from outdraft.engine import scheduler
from outdraft.engine.engine import LLM, Completion
from outdraft.engine.sequence import Sequence
from outdraft.request import FinishReason, SamplingParams
from tests import tiny

K = 4
PAGE = 64
Asking = tuple[tuple[int, ...], SamplingParams, str, bool]
BEGINNING = [7 + (31 * i + i * i) % 400 for i in range(2 * PAGE + 5)]
SEEN: Counter[str] = Counter()


@cache
def engines() -> tuple[LLM, LLM]:
    """The engine under test and the one for solo runs, of the same weights."""
    root = Path(mkdtemp())
    target = tiny.tiny_target(root / "target", "window", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    shared = EngineConfig(
        draft_n_max=K, ctx_size=256, max_sequences=4, prefill_chunk=48, kv_cache_tokens=320
    )
    alone = EngineConfig(draft_n_max=K, ctx_size=256, max_sequences=1, prefix_cache=False)
    both = LLM(str(target), shared), LLM(str(target), alone)
    for llm in both:
        llm.set_draft_n_max(K)  # sampled tokens depend on the draft length
    return both


@cache
def solo(prompt: tuple[int, ...], params: SamplingParams) -> Completion:
    """The request by itself. The draft length is pinned, as it is in the other engine."""
    return engines()[1].generate(prompt, params)


@dataclass(frozen=True)
class Asked:
    sequence: Sequence
    prompt: tuple[int, ...]
    params: SamplingParams


# Lengths around the pages' ends, and beginnings that requests have in common.
LENGTHS = [0, 40, 50, PAGE - 1, PAGE, PAGE + 40, 2 * PAGE - 12, 2 * PAGE, 2 * PAGE + 5]
PROMPTS = st.builds(
    lambda n, own: (*BEGINNING[:n], *own),
    st.sampled_from(LENGTHS),
    st.lists(st.integers(3, 200), min_size=1, max_size=4),
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.0, 0.8, 1.3]),
    seed=st.integers(0, 3),
    top_k=st.sampled_from([0, 20]),
    max_tokens=st.sampled_from([1, 20, 40, 90]),
    stop=st.sampled_from([(), (), (), ("e",), ("aT", "b")]),
    ignore_eos=st.sampled_from([True, True, False]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.2]),
)
REQUESTS = st.tuples(PROMPTS, PARAMS, st.sampled_from(["", "", "a"]), st.booleans())


class Isolation(RuleBasedStateMachine):
    """One engine, many requests; all that is left is checked at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.llm = engines()[0]
        assert self.llm.memory.books.prefix is not None
        self.llm.memory.books.prefix.clear()
        self.n_preempted = self.llm.stats().n_preempted
        self.asked: list[Asked] = []
        self.text: dict[str, str] = {}

    @rule(requests=st.lists(REQUESTS, min_size=1, max_size=4))
    def add(self, requests: list[Asking]) -> None:
        self._queue(requests)

    def _queue(self, requests: list[Asking]) -> None:
        for prompt, params, salt, apart in requests:
            if apart:  # a first token that no other has: no page is shared, and memory runs out
                prompt = (3 + len(self.asked) % 200, *prompt)
            sequence = self.llm.add(prompt, params, cache_salt=salt)
            self.asked.append(Asked(sequence, prompt, params))
            self.text[sequence.id] = ""

    @rule(temperature=st.sampled_from([0.0, 0.9]), n=st.integers(2, 4))
    def crowd(self, temperature: float, n: int) -> None:
        """Requests that fit when they begin and do not when they have grown."""
        params = SamplingParams(temperature=temperature, seed=n, max_tokens=60, ignore_eos=True)
        self._queue([(tuple(BEGINNING[: PAGE + 41]), params, "", True)] * n)

    @precondition(lambda self: any(a.sequence.finish_reason is None for a in self.asked))
    @rule(which=st.integers(0, 11))
    def abort(self, which: int) -> None:
        alive = [a.sequence for a in self.asked if a.sequence.finish_reason is None]
        self.llm.abort(alive[which % len(alive)].id)

    @rule(n=st.integers(1, 12))
    def run(self, n: int) -> None:
        for _ in range(n):
            for event in self.llm.step():
                self.text[event.request_id] += event.text
            self.llm.check()

    def teardown(self) -> None:
        try:
            while self.llm.scheduler.busy:
                self.run(1)
            self.llm.check()
            assert not self.llm.memory.lengths and not self.llm.runner.hidden
            n_preempted = self.llm.stats().n_preempted - self.n_preempted
            assert n_preempted == sum(a.sequence.n_preempted for a in self.asked)
            SEEN["preempted"] += n_preempted
            for asked in self.asked:
                self.compare(asked)
        finally:
            with self.llm:
                pass

    def compare(self, asked: Asked) -> None:
        sequence, want = asked.sequence, solo(asked.prompt, asked.params)
        SEEN["cached"] += sequence.n_cached
        if sequence.finish_reason is FinishReason.ABORT:
            SEEN["aborted"] += 1
            assert sequence.output == want.tokens[: len(sequence.output)]
            return
        SEEN["finished"] += 1
        got = (sequence.output, self.text[sequence.id], sequence.finish_reason)
        assert got == (want.tokens, want.text, want.finish_reason)


@pytest.fixture(autouse=True)
def short_sighted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admit with little room, so that it runs out."""
    monkeypatch.setattr(scheduler, "HORIZON_TOKENS", 8)


def explore(n_examples: int, part: int) -> None:
    """Examples of one part's seed; those of another part are others."""
    machine = seed(part)(type(f"Isolation{part}", (Isolation,), {}))
    options = settings(
        max_examples=n_examples,
        stateful_step_count=20,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    run_state_machine_as_test(machine, settings=options)


def test_what_the_machine_is_for_happens() -> None:
    """Requests of every fate in one example that is written down, not found."""
    SEEN.clear()
    machine = Isolation()
    machine.crowd(0.9, 4)
    machine.run(12)
    machine.abort(3)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    shared = tuple(BEGINNING)
    machine.add([((*shared, 9), params, "", False), ((*shared, 9, 8), params, "a", False)])
    for _ in range(12):
        machine.run(12)
    machine.add([((*shared, 5), params, "", False), ((*shared, 7), params, "a", False)])
    machine.teardown()
    assert SEEN["finished"] == 7 and SEEN["aborted"] == 1
    assert SEEN["cached"] == 2 * (2 * PAGE) and SEEN["preempted"] > 0, SEEN


def test_no_request_feels_another() -> None:
    explore(12, 0)


@pytest.mark.prove
@pytest.mark.parametrize("part", range(1, 11))
def test_no_request_feels_another_in_many_ways(part: int) -> None:
    explore(50, part)
