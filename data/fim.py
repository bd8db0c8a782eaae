"""Fill-in-the-middle: some documents are rearranged so that the model learns to complete a gap from both sides.

A chosen text is cut at two random places into prefix, middle and suffix, and written

    PSM:  <bos> <fim_begin> prefix <fim_hole> suffix <fim_end> middle <eos>        (DeepSeek-V3 report, section 4.1)
    SPM:  <bos> <fim_begin> <fim_hole> suffix <fim_end> prefix middle <eos>

SPM is PSM with an empty prefix whose middle begins with the prefix: suffix first, the same tokens, and one inverse
for both. The parts are tokenised one by one, so that a prompt ends where the middle begins. Cuts fall between
characters (code points), so no part breaks one in two. A text longer than `max_characters` is first cut between lines
into consecutive pieces, each of which becomes a sequence of its own, from BOS to EOS;
`dsv3.prompts.infilling.infilling_prompt` is exactly the part of such a sequence that comes before the middle.
Every draw is a function of (seed, epoch, document) alone.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.tokenizer import ByteLevelBPE
from dsv3.bounds import Fraction, PositiveInt
from dsv3.contracts import Tokenizer
from dsv3.prompts.infilling import Order, infilling_prompt


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


def generator(*, seed: int, epoch: int, document: int, purpose: int) -> np.random.Generator:
    """Random numbers of one document in one epoch (counter-based Philox); `purpose` parts independent uses."""
    key, counter = np.array([seed, document], np.uint64), np.array([0, 0, purpose, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def chosen(*, rate: float, random: np.random.Generator) -> bool:
    """Whether a document is rearranged: the first draw of its generator."""
    return bool(random.random() < rate)


def rearrange(text: str, *, settings: FillInTheMiddle, random: np.random.Generator, tokenizer: Tokenizer) -> list[int]:
    """Ids of a chosen document: one sequence from BOS to EOS for each of its pieces."""
    ids: list[int] = []
    for piece in pieces(text, settings.max_characters):
        first, second = sorted(random.integers(0, len(piece), size=2, endpoint=True).tolist())
        prefix, middle, suffix = piece[:first], piece[first:second], piece[second:]
        ids += infilling_prompt(tokenizer, prefix, suffix, settings.order)
        ids += [*tokenizer.encode(middle), tokenizer.eos]
    return ids


def invert(ids: Sequence[int], *, tokenizer: ByteLevelBPE) -> str:
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


def pieces(text: str, longest: int | None) -> list[str]:
    """`text` cut after line breaks into consecutive pieces of at most `longest` characters.

    A line longer than that is cut inside. None: one piece.
    """
    if longest is None or len(text) <= longest:
        return [text]
    result = [""]
    for line in text.splitlines(keepends=True):
        if len(result[-1]) + len(line) <= longest:
            result[-1] += line
            continue
        result += [line[start : start + longest] for start in range(0, len(line), longest)]
    return [piece for piece in result if piece]
