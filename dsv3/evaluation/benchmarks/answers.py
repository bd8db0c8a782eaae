"""Bits per byte of the target: a metric for every task that improves long before accuracy leaves zero.

    answer bpb = - sum_documents log2 p(right answer | prompt) / sum_documents UTF-8 bytes of the right answer

The prompt is the one that the task itself used, shots included; the answer is the task's target as lm-eval writes it
into a few-shot example, its delimiter included.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from lm_eval.api.instance import Instance
from lm_eval.utils import apply_template

from dsv3.evaluation.benchmarks.adapter import Adapter
from dsv3.evaluation.benchmarks.code import runs_code
from dsv3.evaluation.benchmarks.remote import RemoteAdapter


class AnswerBits(NamedTuple):
    """Of one document."""

    bits: float
    n_bytes: int


def answer_bits(
    task: Any, samples: Sequence[dict[str, Any]], adapter: Adapter | RemoteAdapter, answer: str | None
) -> list[AnswerBits]:
    """Of every sample that lm-eval logged, in its order; empty where the task has no right answer in words.

    `answer`: a template of the document that gives the right answer, where the task's own target is something else,
    such as the tests of a program.
    """
    own_target_is_answer = not runs_code(task) or task.config.metadata.get("target") == "answer"
    if task.OUTPUT_TYPE in ("loglikelihood_rolling", "play") or (answer is None and not own_target_is_answer):
        return []
    pairs, known = [], []
    for sample in samples:
        if task.OUTPUT_TYPE == "multiple_choice":
            gold = _gold(task, sample["doc"])
            known.append(_bits(float(sample["resps"][gold][0][0]), sample["arguments"][gold][1]))
        elif task.OUTPUT_TYPE == "loglikelihood":
            known.append(_bits(float(sample["resps"][0][0][0]), sample["arguments"][0][1]))
        else:
            target = apply_template(answer, sample["doc"]) if answer else sample["target"]
            text = str(target[0] if isinstance(target, list) else target)
            pairs.append((sample["arguments"][0][0], f"{task.config.target_delimiter}{text}"))
    if pairs:
        requests = [Instance("loglikelihood", {}, pair, 0, (None, None, 1)) for pair in pairs]
        scores = adapter.loglikelihood(requests, disable_tqdm=True)
        known = [_bits(score, pair[1]) for (score, _), pair in zip(scores, pairs, strict=True)]
    return known


def _bits(log_probability: float, text: str) -> AnswerBits:
    return AnswerBits(-log_probability / math.log(2), len(text.encode()))


def _gold(task: Any, doc: dict[str, Any]) -> int:
    """The right choice; the first of several."""
    gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    if isinstance(gold, list):
        gold = gold[0]
    return gold if isinstance(gold, int) else task.doc_to_choice(doc).index(gold)
