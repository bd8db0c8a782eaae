"""Row-wise Adagrad against the formula in float64, whatever optimiser meets a sparse gradient; exact resume."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from plugins.optimizer.adamw import adamw
from plugins.optimizer.muon import muon

ROWS, WIDTH, SCALE, RATE = 11, 5, 3.0, 0.05
SHARED = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "sparse_lr_scale": SCALE}
MUON = {"momentum": 0.95, "newton_schulz_steps": 5, "newton_schulz_dtype": "float32", "lr_scale": 1.0}
OPTIMISERS = {
    "fused": lambda named: adamw(named, **SHARED, moments_dtype="float32"),
    "bfloat16": lambda named: adamw(named, **SHARED, moments_dtype="bfloat16"),
    "muon": lambda named: muon(named, **SHARED, **MUON, adamw_params=["memory.*"], adamw_lr_scale=1.0),
    "muon, not named": lambda named: muon(named, **SHARED, **MUON, adamw_params=[], adamw_lr_scale=9.0),
}


def network():
    generator = torch.Generator().manual_seed(0)
    table = nn.Parameter(torch.randn(ROWS, WIDTH, generator=generator))
    matrix = nn.Parameter(torch.randn(2, WIDTH, generator=generator))
    return [("memory.tables.0.weight", table), ("layer.weight", matrix)]


def step(optimizer, parameters, number):
    """Rows drawn with repetition, in two backward passes; returns the dense gradient of the table."""
    generator = torch.Generator().manual_seed(100 + number)
    table, matrix = (parameter for _, parameter in parameters)
    dense = torch.zeros(ROWS, WIDTH, dtype=torch.float64)
    for _ in range(2):
        ids, target = torch.randint(ROWS // 2, (6,), generator=generator), torch.randn(6, 2, generator=generator)
        (F.embedding(ids, table, sparse=True) @ matrix.T * target).sum().backward()
        with torch.no_grad():
            dense.index_add_(0, ids, (target @ matrix).double())
    assert table.grad.is_sparse
    for group in optimizer.param_groups:
        group["lr"] = RATE
    optimizer.step()
    optimizer.zero_grad()
    return dense


@pytest.mark.parametrize("name", OPTIMISERS)
def test_sparse_gradients_are_stepped_by_the_formula(name):
    parameters = network()
    (_, table), (_, matrix) = parameters
    expected, sums, matrix_before = table.detach().double(), torch.zeros(ROWS, dtype=torch.float64), matrix.clone()
    untouched = table.detach().clone()[ROWS // 2 :]
    optimizer = OPTIMISERS[name](parameters)
    for number in range(4):
        gradient = step(optimizer, parameters, number)
        sums += gradient.square().mean(-1)
        expected -= SCALE * RATE * gradient / (sums.sqrt() + 1e-8).unsqueeze(-1)
    torch.testing.assert_close(table.detach().double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(table[ROWS // 2 :], untouched), "no decay where nothing was read"
    assert not torch.equal(matrix, matrix_before), "dense gradients are stepped as ever"


@pytest.mark.parametrize("name", OPTIMISERS)
def test_resumes_exactly(name):
    parameters = network()
    optimizer = OPTIMISERS[name](parameters)
    step(optimizer, parameters, 0)
    again = [(key, nn.Parameter(parameter.detach().clone())) for key, parameter in parameters]
    resumed = OPTIMISERS[name](again)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, both in ((optimizer, parameters), (resumed, again)):
        step(one, both, 1)
        step(one, both, 2)
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(parameters, again, strict=True))
