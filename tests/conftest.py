"""The order in which files are begun; and fixtures, where tests run.

With --numprocesses the first process only hands tests out: it does without the seconds that torch and Lightning take.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LONGEST = ("tests/smoke", "tests/study", "tests/config/test_overrides", "tests/evaluation", "tests/reporting")
"""Begun first, so that none is left when the other processes are done."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not item.nodeid.startswith(LONGEST))
