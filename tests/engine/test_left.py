"""Drafts that stay on the device until they are verified: rounds launched behind passes.

Graphs are recorded calls that run again, so that all of it runs under Triton's interpreter.
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this machine")

from outdraft.config import EngineConfig
from outdraft.engine import graphs
from outdraft.engine.engine import LLM
from outdraft.models import registry
from outdraft.ops.cuda.ops import CudaOps
from outdraft.request import SamplingParams
from outdraft.speculate import gemma4_assistant
from tests import tiny

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")


class Again:
    """A recorded call that runs again, into the tensors of its first run."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.call = call
        self.made = call()

    def replay(self) -> None:
        for own, new in zip(flat(self.made), flat(self.call()), strict=True):
            own.copy_(new)


def flat(made: Any) -> list[Tensor]:
    if isinstance(made, Tensor):
        return [made]
    return [] if made is None else [tensor for part in made for tensor in flat(part)]


def record_again(call: Callable[[], Any], *all_ops: object) -> tuple[Again, Any]:
    program = Again(call)
    return program, program.made


@pytest.fixture
def llm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LLM:
    monkeypatch.setattr(registry, "card", lambda config: CPU)
    for module in (graphs, gemma4_assistant):
        monkeypatch.setattr(module, "record", record_again)
    layers = {"num_hidden_layers": 2, "layer_types": [tiny.S, tiny.F], "sliding_window": 8}
    target = tiny.tiny_target(tmp_path / "target", "dense", seed=11, vocab_size=320, **layers)
    assistant = tiny.tiny_assistant(tmp_path / "assistant", target, ordered=True, seed=12)
    config = EngineConfig(
        assistant=str(assistant), draft_n=3, ctx_size=128, max_sequences=2, quant="bf16"
    )
    made = LLM(str(target), config)
    assert isinstance(made.target.ops, CudaOps)
    return made


def run(llm: LLM, prompts: list[list[int]], n_new: int, **options: Any) -> list[list[int]]:
    llm.runner.logits_log = {}
    params = SamplingParams(max_tokens=n_new, ignore_eos=True, **options)
    sequences = [llm.add(prompt, params) for prompt in prompts]
    while llm.scheduler.busy:
        llm.step()
    assert all(s.error is None for s in sequences), [s.error for s in sequences]
    faults = llm.runner.faults
    assert faults.n_pass == faults.n_drafter == 0, faults.last_drafter_error
    return [s.output for s in sequences]


def test_rounds_follow_passes_and_change_nothing(llm: LLM) -> None:
    prompts = [[2, 40, 41, 50], [2, 99]]
    llm.set_draft_n_max(0)
    plain = run(llm, prompts[:1], 8)
    drafter: Any = llm.runner.drafter
    llm.set_draft_n_max(3)
    assert run(llm, prompts[:1], 8) == plain and drafter.n_flown > 1
    n_flown = drafter.n_flown
    assert run(llm, prompts, 3)[0] == plain[0][:3]  # of several, none is left
    drawn = run(llm, prompts[:1], 2, temperature=1.0)
    assert len(drawn[0]) == 2 and drafter.n_flown == n_flown
    llm.check()


def test_what_was_launched_ahead_is_what_would_have_been_asked_for(llm: LLM) -> None:
    """Of every round launched behind a pass, its drafts beside those of one that waited."""
    drafter: Any = llm.runner.drafter
    leave, seen = drafter.leave, []

    def both(view: Any, k: int) -> Any:
        flown = drafter.n_flown
        left_K = leave(view, k).left_K.clone()
        waited = drafter.propose(view, k)
        if drafter.n_flown > flown:
            seen.append(view.sequences[0].n)
            assert torch.equal(left_K.long(), waited.tokens_BK[0, : len(left_K)])
        return leave(view, k)

    drafter.leave = both
    fake_accepts(llm)
    run(llm, [[2, 40, 41, 50]], 10)
    assert len(seen) > 2 and max(b - a for a, b in pairwise(seen)) > 1


def fake_accepts(llm: LLM) -> None:
    """The drafter's tokens become the target's in two of three rows, so that drafts stay."""
    target_pass: Any = llm.runner.target_pass
    recording = target_pass._recording

    def telling(recorder: Any, numbers: Tensor, n_rows: int, turn: int) -> Any:
        own = recording(recorder, numbers, n_rows, turn)
        if not hasattr(own.program, "told"):
            own.program.told, call = True, own.program.call

            def told() -> Any:
                hidden_TH, logits_TV, best_T = call()
                token_T = own.call.token_T
                best_T = best_T.clone()
                some = (token_T[1:] % 3 > 0) & (token_T[1:] < 318)
                best_T[:-1] = torch.where(some, token_T[1:], best_T[:-1])
                return hidden_TH, logits_TV, best_T

            own.program.call = told
        return own

    target_pass._recording = telling
