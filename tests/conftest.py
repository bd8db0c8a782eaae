"""The order in which files are begun; and fixtures, where tests run.

With --numprocesses the first process only hands tests out: it does without the seconds that torch and Lightning take.
"""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LONGEST = ("tests/study", "tests/smoke", "tests/distributed", "tests/config", "tests/training", "tests/evaluation")
"""Begun first, so that no long file is left when the other processes are done."""


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("dist", "no") == "no":
        config.pluginmanager.import_plugin("tests.fixtures")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        return next((i for i, folder in enumerate(LONGEST) if item.nodeid.startswith(folder)), len(LONGEST))

    items.sort(key=place)
