"""Fill-in-the-middle: some documents are rearranged so that the model learns to complete a gap from both sides.

A chosen text is cut at two random places into prefix, middle and suffix, and written

    PSM:  <bos> <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>        (DeepSeek-V3 report, section 4.1)
    SPM:  <bos> <fim_begin> <fim_hole> suffix <fim_end> prefix middle <eos>

SPM is PSM with an empty prefix whose middle begins with the prefix: suffix first, the same tokens, and one inverse
for both. The parts are tokenised one by one, so that a prompt ends where the middle begins. Cuts fall between
characters (code points), so no part breaks one in two. A text longer than `max_characters` is first cut between lines
into consecutive pieces, each of which becomes a sequence of its own, from BOS to EOS;
`dsv3.prompts.infilling.infilling_prompt` is exactly the part of such a sequence that comes before the middle.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from data.documents import PIECE
from dsv3.bounds import Fraction, PositiveInt
from dsv3.prompts.infilling import Order, arrange

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer


class FillInTheMiddle(NamedTuple):
    """Settings: `rate` is the share of documents, `max_characters` the longest text rearranged as one piece."""

    rate: Fraction
    order: Order
    max_characters: PositiveInt | None

    def check(self) -> None:
        if not 0 <= self.rate <= 1:
            raise ValueError(f"data.fim.rate={self.rate}: must be between 0 and 1")
        if self.order not in ("psm", "spm"):
            raise ValueError(f"data.fim.order={self.order}: must be psm or spm")
        if self.max_characters is not None and self.max_characters < 1:
            raise ValueError(f"data.fim.max_characters={self.max_characters}: must be at least 1")


def rearrange(
    text: Iterable[str], *, settings: FillInTheMiddle, random: np.random.Generator, tokenizer: "Tokenizer"
) -> Iterator[list[int]]:
    """Ids of a chosen document, which comes in parts: one sequence from BOS to EOS for each of its pieces."""
    for piece in pieces(text, settings.max_characters or PIECE):
        first, second = sorted(random.integers(0, len(piece), size=2, endpoint=True).tolist())
        prefix, middle, suffix = piece[:first], piece[first:second], piece[second:]
        before, inside, after = tokenizer.encode_batch([prefix, middle, suffix])
        yield [*arrange(tokenizer, before, after, settings.order), *inside, tokenizer.eos]


def invert(ids: Sequence[int], *, tokenizer: "Tokenizer") -> str:
    """The text of a document, rearranged (in either order) or not."""
    parts: dict[int, list[int]] = {mark: [] for mark in (tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end)}
    text: list[int] = []
    current = text
    for index in ids:
        if index in parts:
            current = parts[index]
        elif index == tokenizer.eos:
            text += parts[tokenizer.fim_begin] + parts[tokenizer.fim_end] + parts[tokenizer.fim_hole]
            parts = {mark: [] for mark in parts}
            current = text
        elif index != tokenizer.bos:
            current.append(index)
    return tokenizer.decode(text)


def pieces(text: Iterable[str], longest: int) -> Iterator[str]:
    """A text that comes in parts, cut after line breaks into consecutive pieces of at most `longest` characters.

    A line longer than that is cut inside.
    """
    piece = ""
    for line in _lines(text):
        if len(piece) + len(line) <= longest:
            piece += line
            continue
        if piece:
            yield piece
        starts = range(0, len(line), longest)
        yield from (line[start : start + longest] for start in starts[:-1])
        piece = line[starts[-1] :]
    if piece:
        yield piece


def _lines(text: Iterable[str]) -> Iterator[str]:
    """Lines with their line breaks, but for a line of over a million characters, which comes in parts."""
    open_line = ""
    for part in text:
        lines = (open_line + part).splitlines(keepends=True)
        open_line = lines.pop() if lines else ""
        yield from lines
        if len(open_line) > PIECE:
            yield open_line
            open_line = ""
    if open_line:
        yield open_line
