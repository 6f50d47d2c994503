"""`outdraft serve --learn` from outside: what is said of it, who may opt out, and its process."""

import time
from contextlib import suppress

import psutil
import pytest

from tests.server.live import Live, live_server

BODY = {"prompt": "def add(a, b):", "max_tokens": 24, "temperature": 0, "ignore_eos": True}


def learner(live: Live) -> psutil.Process | None:
    for child in psutil.Process(live.process.pid).children(recursive=True):
        with suppress(psutil.Error):
            if "outdraft.train.learner" in child.cmdline():
                return child
    return None


def wait_for_learner(live: Live) -> psutil.Process:
    deadline = time.monotonic() + 20
    while (found := learner(live)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return found


def wait_metric(live: Live, name: str, value: float) -> None:
    deadline = time.monotonic() + 20
    while live.metric(name) != value:
        assert time.monotonic() < deadline, (name, live.metric(name))
        time.sleep(0.05)


def test_off_nothing_is_said_and_nothing_runs(live: Live) -> None:
    live.post("/v1/completions", BODY)
    assert "outdraft_learn" not in live.get("/metrics").text
    assert live.get("/props").json()["learning"] is False
    assert live.stats()["learn"] is None and learner(live) is None


def test_on_it_is_visible_and_requests_may_opt_out() -> None:
    with live_server("--learn", "--learn-idle-seconds", "0.05") as live:
        assert live.get("/props").json()["learning"] is True
        assert learner(live) is None  # there is nothing to learn from
        text = live.post("/v1/completions", BODY).json()["choices"][0]["text"]
        wait_metric(live, "outdraft_learn_buffer_texts", 1)
        message = [{"role": "user", "content": "hi"}]
        for path, body in (
            ("/v1/completions", BODY),
            ("/v1/chat/completions", {"messages": message, "max_tokens": 24}),
            ("/v1/responses", {"input": "hi", "max_output_tokens": 24}),
            ("/v1/messages", {"messages": message, "max_tokens": 24, "model": "demo"}),
        ):
            answer = live.post(path, {**body, "store": False})
            assert answer.status_code == 200
            assert "store" not in answer.headers.get("X-Outdraft-Ignored", "")
        live.wait_idle()
        assert live.metric("outdraft_learn_buffer_texts") == 1
        wait_metric(live, 'outdraft_learn_state{state="waiting"}', 1)
        first = wait_for_learner(live)
        wait_busy(live)
        first.kill()
        wait_metric(live, "outdraft_learn_restarts_total", 1)
        assert live.post("/v1/completions", BODY).json()["choices"][0]["text"] == text
        wait_metric(live, "outdraft_learn_buffer_texts", 2)
        second = wait_for_learner(live)
        live.worker().kill()
        psutil.wait_procs([second], timeout=10)
        assert not second.is_running()
        assert "Traceback" not in live.output()


def wait_busy(live: Live) -> None:
    """Until the learner has loaded the model and looked at what there is."""
    deadline = time.monotonic() + 30
    while live.metric("outdraft_learn_cpu_seconds_total") == 0:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("options", [("--learn", "--spec-type", "off"), ("--learn-dir", "x")])
def test_what_cannot_be_is_said_at_once(options: tuple[str, ...]) -> None:
    with live_server(*options, wait=False) as live:
        assert live.process.wait(30) != 0
        output = live.output()
        assert "learn" in output and "Traceback" not in output
