"""Decoding on a GPU: a step over one token of each row, recorded as a CUDA graph over caches of fixed places.

A small step launches thousands of kernels that each run for microseconds, and takes as long as Python needs to launch
them. A recorded one is launched at once; it reads tokens, lengths and caches where they lay when it was recorded.
Prompts, and rows that draft, are read as `DecoderBackend` reads them. The operations of a step are the same on a CPU,
where nothing is recorded: tests compare them there.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.contracts import HasStaticCache, Routing
from dsv3.inference.backend import DecoderBackend
from dsv3.model.decoder import Caches, Decoder
from dsv3.model.layers import PositionCache, StaticCache

log = logging.getLogger(__name__)

BLOCK = 1024
"""Positions by which the room of all rows grows."""


class Step(NamedTuple):
    """What a step over the first n places gives, at the same addresses each time where it is recorded."""

    logits_BV: Tensor  # float32
    routings: dict[str, Routing]
    graph: Any  # torch.cuda.CUDAGraph; None: it is computed anew


class StaticRows:
    """The places of rows, B of them with room for S positions, and the steps over them."""

    @torch.inference_mode()
    def __init__(self, model: Decoder, rows: int, positions: int) -> None:
        """Raises ValueError where a part of the model cannot decode over fixed places."""
        self.model, self.rows, self.positions = model, rows, positions
        self.tokens_B = torch.zeros(rows, dtype=torch.int64, device=model.device)
        self.lengths_B = torch.zeros(rows, dtype=torch.int64, device=model.device)
        attentions: list[Any] = [model.attention(i) for i in range(len(model.layers))]
        if model.memory.new_cache() is not None or not all(isinstance(part, HasStaticCache) for part in attentions):
            raise ValueError("a part of this model keeps a cache of its own kind")
        self.layers = [part.new_static_cache(self.lengths_B, positions) for part in attentions]
        if any(layer is None for layer in self.layers):
            raise ValueError("an attention of this model cannot read a static cache")
        self.steps: dict[int, Step] = {}
        self.records = model.device.type == "cuda"

    @torch.inference_mode()
    def grown(self, rows: int, positions: int) -> "StaticRows":
        """As many rows or more, with as much room or more, which hold the same."""
        other = StaticRows(self.model, rows, positions)
        other.records = self.records
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            theirs.held[: self.rows, ..., : self.positions, :] = mine.held
        return other

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], lengths: Sequence[int]) -> Step:
        """Read the next token of the rows in the first places."""
        n = 1 << (len(tokens) - 1).bit_length()
        given = torch.zeros(2, n, dtype=torch.int64)
        given[:, : len(tokens)] = torch.tensor([tokens, lengths])
        for target_B, values_B in zip((self.tokens_B, self.lengths_B), given, strict=True):
            target_B[:n].copy_(values_B)
        if self.records and n not in self.steps:
            self._record(n)
        if not self.records:
            return self._computed(n)
        self.steps[n].graph.replay()
        return self.steps[n]

    def _computed(self, n: int) -> Step:
        lengths_B = self.lengths_B[:n]
        caches = Caches([StaticCache(layer.held[:n], lengths_B) for layer in self.layers], None)
        last_B1D, routings = self.model.decode_states(self.tokens_B[:n].unsqueeze(1), caches, lengths_B.unsqueeze(1))
        return Step(self.model.logits(self.model.norm(last_B1D)).squeeze(1), routings, None)

    def _record(self, n: int) -> None:
        """Record a step, unless an operation of it waits for the device: then no step is recorded from now on.

        Computing it first, on a stream of its own, lets libraries allocate what a recording must not.
        """
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._computed(n)
            torch.cuda.set_sync_debug_mode("error")
            try:
                self._computed(n)
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                log.info("decoding is not recorded as a CUDA graph: %s", str(error).partition("\n")[0])
                self.records = False
            finally:
                torch.cuda.set_sync_debug_mode("default")
        torch.cuda.current_stream().wait_stream(stream)
        if self.records:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                computed = self._computed(n)
            self.steps[n] = computed._replace(graph=graph)


class StaticBackend(DecoderBackend):
    """A `Decoder`'s rows, of which those that write lie in the first places of `StaticRows`.

    A row takes a place with the first token that it reads by itself, and leaves it for everything else: what it has
    read there is put back into its own cache.
    """

    most_ragged = 0  # rows that read one token each are read apart from prompts

    def __init__(self, model: Decoder) -> None:
        """Raises ValueError where a part of the model cannot decode over fixed places."""
        super().__init__(model)
        self.static = StaticRows(model, 1, BLOCK)
        self.seated: list[int] = []  # the row in each place
        self.lengths: dict[int, int] = {}  # of those rows

    @torch.inference_mode()
    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        if any(len(ids) != 1 for ids in tokens) or any(self.drafter.holds(row) for row in rows):
            for row in rows:
                self._leave(row)
            return super().read(rows, tokens, wanted)
        for row in rows:
            self._seat(row)
        self._make_room(max(self.lengths.values()) + 1)
        given = dict(zip(rows, (ids[0] for ids in tokens), strict=True))
        step = self.static.step([given.get(row, 0) for row in self.seated], [self.lengths[row] for row in self.seated])
        for row in rows:
            self.lengths[row] += 1
        places = [self.seated.index(row) for row in rows]
        self._routings, self.places = step.routings, [slice(place, place + 1) for place in places]
        logits_BV = step.logits_BV.clone()  # the next step writes over it
        return [logits_BV[place : place + min(n, 1)] for place, n in zip(places, wanted, strict=True)]

    @torch.inference_mode()
    def copy(self, source: int, row: int, length: int) -> None:
        self._put_back(source)
        super().copy(source, row, length)

    @torch.inference_mode()
    def drop(self, row: int) -> None:
        self._leave(row, forget=True)
        super().drop(row)
        if not self.caches.lengths:
            self.static.steps.clear()  # from now on the weights may change, and what is cached of them

    @torch.inference_mode()
    def rewind(self, row: int, length: int) -> None:
        self._leave(row)
        super().rewind(row, length)

    def _seat(self, row: int) -> None:
        if row in self.lengths:
            return
        length = self.caches.lengths[row]
        if len(self.seated) == self.static.rows:
            self.static = self.static.grown(2 * self.static.rows, self.static.positions)
        self._make_room(length + 1)
        for static, own in zip(self.static.layers, self._own(row), strict=True):
            static.held[len(self.seated), ..., :length, :] = own.first(length)
        self.seated.append(row)
        self.lengths[row] = length

    def _make_room(self, positions: int) -> None:
        if positions > self.static.positions:
            self.static = self.static.grown(self.static.rows, -(-positions // BLOCK) * BLOCK)

    def _own(self, row: int) -> list[Any]:
        """What the row's own caches hold, layer by layer."""
        layers: list[PositionCache] = self.caches.layers
        return [layer.rows[row] for layer in layers]

    def _put_back(self, row: int) -> None:
        """Add to the row's own caches what it has read in its place."""
        if row not in self.lengths:
            return
        place, end = self.seated.index(row), self.lengths[row]
        for static, own in zip(self.static.layers, self._own(row), strict=True):
            own.append(static.held[place, ..., own.length : end, :])

    def _leave(self, row: int, *, forget: bool = False) -> None:
        """Give the row's place to the last one; `forget`: what it has read there is lost."""
        if row not in self.lengths:
            return
        if not forget:
            self._put_back(row)
        place, last = self.seated.index(row), len(self.seated) - 1
        if place != last:
            for static in self.static.layers:
                static.held[place] = static.held[last]
        self.seated[place] = self.seated[last]
        self.seated.pop()
        del self.lengths[row]
