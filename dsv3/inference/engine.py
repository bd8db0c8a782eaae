"""Generation engine: sequences join, are decoded together and leave between steps.

    add(prompt, settings) -> row      a row waits for the next step
    step() -> events                  every row reads a piece of its prompt, or writes a token (with drafts, several)
    cancel(row)                       a row leaves

A step reads rows in at most three groups: prompts from their beginning, prompts that go on (the two in one, where a
step is to be short), and texts. Within a group shorter pieces are padded, and each row keeps a length, random numbers
and drafts of its own: what it writes does not depend on the rows beside it, but for rounding. A prompt that begins like
a row that is held already copies what that row holds, and one that begins like a prompt still being read waits for it.
Rows of different owners share nothing.

The weights must not change from the first row's beginning to the last one's end: an engine is used under
`cached_weight_casts`.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.inference.backend import Backend
from dsv3.inference.kept_rows import KeptRow, KeptRows
from dsv3.inference.prefixes import SHORTEST_SHARED, common_prefix
from dsv3.inference.recorded_experts import RecordedExperts
from dsv3.inference.row import Event, Finish, Row, Watch
from dsv3.inference.sampling import Choice, Settings, choice_of, likeliest
from dsv3.inference.speculation import Speculation
from dsv3.inference.text import Decode, TextStream, cut_at
from dsv3.planning.draft_costs import usually_pay

PREFILL = 256
"""Positions of a prompt that are read at once, which bounds the memory of their states and the wait of other rows."""


class Completion(NamedTuple):
    """A finished text."""

    ids: list[int]  # as in `Event`
    text: str  # before the first stop string
    finished: Finish
    experts: Mapping[str, list[list[int]]] = {}  # as `RecordedExperts`, of all tokens but the one written last


class Engine:
    """Continues rows over a backend."""

    def __init__(
        self,
        backend: Backend,
        *,
        decode: Decode | None = None,
        speculation: Speculation | None = None,
        prefill: int | None = None,
        kept_positions: int = 0,
    ) -> None:
        """`decode`: makes text of ids, for events and stop strings. `speculation`: what becomes of drafts is added to
        it. `prefill`: positions of prompts that a step reads next to eight texts, in all rows together; None: `PREFILL`
        of each.
        `kept_positions`: of finished rows, whose beginnings later prompts may copy."""
        self.backend, self.decode, self.prefill = backend, decode, prefill
        self.kept = KeptRows(backend, kept_positions if backend.shares_prefixes else 0)
        self.speculation = speculation or Speculation()
        self.rows: dict[int, Row] = {}
        self._numbers = itertools.count()
        self._cancelled: list[Event] = []

    def add(
        self,
        prompt: Sequence[int],
        settings: Settings,
        *,
        choice: Choice | None = None,
        owner: str = "",
        watch: Watch | None = None,
        experts: bool = False,
    ) -> int:
        """A new row that continues the prompt from the next step on. `choice`: instead of what the settings say.
        `owner`: rows copy the beginnings of this owner's rows alone. `watch`: such a row reads its whole prompt itself.
        `experts`: record the experts of its tokens.

        Raises:
            ValueError: the prompt is empty, there is nothing to draft with, or stop strings are given and no `decode`.
        """
        if not prompt:
            raise ValueError("an empty prompt: at least one token is needed, such as the tokenizer's bos")
        if settings.stop and self.decode is None:
            raise ValueError(f"stop={settings.stop}: an engine without `decode` sees no text")
        if settings.drafts is None and not usually_pay(self.backend.draft_costs):
            settings = replace(settings, drafts=0)
        number = next(self._numbers)
        self.backend.add(number, drafts=settings.may_draft)
        stream = TextStream(self.decode, settings.stop) if self.decode is not None else None
        choice = choice or choice_of(settings)
        record = RecordedExperts() if experts else None
        self.rows[number] = Row(number, settings, choice, list(prompt), len(prompt), stream, owner, watch, record)
        return number

    @property
    def kept_positions(self) -> int:
        """Of finished rows, for prompts that begin like them."""
        return self.kept.positions

    def check(self) -> None:
        """Raises where it can write no more: never, in this process."""

    def cancel(self, row: int) -> None:
        """Let a row leave at once; the next step says so. One that has finished already stays finished."""
        if row in self.rows:
            self._drop(row)
            self._cancelled.append(Event(row, [], "", "cancelled"))

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Read a piece of every row; news of rows that wrote something or ended."""
        events, self._cancelled = self._cancelled, []
        for group in self._groups():
            events += self._read(group)
        return events

    def _groups(self) -> Iterator[dict[int, int]]:
        """Rows that are read together, as they stand before the step, and how many tokens of each."""
        begins = [row for row in self.rows.values() if not row.read and not self._reuses(row)]
        goes_on = [row for row in self.rows.values() if row.read and row.unread > 1]
        writes = [row for row in self.rows.values() if row.read and row.unread == 1]
        pieces = self._share_prefill([*begins, *goes_on], self._prefill_next_to(len(writes)))
        pieces |= {row.number: 1 for row in writes}
        groups = [begins, goes_on, writes]
        if self.prefill is not None:  # a pass costs much beside its positions: a short step has as few as can be
            rows = [*begins, *goes_on, *writes]
            one_pass = sum(pieces[row.number] + len(row.drafts) for row in rows) <= self.backend.most_ragged
            by_length = [[row for row in rows if (pieces[row.number] > 1) is long] for long in (True, False)]
            groups = [rows] if one_pass else by_length
        for rows in groups:
            if reading := {row.number: pieces[row.number] for row in rows if pieces[row.number]}:
                yield reading

    def _prefill_next_to(self, texts: int) -> int | None:
        """Positions of prompts that a step reads: more next to many texts, whose steps are longer anyway."""
        if self.prefill is None:
            return None
        return round(self.prefill * max(1.0, texts / 8)) if texts else PREFILL

    def _share_prefill(self, prompts: list[Row], most: int | None) -> dict[int, int]:
        """Positions that each prompt reads in this step, `most` in all. The oldest gets an eighth of them at least,
        so that it ends; of the others the shortest come first, so that they do not wait for long ones."""
        wanted = {row.number: min(row.unread, PREFILL) for row in prompts}
        if most is None or not prompts:
            return wanted
        oldest, *others = prompts = sorted(prompts, key=lambda row: row.number)
        order = [oldest, *sorted(others, key=lambda row: row.unread)]
        left, pieces = most, {}
        for row in order:
            share = max(1, left // 8) if row is oldest and others else left
            pieces[row.number] = min(wanted[row.number], share)
            left -= pieces[row.number]
        return pieces

    def _sources(self) -> Iterator[Row | KeptRow]:
        yield from self.rows.values()
        yield from self.kept.rows.values()

    def _reuses(self, row: Row) -> bool:
        """Whether a row that has read nothing takes its beginning from another one, now or once that has read it."""
        if not self.backend.shares_prefixes or row.prompt <= SHORTEST_SHARED or row.watch is not None:
            return False
        source: Row | KeptRow | None = None
        shared = SHORTEST_SHARED - 1
        for other in self._sources():
            if other.number == row.number or (row.settings.may_draft and not other.settings.may_draft):
                continue
            if other.owner != row.owner or other.tokens[:SHORTEST_SHARED] != row.tokens[:SHORTEST_SHARED]:
                continue
            alike = min(common_prefix([other.tokens, row.tokens]), row.prompt - 1)
            if other.read >= other.prompt:
                alike = min(alike, other.read)
            if alike > shared and (other.read >= alike or (other.number < row.number and other.prompt >= alike)):
                source, shared = other, alike
        if source is not None and source.read >= shared:
            self.backend.copy(source.number, row.number, shared)
            self.kept.used(source.number)
            row.read = row.copied = shared
            if row.experts is not None and isinstance(source, Row) and source.experts is not None:
                row.experts.copy(source.experts, shared)
        return source is not None

    def _read(self, group: dict[int, int]) -> list[Event]:
        rows = [self.rows[number] for number in group]
        pieces = [row.tokens[row.read : row.read + group[row.number]] for row in rows]
        ends = [len(piece) == row.unread for row, piece in zip(rows, pieces, strict=True)]
        given = [piece + row.drafts for row, piece in zip(rows, pieces, strict=True)]
        wanted = [
            len(all_) if row.watch is not None and row.read < row.prompt else 1 + len(row.drafts) if end else 0
            for row, end, all_ in zip(rows, ends, given, strict=True)
        ]
        logits = self.backend.read([row.number for row in rows], given, wanted)
        if any(row.experts is not None for row in rows):
            for row, chosen in zip(rows, self.backend.chosen_experts(), strict=True):
                if row.experts is not None:
                    row.experts.put(row.read, chosen)
        best = self._likeliest([(row, logits_SV) for row, end, logits_SV in zip(rows, ends, logits) if end])
        events = []
        for row, piece, end, logits_SV in zip(rows, pieces, ends, logits, strict=True):
            if row.watch is not None and row.read < row.prompt:
                row.watch(logits_SV[: len(piece)])
                logits_SV = logits_SV[len(piece) - 1 :]
            row.read += len(piece)
            if end:
                events.append(self._write(row, logits_SV, best.get(row.number)))
        drafting = [row for row in rows if row.number in self.rows and row.unread == 1]
        for began in (True, False):  # MTP reads the whole prompt of a text that begins
            self._draft([row for row in drafting if (row.written == 1) is began])
        return events

    def _likeliest(self, ending: Sequence[tuple[Row, Tensor]]) -> dict[int, int]:
        """The tokens of rows that take the likeliest one of the model's own, all at once: a GPU is waited for once."""
        plain = [(row.number, logits_SV[-1]) for row, logits_SV in ending if row.takes_likeliest]
        if len(plain) < 2:
            return {}
        return dict(zip((row for row, _ in plain), likeliest(torch.stack([logits_V for _, logits_V in plain]))))

    def _write(self, row: Row, logits_SV: Tensor, best: int | None) -> Event:
        kept, chosen = row.choose(logits_SV) if best is None else (0, [best])
        self.speculation.passes += 1
        self.speculation.made += len(row.drafts)
        self.speculation.kept += kept
        row.drafts_made += len(row.drafts)
        row.drafts_kept += kept
        event = row.write(chosen)
        row.read += kept
        if event.finished is not None:
            del self.rows[row.number]
            self.kept.keep(row)
        elif row.drafts:
            self.backend.rewind(row.number, row.read)
        row.drafts = []
        return event

    def _draft(self, rows: list[Row]) -> None:
        """Let drafts be made for rows that want them, none beyond the end of a text."""
        counts = {row.number: min(self._drafts(row), row.settings.max_tokens - row.written - 1) for row in rows}
        rows = [row for row in rows if counts[row.number] > 0]
        if not rows:
            return
        numbers = [row.number for row in rows]
        texts, choosers = [row.tokens for row in rows], [row.chooser() for row in rows]
        drafts = self.backend.draft(numbers, texts, [counts[number] for number in numbers], choosers)
        for row, made in zip(rows, drafts, strict=True):
            row.drafts = made

    def _drafts(self, row: Row) -> int:
        """Drafts that a row's next pass is to verify; those of a sampled text depend on no row beside it."""
        if row.settings.drafts is not None:
            return row.settings.drafts
        costs, rows = self.backend.draft_costs, len(self.rows) if row.settings.temperature == 0 else 1
        return int(costs is not None and costs.pay(row.drafts_made, row.drafts_kept, rows))

    def _drop(self, row: int) -> None:
        del self.rows[row]
        self.backend.drop(row)


def complete(
    backend: Backend,
    prompts: Sequence[Sequence[int]],
    settings: Sequence[Settings],
    *,
    decode: Decode,
    at_once: int,
    choices: Sequence[Choice] | None = None,
    experts: bool = False,
) -> list[Completion]:
    """Each prompt's text, at most `at_once` rows together: where one ends the next prompt joins.

    choices: of each prompt, instead of what the settings say. experts: record those of every token.
    """
    engine = Engine(backend, decode=decode if any(one.stop for one in settings) else None)
    waiting, of, rows = iter(range(len(prompts))), dict[int, int](), dict[int, Row]()
    ids: list[list[int]] = [[] for _ in prompts]
    completions: dict[int, Completion] = {}
    while len(completions) < len(prompts):
        for index in itertools.islice(waiting, at_once - len(engine.rows)):
            choice = choices[index] if choices is not None else None
            number = engine.add(prompts[index], settings[index], choice=choice, experts=experts)
            of[number], rows[index] = index, engine.rows[number]
        for event in engine.step():
            index = of[event.row]
            ids[index] += event.ids
            if event.finished is not None:
                text = cut_at(settings[index].stop, decode(ids[index]))
                record = rows.pop(index).experts
                completions[index] = Completion(ids[index], text, event.finished, record.by_layer if record else {})
    return [completions[index] for index in range(len(prompts))]
