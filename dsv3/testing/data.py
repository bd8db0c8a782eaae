"""Does a datamodule keep to `dsv3.contracts.Data`?"""

import json
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import lightning
import torch

from dsv3.contracts import IGNORE, MicroBatch, Question, Sample, Step
from dsv3.testing.requirement import require

STEPS = 4


def check_data(factory: Callable[..., Any], *, tokenizer: Callable[..., Any]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(tokenizer=)` is a datamodule that the core can use.

    tokenizer: called with `texts=` and `cache_dir=`, gives the tokenizer. The data must last for four steps.
    """
    data = _set_up(factory, tokenizer)
    _named(data)
    steps = _steps(data, STEPS)
    require(len(steps) == STEPS, f"the token budget must allow {STEPS} steps; the data ended after {len(steps)}")
    for step in steps:
        require(bool(step.micro_batches or step.prompts), "a step must have a micro-batch or a prompt")
        _prompts(step, data)
        for micro in step.micro_batches:
            _micro_batch(micro, data, "a training step")
            _chained(micro)
    _accounts(steps)
    _repeats(factory, tokenizer, steps)
    _resumes(factory, tokenizer, steps)
    _validation(data)
    _texts(data)


def _set_up(factory: Callable[..., Any], tokenizer: Callable[..., Any]) -> Any:
    data = factory(tokenizer=tokenizer)
    require(isinstance(data, lightning.LightningDataModule), "a datamodule is a lightning.LightningDataModule")
    data.setup("fit")
    return data


def _steps(data: Any, count: int) -> list[Step]:
    """The first steps, each state taken down before the next step is asked for and compared after all."""
    steps, written = [], []
    for step in islice(iter(data.train_dataloader()), count):
        require(isinstance(step, Step), f"train_dataloader() must give dsv3.contracts.Step, not {type(step).__name__}")
        try:
            written.append(json.dumps(step.state_after))
        except TypeError as error:
            raise AssertionError(f"`state_after` must be JSON-serialisable: {error}") from error
        steps.append(step)
    for step, text in zip(steps, written, strict=True):
        require(
            json.dumps(step.state_after) == text,
            "`state_after` of a step changed when later steps were asked for: copy it (Lightning loads a step ahead)",
        )
    return steps


def _named(data: Any) -> None:
    domains = list(data.domains)
    require(
        bool(domains) and all(isinstance(name, str) for name in domains) and len(set(domains)) == len(domains),
        f"`domains` must be different names, at least one; not {domains}",
    )
    require(hasattr(data, "tokenizer"), "after setup(), `tokenizer` must be the one that its factory gave")


def _accounts(steps: list[Step]) -> None:
    tokens = 0
    for step in steps:
        require(
            step.tokens_before == tokens,
            f"`tokens_before` must be {tokens}, the tokens of all steps before it (padding is none); not "
            f"{step.tokens_before}",
        )
        tokens += sum(int((micro.document_ids_BT > 0).sum()) for micro in step.micro_batches)


def _micro_batch(micro: MicroBatch, data: Any, where: str) -> None:
    shape, vocabulary = micro.tokens_BT.shape, data.tokenizer.vocab_size
    for name, tensor in zip(micro._fields, micro.packed, strict=False):
        require(
            tensor.dtype == torch.int64 and tensor.shape == shape and tensor.ndim == 2,
            f"{where}: {name} must be int64 {list(shape)}, not {tensor.dtype} {list(tensor.shape)}",
        )
    ids_BT, real_BT = micro.document_ids_BT, micro.targets_BT != IGNORE
    within = {
        "tokens_BT": (micro.tokens_BT, vocabulary),
        "targets_BT": (micro.targets_BT[real_BT], vocabulary),
        "positions_BT": (micro.positions_BT, shape[1]),
        "domains_BT": (micro.domains_BT, len(data.domains)),
    }
    for name, (tensor, end) in within.items():
        require(
            ((tensor >= 0) & (tensor < end)).all(), f"{where}: {name} must lie in 0..{end - 1} (targets: or IGNORE)"
        )
    of_documents_BT = ids_BT > 0
    require((ids_BT >= 0).all() and (ids_BT[:, :1] <= 1).all(), f"{where}: document ids count from 1 in each row")
    rise_BT = ids_BT[:, 1:] - ids_BT[:, :-1]
    both_BT = of_documents_BT[:, 1:] & of_documents_BT[:, :-1]
    require(((rise_BT == 0) | (rise_BT == 1) | ~both_BT).all(), f"{where}: document ids must count up by 1 in a row")
    require(not (real_BT & ~of_documents_BT).any(), f"{where}: padding (document id 0) must have IGNORE for its target")


def _prompts(step: Step, data: Any) -> None:
    numbers = [prompt.number for prompt in step.prompts]
    require(len(set(numbers)) == len(numbers), "the prompts of a step must have different numbers")
    for prompt in step.prompts:
        require(
            bool(prompt.ids) and all(0 <= token < data.tokenizer.vocab_size for token in prompt.ids),
            f"a prompt's ids must be tokens, at least one; not {prompt.ids}",
        )


def _chained(micro: MicroBatch) -> None:
    next_BT, targets_BT = micro.tokens_BT[:, 1:], micro.targets_BT[:, :-1]
    require(
        ((targets_BT == next_BT) | (targets_BT == IGNORE)).all(),
        "the target of a position must be the next token of its row, or IGNORE",
    )
    require((micro.targets_BT != IGNORE).any(), "a training micro-batch must have a target")


def _repeats(factory: Callable[..., Any], tokenizer: Callable[..., Any], steps: list[Step]) -> None:
    for step, other in zip(steps, _steps(_set_up(factory, tokenizer), STEPS), strict=True):
        require(_equal(step, other), "made again, the datamodule must give the same steps, bit for bit")


def _resumes(factory: Callable[..., Any], tokenizer: Callable[..., Any], steps: list[Step]) -> None:
    for done in range(1, STEPS):
        data = _set_up(factory, tokenizer)
        data.restore(json.loads(json.dumps(steps[done - 1].state_after)))
        rest = _steps(data, STEPS - done)
        require(
            len(rest) == STEPS - done and all(_equal(a, b) for a, b in zip(steps[done:], rest, strict=True)),
            f"restored from the state after step {done}, the data must go on with the steps that followed, bit for bit",
        )


def _equal(step: Step, other: Step) -> bool:
    mine, theirs = ((each.tokens_before, each.state_after, each.prompts) for each in (step, other))
    return mine == theirs and _same(step.micro_batches, other.micro_batches)


def _same(batches: Iterable[MicroBatch], others: Iterable[MicroBatch]) -> bool:
    mine, theirs = ([tensor for micro in each for tensor in micro.packed] for each in (batches, others))
    return len(mine) == len(theirs) and all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


def _validation(data: Any) -> None:
    batches = list(data.validation_batches())
    require(bool(batches), "validation_batches() must give a micro-batch")
    for micro in batches:
        _micro_batch(micro, data, "validation")
    require(_same(batches, data.validation_batches()), "validation_batches() must give the same at every call")
    found = {data.domains[int(domain)] for micro in batches for domain in micro.domains_BT.unique()}
    counts = dict(data.validation_bytes())
    require(
        found <= counts.keys() <= set(data.domains),
        f"validation_bytes() must have a number for each domain of the validation set, {sorted(found)}; it has "
        f"{sorted(counts)}",
    )
    for name, count in counts.items():
        require(isinstance(count, int) and count > 0, f"validation_bytes()[{name!r}] must be above 0, not {count!r}")


def _texts(data: Any) -> None:
    for name, kind in (("questions", Question), ("samples", Sample)):
        found = getattr(data, name)()
        require(
            isinstance(found, list) and all(isinstance(item, kind) for item in found),
            f"{name}() must be a list of dsv3.contracts.{kind.__name__}, empty if there are none",
        )
        require(getattr(data, name)() == found, f"{name}() must be the same at every call")
