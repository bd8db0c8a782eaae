"""Does a tokenizer keep to `dsv3.contracts.Tokenizer`?"""

import random
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

from dsv3.build import load_tokenizer
from dsv3.testing.requirement import require

SPECIAL = ("bos", "eos", "pad", "fim_begin", "fim_hole", "fim_end")
TEXTS = [
    "",
    "def add(a, b):\n    return a + b\n",
    "  two  spaces, a tab\tand a line end\r\n\r\n",
    "naïve 日本語 ½ 👩‍👩‍👧 e\u0301 \u202e\x00\x1f\ufeff",
    "3.14159 == 10**6",
    "<|endoftext|> <s> </s> [PAD] <｜fim▁hole｜><｜end▁of▁sentence｜>",  # noqa: RUF001 (DeepSeek's bars)
]
DOMAINS = {"code": TEXTS[1:3] * 50, "prose": TEXTS[3:5] * 50}
"""What the factory may train on."""


def check_tokenizer(factory: Callable[..., Any]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(texts=, cache_dir=)` is a tokenizer for the core."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = factory(texts=DOMAINS, cache_dir=f"{folder}/cache")
        special = _ids(tokenizer)
        texts = [*TEXTS, *_drawn_texts()]
        for text in texts:
            _text(tokenizer, text, special)
        _batch(tokenizer, texts)
        _special(tokenizer, special)
        for data in _drawn_bytes():
            found = tokenizer.decode_bytes(tokenizer.encode_bytes(data))
            require(found == data, f"decode_bytes(encode_bytes(data)) must give data; {data!r} became {found!r}")
        _vocabulary(tokenizer, special)
        _identity(factory, tokenizer, f"{folder}/cache")
        _saved(tokenizer, f"{folder}/saved")
        _read_back(tokenizer, f"{folder}/saved", special)


def _drawn_texts() -> Iterator[str]:
    """Random characters of all planes."""
    draw = random.Random(0)
    planes = ((0x20, 0x7F), (0xA0, 0x250), (0x3040, 0x3100), (0x1F300, 0x1F600), (0, 0x20), (0xE000, 0xE020))
    for length in (1, 2, 5, 30) * 5:
        yield "".join(chr(draw.randrange(*draw.choice(planes))) for _ in range(length))


def _drawn_bytes() -> Iterator[bytes]:
    """Bytes that are UTF-8, that never are, cut characters, and surrogates written as if they were characters."""
    draw = random.Random(1)
    yield from (b"", bytes(range(256)), "日本語".encode()[1:-1], b"\xed\xb2\x80 \xed\xa0\x80", b"a\xffb\xc3")
    for length in (1, 2, 5, 30) * 5:
        yield draw.randbytes(length)


def _ids(tokenizer: Any) -> dict[str, int]:
    size: Any = getattr(tokenizer, "vocab_size", None)
    require(isinstance(size, int) and size > 0, f"`vocab_size` must be an integer above 0, not {size!r}")
    special: dict[str, Any] = {name: getattr(tokenizer, name, None) for name in SPECIAL}
    for name, index in special.items():
        require(
            isinstance(index, int) and 0 <= index < size,
            f"`{name}` must be an id between 0 and {size - 1}, not {index!r}",
        )
    require(len(set(special.values())) == len(SPECIAL), f"the special tokens must have different ids, not {special}")
    return special


def _text(tokenizer: Any, text: str, special: dict[str, int]) -> None:
    ids = tokenizer.encode(text)
    require(
        isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < tokenizer.vocab_size for i in ids),
        f"encode({text!r}) must be a list of ids below {tokenizer.vocab_size}, not {ids!r}",
    )
    given = [name for name, index in special.items() if index in ids]
    require(
        not given,
        f"encode({text!r}) must give no special token, and gives {', '.join(given)}: the core puts them where they "
        "belong, and text that looks like one is plain text",
    )
    found = tokenizer.decode_bytes(ids)
    require(found == text.encode(), f"decode_bytes(encode(text)) must be the text's UTF-8; {text!r} became {found!r}")
    require(tokenizer.decode(ids) == text, f"decode(encode(text)) must give the text; {text!r} became another")
    require(
        tokenizer.decode_bytes(tokenizer.encode_bytes(text.encode())) == text.encode(),
        f"decode_bytes(encode_bytes(data)) must give data; that of {text!r} became another",
    )


def _batch(tokenizer: Any, texts: list[str]) -> None:
    together, single = [list(ids) for ids in tokenizer.encode_batch(texts)], [tokenizer.encode(text) for text in texts]
    require(together == single, "encode_batch must give what encode gives of each text")


def _special(tokenizer: Any, special: dict[str, int]) -> None:
    ids = tokenizer.encode("ab")
    for name, index in special.items():
        require(
            tokenizer.decode([index, *ids, index]) == "ab" and tokenizer.decode_bytes([index, *ids]) == b"ab",
            f"decode and decode_bytes must leave special tokens out, and `{name}` is not",
        )
    found = tokenizer.decode(tokenizer.encode_bytes(b"a\xffb"))
    require(
        found == "a\ufffdb", f"decode must write U+FFFD for bytes that are not UTF-8; of a, FF, b it gives {found!r}"
    )


def _vocabulary(tokenizer: Any, special: dict[str, int]) -> None:
    table = tokenizer.token_bytes()
    require(
        len(table) == tokenizer.vocab_size,
        f"token_bytes() must have an entry for each of the {tokenizer.vocab_size} ids, not {len(table)}",
    )
    for index, data in enumerate(table):
        require(
            data == tokenizer.decode_bytes([index]),
            f"token_bytes()[{index}] is {data!r}, and decode_bytes([{index}]) {tokenizer.decode_bytes([index])!r}",
        )


def _identity(factory: Callable[..., Any], tokenizer: Any, cache_dir: str) -> None:
    identity = tokenizer.identity()
    again = factory(texts=DOMAINS, cache_dir=cache_dir)
    require(isinstance(identity, str) and bool(identity), f"identity() must be a text, not {identity!r}")
    require(
        again.identity() == identity == tokenizer.identity(),
        "identity() must be equal for tokenizers that encode alike: made twice of the same texts it differs, so that "
        "no cache of token ids would be found again",
    )


def _saved(tokenizer: Any, folder: str) -> None:
    from transformers import AutoTokenizer

    tokenizer.save(folder)
    try:
        loaded = AutoTokenizer.from_pretrained(folder)
    except Exception as error:
        raise AssertionError(f"transformers' AutoTokenizer must read what save() wrote, and fails: {error}") from error
    for text in TEXTS[:-1]:
        found, expected = loaded(text, add_special_tokens=False).input_ids, tokenizer.encode(text)
        require(found == expected, f"saved and read by AutoTokenizer, {text!r} has ids {found} instead of {expected}")
    for name in ("bos", "eos", "pad"):
        found, expected = getattr(loaded, f"{name}_token_id"), getattr(tokenizer, name)
        require(found == expected, f"AutoTokenizer's {name} must be id {expected}, not {found}: name it in the config")


def _read_back(tokenizer: Any, folder: str, special: dict[str, int]) -> None:
    """As `generate`, `evaluate.py` and `export` read the tokenizer of a run."""
    try:
        loaded = load_tokenizer(folder)
    except Exception as error:
        raise AssertionError(
            f"what save() wrote must be read by what conf/saved_tokenizer.yaml names, and fails: {error}"
        ) from error
    for name, index in special.items():
        found = getattr(loaded, name)
        require(found == index, f"read back from a run folder, `{name}` is {found} instead of {index}")
    for text in TEXTS:
        found, expected = loaded.encode(text), tokenizer.encode(text)
        require(found == expected, f"read back from a run folder, {text!r} has ids {found} instead of {expected}")
