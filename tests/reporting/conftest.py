"""The browser that all tests of pages share."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.reporting.browser import launched


@pytest.fixture(scope="package")  # a test of another folder may need asyncio, which it shuts out
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with launched(tmp_path_factory.mktemp("profile")) as browser:
        yield browser
