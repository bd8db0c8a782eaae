"""Benchmark suites: tasks with their few-shot examples and samples, and running one of them.

A suite is a file in conf/benchmarks/. Every task runs by itself, so that one that fails stops no other and results can
be written, and an interrupted evaluation continued, task by task.
"""

import logging
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Literal

import lm_eval.api.task
import numpy as np
import torch
from lm_eval.evaluator import evaluate
from tqdm import tqdm

from dsv3.bounds import NonNegativeFloat, NonNegativeInt, PositiveInt
from dsv3.config.moved import answer
from dsv3.evaluation.agents.shown import won_and_lost
from dsv3.evaluation.benchmarks.adapter import Adapter
from dsv3.evaluation.benchmarks.answers import AnswerBits, answer_bits
from dsv3.evaluation.benchmarks.code import runs_code, sandbox_in_use
from dsv3.evaluation.benchmarks.remote import RemoteAdapter
from dsv3.evaluation.benchmarks.shots import FittingShots
from dsv3.evaluation.benchmarks.statistics import ratio_estimate
from dsv3.evaluation.benchmarks.tasks import TaskFinder, UnavailableError
from dsv3.sandbox import Sandbox

BOOTSTRAP = 1000
"""Draws for the standard error of metrics that have no closed form; means have one."""

ANSWER_BPB = "answer_bpb"


@dataclass(frozen=True)
class Entry:
    """How one task runs. None: as the task itself says."""

    limit: PositiveInt | None = None  # documents, from the first
    num_fewshot: NonNegativeInt | None = None  # few-shot examples
    num_samples: PositiveInt | None = None  # generations for each document, of tasks that give pass@k
    temperature: NonNegativeFloat | None = None  # of sampling; with more than one sample 0.8 where nothing is said
    answer: str | None = None  # template of the right answer in words, where the task's own target is none
    actions: Literal["likelihood", "text"] | None = None  # how an agent's action is taken from the model
    history: NonNegativeInt | None = None  # earlier steps in an agent's prompt
    steps: PositiveInt | None = None  # of an agent's episode, at most

    def changed(self, **settings: Any) -> "Entry":
        """A copy in which the settings that are not None replace this one's."""
        return Entry(**(asdict(self) | {key: value for key, value in settings.items() if value is not None}))


def entries(suite: Mapping[str, Any]) -> dict[str, Entry]:
    """The tasks of a composed conf/benchmarks/*.yaml.

    Raises:
        ValueError: a task has a setting that does not exist.
    """
    result = {}
    known = list(Entry.__dataclass_fields__)
    for name, settings in suite["tasks"].items():
        for setting, value in (settings or {}).items():
            if setting not in known:
                message = answer(setting, value, known) or f"unknown setting; must be one of {', '.join(known)}"
                raise ValueError(f"benchmarks.tasks.{name}.{setting}={value}: {message}")
        result[name] = Entry(**(settings or {}))
    return result


@dataclass
class Outcome:
    """What a task, or a group of tasks, came to."""

    results: dict[str, Any]  # lm-eval's results, without samples
    samples: dict[str, list[dict[str, Any]]]  # by task
    shots_used: dict[str, float]  # mean over the documents, by task
    seconds: float
    episodes: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # to look at, by task of agents


class Suite:
    """Runs tasks on one model."""

    def __init__(self, adapter: Adapter | RemoteAdapter, finder: TaskFinder, sandbox: Sandbox, *, seed: int) -> None:
        self.adapter, self.finder, self.sandbox, self.seed = adapter, finder, sandbox, seed

    def run(self, name: str, entry: Entry) -> Outcome:
        """Run one task, group or tag. The process's random number generators are left as they were.

        Raises:
            UnavailableError: it cannot run here.
        """
        started = time.perf_counter()
        with random_state(self.seed), quiet(), sandbox_in_use(self.sandbox), self.adapter.model.steady():
            loaded = self.finder.load(name, self.sandbox)
            tasks = loaded["tasks"]
            shots = {key: self._prepare(task, entry) for key, task in tasks.items()}
            try:
                results: Any = evaluate(
                    self.adapter,
                    loaded,
                    limit=entry.limit,
                    bootstrap_iters=BOOTSTRAP,
                    confirm_run_unsafe_code=True,
                )
                samples = results.pop("samples")
                episodes = {key: self._episodes(samples[key]) for key, t in tasks.items() if t.OUTPUT_TYPE == "play"}
                bits = {key: self._answer_bits(task, samples[key], entry) for key, task in tasks.items()}
            except Exception as error:  # what a task's own code raises is up to it
                raise UnavailableError(f"{type(error).__name__}: {error}") from error
        add_answer_bits(results, bits)
        used = {key: float(np.mean(fitting.used)) for key, fitting in shots.items()}
        return Outcome(results, samples, used, time.perf_counter() - started, episodes)

    def _prepare(self, task: Any, entry: Entry) -> FittingShots:
        count = entry.num_fewshot if entry.num_fewshot is not None else task.get_config("num_fewshot") or 0
        task.set_config(key="num_fewshot", value=count)
        task.set_fewshot_seed(seed=self.seed)
        takes_samples = runs_code(task) or task.config.metadata.get("samples")
        if takes_samples and entry.num_samples is not None:
            task.set_config(key="repeats", value=entry.num_samples)
        if task.OUTPUT_TYPE == "generate_until" and (entry.temperature or (entry.num_samples or 1) > 1):
            sampling = {"do_sample": True, "temperature": entry.temperature or 0.8}
            task.set_config(key="generation_kwargs", value=sampling, update=True)
        if task.OUTPUT_TYPE == "play":
            wanted = {key: getattr(entry, key) for key in ("actions", "history", "steps", "temperature")}
            changed = {key: value for key, value in wanted.items() if value is not None}
            task.set_config(key="generation_kwargs", value=changed, update=True)
        fitting = FittingShots(task, self.adapter)
        task.fewshot_context = fitting
        return fitting

    def _episodes(self, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those to look at. In the samples a line stands for the filtered response, a second copy of the episode."""
        played = [sample["resps"][0][0] for sample in samples]
        for sample, one in zip(samples, played, strict=True):
            actions = ", ".join(str(step["action"]) for step in one["trajectory"])
            sample["filtered_resps"] = [f"progress {one['progress']:.2f}: {actions}"]
        return [self.adapter.explained(one) for one in won_and_lost(played)]

    def _answer_bits(self, task: Any, samples: list[dict[str, Any]], entry: Entry) -> list[AnswerBits]:
        """Of each document; also written into its samples (one for each of the task's filters)."""
        first = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        bits = answer_bits(task, first, self.adapter, entry.answer)
        by_document = {sample["doc_id"]: of_document for sample, of_document in zip(first, bits)}
        for sample in samples:
            if sample["doc_id"] in by_document:
                of_document = by_document[sample["doc_id"]]
                sample.update(answer_bits=of_document.bits, answer_bytes=of_document.n_bytes)
        return bits


def add_answer_bits(results: dict[str, Any], bits: Mapping[str, list[AnswerBits]]) -> None:
    """Bits per byte of the right answer, for every task that has one, and for groups over all their documents."""
    members = {name: [name] for name in bits} | dict(results["group_subtasks"])
    for name, tasks in members.items():
        pooled = [of_document for task in _leaves(tasks, members) for of_document in bits.get(task, [])]
        if pooled:
            estimate = ratio_estimate(*map(list, zip(*pooled, strict=True)))
            scores = {f"{ANSWER_BPB},none": estimate.value, f"{ANSWER_BPB}_stderr,none": estimate.stderr}
            results["results"].setdefault(name, {"alias": name}).update(scores)
            results["higher_is_better"].setdefault(name, {})[ANSWER_BPB] = False


def _leaves(tasks: list[str], members: Mapping[str, list[str]]) -> Iterator[str]:
    for task in tasks:
        if members.get(task, [task]) == [task]:
            yield task
        else:
            yield from _leaves(members[task], members)


@contextmanager
def random_state(seed: int) -> Iterator[None]:
    """Seeds Python's, NumPy's and PyTorch's generators, and puts their states back after."""
    before = random.getstate(), np.random.get_state(), torch.random.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.random.set_rng_state(before[2])


@contextmanager
def quiet() -> Iterator[None]:
    """lm-eval's advice to its own users and its progress bars stay off the console."""
    logger = logging.getLogger("lm_eval")
    level, bar = logger.level, lm_eval.api.task.tqdm
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = partial(tqdm, disable=True)
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bar
