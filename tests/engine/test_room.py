"""What fits: the sums are those of a loaded engine, and every choice fits in what there is."""

from dataclasses import replace
from pathlib import Path

import pytest

from outdraft.cli.checkup import examine
from outdraft.cli.fit import parts_of
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.engine.fit import DEFAULT_SEQUENCES
from outdraft.engine.room import LEAST_TOKENS, Parts, choose, room_of, sequence_bytes
from outdraft.weights.find import resolve_model
from tests import tiny

CTX = 2048
SEQUENCES = 6


@pytest.fixture(scope="module")
def parts() -> Parts:
    return parts_of(examine(resolve_model("demo")))


def needed(parts: Parts, quant: str, ctx: int, pool: int) -> int:
    room = room_of(parts, quant, 0, ctx)
    fixed = room.weight_bytes + room.drafter_bytes + room.other_bytes
    return fixed + sequence_bytes(parts, ctx, pool, SEQUENCES)


def test_the_engine_takes_what_was_said(parts: Parts) -> None:
    for pool in (None, 3000):
        config = EngineConfig(ctx_size=CTX, max_sequences=SEQUENCES, kv_cache_tokens=pool)
        memory = LLM("demo", replace(config, quant="w4", device="cpu")).memory
        pool_tokens = pool or DEFAULT_SEQUENCES * CTX
        said = sequence_bytes(parts, CTX, pool_tokens, SEQUENCES)
        assert memory.n_bytes <= said <= 1.25 * memory.n_bytes


def test_a_hybrid_takes_what_was_said(tmp_path: Path) -> None:
    path = tiny.tiny_hybrid(tmp_path / "hybrid")
    parts = parts_of(examine(path))
    config = EngineConfig(ctx_size=256, max_sequences=3, quant="w8", device="cpu")
    llm = LLM(str(path), config)
    assert parts.n_draft_max == llm.pairing.n_draft_max
    said = sequence_bytes(parts, 256, 3 * 256, 3)
    assert llm.memory.n_bytes < said <= 2 * llm.memory.n_bytes  # the head's own beside it


def test_every_choice_fits_and_none_is_worse_than_it_need_be(parts: Parts) -> None:
    parts = replace(parts, stored="bf16")
    low = needed(parts, "w4", 64, 64) - 10_000_000
    high = needed(parts, "bf16", CTX, DEFAULT_SEQUENCES * CTX) + 10_000_000
    seen = []
    for free in range(low, high, (high - low) // 60):
        choice = choose(parts, free, CTX, SEQUENCES)
        if choice is None:
            assert needed(parts, "w4", LEAST_TOKENS + 64, LEAST_TOKENS + 64) > free
            seen.append((0, 0, 0))
            continue
        pool = choice.kv_tokens or DEFAULT_SEQUENCES * choice.ctx_tokens
        one = room_of(parts, choice.quant, free, choice.ctx_tokens)
        assert not one.short_bytes and one.most_tokens >= choice.ctx_tokens
        if choice.ctx_tokens < CTX:
            assert choice.quant == "w4" and room_of(parts, "w4", free, CTX).short_bytes
        bits = {"bf16": 16, "w8": 8, "w4": 4}[choice.quant]
        seen.append((bits, choice.ctx_tokens, pool))
        if pool > choice.ctx_tokens:
            assert needed(parts, choice.quant, choice.ctx_tokens, pool) <= free
    assert [s[:2] for s in seen] == sorted(s[:2] for s in seen)  # more memory, never less of it
    assert {s[0] for s in seen} == {0, 4, 8, 16}


def test_nothing_is_recommended_beyond_the_checkpoints_own_bits(parts: Parts) -> None:
    for stored in ("bf16", "w8", "w4"):
        choice = choose(replace(parts, stored=stored), 10**10, CTX, SEQUENCES)
        assert choice is not None and choice.quant == stored and choice.kv_tokens is None
