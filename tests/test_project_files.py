"""Files for people who adopt the project: they parse, and agree with each other."""

import importlib
import json
import re
import sys
import tomllib
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINNED = {normal(line.split("==")[0]): line for line in (ROOT / "requirements.txt").read_text().splitlines()}


def read(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_command_is_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    module, _, function = PROJECT["scripts"]["dsv3"].partition(":")
    sys.argv = ["dsv3", "--help"]
    with pytest.raises(SystemExit) as end:
        getattr(importlib.import_module(module), function)()
    assert end.value.code == 0
    assert "  env " in capsys.readouterr().out


def test_every_requirement_is_pinned_as_it_was_tested() -> None:
    extras = {name: wanted for name, wanted in PROJECT["optional-dependencies"].items() if name != "gpu"}
    wanted = [*PROJECT["dependencies"], *(each for several in extras.values() for each in several)]
    for requirement in (each for each in wanted if not each.startswith("dsv3[")):
        name, version = re.fullmatch(r"([\w.-]+)==([\w.]+)", requirement).groups()  # type: ignore[union-attr]
        assert PINNED[normal(name)].split("==")[1] == version, requirement


def test_all_files_name_one_torch_one_python_and_one_version() -> None:
    torch = next(each for each in PROJECT["dependencies"] if each.startswith("torch=="))
    files = [(ROOT / name).read_text() for name in ("Dockerfile", "Makefile")]
    assert all(torch in text for text in files)
    least = PROJECT["requires-python"].removeprefix(">=")
    assert f"FROM python:{least}-slim" in files[0]
    assert read("CITATION.cff")["version"] == PROJECT["version"]
    assert least in read(".github/workflows/ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    container = (ROOT / ".devcontainer" / "devcontainer.json").read_text()
    assert json.loads(container.partition("\n")[2])["image"].endswith(f":{least}")


def test_the_workflow_calls_targets_that_there_are() -> None:
    steps = read(".github/workflows/ci.yml")["jobs"]["test"]["steps"]
    called = {match[1] for step in steps if (match := re.fullmatch(r"make (\S+)", step.get("run", "")))}
    assert {"check", "coverage"} == called
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert called <= {*targets}


def test_issue_forms_ask_for_the_environment() -> None:
    for name in ("bug", "idea"):
        form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
        assert {"name", "description", "body"} <= form.keys()
        (field,) = [each for each in form["body"] if each["id"] == "environment"]
        assert "dsv3 env" in field["attributes"]["label"]


def test_pages_that_name_files_name_those_that_there_are() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
