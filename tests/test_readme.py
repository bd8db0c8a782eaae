"""The README names every module."""

import subprocess

from tests.conftest import ROOT


def test_every_module_has_its_line() -> None:
    readme = (ROOT / "README.md").read_text()
    listed = subprocess.run(["git", "ls-files", "dsv3", "plugins", "data"], cwd=ROOT, capture_output=True, text=True)
    modules = [path for path in listed.stdout.split() if path.endswith(".py") and not path.endswith("__init__.py")]
    assert modules
    assert [path for path in modules if f"`{path.split('/', 1)[1]}`" not in readme] == []
