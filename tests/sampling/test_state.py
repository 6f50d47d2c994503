"""Options that depend on the text: against restatements from scratch, and put back exactly."""

import math
import random

import pytest
import torch

from outdraft.errors import SamplingError
from outdraft.request import SamplingParams
from outdraft.sampling.grammar import Grammars
from outdraft.sampling.state import SamplerState, ThinkingMarkers
from tests import tiny

V = 32


def restated(
    logits: list[float], params: SamplingParams, prompt: list[int], output: list[int]
) -> list[float]:
    """The documented order, everything counted from the whole text."""
    text = prompt + output
    n_out = len(prompt)
    if params.repeat_last_n >= 0:
        first = max(0, len(text) - params.repeat_last_n)
    else:
        first = 0
    seen = text[first:]
    written = text[max(first, n_out) :]
    row = [float(x) for x in logits]
    for t in set(seen):
        r = params.repetition_penalty
        row[t] = row[t] / r if row[t] > 0 else row[t] * r
    for t in set(written):
        row[t] -= written.count(t) * params.frequency_penalty + params.presence_penalty
    for t, b in params.bias_pairs:
        row[t] += b
    for word in params.bad_words:
        assert not isinstance(word, str)
        if len(word) == 1 or text[1 - len(word) :] == list(word[:-1]):
            row[word[-1]] = -math.inf
    return row


@pytest.mark.parametrize("last_n", [-1, 0, 1, 5, 100])
def test_rows_are_those_of_a_restatement_inside_and_behind_blocks(last_n: int) -> None:
    rng = random.Random(last_n)
    params = SamplingParams(
        presence_penalty=0.7,
        frequency_penalty=-0.3,
        repetition_penalty=1.4,
        repeat_last_n=last_n,
        logit_bias={3: 2.5, 9: -math.inf},
        bad_words=((4,), (5, 6)),
    )
    prompt = [rng.randrange(8) for _ in range(9)]
    words = tuple(w for w in params.bad_words if not isinstance(w, str))
    state = SamplerState(params, tuple(prompt), end_ids=frozenset(), bad_words=words)
    output: list[int] = []
    for _ in range(40):
        logits = torch.randn(V, dtype=torch.float64)
        drafts = [rng.randrange(8) for _ in range(rng.randrange(4))]
        state.mark()
        for i in range(len(drafts) + 1):
            want = restated(logits.tolist(), params, prompt, output + drafts[:i])
            assert torch.allclose(state.process(logits), torch.tensor(want, dtype=torch.float64))
            if i < len(drafts):
                state.push(drafts[i])
        state.rewind()
        assert state.tokens == prompt + output
        output.append(rng.randrange(8))
        state.push(output[-1])


def test_min_tokens_keeps_the_end_away() -> None:
    state = SamplerState(SamplingParams(min_tokens=2), (1,), end_ids=frozenset({0, 7}))
    for n in range(4):
        row = state.process(torch.zeros(V))
        assert bool((row[[0, 7]] == -math.inf).all()) == (n < 2)
        state.push(5)


def test_nothing_left_is_an_error_of_the_request() -> None:
    params = SamplingParams(logit_bias=dict.fromkeys(range(V), -math.inf))
    state = SamplerState(params, (1,), end_ids=frozenset())
    with pytest.raises(SamplingError, match="no token is left"):
        state.process(torch.zeros(V))


@pytest.mark.parametrize("budget", [0, 1, 3])
@pytest.mark.parametrize("opened", [True, False])
def test_the_thinking_budget_closes_the_block_and_keeps_it_closed(
    budget: int, opened: bool
) -> None:
    markers = ThinkingMarkers(20, 21)
    prompt = (1, 20) if opened else (1, 20, 5, 21)
    params = SamplingParams(max_thinking_tokens=budget)
    state = SamplerState(params, prompt, end_ids=frozenset(), markers=markers)
    if not opened:
        assert state.forced() is None
        if budget == 0:
            assert state.process(torch.zeros(V))[20] == -math.inf
            return
        state.push(20)
    for _ in range(budget):
        assert state.forced() is None
        state.push(6)
    state.mark()
    assert state.forced() == 21
    state.push(21)
    assert state.forced() is None and state.process(torch.zeros(V))[20] == -math.inf
    state.rewind()
    assert state.forced() == 21


@pytest.fixture(scope="module")
def grammars(tmp_path_factory: pytest.TempPathFactory) -> Grammars:
    path = tmp_path_factory.mktemp("grammars")
    tiny.write_tokenizer(path)
    return Grammars((path / "tokenizer.json").read_text(), tiny.VOCAB + 5, [1])


def char(c: str) -> int:
    return 6 + sorted(c_for_byte()).index(c)


def c_for_byte() -> list[str]:
    from tokenizers import pre_tokenizers

    return list(pre_tokenizers.ByteLevel.alphabet())


def test_a_grammar_advances_is_put_back_and_ends(grammars: Grammars) -> None:
    state = SamplerState(
        SamplingParams(regex="ab[cd]"),
        (2,),
        end_ids=frozenset({1}),
        grammar=grammars.start(SamplingParams(regex="ab[cd]")),
    )
    logits = torch.randn(tiny.VOCAB + 5)

    def allowed() -> set[int]:
        return set(torch.nonzero(torch.isfinite(state.process(logits))).flatten().tolist())

    a, b, c, d = (char(x) for x in "abcd")
    assert allowed() == {a} and state.n_allowed([a, b, a]) == 2
    state.mark()
    for token, then in ((a, {b}), (b, {c, d})):
        state.push(token)
        assert allowed() == then
    state.push(d)
    assert state.forced() == 1 and state.n_allowed([a]) == 0
    state.push(1)
    state.rewind()
    assert allowed() == {a} and state.forced() is None


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(regex="("),
        SamplingParams(grammar='start: "a" foo'),
        SamplingParams(json_schema="{"),
        SamplingParams(json_schema={"type": "nonsense"}),
    ],
    ids=str,
)
def test_grammars_that_are_none_are_refused(grammars: Grammars, params: SamplingParams) -> None:
    with pytest.raises(SamplingError, match=r"grammar|schema"):
        grammars.start(params)


def test_security_class_5_an_adversarial_regex_runs_out_of_fuel(grammars: Grammars) -> None:
    params = SamplingParams(regex="((a{1,500}){1,500}){1,500}b")
    with pytest.raises(SamplingError, match="cannot be followed"):
        grammar = grammars.start(params)
        for _ in range(2000):
            grammar.allowed(tiny.VOCAB)
            grammar.push(char("a"))


@pytest.mark.parametrize(
    "name,value",
    [
        ("presence_penalty", 2.1),
        ("frequency_penalty", math.nan),
        ("repetition_penalty", 0.0),
        ("repeat_last_n", -2),
        ("top_n_sigma", -1.0),
        ("typical_p", 0.0),
        ("top_p", 0.0),
        ("min_tokens", -1),
        ("n", 0),
        ("n", 10**6),
        ("logprobs", 101),
        ("top_k", 1.5),
        ("max_thinking_tokens", -1),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {1: 101.0}),
        ("bad_words", ("",)),
        ("regex", "a" * 300_000),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(SamplingError, match="bad word" if name == "bad_words" else name):
        SamplingParams(**{name: value})  # type: ignore[arg-type]


def test_options_that_exclude_each_other() -> None:
    for options in (
        {"regex": "a", "json_object": True},
        {"json_object": True, "ignore_eos": True},
        {"min_tokens": 5, "max_tokens": 4},
    ):
        with pytest.raises(SamplingError):
            SamplingParams(**options)  # type: ignore[arg-type]


def test_completions_have_seeds_of_their_own() -> None:
    parts = SamplingParams(temperature=1, n=5).split(7)
    assert parts[0].seed == 7 and len({p.seed for p in parts}) == 5
    assert parts == SamplingParams(temperature=1, n=5).split(7) and all(p.n == 1 for p in parts)
