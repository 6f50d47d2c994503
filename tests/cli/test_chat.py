"""`outdraft chat`: history, commands, Ctrl-C, and a conversation that grows too long."""

import signal
from pathlib import Path
from typing import Any

import pytest

from outdraft.engine.engine import LLM
from outdraft.request import TokenEvent
from tests.cli.conftest import Invoke


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[list[dict[str, str]]]:
    """The conversations that were rendered."""
    conversations: list[list[dict[str, str]]] = []
    render = LLM.render_chat

    def recorded(self: LLM, messages: list[dict[str, Any]], **options: Any) -> tuple[int, ...]:
        conversations.append(list(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(LLM, "render_chat", recorded)
    return conversations


def roles(conversation: list[dict[str, str]]) -> str:
    return "".join(message["role"][0] for message in conversation)


def test_history_grows_and_is_forgotten(
    outdraft: Invoke, pair: Path, seen: list[list[dict[str, str]]]
) -> None:
    lines = "one\n\n  two  \n/help\n/reset\nthree\n/exit\nnever\n"
    result = outdraft("chat", pair, "--max-tokens", 6, "--system", "be brief", input=lines)
    assert result.exit_code == 0
    assert [roles(conversation) for conversation in seen] == ["su", "suau", "su"]
    assert [conversation[-1]["content"] for conversation in seen] == ["one", "two", "three"]
    answer = seen[1][2]["content"]
    assert answer and result.stdout.startswith(answer + "\n")
    assert result.stderr.count("/reset forgets") == 2  # at the start and for /help
    assert "the conversation is forgotten" in result.stderr


def test_ctrl_c_stops_the_answer_and_keeps_it(
    outdraft: Invoke,
    pair: Path,
    seen: list[list[dict[str, str]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    step, n_steps = LLM.step, 0

    def interrupted(self: LLM) -> list[TokenEvent]:
        nonlocal n_steps
        n_steps += 1
        if n_steps == 4:
            signal.raise_signal(signal.SIGINT)
        return step(self)

    monkeypatch.setattr(LLM, "step", interrupted)
    command = ("chat", pair, "--spec-type", "off", "--max-tokens", 30)
    result = outdraft(*command, input="one\ntwo\n")
    assert result.exit_code == 0
    assert roles(seen[1]) == "uau"
    kept = seen[1][1]["content"]
    assert kept and result.stdout.startswith(kept + "\n")
    assert "stopped · 4 tokens" in result.stderr


def test_a_talk_goes_on_after_a_message_that_does_not_fit(
    outdraft: Invoke, pair: Path, seen: list[list[dict[str, str]]]
) -> None:
    lines = "one\n" + "x" * 200 + "\ntwo\n"
    result = outdraft("chat", pair, "--ctx-size", 120, "--max-tokens", 4, input=lines)
    assert result.exit_code == 0
    assert [roles(conversation) for conversation in seen] == ["u", "uau", "uau"]
    assert "error: the prompt has" in result.stderr and "/reset" in result.stderr
