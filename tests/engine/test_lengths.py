"""Draft lengths that the engine chooses: exact, repeatable, and nothing left behind."""

import time
from pathlib import Path

import pytest

from outdraft.config import EngineConfig
from outdraft.engine.costs import Bench, measure_costs
from outdraft.engine.engine import LLM
from outdraft.engine.lengths import AutoLengths
from outdraft.errors import OutdraftError
from outdraft.request import SamplingParams
from tests import tiny

PROMPTS = ["def mean(values):\n", "class Stack:\n", "import os\n"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("demo", EngineConfig(draft_n_max=6, ctx_size=512, max_sequences=3))


def test_costs_are_measured_and_memory_is_as_before(llm: LLM) -> None:
    assert llm.lengths is not None
    llm.check()
    for controller in (llm.lengths.likeliest, llm.lengths.drawn):
        assert set(controller.costs.passes.sizes) >= {1, 7}
        assert set(controller.costs.rounds.by_batch[1]) >= {1, 6}
    pools = [group.pool for group in llm.memory.books.groups.values()]
    fresh = LLM("demo", EngineConfig(draft_n_max=6, ctx_size=512, max_sequences=3))
    assert all(
        g.pool.n_free == g.pool.n_pages == pool.n_pages
        for g, pool in zip(fresh.memory.books.groups.values(), pools, strict=True)
    )


def test_a_slow_model_is_not_measured_for_long(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    target_pass, drafter = llm.runner.target_pass, llm.pairing.drafter
    run, n_calls = target_pass.run, 0

    def slow(*arguments):  # type: ignore[no-untyped-def]
        nonlocal n_calls
        n_calls += 1
        time.sleep(0.05)
        return run(*arguments)

    monkeypatch.setattr(target_pass, "run", slow)
    empty = AutoLengths(6, sample_drafts=True)
    assert drafter is not None
    bench = Bench(llm.target, target_pass, drafter, llm.memory)
    n = measure_costs(empty, bench, 6, 3, budget_s=0.1)
    assert n == 0 and not empty.likeliest.costs.known
    assert n_calls == 1  # it was too slow
    llm.check()


def test_greedy_text_is_that_of_plain_decoding_in_batches(llm: LLM) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True)
    llm.set_draft_n_max(0)
    plain = [llm.generate(p, params).tokens for p in PROMPTS]
    llm.set_draft_auto()
    done = llm.generate_all([*PROMPTS, PROMPTS[0]], params)
    assert [c.tokens for c in done] == [*plain, plain[0]]
    assert sum(c.stats.n_drafted for c in done) > 0
    assert llm.scheduler.stats.n_draft_length_failures == 0
    llm.check()


def test_a_seed_gives_the_text_of_plain_decoding_whatever_the_lengths(llm: LLM) -> None:
    params = SamplingParams(max_tokens=80, ignore_eos=True, temperature=0.9, seed=5)
    llm.set_draft_n_max(0)
    plain = llm.generate(PROMPTS[0], params).tokens
    llm.set_draft_auto()
    done = llm.generate_all([PROMPTS[0], *PROMPTS[1:]], params)
    assert done[0].tokens == plain


def test_without_a_seed_drafts_are_drawn(llm: LLM) -> None:
    assert llm.lengths is not None
    llm.set_draft_auto()
    before = llm.lengths.drawn._shared_of("model").version
    llm.generate(PROMPTS[0], SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.7))
    assert llm.lengths.drawn._shared_of("model").version > before


def test_a_fixed_length_is_kept(llm: LLM) -> None:
    llm.set_draft_n_max(3)
    done = llm.generate(PROMPTS[0], SamplingParams(max_tokens=41, ignore_eos=True))
    assert done.stats.n_drafted >= 3 * (done.stats.n_passes - 3)
    llm.set_draft_auto()


def test_one_knob_fixes_the_length(tmp_path: Path) -> None:
    target = tiny.tiny_target(tmp_path / "target", "plain", seed=21)
    tiny.tiny_assistant(target / "assistant", target, seed=22)
    fixed = LLM(str(target), EngineConfig(draft_n=2, ctx_size=64))
    assert fixed.lengths is None and fixed.scheduler.n_draft_max == 2
    done = fixed.generate([5, 6, 7], SamplingParams(max_tokens=20, ignore_eos=True))
    assert done.stats.n_drafted >= 2 * (done.stats.n_passes - 3)
    with pytest.raises(OutdraftError):
        EngineConfig(draft_n=2, draft_n_max=3)
