"""Cross-entropy through the output head, a chunk of positions at a time.

The logits of all positions at once would be the largest tensor of a training step (N x V in FP32, three times
over with log-softmax and its gradient). Here a chunk's logits are made, turned into their own gradient in place,
and multiplied into the gradients of hidden states and head, all in the forward pass (the gradient of a weighted
sum of losses is known up to one factor, which the backward pass supplies):

    L = sum_n w_n (logsumexp(z_n) - z_n[y_n]),   z_n = W h_n,   dL/dz_n = w_n (softmax(z_n) - onehot(y_n)).

Products run in the dtype of the hidden states; softmax, loss and the head's gradient are FP32 (FP64 stays).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.contracts import IGNORE

CHUNK = 512  # positions


class HeadLoss(NamedTuple):
    total: Tensor  # scalar: the sum of the losses at all positions with a target
    correct: Tensor  # scalar int64: positions whose likeliest token is the target
    targets: Tensor  # scalar int64: positions with a target


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        with_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[1]
        accumulate = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(hidden_ND.dtype)
        total = torch.zeros((), dtype=accumulate, device=hidden_ND.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden_ND.device)
        grad_hidden_ND = torch.empty_like(hidden_ND) if with_grad else None
        grad_weight_VD = torch.zeros_like(weight_VD, dtype=accumulate) if with_grad else None
        for start in range(0, len(targets_N), CHUNK):
            rows = slice(start, start + CHUNK)
            hidden, targets = hidden_ND[rows], targets_N[rows]
            logp, nll = _log_softmax(hidden @ weight.T, targets)
            total += nll.sum()
            correct += (logp.max(-1).indices == targets).sum()  # much faster than argmax on a CPU
            if grad_hidden_ND is not None and grad_weight_VD is not None:
                grad = _logit_gradient(logp, targets).to(hidden.dtype)
                torch.mm(grad, weight, out=grad_hidden_ND[rows])
                grad_weight_VD += grad.T @ hidden
        if grad_hidden_ND is not None:
            ctx.save_for_backward(grad_hidden_ND, grad_weight_VD)
        ctx.mark_non_differentiable(correct)
        return total, correct

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden_ND, grad_weight_VD = ctx.saved_tensors
        return grad_hidden_ND * grads[0].to(grad_hidden_ND.dtype), grad_weight_VD * grads[0], None


def _log_softmax(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities, at least FP32, and each position's loss (0 where ignored)."""
    logp_NV = logits_NV.log_softmax(-1, dtype=torch.promote_types(logits_NV.dtype, torch.float32))
    nll_N = -logp_NV.gather(1, targets_N.clamp(min=0).unsqueeze(1)).squeeze(1)
    return logp_NV, nll_N.masked_fill(targets_N == IGNORE, 0.0)


def _logit_gradient(logp_NV: Tensor, targets_N: Tensor) -> Tensor:
    """softmax - onehot in place of the log-probabilities, zero where ignored."""
    index_N1 = targets_N.clamp(min=0).unsqueeze(1)
    gradient_NV = logp_NV.exp_()
    gradient_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1.0, dtype=logp_NV.dtype))
    return gradient_NV.index_fill_(0, (targets_N == IGNORE).nonzero().squeeze(1), 0.0)


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> HeadLoss:
    """Summed cross-entropy of `targets_N` under softmax(hidden_ND weight_VD^T); `IGNORE` positions give nothing."""
    total, correct = _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)
    return HeadLoss(total, correct, (targets_N != IGNORE).sum())


@torch.no_grad()
def token_losses(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Each position's loss in nats, float32 [N] (0 where ignored), and likeliest token, int64 [N]."""
    weight = weight_VD.to(hidden_ND.dtype)
    losses, predictions = [], []
    for hidden, targets in zip(hidden_ND.split(CHUNK), targets_N.split(CHUNK), strict=True):
        logp, nll = _log_softmax(hidden @ weight.T, targets)
        losses.append(nll)
        predictions.append(logp.max(-1).indices)
    return torch.cat(losses), torch.cat(predictions)
