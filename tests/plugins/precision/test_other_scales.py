"""Scales by row and by tensor, current and delayed, against the recipe in FP64; the history of amax."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch.utils.checkpoint import checkpoint

from dsv3.testing import check_precision
from dsv3.testing.plain import drawn
from dsv3.testing.requirement import require_uncast
from plugins.experts.grouped import grouped_mm
from tests.plugins.precision import reference
from tests.plugins.precision.test_blockwise import Products, assert_within, fp64, inputs, results

CONF = Path(__file__).parents[3] / "conf" / "precision"
N, K, OUT = 30, 24, 40


def made(name, **settings):
    precision = instantiate(OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), settings), _convert_="all")
    precision.activation_dtype = torch.float32  # so that results are not rounded to BF16
    return precision


def quantised(x, format, rows, columns):
    return reference.quantise(x, format, rows, columns)[2]


@pytest.mark.parametrize("gradient_format", ["E4M3", "E5M2"])
@pytest.mark.parametrize("name", ["fp8_rowwise", "fp8_tensorwise"])
def test_products_equal_the_recipe_in_fp64(name, gradient_format):
    settings = {"amax_history": 0} if name == "fp8_tensorwise" else {}
    layer = drawn(made(name, gradient_format=gradient_format, **settings).linear(K, OUT, role="ffn_gate_up"))
    x, dy = inputs((N, K), 1).float(), inputs((N, OUT), 2).float()
    along, across = ((1, 99), (99, 1)) if name == "fp8_rowwise" else ((99, 99), (99, 99))
    held = quantised(fp64(x), "E4M3", *along)
    x_wgrad = quantised(held, "E4M3", *across) if name == "fp8_rowwise" else held
    w, dy64 = fp64(layer.weight), fp64(dy)
    y, dx, dw = results(layer, x, dy)
    assert_within(y, Products.product(held, quantised(w, "E4M3", *along).T))
    assert_within(dx, Products.product(quantised(dy64, gradient_format, *along), quantised(w, "E4M3", *across)))
    assert_within(dw, Products.product(quantised(dy64, gradient_format, *across).T, x_wgrad))


def test_rows_of_experts_are_scaled_apart():
    """An expert's weight gradient is that of its own rows alone."""
    counts = [11, 0, 19]
    layer = drawn(made("fp8_rowwise").grouped_linear(3, K, OUT, role="expert_down", grouped_mm=grouped_mm))
    x, dy = inputs((N, K), 1).float(), inputs((N, OUT), 2).float()
    _, _, dw = results(layer, x, dy, torch.tensor(counts))
    for x_e, dy_e, dw_e in zip(x.split(counts), dy.split(counts), dw, strict=True):
        if len(x_e):
            x_wgrad = quantised(quantised(fp64(x_e), "E4M3", 1, 99), "E4M3", 99, 1)
            assert_within(dw_e, Products.product(quantised(fp64(dy_e), "E4M3", 99, 1).T, x_wgrad))


@pytest.mark.parametrize(
    ("name", "settings"),
    [("fp8_rowwise", {"power_of_two_scales": True}), ("fp8_tensorwise", {"amax_history": 0}),
     ("fp8_tensorwise", {"power_of_two_scales": True}), ("fp8_tensorwise", {"gradient_format": "E5M2"})],
)  # fmt: skip
def test_every_setting_conforms(name, settings):
    check_precision(lambda: made(name, **settings))


def step(layer, x, dy, trainer, *, recompute=False):
    """One step of training on micro-batches x; the outputs. `trainer`: the precision and the optimiser."""
    precision, optimizer = trainer
    outputs = []
    for micro, gradient in zip(x, dy, strict=True):
        leaf = micro.clone().requires_grad_()
        y = checkpoint(layer, leaf, use_reentrant=False) if recompute else layer(leaf)
        y.backward(gradient)
        outputs.append(y.detach())
    optimizer.step()
    optimizer.zero_grad()
    precision.end_step()
    return torch.stack(outputs)


def delayed(history=2):
    torch.manual_seed(0)
    precision = made("fp8_tensorwise", amax_history=history)
    layer = drawn(precision.linear(K, OUT, role="ffn_gate_up"))
    return layer, (precision, torch.optim.SGD(layer.parameters(), lr=1e-3))


def micro_batches(steps):
    """Two micro-batches of x and dy for each step."""

    def drawn_pair(width, seed):
        return torch.stack([inputs((N, width), seed + micro).float() for micro in range(2)])

    return [(drawn_pair(K, 10 * number), drawn_pair(OUT, 10 * number + 5)) for number in range(steps)]


def test_a_delayed_scale_follows_from_earlier_steps():
    layer, trainer = delayed(history=2)
    data, weights = micro_batches(4), []
    for number, (x, dy) in enumerate(data):
        weight = layer.weight.detach().clone()
        y = step(layer, x, dy, trainer)
        past = [x.abs().max() for x, _ in data[max(0, number - 2) : number]]
        for micro, found in zip(x, y, strict=True):
            scale = (torch.stack(past).max() if past else micro.abs().max()) / 448
            values = reference.numbers("E4M3")[
                reference.encode((micro / scale).clamp(-448, 448).double().numpy(), "E4M3")
            ] * scale.double().item() * torch.sign(micro).double().numpy()  # fmt: skip
            expected = expected_weight(weight, weights[-2:] or [weight])
            assert_within(found, Products.product(values, expected.T))
        weights.append(weight)
    assert layer.scales.precision_history[0].tolist() == [x.abs().max().item() for x, _ in data[:-3:-1]]


def expected_weight(weight, earlier):
    scale = (max(w.abs().max() for w in earlier) / 448).double().item()
    quantised = (weight.double() / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn)
    return quantised.double().numpy() * scale


def test_recomputed_forward_passes_count_once():
    results = []
    for recompute in (False, True):
        layer, trainer = delayed()
        outputs = [step(layer, x, dy, trainer, recompute=recompute) for x, dy in micro_batches(4)]
        results.append((torch.stack(outputs), layer.state_dict()))
    (one, state), (other, other_state) = results
    assert torch.equal(one, other)
    assert all(torch.equal(state[name], other_state[name]) for name in state)
    assert state["scales.precision_history"].all()


def test_the_history_resumes_bitwise():
    data = micro_batches(5)
    layer, trainer = delayed()
    outputs = [step(layer, x, dy, trainer) for x, dy in data]
    first, trainer = delayed()
    for x, dy in data[:3]:
        step(first, x, dy, trainer)
    second, trainer = delayed()
    second.load_state_dict(first.state_dict())
    resumed = [step(second, x, dy, trainer) for x, dy in data[3:]]
    assert torch.equal(torch.stack(resumed), torch.stack(outputs[3:]))
    assert torch.equal(second.scales.precision_history, layer.scales.precision_history)


def test_validation_leaves_the_history_alone():
    layer, trainer = delayed()
    x, dy = micro_batches(1)[0]
    step(layer, x, dy, trainer)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with torch.no_grad():
        layer.eval()(1000 * x)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_what_is_not_finite_shows_and_is_not_remembered():
    layer, trainer = delayed()
    data = micro_batches(3)
    step(layer, *data[0], trainer)
    x = data[1][0][0].clone()
    x[0, 0] = float("inf")
    assert layer(x).isnan().all()
    assert layer.scales.precision_amax.isfinite().all()
    assert step(layer, *data[2], trainer).isfinite().all()


def test_a_cast_of_the_model_leaves_the_history_in_fp32():
    layer, _ = delayed()
    require_uncast(layer.scales)
    layer.to(torch.bfloat16)
    assert layer.scales.precision_amax.dtype == torch.float32
