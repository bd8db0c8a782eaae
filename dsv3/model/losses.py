"""Cross-entropy through the output head, a chunk of positions at a time.

The logits of all positions at once would be the largest tensor of a training step (N x V in FP32, three times
over with log-softmax and its gradient). Here a chunk's logits are made, turned into their own gradient in place,
and multiplied into the gradients of hidden states and head, all in the forward pass (the gradient of a weighted
sum of losses is known up to one factor, which the backward pass supplies):

    L = sum_n w_n (logsumexp(z_n) - z_n[y_n]),   z_n = W h_n,   dL/dz_n = w_n (softmax(z_n) - onehot(y_n)).

Products run in the dtype that the head is given in; softmax, loss and the sums of the head's gradient over chunks are
FP32 (FP64 stays).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.contracts import IGNORE, Head

CHUNK = 512  # positions
GPU_CHUNK = 4096
"""On a GPU, where adding a chunk's V x D gradient to their sum takes longer than its products if the chunk is small."""


class HeadLoss(NamedTuple):
    total: Tensor  # scalar: the sum of the losses at all positions with a target
    correct: Tensor  # scalar int64: positions where no token is likelier than the target
    targets: Tensor  # scalar int64: positions with a target


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, weight: Tensor
    ) -> tuple[Tensor, Tensor]:
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accumulate) if with_grad else None
        chunk = CHUNK if hidden_ND.is_cpu else GPU_CHUNK
        logits_CV = hidden_ND.new_empty(min(chunk, len(targets_N)), len(weight))
        p_CV = torch.empty_like(logits_CV, dtype=accumulate)
        losses, hits = [], []
        for start in range(0, len(targets_N), chunk):
            rows = slice(start, start + chunk)
            hidden, targets = hidden_ND[rows], targets_N[rows]
            logits, p = logits_CV[: len(targets)], p_CV[: len(targets)]
            torch.mm(hidden, weight.T, out=logits)
            nll, hit = _softmax(logits, targets, out=p)
            losses.append(nll)
            hits.append(hit)
            if grad_hidden_ND is not None and grad_weight_VD is not None:
                mask_C1 = (targets != IGNORE).to(hidden.dtype).unsqueeze(1)
                grad = _logit_gradient(p, targets, out=logits)
                torch.mm(grad, weight, out=grad_hidden_ND[rows])
                grad_hidden_ND[rows] *= mask_C1
                grad_weight_VD += grad.T @ (hidden * mask_C1)
        if grad_hidden_ND is not None:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        total, correct = torch.cat(losses).sum(), torch.cat(hits).sum()
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], None, None


def _softmax(logits_CV: Tensor, targets_C: Tensor, *, out: Tensor) -> tuple[Tensor, Tensor]:
    """Fill `out` with the probabilities; return each position's loss, and whether no token is likelier than its target.

    logsumexp(z) = max z - ln(max p), since the likeliest token's probability is 1 / sum exp(z - max z): that never
    underflows, as the target's own probability may. Ignored positions have loss 0 and are no hit.
    """
    torch.softmax(logits_CV, -1, dtype=out.dtype, out=out)
    largest_C = logits_CV.amax(-1).to(out.dtype)
    target_C = logits_CV.gather(1, targets_C.clamp(min=0).unsqueeze(1)).squeeze(1).to(out.dtype)
    real_C = targets_C != IGNORE
    nll_C = largest_C - out.amax(-1).log() - target_C
    return nll_C.masked_fill(~real_C, 0.0), (target_C == largest_C) & real_C


def _logit_gradient(p_CV: Tensor, targets_C: Tensor, *, out: Tensor) -> Tensor:
    """softmax - onehot in `out`'s dtype; rows of ignored positions are to be masked by the caller."""
    index_C1 = targets_C.clamp(min=0).unsqueeze(1)
    p_CV.scatter_add_(1, index_C1, torch.full_like(index_C1, -1.0, dtype=p_CV.dtype))
    return out.copy_(p_CV)


def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, copy_VD: Tensor | None = None
) -> HeadLoss:
    """Summed cross-entropy of `targets_N` under softmax(hidden_ND weight_VD^T); `IGNORE` positions give nothing.

    `copy_VD`: the weight as it is multiplied; None: in the dtype of the hidden states.
    """
    copy_VD = weight_VD.detach().to(hidden_ND.dtype) if copy_VD is None else copy_VD
    total, correct = _LinearCrossEntropy.apply(hidden_ND.to(copy_VD.dtype), weight_VD, targets_N, copy_VD)
    return HeadLoss(total, correct, (targets_N != IGNORE).sum())


class _TokenLogProbs(torch.autograd.Function):
    """Keeps no logits: the backward pass makes a chunk's anew."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor) -> Tensor:
        ctx.save_for_backward(hidden_ND, targets_N, copy_VD)
        ctx.weight_dtype = torch.promote_types(weight_VD.dtype, torch.float32)
        return -token_losses(hidden_ND, copy_VD, targets_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        hidden_ND, targets_N, copy_VD = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(copy_VD, dtype=ctx.weight_dtype)
        scale_N = -grads[0] * (targets_N != IGNORE)
        for start in range(0, len(targets_N), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden, targets = hidden_ND[rows], targets_N[rows]
            p = torch.softmax(hidden @ copy_VD.T, -1, dtype=ctx.weight_dtype)
            grad = torch.empty_like(p, dtype=hidden.dtype)
            grad = _logit_gradient(p, targets, out=grad) * scale_N[rows].unsqueeze(1).to(hidden.dtype)
            torch.mm(grad, copy_VD, out=grad_hidden_ND[rows])
            grad_weight_VD += grad.T @ hidden
        return grad_hidden_ND, grad_weight_VD, None, None


def token_log_probs(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, copy_VD: Tensor | None = None
) -> Tensor:
    """ln softmax(hidden_ND weight_VD^T)[targets_N], float32 [N] with a gradient (0 at `IGNORE` positions).

    For losses that are no weighted sum of them; `copy_VD` as in `linear_cross_entropy`.
    """
    copy_VD = weight_VD.detach().to(hidden_ND.dtype) if copy_VD is None else copy_VD
    log_probs_N: Tensor = _TokenLogProbs.apply(hidden_ND.to(copy_VD.dtype), weight_VD, targets_N, copy_VD)
    return log_probs_N


class _TokenDivergences(torch.autograd.Function):
    """Keeps no logits: the backward pass makes a chunk's anew."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, copy_VD: Tensor, other: Head, other_ND: Tensor, reverse: bool
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, copy_VD, other.copy_VD, other_ND)
        ctx.reverse, ctx.weight_dtype = reverse, torch.promote_types(weight_VD.dtype, torch.float32)
        chunks = zip(hidden_ND.split(CHUNK), other_ND.split(CHUNK), strict=True)
        return torch.cat([_divergence(h @ copy_VD.T, o @ other.copy_VD.T, reverse)[0] for h, o in chunks])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_ND, copy_VD, other_VD, other_ND = ctx.saved_tensors
        grad_hidden_ND = torch.empty_like(hidden_ND)
        grad_weight_VD = torch.zeros_like(copy_VD, dtype=ctx.weight_dtype)
        for start in range(0, len(hidden_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden = hidden_ND[rows]
            _, grad = _divergence(hidden @ copy_VD.T, other_ND[rows] @ other_VD.T, ctx.reverse)
            grad = (grad * grads[0][rows].unsqueeze(1)).to(hidden.dtype)
            torch.mm(grad, copy_VD, out=grad_hidden_ND[rows])
            grad_weight_VD += grad.T @ hidden
        return grad_hidden_ND, grad_weight_VD, None, None, None, None


def _divergence(logits_CV: Tensor, other_CV: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """KL(p || q) of each position if `reverse`, else KL(q || p), p being ours; and its gradient for our logits."""
    dtype = torch.promote_types(logits_CV.dtype, torch.float32)
    log_p, log_q = (torch.log_softmax(logits, -1, dtype=dtype) for logits in (logits_CV, other_CV))
    p = log_p.exp()
    if reverse:
        kl_C = (p * (log_p - log_q)).sum(-1)
        return kl_C, p * (log_p - log_q - kl_C.unsqueeze(1))
    q = log_q.exp()
    return (q * (log_q - log_p)).sum(-1), p - q


def token_divergences(hidden_ND: Tensor, head: Head, other_ND: Tensor, other_head: Head, *, reverse: bool) -> Tensor:
    """Kullback-Leibler divergence over the whole vocabulary between two models' next tokens, float32 [N], in nats.

    p = softmax(hidden head^T), with a gradient, and q = softmax(other other_head^T), without one: KL(p || q) if
    `reverse`, else KL(q || p). The widths of the two models may differ, not their vocabularies.
    """
    hidden_ND, other_ND = hidden_ND.to(head.copy_VD.dtype), other_ND.detach().to(other_head.copy_VD.dtype)
    kl_N: Tensor = _TokenDivergences.apply(hidden_ND, head.weight_VD, head.copy_VD, other_head, other_ND, reverse)
    return kl_N


@torch.no_grad()
def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Each position's loss in nats, float32 [N] (0 where ignored); products in the dtype of the weight."""
    dtype = torch.promote_types(weight_VD.dtype, torch.float32)
    losses = []
    for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True):
        logits = hidden.to(weight_VD.dtype) @ weight_VD.T
        losses.append(_softmax(logits, targets, out=torch.empty_like(logits, dtype=dtype))[0])
    return torch.cat(losses)


@torch.no_grad()
def greedy_tokens(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
    """The token that greedy decoding takes at each position, int64 [N]; products in the dtype of the weight."""
    chunks = hidden_ND.to(weight_VD.dtype).split(CHUNK)
    return torch.cat([(hidden @ weight_VD.T).max(-1).indices for hidden in chunks])  # much faster than argmax on a CPU
