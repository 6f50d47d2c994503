"""Promise 1 for models with recurrent layers: rejected drafts leave no trace in their states.

As test_exact.py: the logits behind every emitted token are equal in every bit.
"""

from itertools import cycle
from pathlib import Path

import pytest
import torch

from outdraft.cache import recurrent
from outdraft.cache.states import StateBooks
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from tests import tiny
from tests.contract.test_exact import BACKENDS, N_NEW, assert_idle, assert_same, repetitive, run

SHAPES = (
    "qwen3_5",
    "qwen3_5_moe",
    "nemotron_h_latent",
    pytest.param("nemotron_h_moe", marks=pytest.mark.prove),
)


@pytest.fixture(scope="module", params=SHAPES)
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    tiny.tiny_target(root / "draft", "plain", seed=12)
    return tiny.tiny_hybrid(root / "target", request.param, seed=11)


def load(target: Path, backend: str, **options: object) -> LLM:
    given = {"ctx_size": 256, "draft_n_max": 5, **BACKENDS[backend], **options}
    return LLM(str(target), EngineConfig(**given))  # type: ignore[arg-type]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("drafter", ["mtp", "ngram", "draft-model", "itself"])
def test_every_draft_length_gives_the_bits_of_plain_decoding(
    target: Path, drafter: str, backend: str
) -> None:
    """`itself` drafts what the model will say, so that drafts are accepted, too."""
    own = {"draft-model": target.parent / "draft", "itself": target}.get(drafter)
    spec = {"spec_type": drafter} if own is None else {"assistant": str(own)}
    llm = load(target, backend, **spec)
    several = repetitive(3)
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for k in (1, 2, 5):
        assert_same(run(llm, [several[1]], k)[0], plain[1])
        for got, want in zip(run(llm, several, k), plain, strict=True):
            assert_same(got, want)
    assert llm.runner.faults.n_drafter == llm.runner.faults.n_pass == 0
    assert_idle(llm)


@pytest.mark.parametrize("drafter", ["mtp", "itself"])
@pytest.mark.parametrize("backend", ["reference", "w8"])
def test_steps_without_drafts_between_steps_with_drafts(
    target: Path, backend: str, drafter: str
) -> None:
    """A step that brings none reads the state of the last accepted row, not of the first."""
    llm = load(target, backend, assistant=str(target) if drafter == "itself" else None)
    several = repetitive(3)
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for lengths in ([3, 0], [5, 0, 0, 2, 1], [0, 4, 4, 0, 1]):
        llm.set_draft_n_max(5)
        llm.runner.logits_log = {}
        turns = [cycle(lengths[i:] + lengths[:i]) for i in range(3)]
        llm.scheduler.draft_lengths = lambda decoding, t=turns: [
            next(t[i % 3]) for i in range(len(decoding))
        ]
        params = SamplingParams(max_tokens=N_NEW, ignore_eos=True)
        sequences = [llm.add(prompt, params) for prompt in several]
        while llm.scheduler.busy:
            llm.step()
        for sequence, want in zip(sequences, plain, strict=True):
            logits = torch.stack(llm.runner.logits_log[sequence.id])
            assert_same((sequence.output, logits), want)


def test_reading_the_first_state_after_an_accepted_draft_is_seen(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: the test above fails when the wrong state is read."""
    numbers = recurrent.RecurrentMemory.numbers

    def wrong(self: recurrent.RecurrentMemory, *args: object) -> object:
        read, write = numbers(self, *args)  # type: ignore[arg-type]
        read[read >= 0] = self.books.rings[str(args[0])].own[0]
        return read, write

    monkeypatch.setattr(recurrent.RecurrentMemory, "numbers", wrong)
    with pytest.raises(AssertionError):
        test_steps_without_drafts_between_steps_with_drafts(target, "reference", "itself")


@pytest.mark.parametrize("drafter", ["mtp", "itself"])
def test_prompts_in_chunks_and_preemption(target: Path, drafter: str) -> None:
    """Few pages: sequences give theirs back and are computed again."""
    own = str(target) if drafter == "itself" else None
    llm = load(target, "w8", assistant=own, prefill_chunk=24, kv_cache_tokens=256)
    wide = load(target, "w8", spec_type="off")
    several = repetitive(3)
    plain = [run(wide, [prompt], 0)[0] for prompt in several]
    for got, want in zip(run(llm, several, 4), plain, strict=True):
        assert_same(got, want)
    assert_idle(llm)


def logged(
    llm: LLM, prompt: list[int], k: int, n_new: int = N_NEW
) -> tuple[list[int], torch.Tensor, int]:
    """Tokens, logits behind each, and how many tokens came from the prefix cache."""
    llm.set_draft_n_max(k)
    llm.runner.logits_log = {}
    sequence = llm.add(prompt, SamplingParams(max_tokens=n_new, ignore_eos=True))
    while llm.scheduler.busy:
        llm.step()
    return sequence.output, torch.stack(llm.runner.logits_log[sequence.id]), sequence.n_cached


def text(n: int, seed: int) -> list[int]:
    return torch.randint(6, 300, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("drafter", ["mtp", "itself"])
@pytest.mark.parametrize("backend", ["reference", "w8"])
def test_a_prefix_hit_has_the_bits_of_none(target: Path, backend: str, drafter: str) -> None:
    """Prompts that part from earlier ones inside a page, at its end, and behind their output."""
    own = str(target) if drafter == "itself" else None
    llm = load(target, backend, assistant=own, ctx_size=512, prefill_chunk=100)
    cold = load(
        target, backend, spec_type="off", ctx_size=512, prefix_cache=False, prefill_chunk=77
    )
    shared = text(300, 1)
    first = [*shared, *text(20, 2)]
    assert logged(llm, first, 4)[2] == 0
    said = logged(llm, first, 4, n_new=100)
    assert said[2] == 256
    prompts = {
        256: [*shared, *text(33, 3)],  # inside a page
        192: [*shared[:192], *text(50, 4)],  # at the end of one
        384: [*first, *said[0], *text(7, 5)],  # what was drafted and verified
        128: [*shared[:129]],
    }
    for k in (4, 0):
        for n_cached, prompt in prompts.items():
            got, want = logged(llm, prompt, k), logged(cold, prompt, 0)
            assert got[2] >= n_cached and want[2] == 0
            assert_same(got[:2], want[:2])
    assert llm.runner.faults.n_drafter == 0
    assert_idle(llm)


def together(llm: LLM, prompt_list: list[list[int]], k: int) -> list[list[int]]:
    """The output of all, run at once, long enough to need further pages."""
    llm.set_draft_n_max(k)
    params = SamplingParams(max_tokens=150, ignore_eos=True)
    return [done.tokens for done in llm.generate_all(prompt_list, params)]


@pytest.mark.parametrize("drafter", ["mtp", "itself"])
def test_prefix_hits_under_pressure(target: Path, drafter: str) -> None:
    """Few pages and fewer states: preemption, eviction and hits in one run."""
    few = {"prefill_chunk": 90, "kv_cache_tokens": 700, "kept_states": 5, "max_sequences": 4}
    own = str(target) if drafter == "itself" else None
    llm = load(target, "w8", assistant=own, ctx_size=512, **few)
    cold = load(target, "w8", spec_type="off", ctx_size=512, prefix_cache=False)
    shared = [text(200, seed) for seed in (1, 2, 3)]
    prompts = [[*shared[i % 3], *text(5 + 4 * i, 10 + i)] for i in range(9)]
    plain = [together(cold, [prompt], 0)[0] for prompt in prompts]
    llm.scheduler.horizon_tokens = 1
    for k in (3, 0, 5):
        assert together(llm, prompts, k) == plain
        llm.check()
    stats = llm.stats()
    assert llm.memory.books.prefix is not None
    assert llm.memory.books.prefix.n_hit > 1000 and stats.n_preempted > 0
    assert llm.runner.faults.n_drafter == 0
    assert_idle(llm)


@pytest.mark.parametrize("bug", ["rows behind the page", "a row too early"])
def test_a_wrong_state_in_the_cache_is_seen(
    target: Path, monkeypatch: pytest.MonkeyPatch, bug: str
) -> None:
    """The test of hits fails when a state has other rows than its page's end says."""
    if bug == "a row too early":  # inside a prompt
        numbers = StateBooks.numbers

        def early(self: StateBooks, sequence: str, length: int, n_rows: int) -> object:
            read, writes = numbers(self, sequence, length, n_rows)
            ahead = set(self.rings[sequence].ahead.values())
            return read, [(row - (s in ahead), s) for row, s in writes]

        monkeypatch.setattr(StateBooks, "numbers", early)
    else:  # of an output: what was drafted behind it, too
        keep = StateBooks.keep

        def late(self: StateBooks, sequence: str, length: int, *, sure: bool) -> int | None:
            behind = self.rings[sequence].behind
            if length in behind:
                behind[length], behind[max(behind)] = behind[max(behind)], behind[length]
            return keep(self, sequence, length, sure=sure)

        monkeypatch.setattr(StateBooks, "keep", late)
    with pytest.raises(AssertionError):
        test_a_prefix_hit_has_the_bits_of_none(target, "w8", "itself")


@pytest.mark.parametrize("k", [0, 4])
def test_a_shared_beginning_is_computed_once(target: Path, k: int) -> None:
    """A second prompt of 900 tokens with 810 of the first: the rest is computed, and no more than
    the distance of two kept states beside it; a third of the same kind hits the page where they
    part. Hits do not depend on drafting.
    """
    llm = load(target, "w8", ctx_size=1000, max_sequences=1)
    cold = load(target, "w8", spec_type="off", ctx_size=1000, prefix_cache=False)
    shared = text(810, 1)
    for seed, hit in ((2, 0), (3, 704), (4, 768)):
        prompt = [*shared, *text(90, seed)]
        got, want = logged(llm, prompt, k), logged(cold, prompt, 0)
        assert hit <= got[2] <= 768
        assert_same(got[:2], want[:2])
    states = llm.stats().states
    assert states is not None and 0 < states.kept <= states.kept_max
