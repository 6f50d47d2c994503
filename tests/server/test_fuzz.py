"""schemathesis on every route of a live server, with valid and invalid data: no 5xx, no leak.

The server's context is short, so that a valid request without limits ends soon.
"""

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable

from outdraft.server.app import FRONTS
from tests.server.live import Live, live_server
from tests.server.test_security import LEAK

EXAMPLES = 150
pytestmark = pytest.mark.prove


@pytest.fixture(scope="module")
def short() -> Iterator[Live]:
    with live_server("--ctx-size", "96") as server:
        yield server


@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode), ids=lambda m: m.value)
def test_no_5xx_no_leak(short: Live, mode: schemathesis.GenerationMode) -> None:
    described = schemathesis.openapi.from_url(f"{short.url}/openapi.json")
    seen: Counter[str] = Counter()
    for found in described.get_all_operations():
        operation = found.ok()
        seen[operation.label] += 0

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(operation.as_strategy(generation_mode=mode))
        def ask(case: Any) -> None:
            seen[case.operation.label] += 1
            check(case, case.call(base_url=short.url, timeout=60))

        with suppress(Unsatisfiable):  # a route without arguments cannot be asked wrongly
            ask()
    assert sum(n > 0 for n in seen.values()) >= len(FRONTS), seen


def check(case: Any, response: requests.Response) -> None:
    """What holds of every answer, right or wrong."""
    status = response.status_code
    assert status < 500, (status, response.text)
    assert not re.search(r"Traceback|site-packages|\.py\b.*line \d", response.text), response.text
    if status >= 400:
        assert not LEAK.search(response.text), response.text
        if case.method != "HEAD" and response.content:
            error = response.json()
            assert "error" in error
    assert response.headers["x-request-id"]


def test_the_server_is_still_well(short: Live) -> None:
    assert short.metric("outdraft_engine_restarts_total") == 0
    short.wait_idle()
    assert "Traceback" not in short.output(), short.output()[-3000:]
