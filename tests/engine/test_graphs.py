"""Passes that are recorded once for all numbers of rows have the bits of single calls."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from outdraft.cache.memory import Span
from outdraft.config import EngineConfig, Quant
from outdraft.engine.engine import LLM
from outdraft.engine.graphs import LEAST_ROOM
from tests import tiny

HYBRIDS = ["qwen3_5", "nemotron_h"]
FORMATS: dict[str, Quant] = {"plain": "w8", "dense": "w4", "moe": "w8", "e2b": "bf16"}
SHAPES = [*FORMATS, "window", *HYBRIDS]


def load(path: Path, shape: str) -> LLM:
    quant = FORMATS.get(shape, "w8")
    if shape in HYBRIDS:
        target = tiny.tiny_hybrid(path / "model", shape, seed=5)
    else:
        target = tiny.tiny_target(path / "model", shape, seed=5)
    config = EngineConfig(spec_type="off", quant=quant, ctx_size=512, max_sequences=4)
    return LLM(str(target), config)


def states(llm: LLM, calls: list[list[tuple[str, int]]], seed: int) -> list[Tensor]:
    """Final hidden states of each call's rows: so many of each sequence named, behind its last."""
    rng = torch.Generator().manual_seed(seed)
    memory, found = llm.memory, []
    names = {name for call in calls for name, _ in call}
    for name in sorted(names):
        memory.open(name, [], "", 0)
    for call in calls:
        tokens: list[int] = []
        spans = []
        for name, n in call:
            memory.reserve(name, n)
            spans.append(Span(name, len(tokens), n))
            tokens += torch.randint(6, 300, (n,), generator=rng).tolist()
        found.append(llm.runner.target_pass.run(tokens, spans, []).hidden_TH.clone())
        for name, n in call:
            memory.advance(name, n)
    for name in sorted(names):
        memory.close(name)
    return found


CALLS = [
    [("a", 70)],
    [("a", 1), ("b", 17), ("c", 33)],
    [("b", 90), ("d", 77)],  # more than the room that came first
    [("a", 3)],
    [("d", 140), ("a", 60), ("c", 1)],
]


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_beyond_those_of_a_call_change_nothing(shape: str, tmp_path: Path) -> None:
    llm = load(tmp_path, shape)
    own = llm.runner.target_pass
    recorded = states(llm, CALLS, seed=3)
    assert own.wide is not None and own.wide.n_rows == 2 * LEAST_ROOM
    again = states(llm, CALLS, seed=3)  # now all with the larger room
    own.recorder = None
    expected = states(llm, CALLS, seed=3)
    for one, two, want in zip(recorded, again, expected, strict=True):
        assert torch.equal(one, want) and torch.equal(two, want)


def test_larger_tables_are_recorded_again(tmp_path: Path) -> None:
    llm = load(tmp_path, "plain")
    few = states(llm, CALLS[:2], seed=4)
    first = llm.runner.target_pass.wide
    names = [f"s{i}" for i in range(9)]  # more than the tables were made for
    states(llm, [[(name, 2) for name in names]], seed=4)
    assert llm.runner.target_pass.wide is not first
    for one, two in zip(few, states(llm, CALLS[:2], seed=4), strict=True):
        assert torch.equal(one, two)
