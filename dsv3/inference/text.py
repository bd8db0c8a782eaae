"""Incremental detokenisation with stop strings."""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]
"""Text of ids; bytes that are not UTF-8, such as a part of a character, become U+FFFD."""

WINDOW = 4
"""Ids that are decoded together, so that a long text is not decoded anew with every token."""
PART = "\ufffd"


def cut_at(stops: Sequence[str], text: str) -> str:
    """The text before the stop string that is complete first, as it is when the text is read token by token."""
    ends = [(start + len(stop), start) for stop in stops if (start := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else text


class TextStream:
    """Gives out whole characters, and none that may turn out to be the beginning of a stop string."""

    def __init__(self, decode: Decode, stops: Sequence[str]) -> None:
        self.decode, self.stops = decode, stops
        self.window: list[int] = []  # the latest ids
        self.taken = 0  # characters of the window's text that went to `pending`
        self.pending = ""

    def push(self, token: int) -> tuple[str, bool]:
        """Text to show now, and whether a stop string ended it."""
        self.window.append(token)
        text = self.decode(self.window)
        self._take(text.rstrip(PART))  # a character may end in the next token
        if len(self.window) >= WINDOW and not text.endswith(PART):
            # The last id stays: a tokenizer may write the first one of a text in another way.
            self.window = self.window[-1:]
            self.taken = len(self.decode(self.window))
        cut = cut_at(self.stops, self.pending)
        if len(cut) < len(self.pending):
            self.pending = ""
            return cut, True
        held = self._held()
        shown, self.pending = cut[: len(cut) - held], cut[len(cut) - held :]
        return shown, False

    def finish(self) -> str:
        """What was held back, when the row ends without a stop string."""
        self._take(self.decode(self.window))
        return cut_at(self.stops, self.pending)

    def _take(self, text: str) -> None:
        self.pending += text[self.taken :]
        self.taken = max(self.taken, len(text))

    def _held(self) -> int:
        """Length of the longest end of the pending text that a stop string begins with."""
        longest = max(map(len, self.stops), default=1) - 1
        for length in range(min(longest, len(self.pending)), 0, -1):
            if any(stop.startswith(self.pending[-length:]) for stop in self.stops):
                return length
        return 0
