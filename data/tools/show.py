"""Show rows as training reads them: where documents begin and end, their parts, and what is trained on."""

from dataclasses import dataclass
from functools import partial
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
    from data.tools._corpus import examples, prepared
    from data.tools._rows import in_parts, in_turns, show

    data = examples(options.overrides)
    if data is not None:
        rows, domains, parts = data.rows(), data.domains, partial(in_turns, tokenizer=data.tokenizer)
    else:
        corpus = prepared(options.overrides)
        rows, domains = corpus.rows(), list(corpus.settings.sources)
        parts = partial(in_parts, tokenizer=corpus.tokenizer)
    found = []
    for number in range(options.first, options.first + options.rows):
        row = rows[number]
        found.append({"row": number, "domain": domains[row.domain], "documents": parts(row.tokens.tolist())})
    show(found, len(rows[0].tokens))
    return {"rows": found}
