"""The prompt of a conversation, in DeepSeek-V3's template:

    <bos>{system}<User>{message}<Assistant>{reply}<eos><User>{message}<Assistant>

It is made of token ids, not of text: a message that spells a special token is encoded as plain text and cannot end its
turn.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from dsv3.contracts import HasChatTokens, Tokenizer


class Message(NamedTuple):
    role: Literal["system", "user", "assistant"]
    content: str


def chat_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Ids to be continued by the assistant's reply, up to EOS.

    messages: a system message, if there is one, then user and assistant in turn, the last one the user's.

    Raises:
        ValueError: the tokenizer has no tokens for turns, or the messages come in another order.
    """
    if not isinstance(tokenizer, HasChatTokens):
        raise ValueError("chat: this tokenizer has no tokens for the turns of user and assistant")
    ids = [tokenizer.bos]
    turns = list(messages)
    if turns and turns[0].role == "system":
        ids += tokenizer.encode(turns.pop(0).content)
    expected = ["user" if place % 2 == 0 else "assistant" for place in range(len(turns))]
    if [turn.role for turn in turns] != expected or len(turns) % 2 == 0:
        given = ", ".join(message.role for message in messages) or "none"
        raise ValueError(f"messages: must be user and assistant in turn, ending with user; roles given: {given}")
    for turn in turns:
        if turn.role == "user":
            ids += [tokenizer.user, *tokenizer.encode(turn.content), tokenizer.assistant]
        else:
            ids += [*tokenizer.encode(turn.content), tokenizer.eos]
    return ids
