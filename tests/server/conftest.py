"""One server for all tests that only ask it things, and one that asks for a key."""

from collections.abc import Iterator

import pytest

from tests.server.live import Live, live_server


@pytest.fixture(scope="session")
def live() -> Iterator[Live]:
    """A server of the demo, without a key."""
    with live_server() as server:
        yield server


@pytest.fixture(scope="session")
def keyed() -> Iterator[Live]:
    """A server of the demo that asks for a key."""
    with live_server(key="sesame-1234") as server:
        yield server
