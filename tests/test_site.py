"""The documentation site: what is made from the project is complete, and the commands that pages show are sound."""

import html
import importlib
import importlib.util
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml

from dsv3 import cli
from dsv3.config.preflight import check
from tests.conftest import ROOT
from tests.documented import commands, write_files


def hook(name: str) -> Any:
    """A module of docs/hooks."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / "hooks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = hook("generated")

PLACES = ("run.init_from", "objective.teachers", "run.dir", "run.on_end", "resume", "checkpoint", "compare")
"""Keys whose value a page may name although it is not on this machine: runs and programs of the reader's."""


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return dict(GENERATED.pages())


def test_every_kind_has_a_page_with_its_contract_and_every_option(pages: dict[str, str]) -> None:
    for kind in (path for path in (ROOT / "conf").iterdir() if path.is_dir() and path.name != "hydra"):
        page = pages[f"components/{kind.name}.md"]
        for option in kind.glob("*.yaml"):
            text = option.read_text()
            assert text in page
            if target := (yaml.safe_load(text) or {}).get("_target_"):
                assert f"::: {target}\n" in page
    without = {kind for kind in GENERATED.kinds() if "## Contract" not in pages[f"components/{kind}.md"]}
    assert without == {"benchmarks", "experiment", "model", "parallel", "trainer"}


def test_every_key_and_tool_is_on_a_page(pages: dict[str, str]) -> None:
    assert "trainer.max_time=null  # DD:HH:MM:SS" in pages["reference/keys.md"]
    assert "held_out" in pages["reference/evaluate_keys.md"]
    for package in ("dsv3", "data"):
        for tool in (ROOT / package / "tools").glob("[!_]*.py"):
            assert f"## python -m {package} {tool.stem.rstrip('_')}\n" in pages["reference/tools.md"]


def test_the_site_lists_every_page(pages: dict[str, str]) -> None:
    listed = re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2])
    written = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert sorted(listed) == sorted({*written, *pages})


def test_links_of_the_roots_pages_are_those_of_the_site() -> None:
    text = "[a](docs/plan.md#x) [b](CHANGELOG.md) [c](https://x.y/docs/z) ![d](docs/images/e.png)"
    assert GENERATED.of_root(text) == "[a](plan.md#x) [b](changes.md) [c](https://x.y/docs/z) ![d](images/e.png)"


def test_every_formula_becomes_mathml_of_its_own() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    formulas = re.findall(r"\$\$(.+?)\$\$", page) + re.findall(r"(?<!\$)\$([^$\n]+)\$(?!\$)", page)
    assert len(formulas) > 30
    for formula in formulas:
        found = hook("formulas").on_page_content(rf'<span class="arithmatex">\({html.escape(formula)}\)</span>')
        assert re.fullmatch(r"<math .*</math>", found)
        assert "\\" not in found, "latex2mathml leaves a command that it does not know as text"
    shown = hook("formulas").on_page_content('<div class="arithmatex">\\[a \\lt b\\]</div>')
    assert shown.startswith('<div class="formula"><math ')


def test_the_concepts_have_every_equation_of_the_report_and_their_files_exist() -> None:
    page = (ROOT / "docs" / "concepts.md").read_text()
    numbers: set[int] = set()
    for first, _, last in re.findall(r"\\qquad \((\d+)(\\text\{-\}|, )?(\d+)?\)", page):
        numbers |= set(range(int(first), int(last or first) + 1))
    assert numbers == set(range(1, 26))
    for name in re.findall(r"`((?:plugins|dsv3|data)/\S+\.py)`", page):
        assert (ROOT / name).exists()


def test_messages_that_the_page_about_errors_quotes_are_the_programs() -> None:
    quoted = re.findall(r"^\| \*(.+?)\* \|", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE)
    program = "".join(path.read_text() for path in (ROOT / "dsv3").rglob("*.py"))
    program = re.sub(r'"\s*\n\s*\+? *f?"', "", program)  # strings that go on in the next line
    assert len(quoted) > 3
    assert [words for words in quoted if words not in program] == []


COMMANDS = [(command.page, shlex.split(command.line)) for command in commands() if command.is_ours]


def mistakes(words: list[str]) -> list[str]:
    """Of a command's keys and values; of values, not whether files of the reader's are there. `conf` in the working
    directory has the options that pages write down."""
    if words[0] == "python" and words[1].endswith(".py"):
        of_pages = [] if "--config-dir" in words else ["--config-dir", "conf"]
        problems = check(words[1].removesuffix(".py"), [*of_pages, *words[2:]])
    else:
        package, *rest = words[2:] if words[0] == "python" else words
        name, *options = rest or ["--help"]
        if "--help" in (name, *options):
            return []
        modules = {path.stem.rstrip("_"): path.stem for path in (ROOT / package / "tools").glob("[!_]*.py")}
        options, folder, _ = cli._config_dir(options)
        problems = cli._read(importlib.import_module(f"{package}.tools.{modules[name]}"), options, folder)[1]
    return [str(each) for each in problems if each.key not in PLACES and not each.key.endswith(".path")]


@pytest.mark.slow  # a minute
@pytest.mark.parametrize(("page", "words"), COMMANDS, ids=[" ".join(words)[:80] for _, words in COMMANDS])
def test_a_command_that_a_page_shows_is_sound(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert mistakes(words) == []
