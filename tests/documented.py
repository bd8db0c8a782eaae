"""Commands that pages show: lines of fenced blocks without a language, or of bash.

Above a block that needs what is not here stands `<!-- needs ... -->`; output and other text is a block of `text`.
"""

import re
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


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language."""
    return [block for _, found, block in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]
