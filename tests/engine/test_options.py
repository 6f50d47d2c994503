"""Every option crossed with drafting: greedy and seeded output is that of plain decoding.

The drafter is one that knows the answer and errs at random, so that whole blocks stay and every
place in a block is where one ends.
"""

import json
import math
import random

import pytest
import torch

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM, Completion
from outdraft.errors import SamplingError
from outdraft.request import FinishReason, SamplingParams
from outdraft.speculate.drafter import Draft, Taps, TargetView
from tests import tiny

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "maxItems": 2},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
OPTIONS: dict[str, dict[str, object]] = {
    "nothing": {},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "repetition": {"repetition_penalty": 1.6},
    "window": {"repetition_penalty": 1.6, "presence_penalty": 1.0, "repeat_last_n": 4},
    "bias": {"logit_bias": {65: 9.0, 80: -math.inf}},
    "bad words": {"bad_words": ("a", (70, 71), (90,))},
    "min tokens": {"min_tokens": 30, "stop_token_ids": tuple(range(100, 150))},
    "top-k": {"top_k": 7},
    "top-p": {"top_p": 0.7},
    "min-p": {"min_p": 0.1},
    "sigma": {"top_n_sigma": 1.5},
    "typical": {"typical_p": 0.7},
    "regex": {"regex": "[a-z]{3,9}(, [a-z]{2,5}){2,4}"},
    "lark": {"grammar": 'start: "<" item{2,6} ">"\nitem: /[a-f]+/ ";"'},
    "schema": {"json_schema": SCHEMA},
    "thinking": {"max_thinking_tokens": 5},
    "stop": {"stop": ("e", "q")},
    "all": {
        "presence_penalty": 0.5,
        "frequency_penalty": 0.4,
        "repetition_penalty": 1.2,
        "repeat_last_n": 16,
        "logit_bias": {65: 2.0},
        "bad_words": ((72,),),
        "json_schema": SCHEMA,
        "top_k": 50,
        "min_p": 0.01,
    },
}
PROMPT = [5, 9, 80, 33]


class Oracle:
    """Drafts the known answer, wrong now and then."""

    name = "oracle"
    needs = Taps()

    def __init__(self, answer: list[int], wrong: float) -> None:
        self.answer, self.wrong = answer, wrong
        self.generator = torch.Generator().manual_seed(3)

    def open(self, sequence: str) -> None: ...

    def close(self, sequence: str) -> None: ...

    def commit(self, view: TargetView, n_accepted: list[int]) -> None: ...

    def propose(self, view: TargetView, k: int) -> Draft:
        rest = [(self.answer + [7] * 300)[s.n - len(PROMPT) :][:k] for s in view.sequences]
        tokens_BK = torch.tensor(rest)
        flip = torch.rand(tokens_BK.shape, generator=self.generator) < self.wrong
        tokens_BK = torch.where(flip, (tokens_BK + 1) % tiny.VOCAB, tokens_BK)
        return Draft(tokens_BK, [None] * len(rest), [k] * len(rest))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    root = tmp_path_factory.mktemp("options")
    target = tiny.tiny_target(root / "target", "plain", seed=21)
    tiny.tiny_assistant(root / "assistant", target)
    config = EngineConfig(draft_n_max=5, ctx_size=448, max_sequences=3)
    return with_markers(LLM(str(target), config))


def with_markers(llm: LLM) -> LLM:
    """The tiny tokenizer has no reasoning markers: two of its unused tokens serve."""
    from outdraft.sampling.state import ThinkingMarkers

    llm.samplers.markers = ThinkingMarkers(80, 33 + 1)
    return llm


def params_of(name: str, temperature: float) -> SamplingParams:
    return SamplingParams(
        temperature=temperature,
        seed=11,
        max_tokens=70,
        logprobs=2,
        **OPTIONS[name],  # type: ignore[arg-type]
    )


def plain(llm: LLM, params: SamplingParams) -> Completion:
    llm.set_draft_n_max(0)
    return llm.generate(PROMPT, params)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
@pytest.mark.parametrize("name", OPTIONS)
def test_drafting_changes_nothing(
    llm: LLM, name: str, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = params_of(name, temperature)
    want = plain(llm, params)
    assert want.error is None and want.tokens
    for k, wrong in ((1, 0.0), (5, 0.0), (5, 0.3)):
        monkeypatch.setattr(llm.runner, "drafter", Oracle(want.tokens, wrong))
        llm.set_draft_n_max(k)
        got = llm.generate(PROMPT, params)
        assert (got.tokens, got.text, got.finish_reason) == (
            want.tokens,
            want.text,
            want.finish_reason,
        )
        assert got.logprobs == want.logprobs and len(got.logprobs) == len(got.tokens)
        if wrong == 0 and len(want.tokens) > 10:
            kept = got.stats.n_accepted + got.stats.n_forced_accepted
            assert kept > 0.4 * len(want.tokens)


@pytest.mark.parametrize("temperature", [0.0, 2.0])
def test_neighbours_with_other_options_change_nothing(llm: LLM, temperature: float) -> None:
    llm.set_draft_n_max(4)
    params = [params_of(name, temperature) for name in OPTIONS]
    together = llm.generate_all([PROMPT] * len(params), params)
    for one, got in zip(params, together, strict=True):
        assert got.tokens == plain(llm, one).tokens


def test_a_schema_gives_valid_json_with_drafting(llm: LLM) -> None:
    llm.set_draft_n_max(4)
    check_json(llm, 25)


@pytest.mark.prove
def test_a_thousand_schema_requests_are_all_valid(llm: LLM) -> None:
    llm.set_draft_n_max(4)
    check_json(llm, 1000)


class Silent(Oracle):
    """Drafts nothing that stays, and remembers what it was asked behind."""

    def __init__(self) -> None:
        super().__init__([], 0.0)
        self.asked: list[list[int]] = []

    def propose(self, view: TargetView, k: int) -> Draft:
        self.asked += [list(s.tokens) for s in view.sequences]
        return Draft(torch.full((len(view.sequences), k), 6), [None] * len(view.sequences), [k])


def test_forced_tokens_are_drafted_without_the_drafter(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=1.0, seed=4, regex="[ab]{3}xyzxyzxyz[ab]{3}uvw")
    want = plain(llm, params)
    drafter = Silent()
    monkeypatch.setattr(llm.runner, "drafter", drafter)
    llm.set_draft_n_max(4)
    got = llm.generate(PROMPT, params)
    assert got.text == want.text and got.text[3:12] == "xyzxyzxyz"
    stats = got.stats
    assert stats.n_accepted == 0 and stats.n_forced == stats.n_forced_accepted > 8
    assert stats.n_emitted == len(got.tokens) > stats.n_passes
    after = ["".join(want.text[: len(t) - len(PROMPT)]) for t in drafter.asked]
    assert after and not any(text.endswith(("xyz", "u", "v")) for text in after)
    llm.set_draft_n_max(0)
    assert llm.generate(PROMPT, params).stats.n_forced == 0, "plain decoding stays plain"


def check_json(llm: LLM, n: int) -> None:
    params = [
        SamplingParams(temperature=1.0, seed=s, json_schema=SCHEMA, max_tokens=420)
        for s in range(n)
    ]
    texts = set()
    for got in llm.generate_all([PROMPT] * n, params):
        assert got.finish_reason is FinishReason.STOP
        value = json.loads(got.text)
        assert set(value) == {"name", "age", "tags"} and len(value["name"]) <= 4
        assert type(value["age"]) is int and 0 <= value["age"] <= 120
        assert len(value["tags"]) <= 2 and set(value["tags"]) <= {"red", "green"}
        texts.add(got.text)
    assert len(texts) > n / 2


def test_logprobs_are_the_targets_raw_ones(llm: LLM) -> None:
    params = SamplingParams(
        temperature=0.7, seed=1, max_tokens=12, logprobs=3, repetition_penalty=1.5, top_k=4
    )
    llm.runner.logits_log = {}
    llm.set_draft_n_max(4)
    got = llm.generate(PROMPT, params)
    (rows,) = llm.runner.logits_log.values()
    llm.runner.logits_log = None
    for token, row_V, own in zip(got.tokens, rows, got.logprobs, strict=True):
        log_V = row_V.double().log_softmax(0)
        assert own.token == pytest.approx(float(log_V[token]), abs=1e-5)
        values, ids = log_V.topk(3)
        assert [i for i, _ in own.top] == ids.tolist()
        assert [x for _, x in own.top] == pytest.approx(values.tolist(), abs=1e-5)
        assert own.rank == 1 + int((log_V > log_V[token]).sum())


def test_prompt_logprobs_are_those_of_generating_it(llm: LLM) -> None:
    free = plain(llm, SamplingParams(max_tokens=60, logprobs=2, ignore_eos=True))
    whole = [*PROMPT, *free.tokens]
    got = llm.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=2))
    assert got.prompt_logprobs[0] is None and len(got.prompt_logprobs) == len(whole)
    assert got.prompt_logprobs[len(PROMPT) :] == free.logprobs


def test_n_completions_are_those_of_their_seeds(llm: LLM) -> None:
    llm.set_draft_n_max(4)
    params = SamplingParams(temperature=2.0, seed=5, n=3, max_tokens=20)
    got = llm.generate_all([PROMPT], params)
    assert [c.tokens for c in got] == [llm.generate(PROMPT, p).tokens for p in params.split(5)]
    assert len({tuple(c.tokens) for c in got}) == 3
    with pytest.raises(SamplingError, match="generate_all"):
        llm.generate(PROMPT, params)


def test_options_that_this_model_cannot_meet(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SamplingError, match="vocabulary"):
        llm.generate(PROMPT, SamplingParams(logit_bias={tiny.VOCAB: 1.0}))
    monkeypatch.setattr(llm.samplers, "markers", None)
    with pytest.raises(SamplingError, match="reasoning markers"):
        llm.generate(PROMPT, SamplingParams(max_thinking_tokens=4))
    assert not llm.scheduler.busy


def test_security_class_5_an_adversarial_regex_fails_alone(llm: LLM) -> None:
    """It runs out of fuel; who runs beside it says what it says alone."""
    llm.set_draft_n_max(4)
    bad = SamplingParams(regex="((y{1,500}){1,500}){1,500}b", max_tokens=400)
    good = params_of("schema", 2.0)
    together = llm.generate_all([PROMPT] * 3, [good, bad, params_of("nothing", 0.0)])
    assert together[1].finish_reason is FinishReason.ERROR
    assert "grammar cannot be followed" in (together[1].error or "")
    assert together[0].tokens == plain(llm, good).tokens
    assert together[2].tokens == plain(llm, params_of("nothing", 0.0)).tokens
    assert not llm.scheduler.busy


def test_prompt_logprobs_do_not_come_from_the_prefix_cache(llm: LLM) -> None:
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    whole = [5, 9, 80, 33] * 30
    llm.generate(whole, SamplingParams(max_tokens=1))
    first, again = llm.generate(whole, params), llm.generate(whole, params)
    assert len(first.prompt_logprobs) == len(whole)
    assert first.prompt_logprobs == again.prompt_logprobs


def combination(draw: random.Random) -> dict[str, object]:
    """Some of all options together, of each name one value; at most one grammar."""
    chosen: dict[str, object] = {}
    for name in draw.sample(sorted(OPTIONS), draw.randint(2, 7)):
        grammars = [g for g in ("regex", "grammar", "json_schema") if g in chosen]
        chosen |= {
            key: value
            for key, value in OPTIONS[name].items()
            if not (grammars and key in ("regex", "grammar", "json_schema"))
        }
    return chosen


def check_combinations(llm: LLM, seeds: range) -> None:
    """Options together, drafts half right: alone and beside others what plain decoding gives.

    A combination may leave no token; then it has to end with the same error everywhere.
    """
    params = []
    for seed in seeds:
        draw = random.Random(seed)
        temperature = draw.choice([0.0, 0.8, 2.0])
        chosen = combination(draw)
        params.append(
            SamplingParams(temperature=temperature, seed=seed, max_tokens=50, **chosen)  # type: ignore[arg-type]
        )
    wanted = [plain(llm, one) for one in params]
    n_kept = 0
    for one, want in zip(params, wanted, strict=True):
        llm.runner.drafter = Oracle(want.tokens, 0.2)
        llm.set_draft_n_max(1 + (one.seed or 0) % 5)
        got = llm.generate(PROMPT, one)
        assert outcome(got) == outcome(want), one
        n_kept += got.stats.n_accepted
    assert n_kept > 5 * len(params)
    llm.runner.drafter = Oracle(wanted[0].tokens, 0.0)
    together = llm.generate_all([PROMPT] * len(params), params)
    for one, want, got in zip(params, wanted, together, strict=True):
        assert outcome(got) == outcome(want), one
    llm.check()


def outcome(got: Completion) -> tuple[object, ...]:
    return got.tokens, got.text, got.finish_reason, got.error


def test_options_together(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.runner, "drafter", llm.runner.drafter)  # put back afterwards
    check_combinations(llm, range(12))


def test_a_request_that_fails_keeps_what_came_before(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Options that leave no token in the middle of a block: drafts before that stay."""
    monkeypatch.setattr(llm.runner, "drafter", llm.runner.drafter)
    check_combinations(llm, range(120, 128))


@pytest.mark.prove
@pytest.mark.parametrize("part", range(1, 9))
def test_many_options_together(llm: LLM, part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llm.runner, "drafter", llm.runner.drafter)
    check_combinations(llm, range(100 * part, 100 * part + 60))
