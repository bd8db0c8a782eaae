"""Spool: documents of a source that makes or fetches them, kept by the first reading for the second."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from data.documents import Document, LeftOut
from data.sources import Source

SPOOL = pyarrow.schema(
    [(name, pyarrow.bool_() if name == "held_out" else pyarrow.string()) for name in Document._fields]
)
SPOOLED = 4_000_000
"""Characters written at a time."""


def documents(source: Source, folder: Path, domain: str) -> Iterator[Document | LeftOut]:
    """What a source yields: read anew, or where it made or fetched it for the survey in `folder`, what was kept."""
    spool = spool_path(folder, domain)
    if not spool.exists():
        yield from source.documents()
        return
    for batch in pyarrow.parquet.ParquetFile(spool).iter_batches(batch_size=100, use_threads=False):
        yield from (Document(**row) for row in batch.to_pylist())


def spool_path(folder: Path, domain: str) -> Path:
    return folder / f"{domain}.documents.parquet"


def spooled(source: Source, spool: Path) -> Iterator[Document | LeftOut]:
    """What a source yields; kept in a file if it is not in files already."""
    if source.size is not None:
        yield from source.documents()
        return
    with pyarrow.parquet.ParquetWriter(spool, SPOOL, compression="zstd") as file:
        rows: list[dict[str, Any]] = []
        characters = 0
        for document in source.documents():
            if isinstance(document, Document):
                text = document.text if isinstance(document.text, str) else "".join(document.text)
                document = document._replace(text=text)
                rows.append(document._asdict())
                characters += len(text)
            yield document
            if characters > SPOOLED or len(rows) > 10_000:
                file.write_table(pyarrow.Table.from_pylist(rows, SPOOL))
                rows, characters = [], 0
        file.write_table(pyarrow.Table.from_pylist(rows, SPOOL))
