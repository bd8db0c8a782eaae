"""Preferences: `data=preferences`, for direct preference optimisation.

A row is `{"prompt": "...", "chosen": "...", "rejected": "..."}`: a user's message (or a list of messages that ends with
the user's), the reply that is preferred and the one that is not.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data.conversations import messages_of
from data.example_store import Example
from data.examples import ExampleModule, question_of
from dsv3.contracts import IGNORE, MicroBatch
from dsv3.prompts.chat import Message, conversation


class Preferences(ExampleModule):
    """Pairs of conversations that differ in the last reply; the chosen one comes first, and they share a row."""

    kind = "preferences"

    def example(self, row: Mapping[str, Any]) -> Example:
        prompt, (chosen, rejected) = prompt_of(row), replies_of(row)
        documents = [
            conversation(self.tokenizer, [*untrained(prompt), Message("assistant", reply)])
            for reply in (chosen, rejected)
        ]
        question = question_of(prompt, chosen, row)
        content = json.dumps([prompt, chosen, rejected], ensure_ascii=False)
        return Example(documents, content, row.get("held_out"), question)

    def validation_batches(self) -> Iterator[MicroBatch]:
        """The chosen replies alone: the first, third, ... document of each row."""
        for micro in self.held_out_rows():
            is_rejected_BT = micro.document_ids_BT % 2 == 0
            yield micro._replace(targets_BT=micro.targets_BT.masked_fill(is_rejected_BT, IGNORE))

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        return iter([*(message.content for message in prompt_of(row)), *replies_of(row)])


def prompt_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages before the reply.

    Raises:
        ValueError: there are none, or one of them is no message.
    """
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return [Message("user", prompt)]
    if not isinstance(prompt, list):
        raise ValueError(f"prompt: must be a user's message, or a list of messages; the row has {sorted(row)}")
    return messages_of({"messages": prompt})


def untrained(messages: list[Message]) -> list[Message]:
    """The same messages, none of which is trained on."""
    return [message._replace(train=False) for message in messages]


def replies_of(row: Mapping[str, Any]) -> tuple[str, str]:
    """The chosen and the rejected reply.

    Raises:
        ValueError: one of them is missing, or they are equal.
    """
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), str):
            raise ValueError(f"{key}: must be a reply, as text; the row has {sorted(row)}")
    if row["chosen"] == row["rejected"]:
        raise ValueError("chosen and rejected are equal: such a pair says nothing")
    return row["chosen"], row["rejected"]
