r"""Byte-level BPE by words that are remembered: the ids that `tokenizers` gives, in less than half of its time.

`tokenizers` splits a text by the patterns of its `tokenizer.json` and merges the bytes of every word, however often the
word comes. Here `regex` splits the text, and the ids of a word that came before are looked up.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import regex
from tokenizers import Tokenizer
from tokenizers.models import Model

DIGIT = r"\p{N}"

WORD = "|".join(
    [
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",  # a word with the space, dot, underscore or bracket before it
        r" ?[\p{P}\p{S}]+[\r\n]*",  # punctuation, together with line breaks that follow
        r"\s*[\r\n]+",  # blank lines
        r"\s+(?!\S)",  # a run of spaces, such as indentation, up to the one that goes with the word
        r"\s+",
    ]
)

KNOWN = (
    (DIGIT, WORD),  # `train_bpe`'s
    (  # DeepSeek-V3's
        r"\p{N}{1,3}",
        "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
        "|".join(
            [
                r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+""",
                "[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+",
                " ?[\\p{P}\\p{S}]+[\r\n]*",
                "\\s*[\r\n]+",
                r"\s+(?!\S)",
                r"\s+",
            ]
        ),
    ),
)
"""Patterns, each of which splits what the one before it left, and which mean the same to `regex` and `tokenizers`."""

UNSURE = regex.compile(
    "[^\0-\u052f\u1e00-\u206f\u2190-\u23ff\u2500-\u27bf\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef\U0001f300-\U0001f64f]"
)
"""Characters that `regex` and `tokenizers` may take for different ones, since each has a version of Unicode of its own:
all but the scripts and signs in which both agree on letters, marks, numbers, punctuation, symbols and spaces."""

REMEMBERED, LONGEST = 1 << 15, 32
"""Words that are remembered (about 10 MB; more are no faster), and characters of the longest one."""


class Words:
    """Encodes texts word by word."""

    def __init__(self, patterns: Sequence[str], tokenizer: Tokenizer, letters: Mapping[int, str]) -> None:
        """patterns: one of `KNOWN`. letters: how the vocabulary writes each byte."""
        *splits, word = patterns
        self._splits = [regex.compile(f"({pattern})") for pattern in splits]  # a group: what is between is kept
        self._word = regex.compile("|".join([word, *splits]))
        self._ids = _Ids(tokenizer.model, letters)

    def encode(self, text: str) -> list[int] | None:
        """The ids of a text; None: it has a character of `UNSURE`, or one of no word, such as a control character."""
        if not text.isascii() and UNSURE.search(text):
            return None
        pieces: Iterable[str] = [text]
        for split in self._splits:
            pieces = chain.from_iterable(map(split.split, pieces))
        words = list(chain.from_iterable(map(self._word.findall, pieces)))
        if sum(map(len, words)) < len(text):
            return None
        return list(chain.from_iterable(map(self._ids.__getitem__, words)))


class _Ids(dict[str, Sequence[int]]):
    """word -> ids. A copy or a pickle remembers nothing."""

    def __init__(self, model: Model, letters: Mapping[int, str]) -> None:
        super().__init__()
        self._model, self._letters = model, letters

    def __missing__(self, word: str) -> Sequence[int]:
        written = "".join(map(self._letters.__getitem__, word.encode()))
        ids = tuple(token.id for token in self._model.tokenize(written))
        if len(word) <= LONGEST and len(self) < REMEMBERED:
            self[word] = ids
        return ids

    def __reduce__(self) -> tuple[Any, ...]:
        return _Ids, (self._model, self._letters)


def patterns_of(content: Mapping[str, Any]) -> Sequence[str] | None:
    """Those of `KNOWN` by which a `tokenizer.json` splits texts; None: it does so otherwise, or does more than that."""
    changed = content.get("normalizer") not in (None, {"type": "Sequence", "normalizers": []})
    if changed or content["model"].get("dropout"):
        return None
    return next((patterns for patterns in KNOWN if content.get("pre_tokenizer") == _sequence(patterns)), None)


def _sequence(patterns: Sequence[str]) -> dict[str, Any]:
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*({**split, "pattern": {"Regex": p}} for p in patterns), last]}
