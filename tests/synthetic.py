"""A tiny stand-in for the datamodule: text of a repeating pattern, one step a function of its number."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import torch

from dsv3.contracts import Answer, MicroBatch, Question, Sample, Step

TARGETS = tuple(f"tests.synthetic.{name}" for name in ("byte_tokenizer", "SyntheticData", "Sevenths"))
"""What a run on this data names besides the options of conf/: to be allowed where it is read."""


class ByteTokenizer:
    """Ids 0..255 are bytes; six special ones follow."""

    vocab_size = 262
    bos, eos, pad, fim_begin, fim_hole, fim_end = range(256, 262)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode_bytes(self, ids: Any) -> bytes:
        return bytes(i for i in ids if i < 256)

    def decode(self, ids: Any) -> str:
        return self.decode_bytes(ids).decode(errors="replace")

    def save(self, directory: str) -> None:
        Path(directory).mkdir(parents=True, exist_ok=True)


def byte_tokenizer(*, vocab_size: int, **_: Any) -> ByteTokenizer:
    return ByteTokenizer()


class Sevenths:
    """A reward that the answers of an untrained model earn unlike amounts of."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [sum(token % 7 == 0 for token in answer.ids) / max(1, len(answer.ids)) for answer in answers]


class SyntheticData(lightning.LightningDataModule):
    domains = ("letters", "digits")

    def __init__(
        self,
        *,
        tokenizer: Callable[..., ByteTokenizer],
        cache_dir: Any,
        seed: int,
        sequence_length: int,
        total_tokens: int,
        micro_batch_size: int,
        micro_batches: int,
        isolate_documents: bool,
        fim: Mapping[str, Any],
        validation_tokens: int | None = None,
        questions: int | None = None,
    ) -> None:
        """`validation_tokens`, `questions`: as the real one takes them; here both sets are what they are."""
        super().__init__()
        self.tokenizer = tokenizer()
        self.seed, self.length, self.total = seed, sequence_length, total_tokens
        self.rows, self.micro_batches = micro_batch_size, micro_batches
        self.tokens = 0
        self.rank, self.ranks = 0, 1

    def batch(self, number: int) -> MicroBatch:
        generator = torch.Generator().manual_seed((self.seed << 20) + number)
        start = torch.randint(0, 26, (self.rows, 1), generator=generator)
        stride = torch.randint(1, 4, (self.rows, 1), generator=generator)
        row = 97 + (start + stride * torch.arange(self.length + 1)) % 26
        cut = torch.randint(1, self.length, (self.rows, 1), generator=generator)
        position = torch.arange(self.length).expand(self.rows, -1)
        ids = 1 + (position >= cut).long()
        return MicroBatch(row[:, :-1], row[:, 1:], position, ids, (stride == 1).long().expand_as(ids))

    def train_dataloader(self) -> Iterator[Step]:
        tokens, step_tokens = self.tokens, self.rows * self.length * self.micro_batches
        while tokens < self.total:
            first = tokens // (self.rows * self.length)
            each = -(-self.micro_batches // self.ranks)
            numbers = range(self.rank, each * self.ranks, self.ranks)
            micro = [self.batch(first + i) if i < self.micro_batches else self.padding() for i in numbers]
            filled = sum(i >= self.micro_batches for i in numbers)
            yield Step(micro, tokens, {"tokens": tokens + step_tokens}, filled)
            tokens += step_tokens

    def padding(self) -> MicroBatch:
        return self.batch(0).padding()

    def share(self, rank: int, of: int) -> None:
        self.rank, self.ranks = rank, of

    def restore(self, state: Mapping[str, Any]) -> None:
        self.tokens = state["tokens"]

    def validation_batches(self) -> Iterator[MicroBatch]:
        for number in range(2):
            yield self.batch(1_000_000 + number)

    def validation_bytes(self) -> dict[str, int]:
        counts = torch.stack([b.domains_BT.flatten().bincount(minlength=2) for b in self.validation_batches()])
        return dict(zip(self.domains, counts.sum(0).tolist(), strict=True))

    def questions(self) -> list[Question]:
        return [Question("alphabet", "abcdefg", letter, "h") for letter in "hijk"]

    def samples(self) -> list[Sample]:
        return [Sample("completion", "abcd", None, "efgh"), Sample("infilling", "abcd", "ijkl", "efgh")]
