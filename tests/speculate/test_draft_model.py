"""A draft model of its own: exact, whatever happened to its memory, and refused when it misfits."""

import json
from pathlib import Path

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import ModelError, PairingError
from outdraft.request import SamplingParams
from outdraft.speculate.draft_model import CATCH_UP, DraftModelDrafter
from tests import tiny

PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


def pair(root: Path, target_shape: str, draft_shape: str, **draft: object) -> tuple[Path, Path]:
    target = tiny.tiny_target(root / "target", target_shape, seed=11)
    return target, tiny.tiny_target(root / "draft", draft_shape, seed=12, **draft)


def load(target: Path, draft: Path, **options: object) -> LLM:
    given: dict[str, object] = {"draft_n_max": 5, "ctx_size": 256, "quant": "w8"} | options
    return LLM(str(target), EngineConfig(assistant=str(draft), **given))  # type: ignore[arg-type]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(6, 300, (n,), generator=generator).tolist() for n in (1, 9, 70, 131)]


def run(llm: LLM, k: int) -> list[list[int]]:
    llm.set_draft_n_max(k)
    return [c.tokens for c in llm.generate_all(prompts(), PARAMS)]


@pytest.mark.parametrize(
    ("target_shape", "draft_shape"),
    [("ministral3", "ministral3"), ("plain", "window"), ("ministral3", "plain"), ("moe", "plain")],
)
def test_greedy_text_is_that_of_plain_decoding(
    tmp_path: Path, target_shape: str, draft_shape: str
) -> None:
    llm = load(*pair(tmp_path, target_shape, draft_shape))
    plain = run(llm, 0)
    for k in (1, 3, 5):
        assert run(llm, k) == plain
    assert llm.runner.faults.n_drafter == 0
    llm.check()
    assert not llm.pairing.drafter.memory.lengths  # type: ignore[union-attr]


def test_a_model_drafts_for_itself_and_every_draft_is_accepted(tmp_path: Path) -> None:
    """The drafter's rows have the bits of the target's, so each of its guesses is right."""
    target = tiny.tiny_target(tmp_path / "target", "ministral3", seed=11)
    llm = load(target, target, backend="reference", quant="auto")
    llm.set_draft_n_max(4)
    for mixed in ([3], [0, 4, 1, 0, 2]):  # rounds of several lengths, and none, in turn
        lengths = iter(mixed * 100)
        llm.scheduler.draft_lengths = lambda decoding, it=lengths: [next(it) for _ in decoding]
        done = llm.generate(prompts()[2], PARAMS)
        assert done.stats.n_drafted == done.stats.n_accepted > 8


def test_a_long_prompt_is_read_in_parts_and_drafts_come_when_it_is_read(tmp_path: Path) -> None:
    target, draft = pair(tmp_path, "ministral3", "ministral3")
    llm = load(target, draft, ctx_size=1000, prefill_chunk=2048)
    llm.set_draft_n_max(3)
    done = llm.generate([7, 8, 9] * ((CATCH_UP + 200) // 3), PARAMS)
    assert 0 < done.stats.n_drafted < 3 * 20
    llm.set_draft_n_max(0)
    assert llm.generate([7, 8, 9] * ((CATCH_UP + 200) // 3), PARAMS).tokens == done.tokens


def test_without_room_a_sequence_decodes_plainly(tmp_path: Path) -> None:
    target, draft = pair(tmp_path, "ministral3", "ministral3")
    llm = load(target, draft)
    drafter = llm.pairing.drafter
    assert isinstance(drafter, DraftModelDrafter)
    plain = run(llm, 0)
    group = drafter.memory.groups["full_attention"]
    held = group.pool.allocate(group.pool.n_pages - 3)
    assert run(llm, 3) == plain
    assert llm.runner.faults.n_drafter == 0
    group.pool.release(held)


def test_sampled_text_of_a_seed_is_that_of_plain_decoding(tmp_path: Path) -> None:
    llm = load(*pair(tmp_path, "ministral3", "ministral3"))
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    llm.set_draft_n_max(0)
    plain = llm.generate(prompts()[1], params).tokens
    llm.set_draft_n_max(4)
    assert llm.generate(prompts()[1], params).tokens == plain


def test_another_vocabulary_is_refused_with_the_first_token_that_differs(tmp_path: Path) -> None:
    target, draft = pair(tmp_path, "ministral3", "ministral3")
    path = draft / "tokenizer.json"
    given = json.loads(path.read_text())
    vocab = given["model"]["vocab"]
    a, b = (next(t for t, i in vocab.items() if i == n) for n in (77, 78))
    vocab[a], vocab[b] = 78, 77
    path.write_text(json.dumps(given))
    with pytest.raises(PairingError, match="token 77"):
        load(target, draft)


def test_a_padded_head_is_cut_to_the_vocabulary_of_the_target(tmp_path: Path) -> None:
    """The tokenizers are the same, the rows of the two heads are not."""
    for n_rows in (tiny.VOCAB + 64, tiny.VOCAB - 64):
        root = tmp_path / str(n_rows)
        target, draft = pair(root, "ministral3", "ministral3", vocab_size=n_rows)
        tokenizer = (target / "tokenizer.json").read_text()
        if n_rows < tiny.VOCAB:
            tokenizer = (draft / "tokenizer.json").read_text()
            (target / "tokenizer.json").write_text(tokenizer)
        (draft / "tokenizer.json").write_text(tokenizer)
        llm = load(target, draft)
        assert run(llm, 3) == run(llm, 0)
        assert llm.runner.faults.n_drafter == 0
        llm.set_draft_n_max(3)
        unknown = llm.generate([7, tiny.VOCAB - 1, 9], PARAMS)
        assert (unknown.stats.n_drafted > 0) == (n_rows > tiny.VOCAB)


def test_a_draft_model_that_is_missing_is_an_error(tmp_path: Path) -> None:
    target = tiny.tiny_target(tmp_path / "target", "ministral3", seed=11)
    with pytest.raises(ModelError, match="no draft model"):
        LLM(str(target), EngineConfig(spec_type="draft-model"))
    assert LLM(str(target), EngineConfig()).pairing.drafter is None
