"""Fixtures of the tests that need several ranks."""

from collections.abc import Iterator

import pytest

from tests.distributed.workers import Workers


@pytest.fixture(scope="package")
def workers() -> Iterator[Workers]:
    """Four processes for all tests of this folder: workers.run(function, *args, ranks=2)."""
    started = Workers(4)
    yield started
    started.close()
