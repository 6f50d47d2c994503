"""Which tokens of an answer count as reasoning, and what the usage of each API says of them."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest

from outdraft.request import FinishReason
from outdraft.server.answer import AnswerReader
from outdraft.server.jobs import Delta, End, Token, Usage
from outdraft.server.tools.answer import AnswerSplit
from outdraft.server.tools.reasoning import GEMMA4, THINK, ReasoningFormat
from outdraft.weights.find import DEMO_DIRECTORY
from tests.server.live import live_server
from tests.server.test_chat import chunks

END = End(FinishReason.STOP, Usage(1, 0, 1, 0, 0, {}))


def reader_of(form: ReasoningFormat | None, *, is_open: bool = False) -> AnswerReader:
    return AnswerReader(AnswerSplit(form, None, lambda: "id", reasoning_open=is_open))


def count(reader: AnswerReader, tokens: Iterable[str], at_once: int = 1) -> int:
    """Reads tokens of these texts, several a delta."""
    made = [Token(i, text, drafted=False) for i, text in enumerate(tokens)]
    for begin in range(0, len(made), at_once):
        some = made[begin : begin + at_once]
        end = END if begin + at_once >= len(made) else None
        reader.read(Delta(0, "".join(t.text for t in some), some, end=end))
    return reader.n_reasoning


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_tokens_between_the_markers_count(at_once: int) -> None:
    think = ["<think>", "\n", "a", " bc", "\n", "</think>", "\n\n", "d", "e"]
    assert count(reader_of(THINK), think, at_once) == 4
    assert count(reader_of(THINK, is_open=True), think[1:], at_once) == 4
    channel = [
        "x",
        "<|channel>",
        "thought\n",
        "a",
        "<channel|>",
        "b",
        "<|channel>",
        "c",
        "<channel|>",
    ]
    assert count(reader_of(GEMMA4), channel, at_once) == 3


@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_markers_in_several_tokens_do_not_count(at_once: int) -> None:
    tokens = ["<th", "ink", ">", "a", "b", "</", "think", ">", "c"]
    assert count(reader_of(THINK), tokens, at_once) == 2
    assert count(reader_of(THINK), ["<think>a", "b</think>", "c"], at_once) == 2  # text of both


def test_tokens_without_text_count_where_the_next_text_is() -> None:
    assert count(reader_of(THINK), ["<think>", "", "", "é", "</think>", "", "ü", ""]) == 3


def test_a_block_that_is_not_closed_lasts_to_the_end() -> None:
    assert count(reader_of(THINK), ["<think>", "a", "b", ""]) == 2  # the last one ends the answer
    assert (
        count(reader_of(THINK, is_open=True), ["a", "b", "</", "thin"]) == 4
    )  # no marker after all


def test_nothing_counts_without_a_block() -> None:
    assert count(reader_of(None), ["<think>", "a", "</think>"]) == 0
    assert count(reader_of(THINK), ["a", "<think>", "b", "</think>"]) == 0  # must come first
    assert count(reader_of(THINK), ["<think>", "</think>", "a"]) == 0


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with a template that opens a reasoning block, which it never closes."""
    target = tmp_path_factory.mktemp("thinker") / "target"
    shutil.copytree(DEMO_DIRECTORY / "target", target)
    template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if true %}<think>\n{% endif %}"
    )
    (target / "chat_template.jinja").write_text(template)
    return target


def test_usage_of_every_api_says_it(thinker: Path) -> None:
    asked = {"messages": [{"role": "user", "content": "def add(a, b):"}], "max_tokens": 12}
    with live_server(model=str(thinker)) as server:
        whole = server.post("/v1/chat/completions", {**asked, "n": 2}).json()
        assert "reasoning_content" in whole["choices"][0]["message"]
        details = whole["usage"]["completion_tokens_details"]
        assert details["reasoning_tokens"] == whole["usage"]["completion_tokens"] == 24
        stream = {**asked, "stream": True, "stream_options": {"include_usage": True}}
        usage = chunks(server.post("/v1/chat/completions", stream))[-1]["usage"]
        assert usage["completion_tokens_details"]["reasoning_tokens"] == 12
        response = {"input": "def add(a, b):", "max_output_tokens": 12}
        usage = server.post("/v1/responses", response).json()["usage"]
        assert usage["output_tokens_details"]["reasoning_tokens"] == 12
        plain = server.post("/v1/completions", {"prompt": "def add", "max_tokens": 4}).json()
        assert plain["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
