"""The prompt of a fill-in-the-middle completion: exactly what comes before the middle in training."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

Order = Literal["psm", "spm"]


def infilling_prompt(tokenizer: "Tokenizer", prefix: str, suffix: str, order: Order) -> list[int]:
    """Ids to be continued up to EOS by the middle.

    PSM (report section 4.1): bos, fim_begin, prefix, fim_hole, suffix, fim_end.
    SPM: the same with an empty prefix, and the prefix where the middle begins.
    """
    return arrange(tokenizer, tokenizer.encode(prefix), tokenizer.encode(suffix), order)


def arrange(tokenizer: "Tokenizer", before: list[int], after: list[int], order: Order) -> list[int]:
    """The same from the ids of prefix and suffix."""
    if order == "psm":
        return [tokenizer.bos, tokenizer.fim_begin, *before, tokenizer.fim_hole, *after, tokenizer.fim_end]
    return [tokenizer.bos, tokenizer.fim_begin, tokenizer.fim_hole, *after, tokenizer.fim_end, *before]
