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

CHUNK = 1024  # positions


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
            logits = (hidden @ weight.T).to(accumulate)
            nll, predicted = _softmax_in_place(logits, targets)
            total += nll.sum()
            correct += (predicted == targets).sum()
            if grad_hidden_ND is not None and grad_weight_VD is not None:
                grad = _logit_gradient(logits, targets).to(hidden.dtype)
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


def _softmax_in_place(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits into probabilities; return each position's loss (0 where ignored) and likeliest token."""
    largest_N1, predicted_N1 = logits_NV.max(-1, keepdim=True)
    target_logit_N1 = logits_NV.gather(1, targets_N.clamp(min=0).unsqueeze(1))
    norm_N1 = logits_NV.sub_(largest_N1).exp_().sum(-1, keepdim=True)
    logits_NV.div_(norm_N1)
    nll_N = (norm_N1.log() + largest_N1 - target_logit_N1).squeeze(1)
    return nll_N.masked_fill(targets_N == IGNORE, 0.0), predicted_N1.squeeze(1)


def _logit_gradient(probabilities_NV: Tensor, targets_N: Tensor) -> Tensor:
    """softmax - onehot in place, zero where ignored."""
    ignored_N1 = (targets_N == IGNORE).unsqueeze(1)
    index_N1 = targets_N.clamp(min=0).unsqueeze(1)
    probabilities_NV.scatter_add_(1, index_N1, torch.full_like(index_N1, -1.0, dtype=probabilities_NV.dtype))
    return probabilities_NV.masked_fill_(ignored_N1, 0.0)


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
        nll, predicted = _softmax_in_place((hidden @ weight.T).float(), targets)
        losses.append(nll)
        predictions.append(predicted)
    return torch.cat(losses), torch.cat(predictions)
