# ruff: noqa: RUF001 (DeepSeek writes its special tokens with a fullwidth bar)
"""A tokenizer of one's own: one token for each byte, after eight special ones. Lives outside the project."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

SPECIAL = [
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜fim▁begin｜>",
    "<｜fim▁hole｜>",
    "<｜fim▁end｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
]
"""DeepSeek-V3's strings, by which a saved tokenizer is read back."""


class PlainBytes:
    """Token 8 + b is the byte b."""

    vocab_size = len(SPECIAL) + 256
    bos, eos, pad, fim_begin, fim_hole, fim_end = range(6)

    def encode(self, text: str) -> list[int]:
        return self.encode_bytes(text.encode())

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_bytes(self, data: bytes) -> list[int]:
        return [len(SPECIAL) + byte for byte in data]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return bytes(index - len(SPECIAL) for index in ids if index >= len(SPECIAL))

    def token_bytes(self) -> list[bytes]:
        return [self.decode_bytes([index]) for index in range(self.vocab_size)]

    def identity(self) -> str:
        return "plain bytes after 8 special tokens"

    def save(self, directory: str) -> None:
        """As a byte-level BPE without merges, which transformers and the project read."""
        vocabulary = {text: index for index, text in enumerate([*SPECIAL, *byte_letters()])}
        tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(folder / "tokenizer.json"))
        names = dict(zip(("bos_token", "eos_token", "pad_token"), SPECIAL, strict=False))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **names}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, ensure_ascii=False), encoding="utf-8")


def byte_letters() -> list[str]:
    """The letter that byte-level BPE writes for each byte: itself where printable, else one from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def plain_bytes(*, vocab_size: int, texts: Mapping[str, Sequence[str]], cache_dir: str) -> PlainBytes:
    """What conf/tokenizer/plain_bytes.yaml names; nothing is learned from the `texts`."""
    if vocab_size != PlainBytes.vocab_size:
        raise ValueError(f"tokenizer.vocab_size={vocab_size}: this tokenizer has {PlainBytes.vocab_size} tokens")
    return PlainBytes()
