"""Prefix hits, preemption and failures: the others' tokens are those of running alone."""

import pytest

from outdraft.config import EngineConfig
from outdraft.engine import runner
from outdraft.engine.engine import LLM
from outdraft.request import FinishReason, SamplingParams
from tests import tiny


@pytest.fixture(scope="module", params=["plain", "window"])
def llm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("shared")
    target = tiny.tiny_target(root / "target", request.param, seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    return LLM(str(target), EngineConfig(draft_n_max=4, ctx_size=1000, kv_cache_tokens=1000))


@pytest.mark.parametrize("k", [0, 4])
def test_a_shared_beginning_is_computed_once(llm: LLM, k: int) -> None:
    llm.set_draft_n_max(k)
    assert llm.memory.books.prefix is not None
    llm.memory.books.prefix.clear()
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=20, ignore_eos=True)
    shared = [7 + (31 * i + i * i) % 400 for i in range(810)]
    prompt = shared + [9 + i for i in range(90)]
    cold = llm.generate(prompt, params)
    llm.memory.books.prefix.clear()
    llm.generate([*shared, *[200] * 90], params)
    warm = llm.generate(prompt, params)
    assert cold.cached_tokens == 0 and warm.cached_tokens == 810 // 64 * 64
    assert warm.tokens == cold.tokens
    llm.check()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_preempted_sequences_keep_their_bits(llm: LLM, temperature: float) -> None:
    llm.set_draft_n_max(4)
    params = [
        SamplingParams(temperature=temperature, seed=s, max_tokens=400, ignore_eos=True)
        for s in range(4)
    ]
    prompts = [[10 + s, 40, 7 + s] * (5 + s) for s in range(4)]
    alone = [llm.generate(p, q).tokens for p, q in zip(prompts, params, strict=True)]
    before = llm.scheduler.stats.n_preempted
    together = llm.generate_all(prompts, params)
    assert llm.scheduler.stats.n_preempted > before
    assert [c.tokens for c in together] == alone
    llm.check()


@pytest.mark.parametrize("stage", ["decide", "forward", "propose", "text"])
def test_a_failure_stays_local(llm: LLM, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm.set_draft_n_max(4)
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    prompts = [[5, 9, 80], [2, 41, 90, 91], [17, 18]]
    alone = [llm.generate(p, params).tokens for p in prompts]
    sequences = [llm.add(p, params) for p in prompts]
    guilty = sequences[1]
    if stage == "decide":
        real = runner.decide

        def decide(sequence, *rest):  # type: ignore[no-untyped-def]
            if sequence is guilty:
                raise RuntimeError("planted")
            return real(sequence, *rest)

        monkeypatch.setattr(runner, "decide", decide)
    elif stage == "forward":
        run = llm.runner.target_pass.run

        def broken(tokens, spans, *rest, **more):  # type: ignore[no-untyped-def]
            if any(span.sequence == guilty.id for span in spans):
                raise RuntimeError("planted")
            return run(tokens, spans, *rest, **more)

        monkeypatch.setattr(llm.runner.target_pass, "run", broken)
    elif stage == "propose":
        drafter = llm.runner.drafter
        assert drafter is not None
        propose = drafter.propose

        def poisoned(view, k):  # type: ignore[no-untyped-def]
            if any(s.id == guilty.id for s in view.sequences):
                raise RuntimeError("planted")
            return propose(view, k)

        monkeypatch.setattr(drafter, "propose", poisoned)
    else:
        monkeypatch.setattr(guilty, "detokenizer", None)
    while llm.scheduler.busy:
        llm.step()
    for i, sequence in enumerate(sequences):
        if sequence is guilty and stage != "propose":
            assert sequence.finish_reason is FinishReason.ERROR and sequence.error
        else:
            assert sequence.output == alone[i] and sequence.error is None
    assert (guilty.n_failed_drafts > 0) == (stage == "propose")
    llm.check()
