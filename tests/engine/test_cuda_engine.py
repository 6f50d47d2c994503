"""The whole engine over Triton's kernels: on a GPU, else under Triton's interpreter on a CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton has no build for this machine")

from outdraft.config import EngineConfig, Quant
from outdraft.engine.engine import LLM
from outdraft.models import registry
from outdraft.ops.cuda.ops import CudaOps
from outdraft.request import SamplingParams
from tests import tiny

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
N_NEW = 4


SMALL: dict[str, dict[str, Any]] = {
    "dense": {"num_hidden_layers": 2, "layer_types": [tiny.S, tiny.F]},
    "moe": {"num_hidden_layers": 2, "layer_types": [tiny.S, tiny.F], "num_experts": 4},
    "e2b": {
        "num_hidden_layers": 3,
        "layer_types": [tiny.S, tiny.F, tiny.S],
        "num_kv_shared_layers": 1,
        "vocab_size_per_layer_input": 320,
    },
}


class EagerOps(CudaOps):
    """Without graphs, which the interpreter has not."""

    begin = None  # type: ignore[assignment]


def load(root: Path, shape: str, quant: Quant, *, ordered: bool = False, **options: object) -> LLM:
    target = tiny.tiny_target(root / "target", shape, seed=11, vocab_size=320, **SMALL[shape])
    assistant = tiny.tiny_assistant(root / "assistant", target, ordered=ordered, seed=12)
    config = EngineConfig(
        assistant=str(assistant), draft_n=3, ctx_size=128, max_sequences=2, quant=quant, **options
    )
    return LLM(str(target), config)


@pytest.fixture(autouse=True)
def on_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    if DEVICE.type == "cpu":
        monkeypatch.setattr(registry, "card", lambda config: DEVICE)
        monkeypatch.setattr("outdraft.ops.cuda.ops.CudaOps", EagerOps)


def run(llm: LLM, prompts: list[list[int]], k: int) -> list[tuple[list[int], Tensor]]:
    llm.set_draft_n_max(k)
    llm.runner.logits_log = {}
    params = SamplingParams(max_tokens=N_NEW, ignore_eos=True)
    sequences = [llm.add(prompt, params) for prompt in prompts]
    while llm.scheduler.busy:
        llm.step()
    logs = llm.runner.logits_log
    assert all(s.error is None for s in sequences), [s.error for s in sequences]
    assert llm.runner.faults.n_pass == llm.runner.faults.n_drafter == 0
    assert llm.runner.faults.n_request == 0
    return [(s.output, torch.stack(logs[s.id])) for s in sequences]


@pytest.mark.parametrize(
    ("shape", "quant", "ordered"),
    [
        ("dense", "w4", False),
        ("e2b", "w8", True),
        pytest.param("moe", "bf16", False, marks=pytest.mark.prove),
    ],
)
def test_drafts_give_the_bits_of_plain_decoding(
    tmp_path: Path, shape: str, quant: Quant, ordered: bool
) -> None:
    llm = load(tmp_path, shape, quant, ordered=ordered)
    assert isinstance(llm.target.ops, CudaOps)
    prompts = [[2, 40, 41, 50], [2, 99]]
    plain = run(llm, prompts[:1], 0)[0]
    for some, k in ((prompts[:1], 3), (prompts, 1)):
        got = run(llm, some, k)[0]
        assert got[0] == plain[0] and torch.equal(got[1], plain[1])
    llm.check()


def test_another_family_with_drafts_from_the_text(tmp_path: Path) -> None:
    target = tiny.tiny_target(
        tmp_path / "target", "ministral3", vocab_size=320, num_hidden_layers=2
    )
    config = EngineConfig(spec_type="ngram", draft_n=2, ctx_size=128, max_sequences=2)
    llm = LLM(str(target), config)
    prompts = [[2, *[40, 41, 50, 44, 45] * 2], [2, 99]]
    plain = run(llm, prompts[:1], 0)[0]
    got = run(llm, prompts, 2)[0]
    assert got[0] == plain[0] and torch.equal(got[1], plain[1])


def test_drafts_are_drawn(tmp_path: Path) -> None:
    llm = load(tmp_path, "dense", "bf16", ordered=True)
    done = llm.generate([5, 6, 7], SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0))
    assert llm.runner.faults.n_drafter == 0, llm.runner.faults.last_drafter_error
    assert done.stats.n_drafted > 0


@pytest.mark.parametrize("shape", ["qwen3_5", pytest.param("qwen3_5_moe", marks=pytest.mark.prove)])
def test_recurrent_layers_with_the_targets_own_head(tmp_path: Path, shape: str) -> None:
    layers = {"num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    target = tiny.tiny_hybrid(tmp_path / "target", shape, seed=3, **layers)
    config = EngineConfig(spec_type="mtp", draft_n=2, ctx_size=128, max_sequences=2, quant="bf16")
    llm = LLM(str(target), config)
    assert isinstance(llm.target.ops, CudaOps)
    prompts = [[2, 40, 41, 50], [2, 99]]
    plain = run(llm, prompts[:1], 0)[0]
    for some, k in ((prompts[:1], 2), (prompts, 1)):
        got = run(llm, some, k)[0]
        assert got[0] == plain[0] and torch.equal(got[1], plain[1])
    assert llm.runner.counters.drafts.n_drafted > 0
    llm.check()
