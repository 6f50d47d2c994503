"""Faults that are planted, and limits that are reached: they cost whom they should and no more."""

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.engine.graphs import finite_or_none
from outdraft.engine.sequence import Sequence
from outdraft.errors import QueueFull
from outdraft.request import FinishReason, SamplingParams
from tests import tiny

PROMPTS = [[5, 9, 80], [2, 41, 90, 91], [17, 18]]
PARAMS = SamplingParams(max_tokens=30, ignore_eos=True)
GUILTY = 1


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("faults")
    target = tiny.tiny_target(root / "target", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    llm = LLM(
        str(target),
        EngineConfig(
            draft_n_max=4, ctx_size=400, kv_cache_tokens=800, max_sequences=3, max_queue=2
        ),
    )
    llm.set_draft_n_max(4)
    return llm


@pytest.fixture(scope="module")
def alone(llm: LLM) -> list[list[int]]:
    return [llm.generate(p, PARAMS).tokens for p in PROMPTS]


def run(llm: LLM, sequences: list[Sequence]) -> dict[str, str | None]:
    """To the end; the errors that events told, by request."""
    errors: dict[str, str | None] = {s.id: None for s in sequences}
    while llm.scheduler.busy:
        for event in llm.step():
            if event.error is not None:
                assert event.finish_reason is FinishReason.ERROR and event.token is None
                errors[event.request_id] = event.error
    llm.check()
    return errors


def assert_only_one_failed(
    llm: LLM, sequences: list[Sequence], alone: list[list[int]], words: str
) -> None:
    errors = run(llm, sequences)
    for i, sequence in enumerate(sequences):
        if i == GUILTY:
            error = errors[sequence.id]
            assert error is not None and words in error
            assert sequence.output == alone[i][: len(sequence.output)]
        else:
            assert errors[sequence.id] is None and sequence.output == alone[i]
    assert llm.generate(PROMPTS[GUILTY], PARAMS).tokens == alone[GUILTY]


def test_a_failure_in_stop_strings(llm: LLM, alone: list[list[int]]) -> None:
    sequences = [llm.add(p, PARAMS) for p in PROMPTS]

    class Broken:
        n = 0

        def push(self, text: str) -> tuple[str, str | None]:
            self.n += 1
            if self.n > 7:
                raise RuntimeError("planted")
            return text, None

    sequences[GUILTY].stop_strings = Broken()  # type: ignore[assignment]
    assert_only_one_failed(llm, sequences, alone, "planted")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("when", ["prompt", "decoding"])
def test_logits_that_are_not_finite(
    llm: LLM, alone: list[list[int]], value: float, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All scores of a sequence's rows, in a step of its prompt or behind its drafts."""
    sequences = [llm.add(p, PARAMS) for p in PROMPTS]
    guilty = sequences[GUILTY]
    real = llm.runner.target_pass.run

    def poisoned(tokens, spans, wanted, **options):  # type: ignore[no-untyped-def]
        done = real(tokens, spans, wanted, **options)
        if when == "decoding" and len(guilty.output) < 10:
            return done
        logits_RV, best_R = done.logits_RV.clone(), done.best_R.clone()
        for span in spans:
            rows = [r for r, t in enumerate(wanted) if 0 <= t - span.start < span.n_rows]
            if span.sequence == guilty.id:
                logits_RV[rows] = value
                first_R = torch.argmax(logits_RV[rows], -1).to(best_R.dtype)
                best_R[rows] = finite_or_none(logits_RV[rows], first_R)
        return type(done)(done.hidden_TH, logits_RV, best_R)

    monkeypatch.setattr(llm.runner.target_pass, "run", poisoned)
    while llm.scheduler.busy:
        llm.step()
    monkeypatch.undo()
    assert guilty.finish_reason is FinishReason.ERROR and "not finite" in (guilty.error or "")
    assert guilty.output == alone[GUILTY][: len(guilty.output)]
    assert (len(guilty.output) == 0) == (when == "prompt")
    for i in (0, 2):
        assert sequences[i].output == alone[i] and sequences[i].error is None
    llm.check()
    assert llm.generate(PROMPTS[GUILTY], PARAMS).tokens == alone[GUILTY]


@pytest.mark.parametrize("verb", ["open", "close", "commit"])
def test_a_drafter_that_fails_costs_nobody_anything(
    llm: LLM, alone: list[list[int]], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> None:
        raise RuntimeError(f"planted in {verb}")

    monkeypatch.setattr(llm.runner.drafter, verb, broken)
    before = llm.runner.faults.n_drafter
    sequences = [llm.add(p, PARAMS) for p in PROMPTS]
    errors = run(llm, sequences)
    assert [s.output for s in sequences] == alone and set(errors.values()) == {None}
    assert llm.runner.faults.n_drafter > before
    assert f"planted in {verb}" in llm.runner.faults.last_drafter_error


@pytest.mark.parametrize("how", ["raises", "too few", "out of range"])
def test_draft_lengths_that_fail_mean_no_drafts(
    llm: LLM, alone: list[list[int]], how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lengths(decoding: list[Sequence]) -> list[int]:
        if how == "raises":
            raise RuntimeError("planted")
        return [] if how == "too few" else [-3 for _ in decoding]

    monkeypatch.setattr(llm.scheduler, "draft_lengths", lengths)
    before = llm.scheduler.stats.n_draft_length_failures
    sequences = [llm.add(p, PARAMS) for p in PROMPTS]
    run(llm, sequences)
    assert [s.output for s in sequences] == alone
    assert all(s.stats.n_drafted == 0 for s in sequences)
    assert (llm.scheduler.stats.n_draft_length_failures > before) == (how != "out of range")


def test_a_full_queue_refuses_and_goes_on(llm: LLM, alone: list[list[int]]) -> None:
    sequences = [llm.add(PROMPTS[i % 3], PARAMS) for i in range(5)]  # three may start at once
    with pytest.raises(QueueFull, match="5 requests wait"):
        llm.add(PROMPTS[0], PARAMS)
    llm.step()
    assert len(llm.scheduler.running) == 3
    with pytest.raises(QueueFull, match="2 requests wait"):
        llm.add(PROMPTS[0], PARAMS)
    assert llm.abort(sequences[4].id) is not None
    sequences[4] = llm.add(PROMPTS[1], PARAMS)
    run(llm, sequences)
    assert [s.output for s in sequences] == [alone[i % 3] for i in range(5)]


def test_salts_keep_tenants_apart(llm: LLM) -> None:
    prompt = [7 + (31 * i + i * i) % 400 for i in range(200)]

    def cached(salt: str) -> int:
        sequence = llm.add(prompt, PARAMS, cache_salt=salt)
        run(llm, [sequence])
        return sequence.n_cached

    assert [cached("a"), cached("b"), cached("")] == [0, 0, 0]
    assert [cached("a"), cached("b"), cached("")] == [192, 192, 192]
