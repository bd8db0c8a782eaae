"""Prompts: `data=prompts`, for reinforcement learning and distillation, where the policy writes the answers.

A row is `{"prompt": "...", "answer": "...", "verifier": "exact"}`: a user's message (or a list of messages that ends
with the user's), and what its reward needs: `plugins/reward` says what each verifier reads of the row. An answer that
is text is what held-out rows are scored on.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.cache import digest
from data.example_store import Example
from data.examples import ExampleModule
from data.layout import document_order, mixture
from data.preferences import prompt_of, untrained
from dsv3.bounds import PositiveInt
from dsv3.contracts import Prompt, Step
from dsv3.prompts.chat import Message, chat_prompt, conversation


class Prompts(ExampleModule):
    """Prompts in DeepSeek's chat template, `global_batch_size` of them a step."""

    kind = "prompts"

    def __init__(self, *, max_answer_tokens: PositiveInt, **others: Any) -> None:
        """`max_answer_tokens`: room for the answer in a row of `sequence_length` tokens; longer prompts are left out.

        Raises:
            ValueError: as `ExampleModule`.
        """
        super().__init__(**others)
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
        question = {"prompt": prompt[-1].content, "answer": reply} if len(prompt) == 1 and reply else {}
        question |= {"family": row["family"]} if row.get("family") and question else {}
        item = {key: value for key, value in row.items() if key != "held_out"}
        content = json.dumps(item, ensure_ascii=False, sort_keys=True, default=str)
        return Example([document], content, row.get("held_out"), question, json.loads(content))

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        return (message.content for message in prompt_of(row))

    def setup(self, stage: str | None = None) -> None:
        super().setup(stage)
        if not self._items:
            self._items = [self._prompts(name) for name in self.domains]

    def _prompts(self, name: str) -> list[Prompt]:
        found = []
        for item in self._training[name].facts["items"]:
            messages = prompt_of(item)
            ids = chat_prompt(self.tokenizer, messages)
            if len(ids) <= self._longest:
                found.append(Prompt(ids, messages[-1].content, item, 0))
        if not found:
            raise ValueError(f"data.sources.{name}: no prompt leaves room for data.max_answer_tokens in a row")
        return found

    def stream_key(self) -> str:
        return digest([super().stream_key(), self._longest])

    def steps(self) -> Iterator[Step]:
        """Steps without end from where the datamodule stands: training ends them. Prompt i of a step goes to rank i
        modulo the number of ranks."""
        self.setup()
        key, given = self.stream_key(), 0
        table = mixture({name: source.weight for name, source in self.sources.items()}).tolist()
        if self._restored is not None:
            given = self._restored["prompts"]
        orders: dict[tuple[int, int], Sequence[int]] = {}
        while True:
            count = self.rows_per_step(given)
            own = [self._prompt(given + i, table, orders) for i in range(self._rank, count, self._ranks)]
            given += count
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
