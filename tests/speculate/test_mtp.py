"""The native head: against a plain restatement in fp64, and refused when it is not whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from outdraft.cache.attend import CausalCall
from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.errors import ModelError
from outdraft.models.nemotron_h_config import NemotronHConfig
from outdraft.models.qwen3_5_config import Qwen35Config
from outdraft.request import SamplingParams
from outdraft.speculate.mtp import MtpDrafter
from tests import tiny

PROMPT = torch.randint(6, 300, (21,), generator=torch.Generator().manual_seed(5)).tolist()


def norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (1 + w)


def turned(x_THD: Tensor, theta: float, part: int) -> Tensor:
    """Rotary positions 0, 1, ... on the first `part` dimensions."""
    angles = torch.arange(x_THD.shape[0])[:, None] / theta ** (torch.arange(0, part, 2) / part)
    cos, sin = angles.cos()[:, None].double(), angles.sin()[:, None].double()
    a, b, rest = x_THD[..., : part // 2], x_THD[..., part // 2 : part], x_THD[..., part:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), dim=-1)


def head_of(w: dict[str, Tensor], c: Qwen35Config, embedded: Tensor, hidden: Tensor) -> Tensor:
    """The head's results for rows 0, 1, ... of one sequence, whole and in fp64."""
    u = torch.cat(
        (
            norm(embedded, w["pre_fc_norm_embedding.weight"]),
            norm(hidden, w["pre_fc_norm_hidden.weight"]),
        ),
        dim=-1,
    )
    x = u @ w["fc.weight"].T
    n, dim = x.shape[0], c.head_dim
    y = norm(x, w["layers.0.input_layernorm.weight"])
    q, gate = (y @ w["layers.0.self_attn.q_proj.weight"].T).view(n, -1, 2 * dim).chunk(2, dim=-1)
    k = (y @ w["layers.0.self_attn.k_proj.weight"].T).view(n, -1, dim)
    v = (y @ w["layers.0.self_attn.v_proj.weight"].T).view(n, -1, dim)
    q = turned(norm(q, w["layers.0.self_attn.q_norm.weight"]), c.rope_theta, c.rotary_dim)
    k = turned(norm(k, w["layers.0.self_attn.k_norm.weight"]), c.rope_theta, c.rotary_dim)
    k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * dim**-0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v) * gate.sigmoid()
    x = x + mixed.reshape(n, -1) @ w["layers.0.self_attn.o_proj.weight"].T
    y = norm(x, w["layers.0.post_attention_layernorm.weight"])
    inner = F.silu(y @ w["layers.0.mlp.gate_proj.weight"].T) * (
        y @ w["layers.0.mlp.up_proj.weight"].T
    )
    return norm(x + inner @ w["layers.0.mlp.down_proj.weight"].T, w["norm.weight"])


def plain_norm(x: Tensor, w: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w


def nemotron_head_of(
    w: dict[str, Tensor], c: NemotronHConfig, embedded: Tensor, hidden: Tensor
) -> Tensor:
    """`head_of` of Nemotron-H: attention without positions, then experts in a latent."""
    u = torch.cat(
        (
            plain_norm(embedded, w["layers.0.enorm.weight"]),
            plain_norm(hidden, w["layers.0.hnorm.weight"]),
        ),
        dim=-1,
    )
    x = u @ w["layers.0.eh_proj.weight"].T
    n, dim = x.shape[0], c.head_dim
    y = plain_norm(x, w["layers.0.norm.weight"])
    q, k, v = ((y @ w[f"layers.0.mixer.{i}_proj.weight"].T).view(n, -1, dim) for i in "qkv")
    k, v = (t.repeat_interleave(c.n_heads // c.n_kv_heads, dim=1) for t in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * dim**-0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hts,shd->thd", scores.softmax(-1), v).reshape(n, -1)
    x = x + mixed @ w["layers.0.mixer.o_proj.weight"].T
    y, moe = plain_norm(x, w["layers.1.norm.weight"]), c.moe
    assert moe is not None and moe.latent_size is not None

    def mlp(prefix: str, z: Tensor) -> Tensor:
        inner = (z @ w[f"layers.1.mixer.{prefix}up_proj.weight"].T).relu().square()
        return inner @ w[f"layers.1.mixer.{prefix}down_proj.weight"].T

    added = mlp("shared_experts.", y)
    open_TE = (y @ w["layers.1.mixer.gate.weight"].T).sigmoid()
    choice_TE = open_TE + w["layers.1.mixer.gate.e_score_correction_bias"]
    latent = y @ w["layers.1.mixer.fc1_latent_proj.weight"].T
    for t in range(n):
        groups = choice_TE[t].view(moe.n_groups, -1)
        best = groups.topk(2).values.sum(-1).topk(moe.top_groups).indices
        hidden_E = torch.full_like(groups, float("-inf"))
        hidden_E[best] = groups[best]
        ids = hidden_E.flatten().topk(moe.top_k).indices
        weights = open_TE[t, ids] / open_TE[t, ids].sum() * moe.scale
        routed = sum(
            weight * mlp(f"experts.{e}.", latent[t])
            for e, weight in zip(ids.tolist(), weights, strict=True)
        )
        added[t] += w["layers.1.mixer.fc2_latent_proj.weight"] @ routed
    return plain_norm(x + added, w["layers.1.final_layernorm.weight"])


RESTATED = {"qwen3_5": (head_of, "model.embed_tokens.weight")}
RESTATED["nemotron_h_latent"] = (nemotron_head_of, "backbone.embeddings.weight")


@pytest.mark.parametrize("shape", RESTATED)
@torch.inference_mode()
def test_drafts_are_those_of_the_restatement(tmp_path: Path, shape: str) -> None:
    """Several rounds of one sequence, with accepted and rejected drafts between them."""
    path, (restated, embedding) = tiny.tiny_hybrid(tmp_path / "m", shape, seed=4), RESTATED[shape]
    llm = LLM(str(path), EngineConfig(backend="reference", draft_n=3, ctx_size=128))
    drafter = llm.pairing.drafter
    assert isinstance(drafter, MtpDrafter)
    stored = {n: t.double() for n, t in load_file(path / "model.safetensors").items()}
    head = {n.removeprefix("mtp."): t for n, t in stored.items() if n.startswith("mtp.")}
    table, scorer = stored[embedding], stored["lm_head.weight"]
    states: list[Tensor] = []
    rounds: list[tuple[list[int], list[int]]] = []
    read, propose = drafter.read, drafter.propose
    params = SamplingParams(max_tokens=24, ignore_eos=True)
    llm.set_draft_n_max(0)
    said = [*PROMPT, *llm.generate(PROMPT, params).tokens]
    llm.set_draft_n_max(3)

    def watched_read(sequence: str, first: int, hidden_TH: Tensor) -> None:
        assert first == sum(part.shape[0] for part in states)
        states.append(hidden_TH.double().clone())
        read(sequence, first, hidden_TH)

    def watched_propose(view: Any, k: int) -> Any:
        draft = propose(view, k)
        rounds.append((list(view.sequences[0].tokens), draft.tokens_BK[0].tolist()))
        tokens, hidden = list(view.sequences[0].tokens), torch.cat(states)
        for i in range(k):
            out = restated(head, drafter.head.config, table[tokens[1:]], hidden)
            best = int((out[-1] @ scorer.T).argmax())
            assert draft.tokens_BK[0, i] == best
            tokens.append(best)
            hidden = torch.cat((hidden, out[-1:]))
        n, n_right = len(view.sequences[0].tokens), len(rounds) % (k + 1)
        right = torch.tensor(said[n : n + n_right], dtype=torch.int64)
        draft.tokens_BK[0, : min(k, len(right))] = right[:k]  # so that some are accepted
        return draft

    drafter.read, drafter.propose = watched_read, watched_propose  # type: ignore[method-assign]
    done = llm.generate(PROMPT, params)
    assert llm.runner.faults.n_drafter == 0 and done.tokens == said[len(PROMPT) :]
    assert len(rounds) > 5 and done.stats.n_accepted > 5


def without(path: Path, *names: str) -> Path:
    """The same checkpoint without these tensors."""
    tensors = load_file(path / "model.safetensors")
    kept = {n: t for n, t in tensors.items() if not n.startswith(names)}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("shape", RESTATED)
def test_a_head_that_was_dropped_is_named(tmp_path: Path, shape: str) -> None:
    path = without(tiny.tiny_hybrid(tmp_path / "m", shape), "mtp.")
    llm = LLM(str(path), EngineConfig(ctx_size=128))
    assert llm.pairing.drafter is None
    assert "claims 1 MTP layer and no mtp.* tensor is there" in llm.pairing.reason
    with pytest.raises(ModelError, match="no MTP head"):
        LLM(str(path), EngineConfig(ctx_size=128, spec_type="mtp"))


@pytest.mark.parametrize(
    ("shape", "name"),
    [("qwen3_5", "mtp.fc.weight"), ("nemotron_h_latent", "mtp.layers.1.mixer.gate.weight")],
)
def test_a_head_with_a_missing_tensor_is_named(tmp_path: Path, shape: str, name: str) -> None:
    path = without(tiny.tiny_hybrid(tmp_path / "m", shape), name)
    llm = LLM(str(path), EngineConfig(ctx_size=128))
    assert llm.pairing.drafter is None
    assert f"1 of its tensors are missing, such as {name}" in llm.pairing.reason


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_nextn_predict_layers": 2}, "2 blocks are not supported"),
        ({"mtp_hybrid_override_pattern": "M*"}, "layers of mamba, attention are not supported"),
    ],
)
def test_a_head_of_another_form_is_named(
    tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m", "nemotron_h_latent")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    llm = LLM(str(path), EngineConfig(ctx_size=128))
    assert llm.pairing.drafter is None and words in llm.pairing.reason
    with pytest.raises(ModelError, match=words):
        LLM(str(path), EngineConfig(ctx_size=128, spec_type="mtp"))


def test_a_model_made_without_a_head_has_none(tmp_path: Path) -> None:
    """As 3 Nano: the config claims none, either."""
    path = tiny.tiny_target(tmp_path / "m", "nemotron_h_moe")
    llm = LLM(str(path), EngineConfig(ctx_size=128))
    assert llm.pairing.drafter is None and "it has none" in llm.pairing.reason


def test_another_family_has_no_native_head(tmp_path: Path) -> None:
    path = tiny.tiny_target(tmp_path / "m", "plain")
    with pytest.raises(ModelError, match="without MTP heads"):
        LLM(str(path), EngineConfig(ctx_size=128, spec_type="mtp"))


@pytest.mark.parametrize("shape", RESTATED)
@torch.inference_mode()
def test_recorded_rounds_draft_what_plain_calls_do(tmp_path: Path, shape: str) -> None:
    """Every pass of the head, of sequences that come and go, with drafts kept and not; the scores
    as well, bit for bit."""
    path = tiny.tiny_hybrid(tmp_path / "m", shape, seed=6, dtype="bfloat16")
    config = EngineConfig(backend="cpu", draft_n=3, ctx_size=256, max_sequences=3)
    llm = LLM(str(path), config)
    drafter = llm.pairing.drafter
    assert isinstance(drafter, MtpDrafter) and drafter.recorder is not None
    replayed, score = drafter._replayed, drafter._score
    seen: list[int] = []

    def watched(recorder: Any, numbers: Tensor, hidden_TK: Tensor, view: Any) -> Tensor:
        call = CausalCall.of(drafter.memory, drafter.head.ops, numbers.clone())
        plain = drafter._forward(call, hidden_TK.clone(), view)
        done = replayed(recorder, numbers, hidden_TK, view)
        assert torch.equal(done, plain)
        seen.append(len(done))
        return done

    def watched_score(done_BK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits_BV = drafter.target.logits(done_BK)
        plain = logits_BV, *drafter.head.ops.best(logits_BV)
        got = score(done_BK)
        assert all(torch.equal(a, b) for a, b in zip(got, plain, strict=True))
        return got

    drafter._replayed, drafter._score = watched, watched_score  # type: ignore[method-assign]
    prompts = [PROMPT[:n] for n in (21, 5, 13, 9, 17)]
    many = [SamplingParams(max_tokens=n, ignore_eos=True) for n in (9, 30, 17, 25, 12)]
    llm.generate_all(prompts, many)
    assert llm.runner.faults.n_drafter == 0 and set(seen) >= {1, 2, 3}
