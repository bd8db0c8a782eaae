"""Commands that pages show: lines of fenced blocks without a language, or of bash.

Above a block that needs what is not here stands `<!-- needs ... -->`; output and other text is a block of `text`.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3.paths import ROOT

FENCE = re.compile(r"^(?:<!-- (needs .+) -->\n)?```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
PROJECTS = re.compile(r"(python (train|evaluate)\.py|python -m (dsv3|data)|dsv3)( |$)")


class Command(NamedTuple):
    page: str
    line: str  # without its comment, in one line
    needs: str  # what is not here; empty: it is run

    @property
    def is_ours(self) -> bool:
        """Whether the project's own program runs it."""
        return PROJECTS.match(self.line) is not None


def pages() -> list[Path]:
    return [*ROOT.glob("*.md"), *sorted((ROOT / "docs").rglob("*.md"))]


def commands() -> Iterator[Command]:
    for page in pages():
        for needs, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            if language in ("", "bash"):
                for line in block.replace("\\\n", " ").splitlines():
                    if line := re.sub(r"(^|\s+)#.*", "", line).strip():
                        yield Command(str(page.relative_to(ROOT)), line, needs)


def write_files(folder: Path) -> None:
    """Files of a reader's own that commands name: those of pages, whose blocks begin with their names, and examples."""
    for page in pages():
        for _, language, block in FENCE.findall(page.read_text(encoding="utf-8")):
            name = re.match(r"(?:# @package _global_\n)?# ((?:my_folder|my_tasks|conf)/\S+)\n", block)
            if name and language in ("python", "yaml"):
                file = folder / name[1]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_text(block, encoding="utf-8")
    for example in ("softplus_router", "token_counts"):
        shutil.copytree(ROOT / "tests" / "examples" / example, folder / "my_folder", dirs_exist_ok=True)
    (folder / "my_tasks" / "capitals.jsonl").write_text('{"country": "France", "capital": "Paris"}\n' * 4)
