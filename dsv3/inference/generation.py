"""Generation for one prompt, streamed: a loop over the engine."""

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing

from dsv3.inference.engine import Engine
from dsv3.inference.engines import Source, backend_of, weights_stay
from dsv3.inference.row import Event
from dsv3.inference.sampling import Choice, Settings
from dsv3.inference.speculation import Speculation
from dsv3.inference.text import Decode


def stream(
    source: Source,
    prompt: Sequence[int],
    settings: Settings,
    *,
    decode: Decode | None = None,
    choice: Choice | None = None,
    speculation: Speculation | None = None,
) -> Generator[Event, None, None]:
    """Events of the only row of an engine. Meanwhile the weights of a model must not change.

    decode, speculation: see `Engine`; choice: see `Engine.add`.

    Raises:
        ValueError: as `Engine.add` says, before the first event is asked for.
    """
    engine = Engine(backend_of(source), decode=decode, speculation=speculation)
    engine.add(prompt, settings, choice=choice)

    def events() -> Generator[Event, None, None]:
        with weights_stay(source):
            while engine.rows:
                yield from engine.step()

    return events()


def generate(
    source: Source,
    prompt: Sequence[int],
    settings: Settings,
    *,
    choice: Choice | None = None,
    speculation: Speculation | None = None,
) -> Iterator[int]:
    """Ids after the prompt, as `stream` gives them."""
    events = stream(source, prompt, settings, choice=choice, speculation=speculation)

    def ids() -> Iterator[int]:
        with closing(events):  # a text that is abandoned gives its weights back
            for event in events:
                yield from event.ids

    return ids()
