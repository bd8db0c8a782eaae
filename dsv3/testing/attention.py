"""Does an attention keep to `dsv3.contracts.Attention`?"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.model.layers import CACHE_BLOCK
from dsv3.testing.plain import Plain, drawn, error
from dsv3.testing.requirement import require, require_joined, require_meta, require_reloadable

ROWS, LENGTH = 2, 12
ROUNDING = 1e-4  # relative, of FP32 sums in another order
CHUNKS = ((12,), (5, 7), (1,) * 12, (4, 1, 1, 6))


def check_attention(factory: Callable[..., nn.Module], *, dim: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(precision=...)` is an attention for the core.

    dim: the model width that the factory was given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        precision = Plain(torch.float32)
        require_meta(lambda: factory(precision=precision))
        attention = factory(precision=precision)
        require(isinstance(attention, nn.Module), "an attention is an nn.Module")
        require(
            bool(precision.roles),
            "the projections must be made by `precision.linear(in, out, role=...)`: precision is chosen there",
        )
        drawn(attention)
        x_BTD = torch.randn(ROWS, LENGTH, dim)
        with torch.no_grad():
            _shapes(attention, factory, x_BTD)
            _causal(attention, x_BTD)
            _rows(attention, x_BTD)
            _documents(attention, x_BTD)
            _cache(attention, x_BTD)
            _rewinding(attention, x_BTD)
            _unequal_rows(attention, x_BTD)
            _rows_come_and_go(attention, x_BTD)
            _state(attention, factory, x_BTD)
        _gradients(attention, x_BTD)
        _figures(attention, x_BTD)


def positions(start: int, stop: int, rows: int = ROWS) -> Tensor:
    return torch.arange(start, stop).expand(rows, -1)


def _shapes(attention: Any, factory: Callable[..., nn.Module], x_BTD: Tensor) -> None:
    lower = drawn(factory(precision=Plain(torch.bfloat16)))
    for module, x in ((attention, x_BTD), (attention, x_BTD[:, :1]), (lower, x_BTD.bfloat16())):
        out = module(x, positions(0, x.shape[1]))
        require(
            out.shape == x.shape and out.dtype == x.dtype,
            f"the output must be {x.dtype} {list(x.shape)} like the input, not {out.dtype} {list(out.shape)}",
        )
        require(out.isfinite().all(), f"the output of {x.dtype} has values that are not finite")


def _causal(attention: Any, x_BTD: Tensor) -> None:
    plain = attention(x_BTD, positions(0, LENGTH))
    for t in (1, LENGTH // 2, LENGTH - 1):
        later = x_BTD.clone()
        later[:, t:] = torch.randn_like(later[:, t:])
        moved = attention(later, positions(0, LENGTH))
        require(
            error(moved[:, :t], plain[:, :t]) <= ROUNDING,
            f"positions before {t} changed when only positions from {t} on were replaced: attention must be causal",
        )
    earlier = x_BTD.clone()
    earlier[:, 0] = torch.randn_like(earlier[:, 0])
    moved = attention(earlier, positions(0, LENGTH))
    require(
        error(moved[:, -1], plain[:, -1]) > ROUNDING, "the last position must see the first one, and it did not change"
    )


def _rows(attention: Any, x_BTD: Tensor) -> None:
    together = attention(x_BTD, positions(0, LENGTH))
    for row in range(ROWS):
        alone = attention(x_BTD[row : row + 1], positions(0, LENGTH, rows=1))
        require(error(together[row], alone[0]) <= ROUNDING, "a row must not depend on the other rows of the batch")


def _documents(attention: Any, x_BTD: Tensor) -> None:
    """Rows of two documents and padding, cut differently in each row."""
    cuts = ((5, 10), (1, 12))
    ids_BT = torch.zeros(ROWS, LENGTH, dtype=torch.int64)
    positions_BT = torch.zeros_like(ids_BT)
    for row, (first, end) in enumerate(cuts):
        ids_BT[row, :first], ids_BT[row, first:end] = 1, 2
        positions_BT[row, :first], positions_BT[row, first:end] = torch.arange(first), torch.arange(end - first)
    packed = attention(x_BTD, positions_BT, ids_BT)
    require(packed.isfinite().all(), "padding (document id 0) must not make the output infinite or NaN")
    for row, (first, end) in enumerate(cuts):
        for part in (slice(0, first), slice(first, end)):
            alone = attention(x_BTD[row : row + 1, part], positions(0, part.stop - part.start, rows=1))
            require(
                error(packed[row, part], alone[0]) <= ROUNDING,
                "with document ids, a packed document must come out as it does alone: a position sees its own "
                "document only",
            )


def _decoded(attention: Any, x_BTD: Tensor, cache: Any, chunks: tuple[int, ...]) -> Iterator[Tensor]:
    start = next(iter(cache.lengths.values()))
    for chunk in chunks:
        end = start + chunk
        yield attention(x_BTD[:, start:end], positions(start, end, rows=len(x_BTD)), None, cache)
        found = set(cache.lengths.values())
        require(found == {end}, f"`cache.lengths` must be {end} after so many positions, not {found}")
        start = end


def _cache(attention: Any, x_BTD: Tensor) -> None:
    whole = attention(x_BTD, positions(0, LENGTH))
    for chunks in CHUNKS:
        cache = attention.new_cache(range(ROWS))
        require(cache.lengths == dict.fromkeys(range(ROWS), 0), "rows of a new cache are empty: `lengths` must be 0")
        parts = torch.cat(list(_decoded(attention, x_BTD, cache, chunks)), dim=1)
        require(
            error(parts, whole) <= ROUNDING,
            f"decoding over a cache in chunks of {chunks} must give what the whole row gives",
        )


def _rewinding(attention: Any, x_BTD: Tensor) -> None:
    whole = attention(x_BTD, positions(0, LENGTH))
    cache = attention.new_cache(range(ROWS))
    list(_decoded(attention, torch.cat((x_BTD[:, :4], torch.randn_like(x_BTD[:, 4:])), 1), cache, (4, 5)))
    for row in range(ROWS):
        cache.rewind(row, 4)
        require(cache.lengths[row] == 4, f"a row's length must be 4 after rewind(row, 4), not {cache.lengths[row]}")
    parts = torch.cat(list(_decoded(attention, x_BTD, cache, (3, 5))), dim=1)
    require(error(parts, whole[:, 4:]) <= ROUNDING, "positions after rewind(row, 4) must be forgotten")


def _unequal_rows(attention: Any, x_BTD: Tensor) -> None:
    """Rows of lengths 0, 4 and of more than a block, continued together by 1 and by 3 positions."""
    x_BTD = torch.cat((x_BTD, torch.randn(1, LENGTH, x_BTD.shape[-1])))
    beginnings = {5: x_BTD[0, :0], 0: x_BTD[1, :4], 9: torch.randn(CACHE_BLOCK + 3, x_BTD.shape[-1])}
    for new in (1, 3):
        cache = attention.new_cache(beginnings)
        for row, x_SD in beginnings.items():
            if len(x_SD):
                attention(x_SD.unsqueeze(0), positions(0, len(x_SD), rows=1), None, cache.select([row]))
        starts = torch.tensor([[len(x_SD)] for x_SD in beginnings.values()])
        together = attention(x_BTD[:, -new:], starts + torch.arange(new), None, cache)
        for b, (row, x_SD) in enumerate(beginnings.items()):
            whole_1SD = torch.cat((x_SD, x_BTD[b, -new:])).unsqueeze(0)
            alone = attention(whole_1SD, positions(0, whole_1SD.shape[1], rows=1))
            require(
                error(together[b], alone[0, len(x_SD) :]) <= ROUNDING,
                f"a row that holds {len(x_SD)} positions must give among others, of {starts.flatten().tolist()}, what "
                "it gives alone",
            )
            require(cache.lengths[row] == len(x_SD) + new, "every row must hold its own positions and the new ones")


def _rows_come_and_go(attention: Any, x_BTD: Tensor) -> None:
    whole = attention(x_BTD, positions(0, LENGTH))[1:]
    cache = attention.new_cache([0])
    list(_decoded(attention, torch.cat((x_BTD[1:, :5], x_BTD[:1, 5:]), 1), cache, (LENGTH,)))
    cache.copy(0, 1, 5)
    cache.add(2)
    cache.drop(0)
    left = list(cache.lengths.items())
    require(left == [(1, 5), (2, 0)], f"copy, add and drop must leave rows 1 and 2, of 5 and 0 positions, not {left}")
    parts = torch.cat(list(_decoded(attention, x_BTD[1:], cache.select([1]), (3, 4))), dim=1)
    require(error(parts, whole[:, 5:]) <= ROUNDING, "a copied row must go on as the row whose positions it copied")
    require(cache.lengths[1] == LENGTH, "`select` must give the same rows, not copies of them")


def _state(attention: Any, factory: Callable[..., nn.Module], x_BTD: Tensor) -> None:
    first = attention(x_BTD, positions(0, LENGTH))
    again = attention(x_BTD, positions(0, LENGTH))
    require(torch.equal(first, again), "the same input must give the same output again (recomputation)")
    fresh = drawn(factory(precision=Plain(torch.float32)))
    require(
        not {id(p) for p in attention.parameters()} & {id(p) for p in fresh.parameters()},
        "the factory must make new parameters each time: every layer has an attention of its own",
    )
    require_reloadable(attention, fresh)
    require_joined(attention)
    require(
        error(fresh(x_BTD, positions(0, LENGTH)), first) <= ROUNDING,
        "an attention restored from a state_dict must compute like the one saved",
    )


def _gradients(attention: Any, x_BTD: Tensor) -> None:
    leaf = x_BTD.clone().requires_grad_()
    attention(leaf, positions(0, LENGTH)).square().sum().backward()
    for name, tensor in [("the input", leaf), *attention.named_parameters()]:
        require(
            tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(),
            f"{name} must get a gradient that is finite and not zero",
        )


def _figures(attention: Any, x_BTD: Tensor) -> None:
    numbers, short, long = (
        attention.kv_cache_elements_per_token(),
        attention.flops_per_token(LENGTH),
        attention.flops_per_token(2 * LENGTH),
    )
    for name, value in (("kv_cache_elements_per_token()", numbers), ("flops_per_token()", short)):
        require(isinstance(value, int) and value > 0, f"{name} must be an integer above 0, not {value!r}")
    products = 2 * sum(p.numel() for p in attention.parameters() if p.ndim > 1)
    require(
        long >= short >= products,
        f"flops_per_token() counts the projections, {products} here, and does not fall with the context",
    )
    cache = attention.new_cache(range(ROWS))
    with torch.no_grad():
        list(_decoded(attention, x_BTD, cache, (LENGTH,)))
    held = sum(tensor.numel() for tensor in _tensors(cache))
    require(
        held <= numbers * ROWS * (LENGTH + CACHE_BLOCK),
        f"the cache holds {held / ROWS:g} numbers for a row of {LENGTH} tokens; kv_cache_elements_per_token() says "
        f"{numbers}, and room for at most {CACHE_BLOCK} more may be held",
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors that an object holds, at any depth."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
    elif hasattr(value, "__dict__"):
        yield from _tensors(vars(value))
