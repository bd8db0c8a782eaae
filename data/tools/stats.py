"""Count a prepared corpus: documents, bytes, tokens, bytes per token, what is held out and left out, by domain."""

from dataclasses import dataclass
from typing import Any

from dsv3.cli import option


@dataclass
class Options:
    overrides: list[str] = option([], "keys of conf/train.yaml, such as data=files")


def run(options: Options) -> dict[str, Any]:
    """Print the table; the corpus is prepared first if it is not yet.

    Raises:
        ValueError, OSError: as `data.preparation.prepare`.
    """
    from data.tools._corpus import prepared, show, statistics

    found = statistics(prepared(options.overrides))
    show(found)
    return found
