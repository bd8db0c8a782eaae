"""Prepare a corpus: choose what is held out, tokenise the rest, render fill-in-the-middle; all kept in data.cache_dir.

Training does the same by itself; this does it beforehand. What is there already is not made again, and a preparation
that was interrupted goes on where it was.
"""

import time
from dataclasses import dataclass
from typing import Any

from dsv3.cli import option


@dataclass
class Options:
    overrides: list[str] = option([], "keys of conf/train.yaml, such as data=files")


def run(options: Options) -> dict[str, Any]:
    """Prepare, and print what there is.

    Raises:
        ValueError, OSError: as `data.preparation.prepare`.
    """
    from data.tools._corpus import prepared, show, statistics

    started = time.perf_counter()
    corpus = prepared(options.overrides)
    found = statistics(corpus)
    show(found)
    print(f"ready after {time.perf_counter() - started:.1f} s, in {corpus.store.folder}")
    return found
