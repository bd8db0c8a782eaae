"""Show rows as training reads them: the domain, where documents begin and end, the parts of fill-in-the-middle."""

from dataclasses import dataclass
from typing import Any

from dsv3.bounds import NonNegativeInt, PositiveInt
from dsv3.cli import option


@dataclass
class Options:
    rows: PositiveInt = option(5, "number of rows")
    first: NonNegativeInt = option(0, "number of the first row; a run reads them in order from 0")
    overrides: list[str] = option([], "keys of conf/train.yaml, such as data=files data.fim.rate=0.5")


def run(options: Options) -> dict[str, Any]:
    """Print the rows; the corpus is prepared first if it is not yet.

    Raises:
        ValueError, OSError: as `data.preparation.prepare`.
    """
    from data.tools._corpus import prepared
    from data.tools._rows import in_parts, show

    corpus = prepared(options.overrides)
    rows, domains = corpus.rows(), list(corpus.settings.sources)
    found = []
    for number in range(options.first, options.first + options.rows):
        row = rows[number]
        documents = in_parts(row.tokens.tolist(), corpus.tokenizer)
        found.append({"row": number, "domain": domains[row.domain], "documents": documents})
    show(found, len(rows[0].tokens))
    return {"rows": found}
