"""Every shipped tokenizer passes `check_tokenizer`; tokenizers with one fault each do not."""

import itertools
import json
from functools import partial
from pathlib import Path

import pytest

from data.tokenizer import SPECIAL, ByteLevelBPE, deepseek, train_bpe
from dsv3.testing.tokenizer import check_tokenizer

train = partial(train_bpe, vocab_size=300, sample_characters=10_000)


@pytest.mark.parametrize("factory", [train, pytest.param(partial(deepseek, vocab_size=129280), marks=pytest.mark.slow)])
def test_shipped_tokenizers_conform(factory):
    check_tokenizer(factory)


def factory_of(kind):
    """Makes tokenizers of the class `kind` with the content of a trained one."""
    return lambda **given: kind(content=train(**given)._content)


class SpecialText(ByteLevelBPE):
    def encode(self, text):
        first, mark, rest = text.partition(SPECIAL["fim_hole"])
        return super().encode(first) + ([self.fim_hole, *self.encode(rest)] if mark else [])


class BeginsWithBOS(ByteLevelBPE):
    def encode(self, text):
        return [self.bos, *super().encode(text)]


class Stripping(ByteLevelBPE):
    def encode(self, text):
        return super().encode(text.rstrip())


class OtherBatch(ByteLevelBPE):
    def encode_batch(self, texts):
        return [ids[:5] for ids in super().encode_batch(texts)]


class ShowsEOS(ByteLevelBPE):
    def decode_bytes(self, ids):
        return super().decode_bytes(ids) + b"<eos>" * (self.eos in ids)


class TextOnly(ByteLevelBPE):
    def encode_bytes(self, data):
        return self.encode(data.decode(errors="replace"))


class OnePad(ByteLevelBPE):
    def __init__(self, *, content):
        super().__init__(content=content)
        self.pad = self.eos


class SmallVocabulary(ByteLevelBPE):
    def __init__(self, *, content):
        super().__init__(content=content)
        self.vocab_size = 100


class ShortTable(ByteLevelBPE):
    def token_bytes(self):
        return super().token_bytes()[:-1]


class WrongTable(ByteLevelBPE):
    def token_bytes(self):
        return [data or b"?" for data in super().token_bytes()]


class NewIdentity(ByteLevelBPE):
    made = itertools.count()

    def __init__(self, *, content):
        super().__init__(content=content)
        self.number = next(self.made)

    def identity(self):
        return str(self.number)


class Unsaved(ByteLevelBPE):
    def save(self, directory):
        Path(directory).mkdir()


class SavedWithPrefix(ByteLevelBPE):
    """Another encoding in tokenizer.json: words have a space put before them."""

    def save(self, directory):
        super().save(directory)
        path = Path(directory) / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"]["pretokenizers"][-1]["add_prefix_space"] = True
        path.write_text(json.dumps(content))


class NoSpecialNames(ByteLevelBPE):
    def save(self, directory):
        super().save(directory)
        path = Path(directory) / "tokenizer_config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps({key: value for key, value in config.items() if key != "pad_token"}))


class OtherNames(ByteLevelBPE):
    """Special tokens that another project's files would have."""

    def save(self, directory):
        super().save(directory)
        path = Path(directory) / "tokenizer.json"
        path.write_text(path.read_text().replace(SPECIAL["fim_end"], "<fim_suffix>"))


class SwappedMarks(ByteLevelBPE):
    def __init__(self, *, content):
        super().__init__(content=content)
        self.fim_begin, self.fim_end = self.fim_end, self.fim_begin


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (SpecialText, "looks like one is plain text"),
        (BeginsWithBOS, "must give no special token, and gives bos"),
        (Stripping, "must be the text's UTF-8"),
        (OtherBatch, "encode_batch must give"),
        (ShowsEOS, "leave special tokens out, and `eos`"),
        (TextOnly, r"decode_bytes\(encode_bytes\(data\)\) must give data|U\+FFFD"),
        (OnePad, "different ids"),
        (SmallVocabulary, "ids below 100"),
        (ShortTable, "an entry for each of the 300 ids"),
        (WrongTable, r"token_bytes\(\)\[0\]"),
        (NewIdentity, "made twice of the same texts it differs"),
        (Unsaved, "must read what save"),
        (SavedWithPrefix, "saved and read by AutoTokenizer"),
        (NoSpecialNames, "AutoTokenizer's pad"),
        (OtherNames, "must be read by what conf/saved_tokenizer.yaml names"),
        (SwappedMarks, "read back from a run folder, `fim_begin`"),
    ],
)
def test_faulty_tokenizers_are_found(kind, words):
    with pytest.raises(AssertionError, match=words):
        check_tokenizer(factory_of(kind))
