"""The architecture holds: no import cycles between files, and packages import only those below them."""

import shutil
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import grimp
import pytest

from tests.conftest import ROOT

PACKAGES = ("dsv3", "plugins", "data")


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    """Every import of the project, those inside functions too."""
    return grimp.build_graph(*PACKAGES, cache_dir=None)


def refuse_cycles(graph: grimp.ImportGraph) -> None:
    """Raise a CycleError that names the files of a cycle."""
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()


def test_no_file_imports_itself_through_others(graph: grimp.ImportGraph) -> None:
    assert len(graph.modules) > 200
    refuse_cycles(graph)


def test_a_planted_cycle_is_found() -> None:
    planted = grimp.build_graph(*PACKAGES, cache_dir=None)
    planted.add_import(importer="dsv3.model.layers", imported="dsv3.training.run")
    with pytest.raises(CycleError, match=r"dsv3\.training\.run"):
        refuse_cycles(planted)


@pytest.mark.parametrize(
    ("file", "line", "broken"),
    [
        ("dsv3/model/load.py", "from dsv3.evaluation import held_out", "Packages of dsv3 import only packages below"),
        ("dsv3/runtime.py", "def f():\n    from dsv3.cli import main", "Packages of dsv3 import only packages below"),
        ("dsv3/checkpoint/loading.py", "from plugins.attention import mla", "The core names no plugin"),
        ("plugins/router/sigmoid.py", "from dsv3.build import part", "Plugins and data build on contracts"),
        ("dsv3/inference/sampling.py", "import lightning", "Lightning stays in training"),
        ("dsv3/unplaced.py", "", "Packages of dsv3 import only packages below"),
    ],
)
def test_a_planted_import_breaks_its_contract(tmp_path: Path, file: str, line: str, broken: str) -> None:
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / file).open("a") as source:
        source.write(f"\n{line}\n")
    command = [Path(sys.executable).parent / "lint-imports", "--no-cache"]
    done = subprocess.run(command, cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"{broken}" in done.stdout.partition("Broken contracts")[2]


def test_no_two_files_share_a_name() -> None:
    """A name says which file is meant; tools and conformance checks are called like what they serve."""
    files = [path for path in (ROOT / "dsv3").rglob("*.py") if path.name != "__init__.py"]
    names = [path.stem for path in files if not {"tools", "testing"} & set(path.parts)]
    names += [path.parent.name for path in (ROOT / "dsv3").rglob("__init__.py")]
    assert [name for name in sorted(set(names)) if names.count(name) > 1] == []
