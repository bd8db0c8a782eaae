"""Prompts: `data=prompts`, for reinforcement learning and distillation, where the policy writes the answers.

A row is `{"prompt": "...", "answer": "...", "verifier": "exact"}`: a user's message (or a list of messages that ends
with the user's), and what its reward needs: `plugins/reward` says what each verifier reads of the row. An answer that
is text is what held-out rows are scored on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from data.cache import digest
from data.example_store import TRAINED, Example, StoredExamples
from data.examples import ExampleModule, key_of, question_of
from data.held_out import evenly
from data.layout import document_order, mixture
from data.preferences import prompt_of, untrained
from dsv3.bounds import PositiveInt
from dsv3.contracts import Prompt, Step
from dsv3.environments import in_turns
from dsv3.prompts.chat import Message, conversation


class Prompts(ExampleModule):
    """Prompts in DeepSeek's chat template, `global_batch_size` of them a step."""

    kind = "prompts"

    def __init__(self, *, max_answer_tokens: PositiveInt, steps_per_prompt: PositiveInt = 1, **others: Any) -> None:
        """`max_answer_tokens`: room for the answer in a row of `sequence_length` tokens; longer prompts are left out.
        `steps_per_prompt`: steps in a row that have the same prompts.

        Raises:
            ValueError: as `ExampleModule`.
        """
        super().__init__(**others)
        if steps_per_prompt < 1:
            raise ValueError(f"data.steps_per_prompt={steps_per_prompt}: must be at least 1")
        self._steps_per_prompt = steps_per_prompt
        self._longest = self._length - max_answer_tokens
        if self._longest < 1:
            raise ValueError(
                f"data.max_answer_tokens={max_answer_tokens}: must leave room for prompts in "
                f"data.sequence_length={self._length - 1}"
            )
        self._items: list[list[Prompt]] = []

    def example(self, row: Mapping[str, Any]) -> Example:
        """Prompt and right answer, for held-out rows; the row itself for training."""
        prompt, answer = prompt_of(row), row.get("answer")
        reply = answer if isinstance(answer, str) else ""
        document = conversation(self.tokenizer, [*untrained(prompt), Message("assistant", reply)])
        question = question_of(prompt, reply, row) if reply else {}
        item = {key: value for key, value in row.items() if key != "held_out"}
        content = json.dumps(item, ensure_ascii=False, sort_keys=True, default=str)
        return Example([document], content, row.get("held_out"), question, json.loads(content))

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        return (message.content for message in prompt_of(row))

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if not self._items:
            self._items = [self._prompts(name) for name in self._training]

    def left_out(self, training: StoredExamples) -> int:
        return sum(len(ids) > self._longest for ids in _prompt_ids(training))

    def _prompts(self, name: str) -> list[Prompt]:
        found = self._short_prompts(self._training[name])
        if not found:
            raise ValueError(
                f"{key_of(name)}: no prompt leaves room for data.max_answer_tokens={self._length - self._longest} in "
                f"data.sequence_length={self._length - 1}"
            )
        return found

    def _short_prompts(self, stored: StoredExamples) -> list[Prompt]:
        """Those that leave room for an answer."""
        return [
            Prompt(ids.tolist(), prompt_of(item)[-1].content, item, 0)
            for ids, item in zip(_prompt_ids(stored), stored.facts["items"], strict=True)
            if len(ids) <= self._longest
        ]

    def prompts(self) -> list[Prompt]:
        """All that training may ask."""
        self.setup()
        return [prompt for of_domain in self._items for prompt in of_domain]

    def held_out_prompts(self) -> list[Prompt]:
        """At most `data.questions`, as many of each family as there can be. Those that open episodes are left out:
        their turns cost more than a validation may."""
        families: dict[tuple[str, str], list[Prompt]] = {}
        for name, held_out in self._kept().items():
            for prompt in self._short_prompts(held_out):
                if not in_turns(prompt.item):
                    families.setdefault((name, str(prompt.item.get("family"))), []).append(prompt)
        chosen = evenly(list(families.values()), self._n_questions)
        return [prompt._replace(number=number) for number, prompt in enumerate(chosen)]

    def stream_key(self) -> str:
        repeated = [] if self._steps_per_prompt == 1 else [self._steps_per_prompt]
        return digest([super().stream_key(), self._longest, *repeated])

    def steps(self) -> Iterator[Step]:
        """Steps without end from where the datamodule stands: training ends them. Prompt i of a step goes to rank i
        modulo the number of ranks."""
        self.setup()
        key, given, first = self.stream_key(), 0, 0
        table = mixture({name: source.weight for name, source in self.sources.items()}).tolist()
        if self._restored is not None:
            given, first = self._restored["prompts"], self._restored.get("steps_with_them", 0)
        orders: dict[tuple[int, int], Sequence[int]] = {}
        while True:
            count = self.rows_per_step(given)
            if count < self._ranks:
                raise ValueError(
                    f"data.global_batch_size={count}: must be at least the number of ranks that share the prompts, "
                    f"{self._ranks}"
                )
            own = [self._prompt(given + i, table, orders) for i in range(self._rank, count, self._ranks)]
            for step in range(first + 1, self._steps_per_prompt):
                yield Step([], 0, {"stream": key, "prompts": given, "steps_with_them": step}, prompts=own)
            given, first = given + count, 0
            yield Step([], 0, {"stream": key, "prompts": given}, prompts=own)

    def _prompt(self, number: int, table: Sequence[int], orders: dict[tuple[int, int], Sequence[int]]) -> Prompt:
        """Prompt `number` of the run: a domain's prompts in an order of each epoch's own."""
        periods, place = divmod(number, len(table))
        domain = table[place]
        of_domain = periods * table.count(domain) + table[:place].count(domain)
        epoch, index = divmod(of_domain, len(self._items[domain]))
        if (domain, epoch) not in orders:
            orders[domain, epoch] = document_order(
                len(self._items[domain]), seed=self._seed, domain=self.domains[domain], epoch=epoch
            ).tolist()
        return self._items[domain][orders[domain, epoch][index]]._replace(number=number)


def _prompt_ids(training: StoredExamples) -> Iterator[np.ndarray]:
    """Of each example the tokens before the reply, which alone is trained on."""
    for index in range(len(training.ends)):
        ids = training.example(index)
        yield ids[ids < TRAINED]
