"""One server for all tests of this folder."""

from collections.abc import Iterator

import pytest

from tests.serving.running import Running, running


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("serving"), compare=True, requests_per_minute=100_000) as server:
        yield server
