"""One live server for all tests of a worker."""

from collections.abc import Iterator

import pytest

from tests.server.live import Live, launch


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    server = launch(tmp_path_factory.mktemp("server"))
    yield server
    server.kill()
