# ruff: noqa: RUF001 (DeepSeek writes its special tokens with a fullwidth bar)
"""Infilling prompts written as text, which is what lm-eval's requests are made of.

A task writes `<｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>` as its context, in DeepSeek-V3's own strings. Our
tokenizers never take text for special tokens, so such a context is taken apart again here and put together from ids,
in the order (PSM or SPM) that the model was trained with.
"""

import re

from dsv3.contracts import Tokenizer
from dsv3.prompts.infilling import Order, arrange

BEGIN, HOLE, END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"

_WRITTEN = re.compile(f"{re.escape(BEGIN)}(.*){re.escape(HOLE)}(.*){re.escape(END)}", re.DOTALL)


def parse_infilling(text: str) -> tuple[str, str] | None:
    """Prefix and suffix of a written infilling prompt; None where `text` is none."""
    match = _WRITTEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def infilling_ids(tokenizer: Tokenizer, prefix: str, suffix: str, *, order: Order, room: int) -> list[int]:
    """The prompt's ids, at most `room` of them: what does not fit is cut off at the far ends of prefix and suffix.

    The suffix keeps half of the room, or what the prefix leaves of it.
    """
    before, after = tokenizer.encode(prefix), tokenizer.encode(suffix)
    left = room - len(arrange(tokenizer, [], [], order))
    if left < 1:
        raise ValueError(f"an infilling prompt does not fit in {room} tokens")
    after = after[: max(left // 2, left - len(before))]
    before = before[max(0, len(before) + len(after) - left) :]
    return arrange(tokenizer, before, after, order)
