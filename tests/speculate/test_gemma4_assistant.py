"""A round of the assistant equals an fp64 restatement of the protocol, step by step.

The restatement shares nothing with the package but the weights and the target's keys and values.
"""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from outdraft.cache.attend import CausalCall
from outdraft.cache.memory import Memory, Span
from outdraft.errors import PairingError
from outdraft.models.gemma4 import Gemma4, memory_layers
from outdraft.models.gemma4_assistant import Gemma4Assistant, check_pair
from outdraft.models.gemma4_config import AssistantConfig, Gemma4Config
from outdraft.ops.cpu import CpuOps
from outdraft.ops.reference import ReferenceOps
from outdraft.request import SamplingParams
from outdraft.speculate.chain import draft_chain
from outdraft.speculate.drafter import SequenceView, TargetView
from outdraft.speculate.gemma4_assistant import Gemma4AssistantDrafter
from tests import tiny

N_TOKENS = 131
K = 6
TOLERANCE = 1e-4  # of the spread
KINDS = (tiny.S, tiny.F)


def rms(x: Tensor, weight: Tensor | None) -> Tensor:
    y = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()
    return y if weight is None else y * weight.double()


def rope(x_HD: Tensor, position: int, theta: float, part: float) -> Tensor:
    half = x_HD.shape[-1] // 2
    turning = int(part * x_HD.shape[-1] // 2)
    out = x_HD.clone()
    for i in range(turning):
        angle = position * theta ** (-2 * i / x_HD.shape[-1])
        a, b = x_HD[:, i], x_HD[:, half + i]
        out[:, i] = a * math.cos(angle) - b * math.sin(angle)
        out[:, half + i] = b * math.cos(angle) + a * math.sin(angle)
    return out


def restated_step(
    weights: dict[str, Tensor],
    embedded: Tensor,
    hidden: Tensor,
    position: int,
    kv: dict[str, tuple[Tensor, Tensor]],
    layer_types: list[str],
) -> tuple[Tensor, Tensor]:
    """(normed state [h], next hidden [H]) of one draft step; kv by kind is [n, G, D]."""
    w = {name: tensor.double() for name, tensor in weights.items()}
    y = w["pre_projection.weight"] @ torch.cat((embedded, hidden))
    for i, kind in enumerate(layer_types):
        own = {n.removeprefix(f"layers.{i}."): t for n, t in w.items() if f"layers.{i}." in n}
        keys, values = kv[kind]
        dim = keys.shape[-1]
        q = (own["self_attn.q_proj.weight"] @ rms(y, own["input_layernorm.weight"])).view(-1, dim)
        q = rms(q, own["self_attn.q_norm.weight"])
        q = rope(q, position, *((1e4, 1.0) if kind == tiny.S else (1e6, 0.25)))
        group = q.shape[0] // keys.shape[1]
        heads = []
        for h in range(q.shape[0]):
            attention = torch.softmax(keys[:, h // group] @ q[h], dim=0)
            heads.append(attention @ values[:, h // group])
        a = own["self_attn.o_proj.weight"] @ torch.cat(heads)
        y = y + rms(a, own["post_attention_layernorm.weight"])
        x = rms(y, own["pre_feedforward_layernorm.weight"])
        inner = F.gelu(own["mlp.gate_proj.weight"] @ x, approximate="tanh")
        inner = inner * (own["mlp.up_proj.weight"] @ x)
        out = rms(own["mlp.down_proj.weight"] @ inner, own["post_feedforward_layernorm.weight"])
        y = (y + out) * own["layer_scalar"]
    y = rms(y, w["norm.weight"])
    return y, w["post_projection.weight"] @ y


def restated_logits(weights: dict[str, Tensor], y: Tensor, raw: dict[str, Any]) -> Tensor:
    head = weights["embed_tokens.weight"].double()
    if not raw["use_ordered_embeddings"]:
        return head @ y
    scores = weights["masked_embedding.centroids.weight"].double() @ y
    best = scores.topk(raw["centroid_intermediate_top_k"]).indices
    ids = weights["masked_embedding.token_ordering"].view(raw["num_centroids"], -1)[best].flatten()
    logits = torch.full((head.shape[0],), float("-inf"), dtype=torch.float64)
    logits[ids] = head[ids] @ y
    return logits


@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "ordered"])
@pytest.mark.parametrize("shape", ["plain", "dense", "e2b", "window"])
@torch.inference_mode()
def test_a_round_equals_the_protocol_in_fp64(shape: str, ordered: bool) -> None:
    raw = tiny.target_config(shape)
    target_weights = tiny.target_weights(raw, seed=5)
    config = Gemma4Config.from_hf(raw)
    ops = ReferenceOps()
    target = Gemma4(config, target_weights, ops)
    memory = Memory(
        memory_layers(config), max_sequences=1, max_tokens=256, max_rows=160, dtype=torch.float32
    )
    memory.open("s")
    generator = torch.Generator().manual_seed(7)
    tokens = torch.randint(6, tiny.VOCAB, (N_TOKENS + 1,), generator=generator).tolist()
    memory.reserve("s", N_TOKENS)
    call = CausalCall.prepare(memory, ops, [Span("s", 0, N_TOKENS)], tokens[:-1])
    hidden = target.forward(call.token_T, call.position_T, call.attend)
    memory.advance("s", N_TOKENS)

    raw_assistant = tiny.assistant_config(raw, ordered=ordered)
    weights = tiny.assistant_weights(raw_assistant, seed=6)
    assistant = AssistantConfig.from_hf(raw_assistant)
    check_pair(config, assistant)
    model = Gemma4Assistant(assistant, weights, ops)
    kv_layers = {kind: config.last_owner(kind) for kind in KINDS}
    drafter = Gemma4AssistantDrafter(model, kv_layers)
    view = SequenceView("s", tokens, SamplingParams(), 0, hidden[-1])
    keys = drafter._call(memory, drafter._numbers(memory, [view])).attend
    steps = []

    normed = None

    def step(newest: Tensor) -> Tensor:
        nonlocal normed
        carried = hidden[-1:] if normed is None else model.carry(normed)
        at = torch.tensor([N_TOKENS], dtype=torch.int32)
        normed = model.step(target.embed(newest.int()), carried, at, keys)
        logits = model.logits(normed)
        steps.append((int(newest), carried[0].double(), logits[0]))
        return logits, *ops.best(logits)

    draft = draft_chain([view], K, step)

    kv = {}
    for kind in KINDS:
        store, window = memory.groups[kind].layers[kv_layers[kind]], memory.groups[kind].window
        table = memory.groups[kind].tables["s"]
        rows = slice(0 if window is None else max(0, N_TOKENS - window), N_TOKENS)
        kv[kind] = tuple(
            pool[table.pages].permute(0, 2, 1, 3).flatten(0, 1)[rows].double()
            for pool in (store.k_PGSD, store.v_PGSD)
        )
    scale = raw["hidden_size"] ** 0.5
    assert torch.equal(steps[0][1], hidden[-1].double())
    previous = None
    for newest, carried, logits in steps:
        if previous is not None:
            assert (carried - previous).abs().max() <= TOLERANCE * previous.abs().max()
        # Each step from the state that was really carried: a random recurrence amplifies rounding.
        embedded = target_weights["embed_tokens.weight"][newest].double() * scale
        y, previous = restated_step(
            weights, embedded, carried, N_TOKENS, kv, raw_assistant["text_config"]["layer_types"]
        )
        want = restated_logits(weights, y, raw_assistant)
        assert torch.equal(torch.isinf(want), torch.isinf(logits))
        seen = ~torch.isinf(want)
        spread = want[seen].max() - want[seen].min()
        assert (want[seen] - logits[seen].double()).abs().max() <= TOLERANCE * spread
    assert drafter.needs.final_hidden and set(drafter.needs.kv_groups) == set(KINDS)
    want_sure = [torch.softmax(logits.double(), dim=-1).max() for _, _, logits in steps]
    assert draft.confidence_BK is not None
    torch.testing.assert_close(draft.confidence_BK[0].double(), torch.stack(want_sure))
    assert draft.tokens_BK.shape == (1, K) and draft.lengths == [K] and draft.probs == [None]


Scene = tuple[Gemma4AssistantDrafter, TargetView]


def compiled_scene(*, ordered: bool, vocab: int = tiny.VOCAB) -> Scene:
    """A drafter and a target with two sequences, on the compiled kernels."""
    raw = tiny.target_config("plain", vocab_size=vocab)
    config = Gemma4Config.from_hf(raw)
    ops = CpuOps(format="w8")
    target = Gemma4(config, tiny.target_weights(raw, seed=5), ops)
    memory = Memory(
        memory_layers(config), max_sequences=2, max_tokens=512, max_rows=160, dtype=torch.bfloat16
    )
    raw_assistant = tiny.assistant_config(raw, ordered=ordered)
    weights = tiny.assistant_weights(raw_assistant, seed=6)
    model = Gemma4Assistant(AssistantConfig.from_hf(raw_assistant), weights, CpuOps())
    drafter = Gemma4AssistantDrafter(model, {kind: config.last_owner(kind) for kind in KINDS})
    generator = torch.Generator().manual_seed(7)
    views = []
    for name, n in (("a", 131), ("b", 40)):
        tokens = torch.randint(6, tiny.VOCAB, (n + 1,), generator=generator).tolist()
        memory.open(name)
        memory.reserve(name, n)
        call = CausalCall.prepare(memory, ops, [Span(name, 0, n)], tokens[:-1])
        hidden = target.forward(call.token_T, call.position_T, call.attend)
        memory.advance(name, n)
        views.append(SequenceView(name, tokens, SamplingParams(), 0, hidden[-1].clone()))
    return drafter, TargetView(views, memory, target.embed, ops)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "ordered"])
@torch.inference_mode()
def test_a_recorded_round_equals_the_calls_one_by_one(ordered: bool, temperature: float) -> None:
    recorded, view = compiled_scene(ordered=ordered)
    plain = Gemma4AssistantDrafter(recorded.model, recorded.kv_layers)
    plain.recorder = None
    params = SamplingParams(temperature=temperature)
    views = [replace(view.sequences[0], params=params), view.sequences[1]]
    for chosen in (views, views[:1], views[1:], views[::-1]):
        for k in (1, 2, K, 2):
            part = replace(view, sequences=chosen)
            want, got = plain.propose(part, k), recorded.propose(part, k)
            assert torch.equal(want.tokens_BK, got.tokens_BK)
            assert want.confidence_BK is not None and got.confidence_BK is not None
            torch.testing.assert_close(want.confidence_BK, got.confidence_BK, rtol=1e-5, atol=0)
            assert want.lengths == got.lengths
            for one, two in zip(want.probs, got.probs, strict=True):
                assert (one is None) == (two is None)
                assert one is None or two is None or torch.equal(one, two)
    assert recorded.recordings and not plain.recordings


@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "ordered"])
@torch.inference_mode()
def test_confidence_is_the_softmax_of_the_drafters_own_scores(ordered: bool) -> None:
    drafter, view = compiled_scene(ordered=ordered)
    drafter.recorder = None
    rows: list[Tensor] = []
    logits = drafter.model.logits
    drafter.model.logits = lambda normed: rows.append(logits(normed).double()) or rows[-1].float()  # type: ignore[method-assign,func-returns-value]
    # Drawn tokens are not the likeliest ones: their own probability counts, at temperature 1.
    params = SamplingParams(temperature=3.0)
    views = [replace(s, params=params) for s in view.sequences]
    draft = drafter.propose(replace(view, sequences=views), K)
    assert draft.confidence_BK is not None and len(rows) == K
    unlikely = 0
    for i, logits_BV in enumerate(rows):
        for b in range(2):
            token = draft.tokens_BK[b, i]
            want = torch.softmax(logits_BV[b], dim=0)[token]
            torch.testing.assert_close(draft.confidence_BK[b, i].double(), want, rtol=1e-5, atol=0)
            unlikely += int(token != logits_BV[b].argmax())
    assert unlikely > 0


@pytest.mark.parametrize("ordered", [False, True], ids=["dense", "ordered"])
@torch.inference_mode()
def test_recordings_do_not_keep_the_scores_of_their_steps(ordered: bool) -> None:
    vocab = 1 << 16
    drafter, view = compiled_scene(ordered=ordered, vocab=vocab)
    params = SamplingParams(temperature=1.0)
    drawn = [replace(s, params=params) for s in view.sequences]
    for chosen in (view.sequences, view.sequences[:1], drawn):
        for k in (1, 4, 7):
            drafter.propose(replace(view, sequences=chosen), k)
    one_step = 2 * vocab * 4
    assert len(drafter.recordings) == 7
    assert drafter.model.ops.arena.n_bytes < 6 * one_step  # type: ignore[attr-defined]
    for recording in drafter.recordings.values():
        kept = [x for used in recording.program.kept for x in used if isinstance(x, Tensor)]  # type: ignore[attr-defined]
        assert not any(x.dtype == torch.float32 and x.numel() >= vocab for x in kept)


@pytest.mark.parametrize(
    "change,named",
    [
        ({"vocab_size": 256}, "vocab_size"),
        ({"head_dim": 64}, "head_dim of sliding_attention"),
        ({"global_head_dim": 32}, "head_dim of full_attention"),
        ({"sliding_window": 32}, "sliding_window"),
        ({"hidden_size": 32}, "backbone hidden size"),
    ],
)
def test_an_assistant_of_another_target_is_refused_by_name(
    change: dict[str, int], named: str
) -> None:
    other = tiny.target_config(**change)
    assistant = AssistantConfig.from_hf(tiny.assistant_config(other))
    with pytest.raises(PairingError, match=named):
        check_pair(Gemma4Config.from_hf(tiny.target_config()), assistant)
