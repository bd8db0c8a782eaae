"""Benchmarks of the model that `make train` makes, against lm-eval's own `hf` model on its export.

Both sides are as their users run them: the same number of requests at once, each in the number format that it chooses
for the run. A document of a multiple-choice task has four endings of one beginning; a document of a
generation task is continued by a fixed number of tokens.
"""

import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dsv3.bench.drafts import RUN
from dsv3.bench.measuring import Figure, interleaved
from dsv3.checkpoint.huggingface import export_run
from dsv3.checkpoint.loading import load_run
from dsv3.contracts import Data, Tokenizer
from dsv3.evaluation.held_out import held_out_data

AT_ONCE = 16
"""Requests, as `benchmarks.batch_size` stands."""
DOCUMENTS = 64
BEGINNING, ENDING, CHOICES = 160, 12, 4
"""Tokens of a beginning and of an ending, and endings of a document."""
PROMPT, ANSWER = 64, 64
"""Tokens of a prompt, and those written after it."""
GOAL = 2.0


def evaluation(repeats: int, device: torch.device, run: Path = RUN) -> Iterator[Figure]:
    """Documents per CPU second of both, and on how many answers they agree."""
    loaded = load_run(run, device=device)
    tokens = held_out_tokens(held_out_data(loaded))
    requests = {
        "multiple choice": choices(tokens, loaded.tokenizer()),
        "generation": prompts(tokens, loaded.tokenizer()),
    }
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        models = opened(loaded, Path(folder) / "exported", run)
        stack.enter_context(models["ours"].model.steady())
        for kind, asked in requests.items():
            answers: dict[str, Any] = {}

            def ask(side: str, kind: str = kind, asked: Any = asked, answers: dict[str, Any] = answers) -> None:
                model = models[side]
                call = model.loglikelihood if kind == "multiple choice" else model.generate_until
                answers[side] = call(asked, disable_tqdm=True)

            turns = {side: lambda side=side: ask(side) for side in models}  # type: ignore[misc]
            seconds = interleaved(turns, repeats=repeats, clock=time.process_time)
            yield compared(kind, seconds, alike(kind, answers))


def opened(loaded: Any, folder: Path, run: Path) -> Mapping[str, Any]:
    """Both as lm-eval models."""
    from lm_eval.models.huggingface import HFLM

    from dsv3.evaluation.benchmarks.adapter import Adapter
    from dsv3.evaluation.benchmarks.session import native_model

    export_run(run, folder, weights="live", mtp=False, dtype=torch.bfloat16, max_shard_bytes=2**30)
    device = str(loaded.model.device)
    return {
        "ours": Adapter(native_model(loaded, "live", engine="auto"), batch_size=AT_ONCE, seed=0),
        "theirs": HFLM(pretrained=str(folder), batch_size=AT_ONCE, device=device),
    }


def held_out_tokens(data: Data) -> list[int]:
    """All of them, one row after the other."""
    return [token for batch in data.validation_batches() for row in batch.tokens_BT.tolist() for token in row]


def choices(tokens: list[int], tokenizer: Tokenizer) -> list[Any]:
    """Beginnings evenly over the text; the endings are what follows there, and at three other places."""
    step = (len(tokens) - BEGINNING - ENDING) // DOCUMENTS
    starts = [number * step for number in range(DOCUMENTS)]
    endings = [tokens[start + BEGINNING : start + BEGINNING + ENDING] for start in starts]
    return [
        instance("loglikelihood", tokenizer, tokens[start : start + BEGINNING], tokenizer.decode(endings[other]))
        for number, start in enumerate(starts)
        for other in [(number + k) % DOCUMENTS for k in range(CHOICES)]
    ]


def prompts(tokens: list[int], tokenizer: Tokenizer) -> list[Any]:
    step = (len(tokens) - PROMPT) // DOCUMENTS
    how = {"until": [], "max_gen_toks": ANSWER, "do_sample": False}
    starts = range(0, step * DOCUMENTS, step)
    return [instance("generate_until", tokenizer, tokens[start : start + PROMPT], how) for start in starts]


def instance(kind: Any, tokenizer: Tokenizer, tokens: list[int], rest: Any) -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, (tokenizer.decode(tokens), rest), 0)


def alike(kind: str, answers: Mapping[str, Any]) -> int:
    """Documents whose best ending, or whose text, is the same on both sides."""
    if kind == "generation":
        return sum(map(str.__eq__, map(str, answers["ours"]), answers["theirs"]))
    ours, theirs = (torch.tensor([logp for logp, _ in answers[side]]).view(-1, CHOICES) for side in ("ours", "theirs"))
    return int((ours.argmax(1) == theirs.argmax(1)).sum())


def compared(kind: str, seconds: Mapping[str, float], same: int) -> Figure:
    ours, theirs = (DOCUMENTS / seconds[side] for side in ("ours", "theirs"))
    note = f"{ours:.1f} documents per CPU second against {theirs:.1f}; {same} of {DOCUMENTS} answers the same"
    return Figure("evaluation", f"{kind}, documents/s against lm-eval's hf model", ours / theirs, "x", GOAL, note=note)
