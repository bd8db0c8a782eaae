"""Does a memory keep to `dsv3.contracts.Memory`?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.testing.plain import drawn, error
from dsv3.testing.requirement import require, require_meta, require_reloadable

ROWS, LENGTH = 3, 12
ROUNDING = 1e-4  # relative, of FP32 sums in another order
CHUNKS = ((12,), (5, 7), (1,) * 12, (4, 1, 1, 6))


def check_memory(factory: Callable[[], nn.Module], *, dim: int, vocab_size: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a memory that the core can use.

    dim, vocab_size: what the factory was given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        require_meta(factory)
        memory = factory()
        require(isinstance(memory, nn.Module), "a memory is an nn.Module")
        drawn(memory)
        _active(memory)
        x_BTD = torch.randn(ROWS, LENGTH, dim)
        tokens_BT = torch.randint(min(vocab_size, 4), (ROWS, LENGTH))  # few tokens, so that n-grams come again
        with torch.no_grad():
            _shapes(memory, x_BTD, tokens_BT)
            _causal(memory, x_BTD, tokens_BT, vocab_size)
            _rows(memory, x_BTD, tokens_BT)
            _documents(memory, x_BTD, tokens_BT)
            _cache(memory, x_BTD, tokens_BT)
            _rewinding(memory, x_BTD, tokens_BT)
            _unequal_rows(memory, x_BTD, tokens_BT)
            _state(memory, factory, x_BTD, tokens_BT)
        _gradients(memory, x_BTD, tokens_BT)


def _active(memory: Any) -> None:
    active, every = getattr(memory, "active_parameters", None), sum(p.numel() for p in memory.parameters())
    require(
        isinstance(active, int) and 0 <= active <= every,
        f"`active_parameters`, those that one token reads, must be an integer between 0 and {every}, the number of "
        f"all; not {active!r}",
    )


def _shapes(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    for x, tokens in ((x_BTD, tokens_BT), (x_BTD.bfloat16(), tokens_BT), (x_BTD[:, :1], tokens_BT[:, :1])):
        y = memory(x, tokens)
        require(
            y.shape == x.shape and y.dtype == x.dtype,
            f"the output must be {x.dtype} {list(x.shape)} like the embeddings, not {y.dtype} {list(y.shape)}",
        )
    added = memory(x_BTD, tokens_BT) - x_BTD
    other = memory(2 * x_BTD, tokens_BT) - 2 * x_BTD
    require(
        error(other, added) <= ROUNDING or (other - added).abs().max() < ROUNDING,
        "what is added to the embeddings must come from the tokens alone",
    )


def _causal(memory: Any, x_BTD: Tensor, tokens_BT: Tensor, vocab_size: int) -> None:
    plain = memory(x_BTD, tokens_BT)
    for t in (1, LENGTH // 2, LENGTH - 1):
        later = tokens_BT.clone()
        later[:, t:] = (later[:, t:] + 1) % vocab_size
        moved = memory(x_BTD, later)
        require(
            error(moved[:, :t], plain[:, :t]) <= ROUNDING,
            f"positions before {t} changed when only tokens from {t} on were replaced: a memory may read no later ones",
        )


def _rows(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    together = memory(x_BTD, tokens_BT)
    for row in range(ROWS):
        alone = memory(x_BTD[row : row + 1], tokens_BT[row : row + 1])
        require(error(together[row], alone[0]) <= ROUNDING, "a row must not depend on the other rows of the batch")


def _documents(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    ids_BT = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    cuts = (5, 1, 11)
    for row, cut in enumerate(cuts):
        ids_BT[row, cut:] = 2
    packed = memory(x_BTD, tokens_BT, ids_BT)
    for row, cut in enumerate(cuts):
        for part in (slice(0, cut), slice(cut, LENGTH)):
            alone = memory(x_BTD[row : row + 1, part], tokens_BT[row : row + 1, part])
            require(
                error(packed[row, part], alone[0]) <= ROUNDING,
                "with document ids, a packed document must come out as it does alone: nothing of another is read",
            )


def _cache(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    whole = memory(x_BTD, tokens_BT)
    for chunks in CHUNKS:
        cache = memory.new_cache(range(ROWS))
        parts = []
        for x, tokens in zip(x_BTD.split(chunks, 1), tokens_BT.split(chunks, 1), strict=True):
            parts.append(memory(x, tokens, None, cache))
        require(
            error(torch.cat(parts, 1), whole) <= ROUNDING,
            f"decoding over a cache in chunks of {chunks} must give what the whole row gives",
        )
        if cache is not None:
            found = cache.lengths
            require(found == dict.fromkeys(range(ROWS), LENGTH), f"`lengths` must be {LENGTH} each, not {found}")


def _rewinding(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    cache = memory.new_cache(range(ROWS))
    if cache is None:
        return
    memory(x_BTD, torch.cat((tokens_BT[:, :4], tokens_BT[:, 4:].flip(1)), 1), None, cache)
    for row in range(ROWS):
        cache.rewind(row, 4)
    again = memory(x_BTD[:, 4:], tokens_BT[:, 4:], None, cache)
    require(error(again, memory(x_BTD, tokens_BT)[:, 4:]) <= ROUNDING, "tokens after rewind(row, 4) must be forgotten")


def _unequal_rows(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    """Rows that hold 0, 3 and 9 tokens, continued together by two."""
    held = {7: 0, 2: 3, 5: 9}
    cache = memory.new_cache(held)
    if cache is None:
        return
    for b, (row, length) in enumerate(held.items()):
        if length:
            memory(x_BTD[b : b + 1, :length], tokens_BT[b : b + 1, :length], None, cache.select([row]))
    ahead_BT = torch.tensor(list(held.values())).unsqueeze(1) + torch.arange(2)
    x_B2D = x_BTD.gather(1, ahead_BT.unsqueeze(-1).expand(-1, -1, x_BTD.shape[-1]))
    together = memory(x_B2D, tokens_BT.gather(1, ahead_BT), None, cache)
    for b, length in enumerate(held.values()):
        alone = memory(x_BTD[b : b + 1, : length + 2], tokens_BT[b : b + 1, : length + 2])
        require(
            error(together[b], alone[0, length:]) <= ROUNDING,
            f"a row that holds {length} tokens must give among others, of {list(held.values())}, what it gives alone",
        )


def _state(memory: Any, factory: Callable[[], nn.Module], x_BTD: Tensor, tokens_BT: Tensor) -> None:
    first = memory(x_BTD, tokens_BT)
    require(torch.equal(memory(x_BTD, tokens_BT), first), "the same tokens must give the same again (recomputation)")
    fresh = drawn(factory())
    require_reloadable(memory, fresh)
    require(
        torch.equal(fresh(x_BTD, tokens_BT), first), "a memory restored from a state_dict must give what the saved gave"
    )


def _gradients(memory: Any, x_BTD: Tensor, tokens_BT: Tensor) -> None:
    leaf = x_BTD.clone().requires_grad_()
    memory(leaf, tokens_BT).square().sum().backward()
    for name, tensor in [("the embeddings", leaf), *memory.named_parameters()]:
        gradient = tensor.grad
        require(gradient is not None, f"{name} must get a gradient")
        values = gradient.coalesce().values() if gradient.is_sparse else gradient
        require(
            gradient.dtype == torch.float32 and values.isfinite().all() and values.any(),
            f"{name} must get a float32 gradient that is finite and not zero",
        )
