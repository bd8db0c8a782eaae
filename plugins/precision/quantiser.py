"""Emulated quantisation of a GEMM operand: values of a small format times a scale.

    scale = max(amax of a tile, floor) / largest        FP32, or rounded up to a power of two
    code  = round(clamp(x / scale, -largest, largest))  in the format, to nearest, ties to even
    value = code * scale                                what the product multiplies

A tile is `rows` x `columns` neighbours that share a scale; at the edges of a matrix it is cut short. Where the rows
belong to groups (the experts' tokens), a tile of several rows begins anew with every group and never reaches into the
next.

An infinity or NaN is not hidden: all of its tile becomes NaN.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.precision.formats import Format, round_to, round_up_to_power_of_two

KERNELS = 256  # that torch.compile may make of one function: for each shape and dtype of tiles, and format


class Groups(NamedTuple):
    """The groups of a matrix's rows, which are sorted by group."""

    counts_E: Tensor  # rows of each, int64
    n_rows: int

    def segments(self, rows: int | None) -> tuple[Tensor, int]:
        """The tile that each row belongs to, int64 [n_rows], and a bound on the number of tiles.

        `rows`: of a tile, counted from its group's first row; None: all rows of the group.
        """
        n_groups = self.counts_E.numel()
        numbers_E = torch.arange(n_groups, device=self.counts_E.device)
        group_R = numbers_E.repeat_interleave(self.counts_E, output_size=self.n_rows)
        if rows is None:
            return group_R, n_groups
        tiles_E = self.counts_E.add(rows - 1).div(rows, rounding_mode="floor")
        first_tile_E, first_row_E = tiles_E.cumsum(0) - tiles_E, self.counts_E.cumsum(0) - self.counts_E
        within_R = torch.arange(self.n_rows, device=self.counts_E.device) - first_row_E[group_R]
        return first_tile_E[group_R] + within_R.div(rows, rounding_mode="floor"), self.n_rows // rows + n_groups


class Held(NamedTuple):
    """A quantised matrix as it is kept: R x C tiles of h x w numbers (zeros where a tile reaches over the edge)."""

    codes: Tensor  # in the format's dtype, [R, h, C, w]; [R C, 1, 1, w] where h is 1
    scales: Tensor  # float32, the same with h and w 1


@dataclass(frozen=True)
class Quantiser:
    """One way to quantise a matrix x [..., rows, columns] of any floating-point dtype."""

    format: Format
    rows: int | None  # of a tile; None: all
    columns: int | None
    power_of_two: bool
    amax_floor: float
    compiled: bool

    def values(
        self, x: Tensor, dtype: torch.dtype, *, groups: Groups | None = None, scale: Tensor | None = None
    ) -> Tensor:
        """x after quantisation, in `dtype`. `scale`: one for the whole matrix, instead of those that follow from x."""
        if groups is not None and self.rows != 1 and (self.rows, self.columns) != (None, None):
            segment_R, n_segments = groups.segments(self.rows)
            tiles = tiles_of(x, 1, self.columns)
            amax_SC = torch.zeros(n_segments, tiles.shape[-2], device=x.device)
            return matrix_of(self._run(quantise_groups, tiles, segment_R, amax_SC, dtype=dtype), x.shape)
        return matrix_of(self._run(quantise, self._tiles(x), scale, dtype=dtype), x.shape)

    def held(self, x: Tensor, *, scale: Tensor | None = None) -> Held:
        """Codes and scales of a matrix x [rows, columns], which has no groups or tiles of one row."""
        return Held(*self._run(encode, self._tiles(x), scale))

    def values_and_held(self, x: Tensor, dtype: torch.dtype, *, scale: Tensor | None = None) -> tuple[Tensor, Held]:
        """Both, at the cost of one."""
        values, *held = self._run(quantise_and_encode, self._tiles(x), scale, dtype=dtype)
        return matrix_of(values, x.shape), Held(*held)

    def decoded(self, held: Held, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The values of what was held, as a matrix of `shape`."""
        return matrix_of(self._run(decode, held.codes, held.scales, dtype=dtype), shape)

    def _tiles(self, x: Tensor) -> Tensor:
        """Tiles of one row need not know their place: fewer kinds of shapes, so fewer kernels to compile."""
        tiles = tiles_of(x, self.rows, self.columns)
        return tiles.reshape(-1, 1, 1, tiles.shape[-1]) if self.rows == 1 else tiles

    def _run(self, function: Callable[..., Any], *tensors: Tensor | None, **settings: Any) -> Any:
        return run_kernel(function, *tensors, compiled=self.compiled, quantiser=self, **settings)


def tiles_of(x: Tensor, rows: int | None, columns: int | None) -> Tensor:
    """x [..., R h, C w] as [..., R, h, C, w], zeros added where a tile reaches over the edge."""
    h, w = (min(size or whole, whole) for size, whole in zip((rows, columns), x.shape[-2:], strict=True))
    if x.shape[-2] % h or x.shape[-1] % w:
        x = F.pad(x, (0, -x.shape[-1] % w, 0, -x.shape[-2] % h))
    return x.unflatten(-1, (-1, w)).unflatten(-3, (-1, h))


def matrix_of(tiles: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `tiles_of`: a matrix of `shape`, without the zeros."""
    *leading, rows, columns = shape
    w = tiles.shape[-1]
    return tiles.reshape(*leading, -1, -(-columns // w) * w)[..., :rows, :columns]


def scale_of(amax: Tensor, quantiser: Quantiser) -> Tensor:
    """The scale of tiles with these largest magnitudes (FP32)."""
    scale = amax.clamp(min=quantiser.amax_floor) / quantiser.format.largest
    return round_up_to_power_of_two(scale) if quantiser.power_of_two else scale


def scaled(tiles: Tensor, scale: Tensor | None, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    """Codes of tiles [R, h, C, w], in FP32, and scales."""
    tiles = tiles.float()
    if scale is None:
        scale = scale_of(tiles.abs().amax((-3, -1), keepdim=True), quantiser)
    return round_to(tiles / scale, quantiser.format), scale


def encode(tiles: Tensor, scale: Tensor | None, *, quantiser: Quantiser) -> tuple[Tensor, Tensor]:
    codes, scale = scaled(tiles, scale, quantiser)
    return codes.to(quantiser.format.dtype), scale


def quantise(tiles: Tensor, scale: Tensor | None, *, quantiser: Quantiser, dtype: torch.dtype) -> Tensor:
    codes, scale = scaled(tiles, scale, quantiser)
    return codes.mul_(scale).to(dtype)


def quantise_and_encode(
    tiles: Tensor, scale: Tensor | None, *, quantiser: Quantiser, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    codes, scale = scaled(tiles, scale, quantiser)
    return (codes * scale).to(dtype), codes.to(quantiser.format.dtype), scale


def quantise_groups(
    tiles: Tensor, segment_R: Tensor, amax_SC: Tensor, *, quantiser: Quantiser, dtype: torch.dtype
) -> Tensor:
    """Values of tiles [R, 1, C, w]; rows of one segment share their scales. `amax_SC` holds zeros."""
    tiles = tiles.float()
    amax_RC = tiles.abs().amax((-3, -1))
    amax_SC = amax_SC.scatter_reduce(0, segment_R.unsqueeze(1).expand_as(amax_RC), amax_RC, "amax")
    scale = scale_of(amax_SC, quantiser).index_select(0, segment_R).unsqueeze(1).unsqueeze(3)
    return round_to(tiles / scale, quantiser.format).mul_(scale).to(dtype)


def decode(codes: Tensor, scales: Tensor, *, quantiser: Quantiser, dtype: torch.dtype) -> Tensor:
    return (codes.float() * scales).to(dtype)


def run_kernel(function: Callable[..., Any], *tensors: Tensor | None, compiled: bool, **settings: Any) -> Any:
    """function(*tensors, **settings); if `compiled`, as one kernel for each shape of the tensors but their first axis.

    The first call of each kernel takes seconds.
    """
    if not compiled:
        return function(*tensors, **settings)
    for tensor in tensors:
        if tensor is not None and tensor.ndim:
            torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return _compiled(function)(*tensors, **settings)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, KERNELS)
    return torch.compile(function, dynamic=False)
