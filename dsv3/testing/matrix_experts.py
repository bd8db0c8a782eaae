"""Experts for checks of a dispatch, and what a dispatch must make of them."""

import torch
from torch import Tensor

from dsv3.contracts import Routing
from dsv3.testing.requirement import require

DIM = 6
ROUNDING = 1e-4  # relative, of FP32 sums in another order


class MatrixExperts:
    """Expert e multiplies by its own matrix, and insists on what `dsv3.contracts.Experts` is promised."""

    def __init__(self, weight_EDD: Tensor) -> None:
        self.weight_EDD = weight_EDD.detach().requires_grad_()

    def __call__(self, *given: Tensor, **named: Tensor) -> Tensor:
        require(
            len(given) == 3 and not named,
            "experts must be called by position, experts(x_MD, counts_E, gates_M): the monitor looks on by a forward "
            "hook, which sees no others",
        )
        x_MD, counts_E, gates_M = given
        experts = len(self.weight_EDD)
        require(
            counts_E.shape == (experts,) and counts_E.dtype == torch.int64,
            f"experts must be given counts_E int64 [{experts}], not {counts_E.dtype} {list(counts_E.shape)}",
        )
        require(
            int(counts_E.sum()) == len(x_MD) == len(gates_M),
            f"experts must be given a row and a gate for each count: counts_E sums to {int(counts_E.sum())}, with "
            f"{len(x_MD)} rows and {len(gates_M)} gates",
        )
        require(gates_M.dtype == torch.float32, f"experts must be given float32 gates, not {gates_M.dtype}")
        parts = x_MD.split(counts_E.tolist())
        y_MD = torch.cat([x @ weight.to(x.dtype) for x, weight in zip(parts, self.weight_EDD, strict=True)])
        return y_MD * gates_M.unsqueeze(1).to(y_MD.dtype)


def expected_sum(x_ND: Tensor, routing: Routing, weight_EDD: Tensor) -> Tensor:
    """sum_k gates_NK * expert_k(x_ND), in FP64."""
    chosen_NKDD = weight_EDD.double()[routing.experts_NK]
    y_NKD = torch.einsum("nd,nkde->nke", x_ND.double(), chosen_NKDD)
    return (y_NKD * routing.gates_NK.double().unsqueeze(-1)).sum(1)
