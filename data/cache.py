"""Content-addressed cache of results on disk."""

import hashlib
import json
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """Name of a JSON-serialisable value: 20 hexadecimal digits, equal for equal values."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=10).hexdigest()


def number(text: str) -> int:
    """A 64-bit number that depends on `text` alone: the identity of a document, and its place in a fixed order."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def beside(path: Path) -> Path:
    """A place next to `path` to write what becomes it, which no other process of any machine is given."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


@contextmanager
def rebuilt(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder`, which it replaces at the end."""
    building = beside(folder)
    building.mkdir(parents=True)
    yield building
    shutil.rmtree(folder, ignore_errors=True)
    building.rename(folder)


def cached(folder: Path, key: str, what: str | None, build: Callable[[Path], None]) -> Path:
    """Return the folder `folder/key`, built by `build(empty folder)` if it is not there yet.

    what: for a line in the log; None: none.
    The result is built beside its place and renamed into it, so that it is whole or absent; of two processes that
    build it at once, the first to finish wins and both return the same path.
    """
    target = folder / key
    if target.is_dir():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if what is not None:
        log.info("building %s (kept in %s)", what, target)
    building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder))
    try:
        build(building)
        building.chmod(0o755)
        os.rename(building, target)
    except OSError:
        if not target.is_dir():
            raise
    finally:
        shutil.rmtree(building, ignore_errors=True)
    if what is not None:
        log.info("built %s in %.1f s", what, time.perf_counter() - started)
    return target
