"""Ends inside an accepted block: one event, "keep n of these tokens", whatever the reason.

A drafter that knows the answer makes whole blocks acceptable, so every end falls inside a block
sooner or later; with drafting the result has to be that of plain decoding.
"""

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion
from outdraft.errors import OutdraftError, PromptError
from outdraft.request import FinishReason, SamplingParams
from outdraft.speculate.drafter import Draft, Taps, TargetView
from tests import tiny


class Oracle:
    """Drafts what plain decoding is going to say, with a wrong token where `wrong` says so."""

    name = "oracle"
    needs = Taps()

    def __init__(self, answers: dict[tuple[int, ...], list[int]], wrong: float = 0.0) -> None:
        self.answers = answers
        self.wrong = wrong
        self.generator = torch.Generator().manual_seed(0)
        self.open_sequences: set[str] = set()

    def open(self, sequence: str) -> None:
        self.open_sequences.add(sequence)

    def close(self, sequence: str) -> None:
        self.open_sequences.remove(sequence)

    def commit(self, view: TargetView, n_accepted: list[int]) -> None:
        assert len(n_accepted) == len(view.sequences)

    def propose(self, view: TargetView, k: int) -> Draft:
        rows = []
        for sequence in view.sequences:
            assert sequence.id in self.open_sequences
            prompt = next(p for p in self.answers if tuple(sequence.tokens[: len(p)]) == p)
            rest = (self.answers[prompt] + [7] * k)[sequence.n - len(prompt) :][:k]
            rows.append(torch.tensor(rest))
        tokens_BK = torch.stack(rows)
        flip = torch.rand(tokens_BK.shape, generator=self.generator) < self.wrong
        tokens_BK = torch.where(flip, (tokens_BK + 1) % tiny.VOCAB, tokens_BK)
        return Draft(tokens_BK, [None] * len(rows), [k] * len(rows))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("keep")
    target = tiny.tiny_target(root / "target", "window", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    return LLM(str(target), EngineConfig(draft_n_max=7, ctx_size=192, max_sequences=3))


PROMPTS = [[5, 9, 80, 33], [2, 41, 90, 91, 92] * 11, [17]]


def plain(llm: LLM, prompt: list[int], **params: object) -> Completion:
    llm.set_draft_n_max(0)
    return llm.generate(prompt, SamplingParams(**params))  # type: ignore[arg-type]


def drafting(
    llm: LLM,
    prompt: list[int],
    k: int,
    wrong: float,
    monkeypatch: pytest.MonkeyPatch,
    **params: object,
) -> Completion:
    """The same with an oracle; leaves nothing behind."""
    answer = plain(llm, prompt, max_tokens=150, ignore_eos=True).tokens
    oracle = Oracle({tuple(prompt): answer}, wrong)
    monkeypatch.setattr(llm.runner, "drafter", oracle)
    llm.set_draft_n_max(k)
    got = llm.generate(prompt, SamplingParams(**params))  # type: ignore[arg-type]
    assert not oracle.open_sequences and not llm.memory.lengths
    for group in llm.memory.groups.values():
        assert group.pool.n_available == group.pool.n_pages
    llm.check()
    return got


def assert_equal(got: Completion, want: Completion) -> None:
    assert (got.tokens, got.text, got.finish_reason) == (want.tokens, want.text, want.finish_reason)


@pytest.mark.parametrize("wrong", [0.0, 0.3])
@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("prompt", PROMPTS, ids=["short", "past window", "one token"])
def test_every_end_inside_a_block(
    llm: LLM, prompt: list[int], k: int, wrong: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = plain(llm, prompt, max_tokens=60, ignore_eos=True)
    for n in (1, 2, 7, 30):
        want = plain(llm, prompt, max_tokens=n, ignore_eos=True)
        got = drafting(llm, prompt, k, wrong, monkeypatch, max_tokens=n, ignore_eos=True)
        assert_equal(got, want)
        assert got.finish_reason is FinishReason.LENGTH and len(got.tokens) == n
    for at in (0, 5, 11):
        stop_id = (free.tokens[at],)
        want = plain(llm, prompt, max_tokens=60, stop_token_ids=stop_id)
        got = drafting(llm, prompt, k, wrong, monkeypatch, max_tokens=60, stop_token_ids=stop_id)
        assert_equal(got, want)
        assert got.finish_reason is FinishReason.STOP and got.tokens[-1] == stop_id[0]
    letters = free.text[20:23]
    want = plain(llm, prompt, max_tokens=60, stop=(letters,))
    got = drafting(llm, prompt, k, wrong, monkeypatch, max_tokens=60, stop=(letters,))
    assert_equal(got, want)
    assert got.finish_reason is FinishReason.STOP and letters not in got.text
    # The context is the last resort: no max_tokens.
    want = plain(llm, prompt, ignore_eos=True)
    got = drafting(llm, prompt, k, wrong, monkeypatch, ignore_eos=True)
    assert_equal(got, want)
    assert len(prompt) + len(got.tokens) == llm.ctx_size


def test_a_perfect_drafter_fills_every_block(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    got = drafting(llm, PROMPTS[0], 4, 0.0, monkeypatch, max_tokens=41, ignore_eos=True)
    assert got.stats.n_emitted == 41 and got.stats.n_accepted == got.stats.n_drafted
    assert got.stats.n_passes == 9  # one token with the prompt, then blocks of five


def test_events_stream_and_closing_aborts(llm: LLM) -> None:
    llm.set_draft_n_max(4)
    events = []
    stream = llm.stream(PROMPTS[0], SamplingParams(max_tokens=50, ignore_eos=True))
    for event in stream:
        events.append(event)
        if len(events) == 10:
            break
    stream.close()
    assert not llm.scheduler.busy and not llm.memory.lengths
    assert [e.token for e in events] == plain(llm, PROMPTS[0], max_tokens=10).tokens
    assert all(e.finish_reason is None for e in events)


@pytest.mark.parametrize(
    "prompt,words",
    [
        ([], "empty"),
        ("", "empty"),
        ([5, 512], "outside the vocabulary"),
        ([5] * 192, "context holds"),
    ],
)
def test_prompts_that_cannot_run_are_refused(llm: LLM, prompt: list[int], words: str) -> None:
    with pytest.raises(PromptError, match=words):
        llm.generate(prompt)
    assert not llm.scheduler.busy


def test_draft_lengths_that_were_not_planned_for_are_refused(llm: LLM) -> None:
    with pytest.raises(OutdraftError, match="draft length 8"):
        llm.set_draft_n_max(8)


def test_sampled_output_depends_on_the_seed_and_not_on_neighbours(llm: LLM) -> None:
    llm.set_draft_n_max(4)
    params = [SamplingParams(temperature=0.9, seed=s, max_tokens=30) for s in (1, 2, 1)]
    together = llm.generate_all([PROMPTS[0], PROMPTS[1], PROMPTS[0]], params)
    alone = [llm.generate(p, q) for p, q in zip([PROMPTS[0], PROMPTS[1]], params, strict=False)]
    assert together[0].tokens == together[2].tokens == alone[0].tokens
    assert together[1].tokens == alone[1].tokens
    other = llm.generate(PROMPTS[0], SamplingParams(temperature=0.9, seed=3, max_tokens=30))
    assert other.tokens != alone[0].tokens
