"""DeepSeek-V3's chat template, as token ids:

    <bos>{system}<User>{message}<Assistant>{reply}<eos><User>{message}<Assistant>{reply}<eos>

It is made of ids, not of text: a message that spells a special token is encoded as plain text and cannot end its turn.
`CHAT_TEMPLATE` says the same to transformers, whose `apply_chat_template` gives the same ids for all other messages.
"""

# ruff: noqa: RUF001 (DeepSeek writes its special tokens with a fullwidth bar)
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}"
    "{% elif message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] + '<｜Assistant｜>' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% endif %}"
    "{% endfor %}"
)
"""The Jinja template that a tokenizer is saved with. The prompt of a reply always ends with `<｜Assistant｜>`."""


class Message(NamedTuple):
    role: Literal["system", "user", "assistant"]
    content: str
    train: bool = True  # of a reply: whether its tokens are trained on


class Rendered(NamedTuple):
    """A conversation as tokens."""

    ids: list[int]
    trained: list[bool]  # of each: whether it is trained on: replies and the EOS that ends them


def conversation(tokenizer: "Tokenizer", messages: Sequence[Message]) -> Rendered:
    """A whole conversation, which ends with a reply.

    Raises:
        ValueError: the tokenizer has no tokens for turns, or the messages come in another order.
    """
    _check_order(messages, last="assistant")
    return _render(tokenizer, messages)


def chat_prompt(tokenizer: "Tokenizer", messages: Sequence[Message]) -> list[int]:
    """Ids to be continued by the assistant's reply, up to EOS.

    messages: a system message, if there is one, then user and assistant in turn, the last one the user's.

    Raises:
        ValueError: the tokenizer has no tokens for turns, or the messages come in another order.
    """
    _check_order(messages, last="user")
    return _render(tokenizer, messages).ids


def prompt_ids(tokenizer: "Tokenizer", text: str, *, chat: bool) -> list[int]:
    """Ids of a text to be continued; `chat`: of a user's message to be answered."""
    return chat_prompt(tokenizer, [Message("user", text)]) if chat else [tokenizer.bos, *tokenizer.encode(text)]


def _render(tokenizer: "Tokenizer", messages: Sequence[Message]) -> Rendered:
    user, assistant = getattr(tokenizer, "user", None), getattr(tokenizer, "assistant", None)
    if user is None or assistant is None:
        raise ValueError("chat: this tokenizer has no tokens for the turns of user and assistant")
    rendered = Rendered([tokenizer.bos], [False])
    for message, content in zip(messages, tokenizer.encode_batch([message.content for message in messages])):
        is_trained = False
        if message.role == "user":
            content = [user, *content, assistant]
        elif message.role == "assistant":
            content, is_trained = [*content, tokenizer.eos], message.train
        rendered.ids.extend(content)
        rendered.trained.extend([is_trained] * len(content))
    return rendered


def _check_order(messages: Sequence[Message], *, last: Literal["user", "assistant"]) -> None:
    roles = [message.role for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if turns != expected or turns[-1:] != [last]:
        given = ", ".join(roles) or "none"
        raise ValueError(f"messages: must be user and assistant in turn, ending with {last}; roles given: {given}")
