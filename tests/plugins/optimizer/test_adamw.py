"""AdamW with FP32 and with BF16 moments against a float64 twin; its groups; exact resume."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from plugins.optimizer.adamw import BF16MomentsAdamW, adamw

OPTIONS = {"betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1, "sparse_lr_scale": 1.0}


def named(*shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(f"p{i}.weight", nn.Parameter(torch.randn(shape, generator=generator))) for i, shape in enumerate(shapes)]


def gradients(parameters, step):
    generator = torch.Generator().manual_seed(1000 + step)
    return [torch.randn(parameter.shape, generator=generator) for _, parameter in parameters]


def set_gradients(parameters, step):
    for (_, parameter), gradient in zip(parameters, gradients(parameters, step), strict=True):
        parameter.grad = gradient


def set_rate(optimizer, rate):
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]


def reference(start, gradient_list, rates, *, decay, betas, eps):
    """The formulas in float64."""
    p, (b1, b2) = start.double(), betas
    m, v = torch.zeros_like(p), torch.zeros_like(p)
    for t, (gradient, rate) in enumerate(zip(gradient_list, rates, strict=True), start=1):
        g = gradient.double()
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        p = p - rate * decay * p - rate * (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps)
    return p


@pytest.mark.parametrize(("moments", "tolerance"), [("float32", 1e-5), ("bfloat16", 4e-3)])
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=3), min_size=1, max_size=4),
    st.integers(1, 8),
    st.integers(0, 1000),
)
def test_agrees_with_float64(moments, tolerance, shapes, steps, seed):
    """BF16 moments are compared to within 0.4% of what each element moved by, BF16's rounding step."""
    parameters = named(*shapes, seed=seed)
    starts = [parameter.detach().clone() for _, parameter in parameters]
    rates = [0.01 * (1 + step) for step in range(steps)]
    optimizer = adamw(parameters, **OPTIONS, moments_dtype=moments)
    for step, rate in enumerate(rates):
        set_gradients(parameters, step)
        set_rate(optimizer, rate)
        optimizer.step()
    for i, (_, parameter) in enumerate(parameters):
        decay = 0.1 if parameter.ndim >= 2 else 0.0
        steps_of_it = [gradients(parameters, step)[i] for step in range(steps)]
        expected = reference(starts[i], steps_of_it, rates, decay=decay, betas=(0.9, 0.95), eps=1e-8)
        torch.testing.assert_close(parameter.double(), expected, rtol=1e-5, atol=tolerance * sum(rates))


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_only_matrices_decay_and_the_rate_waits_for_the_schedule(moments):
    parameters = named([3, 4], [2, 3, 4], [5])
    before = [parameter.detach().clone() for _, parameter in parameters]
    optimizer = adamw(parameters, **OPTIONS, moments_dtype=moments)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    assert all(torch.equal(p, b) for (_, p), b in zip(parameters, before, strict=True))
    set_rate(optimizer, 0.5)
    optimizer.step()
    for (_, parameter), start in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.detach(), start * (0.95 if start.ndim >= 2 else 1.0))


def test_a_model_of_matrices_alone_has_one_group():
    assert len(adamw(named([2, 2]), **OPTIONS, moments_dtype="float32").param_groups) == 1


@pytest.mark.parametrize("moments", ["float32", "bfloat16"])
def test_resume_is_bitwise_and_steps_are_deterministic(moments):
    def run(first, last, state=None):
        parameters = named([33, 17], [4, 9, 5], [7])
        optimizer = adamw(parameters, **OPTIONS, moments_dtype=moments)
        if state is not None:
            for (_, parameter), value in zip(parameters, state[0], strict=True):
                parameter.data.copy_(value)
            optimizer.load_state_dict(state[1])
        for step in range(first, last):
            set_gradients(parameters, step)
            set_rate(optimizer, 1e-2)
            optimizer.step()
        values = [parameter.detach().clone() for _, parameter in parameters]
        return values, copy.deepcopy(optimizer.state_dict())

    whole, again = run(0, 9), run(0, 9)
    resumed = run(5, 9, state=run(0, 5))
    for other in (again, resumed):
        assert all(torch.equal(a, b) for a, b in zip(whole[0], other[0], strict=True))
        for index, state in whole[1]["state"].items():
            for key, value in state.items():
                found = other[1]["state"][index][key]
                assert type(found) is type(value)
                if isinstance(value, torch.Tensor):
                    assert found.dtype == value.dtype
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(value))


def test_bf16_moments_are_bf16_and_the_rest_is_fp32():
    parameters = named([8, 8])
    optimizer = adamw(parameters, **OPTIONS, moments_dtype="bfloat16")
    assert isinstance(optimizer, BF16MomentsAdamW)
    set_gradients(parameters, 0)
    optimizer.step()
    state = optimizer.state[parameters[0][1]]
    assert state.pop("step") == 1, "an integer, for which no step has to ask the device"
    assert {key: value.dtype for key, value in state.items()} == {
        "exp_avg": torch.bfloat16,
        "exp_avg_sq": torch.bfloat16,
    }
    assert parameters[0][1].dtype == torch.float32


def test_bf16_second_moment_follows_a_change_of_scale():
    """Gradients of 1 and then of 0.1: v must come down to 0.01 and not stall on rounding."""
    ((_, parameter),) = parameters = named([4, 4])
    optimizer = adamw(parameters, **OPTIONS, moments_dtype="bfloat16")
    for step in range(300):
        parameter.grad = torch.full_like(parameter, 1.0 if step < 100 else 0.1)
        optimizer.step()
    assert optimizer.state[parameter]["exp_avg_sq"].float().mean().item() == pytest.approx(0.01, rel=0.1)


def test_bf16_step_calls_its_closure_and_skips_parameters_without_gradient():
    parameters = named([2, 2], [2, 2])
    before = parameters[1][1].detach().clone()
    optimizer = adamw(parameters, **OPTIONS, moments_dtype="bfloat16")
    set_rate(optimizer, 0.1)

    def closure():
        optimizer.zero_grad()
        loss = parameters[0][1].square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(30)]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(parameters[1][1], before)


def test_unknown_moments_are_refused():
    with pytest.raises(ValueError, match=r"optimizer\.moments_dtype=float16"):
        adamw(named([2, 2]), **OPTIONS, moments_dtype="float16")
