"""Whole steps as costs: measured by the engine itself, which is left as it was."""

import time

import pytest

from outdraft.config import EngineConfig
from outdraft.engine import lengths as lengths_module
from outdraft.engine.engine import LLM
from outdraft.engine.lengths import AutoLengths, StepCosts
from outdraft.engine.sequence import Sequence
from outdraft.engine.whole import measure_steps, works_beside
from outdraft.request import SamplingParams
from outdraft.speculate.costs import StepModel
from outdraft.speculate.length import Choice
from outdraft.speculate.trial import Trials

PROMPT = "def mean(values):\n"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", EngineConfig(draft_n_max=3, ctx_size=512, max_sequences=2))


def test_measured_steps_are_the_controllers_costs_and_nothing_else_changes(llm: LLM) -> None:
    assert llm.lengths is not None and not llm.lengths.whole_steps  # a processor
    assert not works_beside(llm.target.ops)
    counters, stats = llm.runner.counters, llm.scheduler.stats
    lengths = AutoLengths(3, sample_drafts=True)
    assert measure_steps(llm, lengths) == 8
    assert lengths.whole_steps
    for costs in (lengths.likeliest.costs, lengths.drawn.costs):
        assert costs.passes.sizes == [1, 2, 3, 4]
        assert set(costs.rounds.by_batch[1]) == {1, 2, 3}
        assert 0 < costs.at(1, 1) < costs.at(1, 4, 1, 3)
    assert llm.runner.counters is counters and llm.scheduler.stats is stats
    assert counters.drafts.n_passes == 0 and stats.n_admitted == 0
    assert not llm.scheduler.busy
    llm.check()
    llm.lengths, whole = None, lengths
    llm.set_draft_auto()
    llm.runner.lengths = whole  # greedy text is the same with these costs
    llm.scheduler.draft_lengths = whole.choose
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    chosen = llm.generate(PROMPT, params).tokens
    llm.set_draft_n_max(0)
    assert llm.generate(PROMPT, params).tokens == chosen
    assert llm.scheduler.stats.n_draft_length_failures == 0


def test_no_time_measures_nothing(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outdraft.engine.whole.BUDGET_S", 0.0)
    lengths = AutoLengths(3, sample_drafts=True)
    assert measure_steps(llm, lengths) == 0
    assert not lengths.whole_steps and not lengths.likeliest.costs.known
    assert not llm.scheduler.busy
    llm.check()


def test_a_whole_step_has_no_rest_of_its_own() -> None:
    costs = StepModel()
    costs.measured({1: 0.6, 2: 0.7, 8: 0.9})
    costs.observe_rest(2, 0.2)
    costs.whole_step(0, 0.0, 0.3)
    costs.whole_step(1, 0.25, 0.75)
    assert costs.at(1, 1) == pytest.approx(0.3)
    assert costs.at(1, 2, 1, 1) == pytest.approx(1.0)
    assert costs.at(2, 8) == pytest.approx(1.1)


def test_the_time_between_steps_counts_and_a_pause_does_not(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = AutoLengths(3, sample_drafts=True)
    lengths.likeliest.costs.measured({1: 0.5, 2: 0.6})
    lengths.whole_steps = True
    clock = 0.0
    monkeypatch.setattr(lengths_module.time, "perf_counter", lambda: clock)
    seen: list[tuple[float, float | None]] = []
    monkeypatch.setattr(lengths.likeliest, "observe_step", lambda *a: seen.append((a[4], a[6])))
    one, other = llm.prepare(PROMPT), llm.prepare(PROMPT)
    for at, sequences in (
        (1.0, [one]),  # the first: nothing to count from
        (2.0, [one]),  # the first that counts is the first of its size
        (3.0, [one]),
        (4.5, [one]),
        (9.5, [one]),  # a pause
        (10.5, [one, other]),
        (11.5, [one]),  # behind another batch
        (12.0, [one]),
    ):
        clock = at
        n = len(sequences)
        lengths.observe(sequences, StepCosts(n, n, 0.0, 0.7, 0.2, {}))
    assert seen == [(1.0, None), (1.5, None), (0.5, None)]
    monkeypatch.setattr(lengths_module.time, "perf_counter", time.perf_counter)


def test_of_plain_steps_in_a_row_one_in_eight_is_looked_at() -> None:
    lengths = AutoLengths(3, sample_drafts=True)
    lengths.likeliest.costs.measured({1: 1e-3, 2: 1e-2, 4: 2e-2})
    lengths.whole_steps = True
    llm = LLM("demo", EngineConfig(draft_n=0, ctx_size=512, max_sequences=2))
    start = llm.prepare(PROMPT)
    for _ in range(lengths_module.FIRST):  # so much is drafted first, and looked at
        assert lengths.choose([start]) == [3] and lengths.looks(1)
        lengths.observe([start], StepCosts(1, 4, 1e-4, 1e-4, 1e-4, {start.id: (3, 0)}))
    lengths.trials[False] = Trials()  # trials look at each step
    one, other = llm.prepare(PROMPT), llm.prepare(PROMPT)

    def step(*sequences: Sequence) -> bool:
        assert lengths.choose(list(sequences)) == [0] * len(sequences)
        looked = lengths.looks(len(sequences))
        if looked:
            n = len(sequences)
            lengths.observe(sequences, StepCosts(n, n, 0.0, 1e-4, 1e-4, {}))
        return looked

    assert [step(one) for _ in range(17)] == ([True] + 7 * [False]) * 2 + [True]
    assert step(other) and not step(other)
    assert step(one, other) and step(one)  # a batch ends the row
    assert not step(one)
    lengths.likeliest.costs.measured({1: 1e-3, 2: 1e-3, 4: 1e-3})
    for _ in range(99):
        lengths.likeliest.observe_block(one.id, "model", 3, 3)
    while lengths.choose([one]) == [0]:
        pass
    blocks = {one.id: (3, 3)}
    for _ in range(lengths_module.HELD):  # drafting: kept for some steps, of which blocks count
        lengths.observe([one], StepCosts(1, 4, 0.0, 1e-4, 0.0, blocks))
        assert lengths.choose([one]) == [3] and lengths._skipping and lengths.looks(1)
    assert not lengths._unlooked
    lengths.likeliest.close(one.id)
    lengths.likeliest.costs.measured({1: 0.1, 2: 1.0, 4: 2.0})  # long steps: each is looked at
    while lengths.choose([one]) != [0]:  # the choice of before serves some more steps
        pass
    assert all(step(one) for _ in range(8))


def test_with_drawn_drafts_the_rest_is_that_of_the_start(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = AutoLengths(3, sample_drafts=True)
    params = SamplingParams(temperature=1.0, ignore_eos=True)
    for k in range(4):
        lengths.begin_whole(params, k, 0.1 * k, 0.5, 0.25 + 0.25 * k)
    costs = lengths.drawn.costs
    assert costs.at(1, 1) == pytest.approx(0.75) and costs.at(1, 4, 1, 3) == pytest.approx(1.8)
    assert not lengths.likeliest.costs.known
    seen: list[float] = []
    monkeypatch.setattr(lengths.drawn, "observe_step", lambda *a: seen.append(a[4]))
    sequence = llm.prepare(PROMPT, params)
    for k, rest_s in ((0, 9.0), (0, 7.0), (3, 9.0), (3, 7.0)):
        lengths._chosen = {sequence.id: Choice(k, "model")}
        lengths.observe([sequence], StepCosts(1, 1 + k, 0.1 * k, 0.5, rest_s, {}))
    assert seen == [0.75, 1.5]


def test_a_drafter_that_fails_is_not_waited_for(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no drafts")

    monkeypatch.setattr(llm.pairing.drafter, "propose", fail)
    monkeypatch.setattr("outdraft.engine.whole.BUDGET_S", 1e6)
    assert measure_steps(llm, AutoLengths(3, sample_drafts=True)) == 1  # plain decoding
    assert not llm.scheduler.busy
