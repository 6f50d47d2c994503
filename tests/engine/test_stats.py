"""What an engine says of itself, against what was done with it."""

from pathlib import Path

import pytest

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.engine.lengths import AutoLengths, StepCosts
from outdraft.errors import QueueFull
from outdraft.request import FinishReason, Request, SamplingParams
from tests import tiny

PROMPT = [7 + (31 * i + i * i) % 400 for i in range(150)]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stats")
    target = tiny.tiny_target(root / "target", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    return root


@pytest.fixture
def llm(root: Path) -> LLM:
    config = EngineConfig(draft_n=3, ctx_size=500, max_sequences=2, max_queue=1)
    return LLM(str(root / "target"), config)


def test_a_new_engine_is_empty(llm: LLM) -> None:
    stats = llm.stats()
    assert (stats.n_running, stats.n_waiting, stats.max_running) == (0, 0, 2)
    assert stats.drafter == "gemma4-assistant" and stats.why_not_drafting is None
    assert stats.hit_rate == 0 and stats.speed_up is None and not stats.finished
    assert all(p.free == p.total and p.used == p.cached == 0 for p in stats.pages.values())


def test_counts_follow_what_happens(llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True)
    sequences = [llm.add(PROMPT, params) for _ in range(3)]
    with pytest.raises(QueueFull):
        llm.add(PROMPT, params)
    llm.step()
    llm.step()
    stats = llm.stats()
    assert (stats.n_running, stats.n_waiting, stats.n_refused) == (2, 1, 1)
    assert stats.draft_length == 3
    assert all(p.used > 0 and p.free + p.used + p.cached == p.total for p in stats.pages.values())
    assert stats.n_prompt_tokens == 300 and stats.n_cached_tokens == 0
    while llm.scheduler.busy:
        llm.step()
    stats = llm.stats()
    assert stats.finished == {FinishReason.LENGTH: 3} and stats.n_admitted == 3
    assert stats.n_prompt_tokens == 450
    assert stats.n_cached_tokens == sum(s.n_cached for s in sequences) == 128
    assert stats.hit_rate == 128 / 450
    assert stats.drafts.n_emitted == 36
    assert stats.drafts.n_drafted == sum(s.stats.n_drafted for s in sequences) > 0
    assert stats.drafts.n_accepted == sum(s.stats.n_accepted for s in sequences)
    assert any(p.cached > 0 for p in stats.pages.values())
    assert all(p.used == 0 for p in stats.pages.values())
    before = stats.drafts.n_emitted
    llm.generate(PROMPT, params)
    assert stats.drafts.n_emitted == before, "a snapshot stays as it is"


def test_aborts_waiting_and_running_are_counted(llm: LLM) -> None:
    sequences = [llm.add(PROMPT, SamplingParams(max_tokens=12)) for _ in range(3)]
    llm.step()
    for sequence in sequences:
        llm.abort(sequence.id)
    assert llm.stats().finished == {FinishReason.ABORT: 3}


def test_a_preempted_prompt_counts_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(draft_n=3, ctx_size=256, max_sequences=4, kv_cache_tokens=320)
    llm = LLM(str(root / "target"), config)
    llm.scheduler.horizon_tokens = 8
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    prompts = [[3 + i, *PROMPT[:105]] for i in range(4)]
    sequences = [llm.add(p, params) for p in prompts]
    planned = 0
    plan = llm.scheduler.plan

    def counted() -> object:
        nonlocal planned
        made = plan()
        planned += len(made.preempted)
        return made

    monkeypatch.setattr(llm.scheduler, "plan", counted)
    while llm.scheduler.busy:
        llm.step()
    stats = llm.stats()
    assert stats.n_preempted == planned == sum(s.n_preempted for s in sequences) > 0
    assert stats.n_admitted == 4 + planned
    assert stats.n_prompt_tokens == 4 * 106


def test_why_nothing_is_drafted(root: Path) -> None:
    off = LLM(str(root / "target"), EngineConfig(spec_type="off", ctx_size=200))
    assert off.stats().drafter is None
    assert off.stats().why_not_drafting == "drafting is off: --spec-type off"
    llm = LLM(str(root / "target"), EngineConfig(draft_n_max=3, ctx_size=200))
    llm.set_draft_n_max(0)
    assert "set to 0" in str(llm.stats().why_not_drafting)
    llm.set_draft_auto()
    assert llm.stats().why_not_drafting is None, "nothing was decoded yet"
    llm.scheduler.draft_lengths = lambda decoding: [0] * len(decoding)
    llm.generate(PROMPT[:5], SamplingParams(max_tokens=4, ignore_eos=True))
    assert "does not pay" in str(llm.stats().why_not_drafting)


def test_the_speed_up_is_tokens_over_those_of_plain_steps() -> None:
    lengths = AutoLengths(4, sample_drafts=True)
    sequence = type("S", (), {"request": Request("a", (1,), SamplingParams())})()
    plain = StepCosts(1, 1, 0.0, 0.009, 0.001, {})
    for _ in range(50):
        lengths.observe([sequence], plain)
    assert lengths.speed_up == pytest.approx(1.0)
    drafted = StepCosts(1, 4, 0.002, 0.010, 0.001, {"a": (3, 2)})
    for _ in range(3000):
        lengths.observe([sequence], drafted)
    assert lengths.speed_up == pytest.approx(3 * 0.010 / 0.013, rel=5e-3)
