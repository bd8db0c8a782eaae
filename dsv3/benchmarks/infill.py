# ruff: noqa: RUF001 (DeepSeek writes its special tokens with a fullwidth bar)
"""Infilling prompts written as text, which is what lm-eval's requests are made of.

A task writes `<｜fim▁begin｜>prefix<｜fim▁hole｜>suffix<｜fim▁end｜>` as its context, in DeepSeek-V3's own strings. Our
tokenizers never take text for special tokens, so such a context is taken apart again here and put together from ids,
in the order (PSM or SPM) that the model was trained with.
"""

import re

from dsv3.contracts import Tokenizer
from dsv3.infilling import Order, infilling_prompt

BEGIN, HOLE, END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"

_WRITTEN = re.compile(f"{re.escape(BEGIN)}(.*){re.escape(HOLE)}(.*){re.escape(END)}", re.DOTALL)


def parse_infilling(text: str) -> tuple[str, str] | None:
    """Prefix and suffix of a written infilling prompt; None where `text` is none."""
    match = _WRITTEN.fullmatch(text)
    return (match[1], match[2]) if match else None


def infilling_ids(tokenizer: Tokenizer, prefix: str, suffix: str, *, order: Order, room: int) -> list[int]:
    """At most `room` ids of the prompt: prefix and suffix are cut at their far ends until it fits.

    The prefix gives way first, down to half of the room, then the suffix.
    """
    while len(ids := infilling_prompt(tokenizer, prefix, suffix, order)) > room:
        before, after = len(tokenizer.encode(prefix)), len(tokenizer.encode(suffix))
        excess = len(ids) - room
        if before > after or not suffix:
            if not prefix:
                raise ValueError(f"an infilling prompt does not fit in {room} tokens")
            prefix = prefix[-(len(prefix) * max(before - excess, after) // before) :] if before > excess else ""
        else:
            suffix = suffix[: len(suffix) * max(after - excess, 0) // after]
    return ids
