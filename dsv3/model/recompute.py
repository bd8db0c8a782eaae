"""Activation recomputation of cheap results in the backward pass (report, section 3.2.3).

A layer hands a cheap function to `recomputed`. Within `recomputing`, wherever autograd would keep a result of it, or a
view of one, it keeps a note instead: the function and its inputs, of which those that are results themselves are notes
too. The backward pass runs the function once more when it first needs a result, and lets it go after its last use.

The graph of the first pass stays, and nothing that draws, counts or chooses is run twice: gradients are the same to the
bit, and routing and load are what they were.

torch.utils.checkpoint gives the same gradients but does not save the memory: it drops what a function keeps inside, and
nearly all that these functions cost is their result, which the layer that reads it keeps. Peak of a BF16 training step
of the bench's model in MiB, where 700 is all kept and 607 this module (docs/LOG.md):

    checkpoint of each function                       744    its results are kept, and its inputs too
    selective, every operation but these functions    868    keeps each operation's result, needed or not
    selective, the matrix products alone              704    keeps the products' results, repeats routing and dispatch
    checkpoint of whole blocks                        547    repeats all products: a third more FLOPs
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

Part = Literal["norm", "attention_up", "swiglu"]
"""What may be recomputed: every RMSNorm, and a router's FP32 copy of it; queries, keys and values from what they are
projected from; silu(a) * b of dense FFNs, shared and routed experts. FP8 precisions keep quantised factors of their
products instead of these."""


class _Call:
    """One call of a function whose results are not kept."""

    def __init__(self, function: Callable[..., Any], inputs: list[Any]) -> None:
        self.function, self.inputs = function, inputs
        self.results: tuple[Tensor, ...] | None = None
        self.uses = 0  # of its results in the backward pass, still to come

    def result(self, number: int) -> Tensor:
        if self.results is None:
            with torch.no_grad():
                self.results = _tuple(self.function(*map(_brought_back, self.inputs)))
        result = self.results[number]
        self.uses -= 1
        if self.uses <= 0:  # below: a graph that is kept and run backwards again
            self.results = None
        return result


class _Note(NamedTuple):
    """Stands for a tensor: a view of a result."""

    call: _Call
    number: int
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Known(NamedTuple):
    """A result of a call, recognised by its storage; the reference keeps that number from being given out again."""

    storage: StorageWeakRef
    version: int
    call: _Call
    number: int


class _Ledger:
    """What is recomputed now, and the results that were not kept."""

    def __init__(self, parts: frozenset[str]) -> None:
        self.parts = parts
        self.known: dict[int, _Known] = {}

    def called(self, function: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
        call = _Call(function, [self.noted(x) for x in inputs])
        results = function(*inputs)
        for number, result in enumerate(_tuple(results)):
            storage = StorageWeakRef(result.untyped_storage())
            self.known[storage.cdata] = _Known(storage, result._version, call, number)
        return results

    def noted(self, x: Any) -> Any:
        """The note for a tensor, or its values where it is no result, or was changed since.

        Values alone: an operation that keeps its own result would keep itself, by the result's graph.
        """
        if not isinstance(x, Tensor):
            return x
        known = self.known.get(x.untyped_storage()._cdata)
        if known is None or known.version != x._version:
            return x.detach()
        known.call.uses += 1
        return _Note(known.call, known.number, x.size(), x.stride(), int(x.storage_offset()))


_ledger: _Ledger | None = None


def recomputed(part: Part, function: Callable[..., Any], *inputs: Any) -> Any:
    """function(*inputs), a tensor or a tuple of tensors; not kept for the backward pass where `part` is recomputed.

    The function depends on its inputs and on weights alone, and its results are not changed in place.
    """
    if _ledger is None or part not in _ledger.parts or not torch.is_grad_enabled():
        return function(*inputs)
    return _ledger.called(function, inputs)


@contextmanager
def recomputing(parts: Collection[str]) -> Iterator[None]:
    """Around a forward pass (its backward pass may follow outside)."""
    global _ledger
    if not parts:
        yield
        return
    before, _ledger = _ledger, _Ledger(frozenset(parts))
    try:
        with saved_tensors_hooks(_ledger.noted, _brought_back):
            yield
    finally:
        _ledger = before


def _brought_back(x: Any) -> Any:
    return x.call.result(x.number).as_strided(x.size, x.stride, x.offset) if isinstance(x, _Note) else x


def _tuple(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else results
