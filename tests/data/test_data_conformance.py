"""The datamodule passes `check_data`, and so does the tests' stand-in; datamodules with one fault each do not."""

import itertools
from functools import partial

import pytest
import torch

from dsv3.contracts import IGNORE
from dsv3.testing.data import check_data
from tests.synthetic import SyntheticData, byte_tokenizer

bytes_tokenizer = partial(byte_tokenizer, vocab_size=262)
SETTINGS = {
    "cache_dir": None, "seed": 1, "sequence_length": 16, "total_tokens": 16 * 16 * 6, "micro_batch_size": 4,
    "micro_batches": 2, "isolate_documents": False, "fim": {},
}  # fmt: skip


@pytest.mark.parametrize("changes", [{}, {"isolate_documents": True}])
def test_the_datamodule_conforms(make, tokenizer, changes):
    check_data(lambda *, tokenizer: make(tokenizer=tokenizer, **changes), tokenizer=lambda **_: tokenizer)


def test_the_stand_in_conforms():
    check_data(partial(SyntheticData, **SETTINGS), tokenizer=bytes_tokenizer)


class Changed(SyntheticData):
    """Each step is passed through `changed`, whose argument is a step."""

    def train_dataloader(self):
        return map(self.changed, super().train_dataloader())


class SkipsFirst(Changed):
    def changed(self, step):
        return step._replace(tokens_before=step.tokens_before + 128)


class Narrow(Changed):
    def changed(self, step):
        return step._replace(micro_batches=[micro._replace(domains_BT=micro.domains_BT.int()) for micro in step[0]])


class TargetsAreInputs(Changed):
    def changed(self, step):
        return step._replace(micro_batches=[micro._replace(targets_BT=micro.tokens_BT) for micro in step[0]])


class ZeroBased(Changed):
    def changed(self, step):
        return step._replace(
            micro_batches=[micro._replace(document_ids_BT=micro.document_ids_BT - 1) for micro in step[0]]
        )


class Skipping(Changed):
    def changed(self, step):
        return step._replace(
            micro_batches=[
                micro._replace(document_ids_BT=micro.document_ids_BT * 2 - 1) for micro in step.micro_batches
            ]
        )


class NoTargets(Changed):
    def changed(self, step):
        return step._replace(
            micro_batches=[micro._replace(targets_BT=micro.targets_BT.clone().fill_(IGNORE)) for micro in step[0]]
        )


class UnknownDomain(Changed):
    def changed(self, step):
        return step._replace(micro_batches=[micro._replace(domains_BT=micro.domains_BT + 2) for micro in step[0]])


class TensorState(Changed):
    def changed(self, step):
        return step._replace(state_after={"tokens": torch.tensor(1)})


class SharedState(Changed):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.state = {}

    def changed(self, step):
        self.state |= step.state_after
        return step._replace(state_after=self.state)


class NeverTheSame(Changed):
    calls = itertools.count()

    def changed(self, step):
        return step._replace(
            micro_batches=[
                micro._replace(domains_BT=micro.domains_BT * (next(self.calls) % 3 > 0)) for micro in step[0]
            ]
        )


class StartsOver(SyntheticData):
    def restore(self, state):
        pass


class ShortBudget(SyntheticData):
    def __init__(self, **settings):
        super().__init__(**settings)
        self.total = 200


class RandomValidation(SyntheticData):
    calls = itertools.count(10_000)

    def validation_batches(self):
        yield self.batch(next(self.calls))


class OneDomainCounted(SyntheticData):
    def validation_bytes(self):
        return {"letters": 100}


class PlainTuples(SyntheticData):
    def samples(self):
        return [("completion", "abcd", None, "efgh")]


class SameNames(SyntheticData):
    domains = ("letters", "letters")


class NoModule:
    def __init__(self, **settings):
        pass


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (NoModule, "LightningDataModule"),
        (SameNames, "different names"),
        (ShortBudget, "ended after 2"),
        (SkipsFirst, "`tokens_before` must be 0"),
        (Narrow, "domains_BT must be int64"),
        (TargetsAreInputs, "must be the next token"),
        (ZeroBased, "padding .document id 0. must have IGNORE"),
        (Skipping, "count up by 1"),
        (NoTargets, "must have a target"),
        (UnknownDomain, r"domains_BT must lie in 0..1"),
        (TensorState, "JSON-serialisable"),
        (SharedState, "copy it"),
        (NeverTheSame, "made again"),
        (StartsOver, "restored from the state after step 1"),
        (RandomValidation, "the same at every call"),
        (OneDomainCounted, "must have a number for each domain"),
        (PlainTuples, "dsv3.contracts.Sample"),
    ],
)
def test_faulty_datamodules_are_found(data, words):
    with pytest.raises(AssertionError, match=words):
        check_data(partial(data, **SETTINGS), tokenizer=bytes_tokenizer)
