"""`/v1/completions` and the routes about tokens, live; and tokens against the Python API's."""

import base64
import json
import struct
from collections.abc import Iterator

import pytest

from outdraft.config import EngineConfig
from outdraft.engine.engine import LLM
from outdraft.request import SamplingParams
from tests.server.live import Live

SAMPLED = {"temperature": 0.9, "seed": 1234, "top_p": 0.95, "top_k": 0}
PROMPTS = ["def mean(values):\n", "class Stack:\n    def push(self, x):\n"]


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", EngineConfig(threads=1)) as made:
        yield made


def test_tokens_are_those_of_the_python_api(live: Live, llm: LLM) -> None:
    """Greedy, and sampled with a seed: the server adds nothing and takes nothing away."""
    for values in ({"temperature": 0.0}, SAMPLED):
        for prompt in PROMPTS:
            own = llm.generate(prompt, SamplingParams(max_tokens=40, **values))  # type: ignore[arg-type]
            asked = {"prompt": prompt, "max_tokens": 40, "outdraft": {"tokens": True}, **values}
            choice = live.post("/v1/completions", asked).json()["choices"][0]
            assert [t["id"] for t in choice["outdraft"]["tokens"]] == own.tokens
            assert choice["text"] == own.text


def test_many_prompts_and_token_ids(live: Live) -> None:
    ids = [
        live.post("/tokenize", {"content": p, "add_special": True}).json()["tokens"]
        for p in PROMPTS
    ]
    asked = {"max_tokens": 10, "temperature": 0, "n": 2}
    by_text = live.post("/v1/completions", {**asked, "prompt": PROMPTS}).json()
    by_ids = live.post("/v1/completions", {**asked, "prompt": ids}).json()
    one = live.post("/v1/completions", {**asked, "prompt": ids[1]}).json()
    texts = [c["text"] for c in by_text["choices"]]
    assert [c["index"] for c in by_text["choices"]] == [0, 1, 2, 3]
    assert texts == [c["text"] for c in by_ids["choices"]]
    assert texts[2] == texts[3] == one["choices"][0]["text"]
    assert by_text["usage"]["completion_tokens"] == 40


def test_echo_with_logprobs_tells_those_of_the_prompt(live: Live) -> None:
    asked = {"prompt": PROMPTS[0], "max_tokens": 2, "temperature": 0, "echo": True, "logprobs": 1}
    choice = live.post("/v1/completions", asked).json()["choices"][0]
    assert choice["text"].startswith(PROMPTS[0])
    told = choice["logprobs"]
    assert told["token_logprobs"][0] is None
    assert all(value <= 0 for value in told["token_logprobs"][1:])
    assert len(told["tokens"]) == len(told["top_logprobs"]) == len(told["text_offset"])
    ends = [*told["text_offset"][1:], len(choice["text"])]
    at = zip(told["tokens"], told["text_offset"], ends, strict=True)
    assert [choice["text"][a:b] for _, a, b in at] == ["", *told["tokens"][1:]]  # <bos> has no text


def test_streamed_echo_tells_what_the_whole_answer_does(live: Live) -> None:
    asked = {"prompt": PROMPTS[:2], "max_tokens": 6, "seed": 7, "echo": True, "logprobs": 2, "n": 2}
    whole = live.post("/v1/completions", asked).json()
    streamed = live.post("/v1/completions", {**asked, "stream": True}).text
    lines = [line[6:] for line in streamed.split("\n\n") if line.startswith("data: {")]
    chunks = [c for line in lines for c in json.loads(line)["choices"]]
    assert len(whole["choices"]) == 4
    for choice in whole["choices"]:
        own = [c for c in chunks if c["index"] == choice["index"]]
        assert own[0]["text"] == PROMPTS[choice["index"] // 2]  # the prompt comes first, by itself
        assert own[0]["logprobs"]["token_logprobs"][0] is None
        assert "".join(c["text"] for c in own) == choice["text"]
        for name, told in choice["logprobs"].items():
            assert [x for c in own for x in c["logprobs"][name]] == told


def test_streamed_text_is_the_whole_text(live: Live) -> None:
    asked = {"prompt": PROMPTS, "max_tokens": 30, "temperature": 0}
    whole = live.post("/v1/completions", asked).json()
    streamed = live.post("/v1/completions", {**asked, "stream": True}).text
    lines = [line[6:] for line in streamed.split("\n\n") if line.startswith("data: {")]
    for choice in whole["choices"]:
        own = [
            c
            for line in lines
            for c in json.loads(line)["choices"]
            if c["index"] == choice["index"]
        ]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert own[-1]["finish_reason"] == "length"


def test_tokenize_and_back(live: Live) -> None:
    text = "def f(x): return 'é' * 2  # 猫"
    told = live.post("/tokenize", {"content": text, "with_pieces": True}).json()
    ids = [t["id"] for t in told["tokens"]]
    assert told["count"] == len(ids)
    assert live.post("/detokenize", {"tokens": ids}).json()["content"] == text
    refused = live.post("/detokenize", {"tokens": [*ids, 10**6]})
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "tokens"


def test_embeddings_have_length_one_and_know_what_is_alike(live: Live, llm: LLM) -> None:
    texts = [
        "def add(a, b):\n    return a + b\n",
        "def add(x, y):\n    return x + y\n",
        "import os, sys",
    ]
    told = live.post("/v1/embeddings", {"input": texts, "model": "demo"}).json()
    vectors = [d["embedding"] for d in told["data"]]
    assert [sum(v * v for v in vector) for vector in vectors] == pytest.approx([1, 1, 1], abs=1e-4)
    alike = sum(a * b for a, b in zip(vectors[0], vectors[1], strict=True))
    apart = sum(a * b for a, b in zip(vectors[0], vectors[2], strict=True))
    assert alike > apart
    asked = {"input": texts[0], "encoding_format": "base64"}
    packed = live.post("/v1/embeddings", asked).json()["data"][0]["embedding"]
    raw = base64.b64decode(packed)
    assert list(struct.unpack(f"<{len(raw) // 4}f", raw)) == pytest.approx(vectors[0], abs=1e-6)
    last = live.post("/v1/embeddings", {"input": texts[0], "pooling": "last"}).json()
    assert last["data"][0]["embedding"] != vectors[0]
    live.wait_idle()


@pytest.mark.parametrize(
    "body,words",
    [
        ({}, "prompt"),
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [[]]}, "empty"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [2, 99_999_999]}, "vocabulary"),
        ({"prompt": "x", "best_of": 3}, "use n"),
        ({"prompt": "x", "suffix": "y"}, "suffix"),
        ({"prompt": [2] * 5000}, "context"),
    ],
)
def test_bad_prompts_are_refused(live: Live, body: dict[str, object], words: str) -> None:
    response = live.post("/v1/completions", body)
    assert response.status_code == 400
    assert words in response.json()["error"]["message"]


def test_looks(live: Live) -> None:
    assert live.get("/health").json()["status"] == "ok"
    assert live.get("/ready").json() == {"ready": True, "reason": None}
    listed = live.get("/v1/models").json()["data"]
    assert [m["id"] for m in listed] == ["demo"]
    assert live.get("/v1/models/demo").json() == listed[0]
    assert live.get("/v1/models/nope").status_code == 404
    assert live.get("/props").json()["default_generation_settings"]["n_ctx"] == 4096
    metrics = live.get("/metrics").text
    for name in ("num_drafts", "num_draft_tokens", "num_accepted_tokens"):
        assert f"outdraft_spec_decode_{name}_total" in metrics
    assert 'outdraft_spec_decode_num_accepted_tokens_per_pos_total{position="0"}' in metrics
    stats = live.stats()
    for name in ("tok_s", "tokens_per_pass", "acceptance_by_position", "draft_n_now", "pages"):
        assert name in stats
