"""Shared layers: modules refusing casts, RMSNorm, SwiGLU, hashes, decoding caches, held weights."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import Precision
from dsv3.model.recompute import recomputed


class KeepsDtype(nn.Module):
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
        self.swiglu = precision.swiglu

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_up_proj(x)))


class PositionCache:
    """What decoding keeps of up to `capacity` positions, [..., capacity, width] of one dtype: a `Cache`."""

    def __init__(self, *shape: int, dtype: torch.dtype, device: torch.device) -> None:
        self.held = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    def append(self, new: Tensor) -> Tensor:
        """Add T positions, [..., T, width], and return all held, [..., length, width], where they lie.

        Raises ValueError where there is no room for them.
        """
        end, capacity = self.length + new.shape[-2], self.held.shape[-2]
        if end > capacity:
            raise ValueError(f"the cache holds {capacity} positions, {end} are needed")
        self.held[..., self.length : end, :] = new
        self.length = end
        return self.held[..., :end, :]

    def rewind(self, length: int) -> None:
        self.length = length


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Within it no weight changes, so that each layer with a method `hold_weights` computes what follows from its
    weight alone (a cast, quantised blocks) once: not for every token decoded, and not for every micro-batch of a step.
    One within another changes nothing."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "hold_weights")]
    held = [layer for layer in layers if layer.hold_weights(True)]
    try:
        yield
    finally:
        for layer in held:
            layer.hold_weights(False)
