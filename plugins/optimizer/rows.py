"""Row-wise Adagrad for tables with sparse gradients.

For each row r that the gradient has, with g_r [W] summed over its occurrences:
    s_r = s_r + mean(g_r^2)          p_r = p_r - lr * g_r / (sqrt(s_r) + eps)
A row that is seldom seen moves far each time, one that is often seen ever less (Duchi et al. 2011, with one sum for a
row). Adam's moments would have to fade in every row at every step. Nothing is decayed.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.model.layers import first_row, local


def step_rows(parameter: Tensor, gradient: Tensor, state: dict[str, Any], *, lr: float, eps: float) -> None:
    """Move the rows of `parameter` [R, W] that `gradient`, a sparse tensor of its shape, has; in place.

    Where ranks share the rows, those of the gradient are this rank's, and so is the state.
    """
    if not state:
        state["step"] = torch.zeros(())  # torch's AdamW wants one in every state
        state["square_sum"] = torch.zeros_like(parameter.select(1, 0))
    state["step"] += 1
    gradient = gradient.coalesce()
    rows_U, values_UW = gradient.indices()[0] - first_row(parameter), gradient.values()
    sum_R = local(state["square_sum"])
    sums_U = sum_R[rows_U] + values_UW.square().mean(-1)
    sum_R[rows_U] = sums_U
    local(parameter).index_add_(0, rows_U, values_UW / (sums_U.sqrt() + eps).unsqueeze(-1), alpha=-lr)
