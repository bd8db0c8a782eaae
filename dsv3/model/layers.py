"""Shared layers: fixed-dtype modules, RMSNorm, SwiGLU, joined weights, hashes, KV caches, cached weight casts."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn

from dsv3.contracts import JoinsMatrices, Precision
from dsv3.model.recompute import recomputed


class FixedDtype(nn.Module):
    """A module that `.to(bfloat16)`, `.half()` and the like move to a device but never to another dtype.

    For routing state: in BF16 a bias stalls near 0.5 and 40,960 tokens are counted as 39,424.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            return result if result.dtype == tensor.dtype else tensor.to(result.device)

        return super()._apply(moved, recurse)


def hashed(keys: Tensor, rounds: Sequence[tuple[int, int]], last_shift: int, *, mask: int | None = None) -> Tensor:
    """Multiply-xorshift hash: int64 of any shape -> int64, every bit of the result depending on many of the key's.

    For each (shift, odd multiplier) of `rounds`, x becomes (x ^ x >> shift) * multiplier; at the end it becomes
    x ^ x >> last_shift. Products wrap around; `mask`: the bits kept of each, None: all 64. Shifts copy the sign bit.
    """
    for shift, multiplier in rounds:
        keys = (keys ^ (keys >> shift)) * multiplier
        keys = keys if mask is None else keys & mask
    return keys ^ (keys >> last_shift)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y = x r weight in x's dtype, and r = (mean(x^2) + eps)^-1/2, [..., 1], in FP32 (FP64 stays)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    r = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_().div_(x.shape[-1]).add_(eps).rsqrt_()
    return (wide * r).mul_(weight).to(x.dtype), r


class _RMSNorm(torch.autograd.Function):
    """`rms_norm` with its gradient. With z = x r and g = dy * weight, over rows of width D:

    dx = r (g - z * mean(g z))        dweight = sum over rows of dy * z
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, r = rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        z = x.to(r.dtype) * r
        g = grads[0].to(r.dtype)
        weight_grad = (g * z).flatten(0, -2).sum(0)
        g = g * weight
        g.addcmul_(z, torch.linalg.vecdot(g, z).unsqueeze(-1), value=-1 / x.shape[-1])
        return g.mul_(r).to(x.dtype), weight_grad.to(weight.dtype), None


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in FP32 (FP64 stays), returned in x's dtype."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        normalised: Tensor = recomputed("norm", self._normalised, x)
        return normalised

    def _normalised(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():  # decoding: an autograd function costs more than so small an operation
            return rms_norm(x, self.weight, self.eps)[0]
        normalised: Tensor = _RMSNorm.apply(x, self.weight, self.eps)
        return normalised


class SwiGLU(nn.Module):
    """FFN(x) = W_down (silu(W_gate x) * W_up x); `gate_up_proj.weight` is [2 * inter_dim, D], gates first."""

    def __init__(self, *, dim: int, inter_dim: int, precision: Precision) -> None:
        super().__init__()
        self.gate_up_proj = precision.linear(dim, 2 * inter_dim, role="ffn_gate_up")
        self.down_proj = precision.linear(inter_dim, dim, role="ffn_down")
        self.joined = {"gate_up_proj.weight": (inter_dim, inter_dim)}
        self.swiglu = precision.swiglu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_up_proj(x)))


def joined_weights(model: nn.Module) -> dict[nn.Parameter, Sequence[int]]:
    """Rows of each matrix in every weight of the model that joins several (`JoinsMatrices`)."""
    parts = [module for module in model.modules() if isinstance(module, JoinsMatrices)]
    return {part.get_parameter(name): rows for part in parts for name, rows in part.joined.items()}


def matrices(weight: Tensor, rows: Sequence[int]) -> tuple[Tensor, ...]:
    """The matrices in a weight [..., out, in] whose rows follow the repeated pattern `rows`.

    Views [..., repeats, rows_j, in]; flattened over the first two of these axes, the j-th is a matrix.
    """
    return weight.unflatten(-2, (-1, sum(rows))).split(list(rows), dim=-2)


CACHE_BLOCK = 64
"""Positions by which a row of a cache grows."""


class HeldRow:
    """Of one row, [..., S, width] with room for S >= length positions; numbers after `length` are finite."""

    def __init__(self, held: Tensor, length: int) -> None:
        self.held, self.length = held, length

    def reserve(self, length: int) -> None:
        """Make room for so many positions, in whole blocks."""
        room = -(-length // CACHE_BLOCK) * CACHE_BLOCK
        if room > self.held.shape[-2]:
            wider = self.held.new_zeros(*self.held.shape[:-2], room, self.held.shape[-1])
            wider[..., : self.length, :] = self.held[..., : self.length, :]
            self.held = wider

    def first(self, length: int) -> Tensor:
        return self.held[..., :length, :]

    def append(self, new: Tensor) -> None:
        """Add T positions, [..., T, width]."""
        end = self.length + new.shape[-2]
        self.reserve(end)
        self.held[..., self.length : end, :] = new
        self.length = end


class TokenOfRow(HeldRow):
    """One token of those that a row reads at once, as a row of its own: it sees what the row holds up to it."""

    def __init__(self, row: HeldRow, length: int) -> None:
        self.row, self.length = row, length

    def first(self, length: int) -> Tensor:
        return self.row.first(length)

    def append(self, new: Tensor) -> None:
        """Those before it in the row come first."""
        self.row.append(new)
        self.length = self.row.length


class PositionCache:
    """Keeps [..., width] numbers of one dtype for every position: a `Cache` for most parts.

    A row lies in a tensor of its own, which grows in blocks: rows come and go, and are read, without the others being
    moved.
    """

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device, rows: Iterable[int] = ()) -> None:
        """`shape`: of one position; the positions of a row are its last axis but one, [..., S, width]."""
        self.empty = torch.zeros(*shape[:-1], 0, shape[-1], dtype=dtype, device=device)
        self.rows = {row: HeldRow(self.empty, 0) for row in rows}

    @property
    def lengths(self) -> dict[int, int]:
        return {row: held.length for row, held in self.rows.items()}

    @property
    def position_bytes(self) -> int:
        return self.empty.element_size() * math.prod(self.empty.shape[:-2]) * self.empty.shape[-1]

    def add(self, row: int) -> None:
        self.rows[row] = HeldRow(self.empty, 0)

    def copy(self, source: int, row: int, length: int) -> None:
        self.rows[row] = copied = HeldRow(self.empty, 0)
        copied.reserve(length)
        copied.first(length).copy_(self.rows[source].first(length))
        copied.length = length

    def drop(self, row: int) -> None:
        del self.rows[row]

    def rewind(self, row: int, length: int) -> None:
        held = self.rows[row]
        held.length = length
        if held.held.shape[-2] > length + CACHE_BLOCK:
            held.held = held.first(-(-length // CACHE_BLOCK) * CACHE_BLOCK).clone()

    def select(self, rows: Sequence[int]) -> Self:
        return self._with({row: self.rows[row] for row in rows})

    def by_token(self, rows: Sequence[int], counts: Sequence[int]) -> Self:
        """Each token that these rows are to read, counts[b] of row b, as a row that reads one: rows of unlike lengths
        without padding."""
        tokens: list[HeldRow] = [
            TokenOfRow(self.rows[row], self.rows[row].length + place)
            for row, count in zip(rows, counts, strict=True)
            for place in range(count)
        ]
        return self._with(dict(enumerate(tokens)))

    def _with(self, rows: dict[int, HeldRow]) -> Self:
        chosen = self.__new__(type(self))  # copy.copy takes five times as long
        chosen.__dict__.update(self.__dict__)
        chosen.rows = rows
        return chosen

    def append(self, new: Tensor) -> None:
        """Add T positions to each row, [B, ..., T, width]."""
        for row, added in zip(self.rows.values(), new, strict=True):
            row.append(added)

    def read(self) -> Tensor:
        """All rows, [B, ..., S, width], S being the longest one's length; zeros follow the shorter ones.

        A single row is not copied.
        """
        rows = list(self.rows.values())
        longest = max(row.length for row in rows)
        if len(rows) == 1:
            return rows[0].first(longest).unsqueeze(0)
        together = self.empty.new_zeros(len(rows), *self.empty.shape[:-2], longest, self.empty.shape[-1])
        for b, row in enumerate(rows):
            together[b, ..., : row.length, :] = row.first(row.length)
        return together


class StaticCache:
    """[B, ..., S, width]: what a `PositionCache` keeps of each position, of B rows with room for S positions each.

    Its shape never changes, and how long the rows are stands on the device alone, so that a step over one token of each
    row can be recorded as a CUDA graph. Of a row shorter than others the rest is read and masked.
    """

    def __init__(self, held: Tensor, lengths_B: Tensor) -> None:
        """`lengths_B`: int64, before the token that a step reads; the caches of all layers share it."""
        self.held, self.lengths_B = held, lengths_B

    @classmethod
    def like(cls, cache: PositionCache, lengths_B: Tensor, positions: int) -> Self:
        """With room for so many positions, all zeros."""
        *leading, _, width = cache.empty.shape
        return cls(cache.empty.new_zeros(len(lengths_B), *leading, positions, width), lengths_B)

    def append(self, new: Tensor) -> None:
        """Put the numbers of each row's next position in their place, [B, ..., 1, width]."""
        place = self.lengths_B.view(-1, *[1] * (new.ndim - 1)).expand_as(new)
        self.held.scatter_(-2, place, new)

    def later_BS(self) -> Tensor:
        """True at positions after the token that a step reads."""
        return torch.arange(self.held.shape[-2], device=self.held.device) > self.lengths_B.unsqueeze(1)


def next_positions(lengths: Iterable[int], count: int, device: torch.device) -> Tensor:
    """int64 [B, T]: the T = `count` positions that follow the `lengths` of B rows."""
    starts = list(lengths)
    if len(set(starts)) == 1:
        return torch.arange(starts[0], starts[0] + count, device=device).expand(len(starts), -1)
    return torch.tensor(starts, device=device).unsqueeze(1) + torch.arange(count, device=device)


def on_host(counts: Tensor) -> Any:
    """Numbers of rows as the host needs them, to cut a tensor or to size one: an int of a scalar, a list of a vector.

    It waits for the device. A training step waits nowhere else but to read its record, and dispatches and experts for a
    GPU do without.
    """
    return counts.tolist()


def local(weight: Tensor) -> Tensor:
    """This rank's part of a weight that is shared among ranks, such as those of experts; others as they are."""
    to_local: Callable[[], Tensor] | None = getattr(weight, "to_local", None)
    return weight if to_local is None else to_local()


def first_row(weight: Tensor) -> int:
    """The number, in the whole weight, of the first row of this rank's part; 0 where ranks do not share the rows.

    Rows are those of the first axis, as `torch.chunk` deals them to the ranks of one group.
    """
    mesh: Any = getattr(weight, "device_mesh", None)
    return 0 if mesh is None else mesh.get_local_rank() * -(-weight.shape[0] // mesh.size())


@contextmanager
def cached_weight_casts(model: nn.Module) -> Iterator[None]:
    """Within it no weight changes, so that each layer with a method `hold_weights` computes what follows from its
    weight alone (a cast, quantised blocks) once: not for every token decoded, and not for every micro-batch of a step.
    One within another changes nothing. Weights that are sharded, and gathered only for their pass, are not held."""
    layers: list[Any] = [
        module
        for module in model.modules()
        if hasattr(module, "hold_weights") and all(local(p) is p for p in module.parameters(recurse=False))
    ]
    held = [layer for layer in layers if layer.hold_weights(True)]
    try:
        yield
    finally:
        for layer in held:
            layer.hold_weights(False)


KeepsDtype, held_weights = FixedDtype, cached_weight_casts
"""Their names in plugins of older versions."""
