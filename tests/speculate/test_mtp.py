"""The native head: against a plain restatement in fp64, and refused when it is not whole."""

import json
from collections import Counter
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
from outdraft.sampling.logits import distribution
from outdraft.speculate.draft_vocab import choose_ids
from outdraft.speculate.mtp import MtpDrafter
from outdraft.speculate.proof import (
    Decoder,
    block_distribution,
    chi_square_p_value,
    continuation,
    logits_table,
    sampled_drafts,
    table,
)
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


def watched(llm: LLM) -> list[tuple[int, list[int]]]:
    """Filled with every round of one sequence: its number of tokens, and its drafts."""
    drafter = llm.pairing.drafter
    assert isinstance(drafter, MtpDrafter)
    rounds: list[tuple[int, list[int]]] = []
    propose = drafter.propose

    def seen(view: Any, k: int) -> Any:
        draft = propose(view, k)
        own = draft.tokens_BK[0, : draft.lengths[0]].tolist()
        rounds.append((len(view.sequences[0].tokens), own))
        return draft

    drafter.propose = seen  # type: ignore[method-assign]
    return rounds


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_behind_a_prefix_hit_the_head_drafts_what_it_would(tmp_path: Path, backend: str) -> None:
    """The head's pages come from its own cache; where they part one token late, it begins anew."""
    path = tiny.tiny_hybrid(tmp_path / "m", seed=8, dtype="bfloat16")
    options: dict[str, Any] = {"backend": backend, "draft_n": 3, "ctx_size": 512}
    warm = LLM(str(path), EngineConfig(**options))
    cold = LLM(str(path), EngineConfig(**options, prefix_cache=False))
    got, want = watched(warm), watched(cold)
    params = SamplingParams(max_tokens=20, ignore_eos=True)
    shared = torch.randint(6, 300, (220,), generator=torch.Generator().manual_seed(2)).tolist()
    warm.generate([*shared, 7, 8], params)
    got.clear()
    prompt = [*shared, 9, 10, 11]
    done = warm.generate(prompt, params)
    assert done.cached_tokens == 192 and done.tokens == cold.generate(prompt, params).tokens
    assert got == want and sum(len(drafts) for _, drafts in got) > 20
    got.clear()
    parted = [*shared[:192], 5 if shared[192] != 5 else 6, *shared[193:]]  # row 191 is another
    done = warm.generate(parted, params)
    assert done.cached_tokens == 192 and done.tokens == cold.generate(parted, params).tokens
    assert sum(len(drafts) for _, drafts in got) > 20
    drafter = warm.pairing.drafter
    assert isinstance(drafter, MtpDrafter) and warm.runner.faults.n_drafter == 0
    drafter.memory.books.check()


def test_rounds_of_a_head_are_measured_at_the_start(tmp_path: Path) -> None:
    """The controller has costs of drafting before the first request."""
    path = tiny.tiny_hybrid(tmp_path / "m", seed=8, dtype="bfloat16")
    llm = LLM(str(path), EngineConfig(backend="cpu", draft_n_max=3, ctx_size=256, max_sequences=2))
    drafter = llm.pairing.drafter
    assert llm.lengths is not None and isinstance(drafter, MtpDrafter)
    rounds = llm.lengths.likeliest.costs.rounds
    assert (1, 1) in rounds and (1, 3) in rounds
    assert not drafter.memory.lengths and not llm.memory.lengths
    drafter.memory.books.check()


@pytest.mark.parametrize("shape", RESTATED)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_part_of_the_vocabulary_is_drafted_and_nothing_else_changes(
    tmp_path: Path, backend: str, shape: str
) -> None:
    path = tiny.tiny_hybrid(tmp_path / "m", shape, seed=8, dtype="bfloat16")
    options: dict[str, Any] = {"backend": backend, "draft_n": 3, "ctx_size": 256}
    whole = LLM(str(path), EngineConfig(**options))
    part = LLM(str(path), EngineConfig(**options, draft_vocab=100))
    drafter = part.pairing.drafter
    assert isinstance(drafter, MtpDrafter) and drafter.vocab is not None
    ids = set(drafter.vocab.ids_N.tolist())
    assert len(ids) == 128 and 1 in ids  # the end of sequence
    rounds = watched(part)
    for seed, temperature in ((None, 0.0), (4, 0.9)):
        params = SamplingParams(temperature=temperature, seed=seed, max_tokens=30, ignore_eos=True)
        assert part.generate(PROMPT, params).tokens == whole.generate(PROMPT, params).tokens
    drafted = {token for _, drafts in rounds for token in drafts}
    assert len(drafted) > 5 and drafted <= ids
    with torch.inference_mode():
        rows = torch.randn(3, 64).to(torch.bfloat16)
        ids_N = drafter.vocab.ids_N
        want_BV = part.target.model.logits(rows)
        got_BV = drafter.vocab.whole(drafter.vocab.logits(rows))
        assert torch.equal(got_BV[:, ids_N], want_BV[:, ids_N])
        assert int(torch.isfinite(got_BV).sum()) == 3 * len(ids_N)


def test_drawn_drafts_of_a_part_are_lossless(tmp_path: Path) -> None:
    """The engine's own drafts and verification: second tokens have the target's distribution."""
    path = tiny.tiny_hybrid(tmp_path / "m", seed=8)
    config = {
        "draft_n": 1,
        "ctx_size": 64,
        "max_sequences": 64,
        "max_queue": 2000,
    }
    llm = LLM(str(path), EngineConfig(**config, draft_vocab=256))  # type: ignore[arg-type]
    n, prompt = 1200, PROMPT[:5]
    params = SamplingParams(temperature=1.0, top_k=40, max_tokens=3, ignore_eos=True)
    done = llm.generate_all([prompt] * n, params)
    assert sum(c.stats.n_accepted for c in done) > 10
    first = Counter(c.tokens[0] for c in done)
    token, n_first = first.most_common(1)[0]
    llm.runner.logits_log = {}
    llm.set_draft_n_max(0)
    llm.generate([*prompt, token], SamplingParams(max_tokens=1))
    (rows,) = llm.runner.logits_log.values()
    p_V = distribution(rows[0][None], params)[0].double()
    ids = p_V.nonzero()[:, 0]
    seen = Counter(c.tokens[1] for c in done if c.tokens[0] == token)
    assert set(seen) <= set(ids.tolist())
    observed = torch.tensor([seen[i] for i in ids.tolist()], dtype=torch.float64)
    assert chi_square_p_value(observed, p_V[ids] * n_first) > 1e-6


@pytest.mark.parametrize("k", [1, 2, 3])
def test_a_q_without_mass_outside_a_part_is_lossless(k: int) -> None:
    """By enumeration through the real rule: most of the target's mass may lie outside."""
    vocab, params = 4, SamplingParams(1.0)
    truth = table(logits_table(vocab, 1), params)
    scores = logits_table(vocab, 2)

    def part(context: tuple[int, ...]) -> Tensor:
        logits_V = scores(context).clone()
        logits_V[[1, 3]] = float("-inf")
        return logits_V

    decoder = Decoder(truth, sampled_drafts(table(part, params)))
    got = block_distribution(decoder, truth, vocab, k)
    want = continuation(truth, (), vocab, k + 1)
    assert float((got - want).abs().max()) < 1e-12


def test_ids_are_the_frequent_ones_then_the_lowest() -> None:
    assert choose_ids(64, 1000, [999], [500, 500, 7, 600]) == [*range(61), 500, 600, 999]
    assert choose_ids(65, 100, []) == [*range(100)]
