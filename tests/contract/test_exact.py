"""Promise 1: greedy output with drafting is that of plain decoding, bit for bit.

Not only the tokens: the logits behind every emitted token are equal in every bit, for every shape,
draft length, drafter head and kind of weights, past the sliding window, with prompts computed in
chunks, and with other sequences in the same call.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from outdraft.config import DType, EngineConfig, Quant, SpecType
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from tests import tiny

N_NEW = 24


@pytest.fixture(scope="module", params=tiny.SHAPES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp(request.param)
    target = tiny.tiny_target(root / "target", request.param, seed=11)
    tiny.tiny_assistant(root / "assistant", target, seed=12)
    tiny.tiny_assistant(root / "ordered", target, ordered=True, seed=13)
    return target


def prompts(n: int, seed: int = 5) -> list[list[int]]:
    """Prompts of ragged lengths, some past every window."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 9, 70, 131, 33, 200][:n]
    return [torch.randint(6, 300, (size,), generator=generator).tolist() for size in lengths]


def run(llm: LLM, prompt_list: list[list[int]], k: int) -> list[tuple[list[int], Tensor]]:
    """Tokens and emitted logits [N, V] of every prompt, run together."""
    llm.set_draft_n_max(k)
    llm.runner.logits_log = {}
    params = SamplingParams(max_tokens=N_NEW, ignore_eos=True)
    sequences = [llm.add(prompt, params) for prompt in prompt_list]
    while llm.scheduler.busy:
        llm.step()
    logs = llm.runner.logits_log
    return [(s.output, torch.stack(logs[s.id])) for s in sequences]


def assert_same(got: tuple[list[int], Tensor], want: tuple[list[int], Tensor]) -> None:
    assert got[0] == want[0]
    assert torch.equal(got[1], want[1])


def assert_idle(llm: LLM) -> None:
    """Nothing is left behind: every page is free again."""
    assert not llm.memory.lengths and not llm.runner.hidden
    for group in llm.memory.groups.values():
        assert group.pool.n_available == group.pool.n_pages and not group.tables
    llm.check()


BACKENDS: dict[str, dict[str, Any]] = {
    "reference": {"backend": "reference", "dtype": "float32"},
    "w8": {"quant": "w8"},
    "w4": {"quant": "w4", "kv_dtype": "int8"},
    "bf16": {"quant": "bf16"},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("head", ["assistant", "ordered"])
def test_every_draft_length_gives_the_bits_of_plain_decoding(
    pair: Path, head: str, backend: str
) -> None:
    config = EngineConfig(
        assistant=str(pair.parent / head), draft_n_max=7, ctx_size=256, **BACKENDS[backend]
    )
    llm = LLM(str(pair), config)
    several = prompts(4)[1:]
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for k in range(1, 8):
        prompt, want = several[k % 3], plain[k % 3]
        assert_same(run(llm, [prompt], k)[0], want)
        assert_same(run(llm, several, k)[k % 3], want)
    assert_idle(llm)


def repetitive(n: int) -> list[list[int]]:
    """Prompts in which the text of the last tokens came before, and others without a repeat."""
    return [p * 2 + p[:6] if i % 2 else p for i, p in enumerate(prompts(n)[:n])]


@pytest.mark.parametrize("backend", ["reference", "w8"])
@pytest.mark.parametrize("spec_type", ["ngram", "ngram+gemma4-assistant"])
def test_drafts_from_the_text_give_the_bits_of_plain_decoding(
    pair: Path, spec_type: SpecType, backend: str
) -> None:
    assistant = None if spec_type == "ngram" else str(pair.parent / "assistant")
    config = EngineConfig(
        spec_type=spec_type, assistant=assistant, draft_n_max=7, ctx_size=256, **BACKENDS[backend]
    )
    llm = LLM(str(pair), config)
    several = repetitive(3)
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for k in (1, 3, 7):
        assert_same(run(llm, [several[1]], k)[0], plain[1])
        for got, want in zip(run(llm, several, k), plain, strict=True):
            assert_same(got, want)
    assert llm.runner.faults.n_drafter == 0
    assert_idle(llm)


@pytest.mark.parametrize("spec_type", ["ngram", "ngram+gemma4-assistant"])
def test_sampled_text_of_a_seed_does_not_depend_on_drafts_from_the_text(
    spec_type: SpecType,
) -> None:
    llm = LLM("demo", EngineConfig(spec_type=spec_type, draft_n_max=7))
    text = "def mean(values):\n    return sum(values) / len(values)\n"
    prompt = list(llm.encode(text * 2 + "def mean(values):\n"))
    params = SamplingParams(max_tokens=N_NEW, temperature=0.8, seed=3, ignore_eos=True)
    outputs = []
    for k in (0, 2, 7):
        llm.set_draft_n_max(k)
        sequence = llm.add(prompt, params)
        while llm.scheduler.busy:
            llm.step()
        outputs.append(sequence.output)
    assert outputs[0] == outputs[1] == outputs[2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_neighbours_chunks_and_layout_change_nothing(pair: Path, backend: str) -> None:
    several = prompts(6)
    same: dict[str, Any] = {"ctx_size": 256, **BACKENDS[backend]}
    alone = LLM(str(pair), EngineConfig(spec_type="off", max_sequences=1, **same))
    plain = [run(alone, [prompt], 0)[0] for prompt in several]
    crowded = LLM(
        str(pair),
        EngineConfig(
            assistant=str(pair.parent / "assistant"),
            draft_n_max=5,
            max_sequences=4,
            prefill_chunk=37,
            **same,
        ),
    )
    for k in (0, 3, 5):
        for got, want in zip(run(crowded, several, k), plain, strict=True):
            assert_same(got, want)
    assert_idle(crowded)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_in_half_precision(pair: Path, dtype: DType) -> None:
    llm = LLM(str(pair), EngineConfig(assistant=str(pair.parent / "assistant"), dtype=dtype))
    several = prompts(3)
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for got, want in zip(run(llm, several, 4), plain, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_demo_pair(backend: str) -> None:
    llm = LLM("demo", EngineConfig(draft_n_max=7, **BACKENDS[backend]))
    texts = ["def mean(values):\n", 'class Stack:\n    """A stack."""\n']
    several = [list(llm.encode(text)) for text in texts]
    plain = [run(llm, [prompt], 0)[0] for prompt in several]
    for k in range(1, 8):
        for got, want in zip(run(llm, several, k), plain, strict=True):
            assert_same(got, want)
    assert_idle(llm)


@pytest.mark.parametrize("quant", ["w8", "w4", "bf16"])
def test_replayed_steps_have_the_bits_of_single_calls(quant: Quant) -> None:
    llm = LLM("demo", EngineConfig(quant=quant))
    prompt = list(llm.encode("import sys\n"))
    recorded = run(llm, [prompt], 4)[0]
    assert llm.runner.target_pass.recordings and llm.runner.target_pass.wide is not None
    llm.runner.target_pass.recorder = None
    assert_same(run(llm, [prompt], 4)[0], recorded)


def test_a_stale_row_after_a_rejection_would_be_seen(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken on purpose: rejected rows that stay in memory change the output."""
    config = EngineConfig(assistant=str(pair.parent / "assistant"), backend="reference")
    llm = LLM(str(pair), config)
    prompt = prompts(3)[2]
    want = run(llm, [prompt], 0)[0]
    keep = type(llm.runner)._keep_rows

    def forgetful(self, sequence, n_rows, n_kept):  # type: ignore[no-untyped-def]
        keep(self, sequence, n_rows, n_kept)
        if n_rows > n_kept:  # the next row is written one slot too far
            store = next(iter(self.memory.groups["full_attention"].layers.values()))
            store.k_PGSD.copy_(store.k_PGSD.roll(1, dims=2))

    monkeypatch.setattr(type(llm.runner), "_keep_rows", forgetful)
    got = run(llm, [prompt], 4)[0]
    assert not torch.equal(got[1], want[1])
