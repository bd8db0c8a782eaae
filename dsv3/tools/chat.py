"""Talk to a trained model in the terminal."""

import sys
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from dsv3.bounds import Fraction, NonNegativeFloat, PositiveInt, Seed
from dsv3.cli import ENGINE_HELP, ENGINES, REQUIRED, option

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer
    from dsv3.inference.engines import Source
    from dsv3.inference.sampling import Settings
    from dsv3.prompts.chat import Message

HELP = """/system TEXT   a system message, for a new conversation; without TEXT: none
/reset         forget the conversation
/seed NUMBER   of sampling; the next reply is drawn with it
/help          this list
/quit          or the end of input"""


@dataclass
class Options:
    checkpoint: str = option(REQUIRED, "a run folder, or one of its checkpoint files")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    system: str = option("", "a system message")
    max_tokens: PositiveInt = option(128, "maximum number of tokens of a reply")
    temperature: NonNegativeFloat = option(0.0, "0: greedy decoding; 1: sample from the model's distribution")
    top_p: Fraction = option(1.0, "nucleus sampling: cumulative probability kept")
    seed: Seed = option(0, "sampling seed; each reply is drawn with the next one")
    allow: list[str] = option([], "classes outside conf/ that the run's config.yaml may name: [package.Class]")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))
    engine: str = option("auto", ENGINE_HELP, choices=ENGINES)


def run(options: Options) -> dict[str, Any]:
    """Answer line after line of stdin, and return the conversation.

    Raises:
        ValueError: an option is out of its range, or the tokenizer has no tokens for turns.
        FileNotFoundError: `checkpoint` is not a run's.
    """
    from dsv3.checkpoint.loading import load_run
    from dsv3.inference.engines import source_of
    from dsv3.inference.sampling import Settings
    from dsv3.runtime import device_named

    loaded = load_run(options.checkpoint, device=device_named(options.device), allow=options.allow)
    loaded.use(options.weights)
    tokenizer = loaded.tokenizer()
    settings = Settings(
        max_tokens=options.max_tokens,
        temperature=options.temperature,
        top_p=options.top_p,
        seed=options.seed,
        eos=(tokenizer.eos,),
    )
    source = source_of(loaded.model, loaded.config, options.engine)
    talk = Talk(source, tokenizer, settings, loaded.config.data.sequence_length)
    talk.begin(options.system)
    if sys.stdin.isatty():
        print(f"{loaded.folder.path}, {loaded.tokens:,} tokens. /help lists commands.")
    while (line := read_line()) is not None:
        if line.startswith("/"):
            if talk.command(line) == "quit":
                break
        elif line.strip():
            talk.answer(line)
    return {"messages": [message._asdict() for message in talk.messages]}


def read_line() -> str | None:
    """The user's next line; None at the end of input."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


@dataclass
class Talk:
    """A conversation with a model, or with a backend over its weights."""

    source: "Source"
    tokenizer: "Tokenizer"
    settings: "Settings"
    trained_length: int  # tokens of the rows that the model was trained on
    messages: list["Message"] = field(default_factory=list)
    system: str = ""

    def begin(self, system: str) -> None:
        """A new conversation."""
        from dsv3.prompts.chat import Message

        self.system = system
        self.messages = [Message("system", system)] if system else []

    def command(self, line: str) -> str:
        """Obey a line that begins with a slash; return its name."""
        name, _, rest = line[1:].partition(" ")
        if name == "system":
            self.begin(rest.strip())
        elif name == "reset":
            self.begin(self.system)
        elif name == "seed" and rest.strip().lstrip("-").isdigit():
            try:
                self.settings = replace(self.settings, seed=int(rest))
            except ValueError as error:
                print(error)
        elif name != "quit":
            print(HELP)
        return name

    def answer(self, text: str) -> None:
        """Stream a reply, and keep it. The oldest turns are forgotten where the conversation outgrows the model."""
        from dsv3.inference.generation import stream
        from dsv3.prompts.chat import Message

        self.messages.append(Message("user", text))
        reply = ""
        for event in stream(self.source, self._prompt(), self.settings, decode=self.tokenizer.decode):
            reply += event.text
            print(event.text, end="", flush=True)
        print()
        self.messages.append(Message("assistant", reply))
        self.settings = replace(self.settings, seed=(self.settings.seed + 1) % 2**63)

    def _prompt(self) -> list[int]:
        from dsv3.prompts.chat import chat_prompt

        first = len(self.messages[:1]) if self.system else 0
        while True:
            prompt = chat_prompt(self.tokenizer, self.messages)
            if len(prompt) + self.settings.max_tokens <= self.trained_length or len(self.messages) <= first + 1:
                return prompt
            del self.messages[first : first + 2]
