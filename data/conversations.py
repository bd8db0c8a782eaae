"""Conversations: `data=conversations`, for supervised fine-tuning.

A row is `{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}`, with as many
turns as there are, and a message of the role `system` before the others if there is one. A reply with `"train": false`
is read and not trained on.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data.example_store import Example
from data.examples import ExampleModule, question_of
from dsv3.prompts.chat import Message, conversation

ROLES = ("system", "user", "assistant")


class Conversations(ExampleModule):
    """Conversations in DeepSeek's chat template; replies and the EOS that ends them are trained on."""

    kind = "conversations"

    def example(self, row: Mapping[str, Any]) -> Example:
        messages = messages_of(row)
        rendered = conversation(self.tokenizer, messages)  # refuses a conversation without a reply
        question = question_of(messages[:-1], messages[-1].content, row)
        return Example([rendered], json.dumps(messages, ensure_ascii=False), row.get("held_out"), question)

    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        return (message.content for message in messages_of(row))


def messages_of(row: Mapping[str, Any]) -> list[Message]:
    """The messages of a row.

    Raises:
        ValueError: it has none, or one of them is no message; says which.
    """
    messages = row.get("messages")
    if not isinstance(messages, list):
        raise ValueError(f"messages: must be a list of messages; the row has {sorted(row)}")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{number}]: must be an object with role and content")
        role, content, train = message.get("role"), message.get("content"), message.get("train")
        if role not in ROLES:
            raise ValueError(f"messages[{number}].role={role!r}: must be one of {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise ValueError(f"messages[{number}].content: must be text, not {type(content).__name__}")
        if not isinstance(train, bool | None):
            raise ValueError(f"messages[{number}].train={train!r}: must be true or false")
        found.append(Message(role, content, train is not False))
    return found
