"""Quantisation error of a layer, by hand; measuring changes nothing."""

import math

import pytest
import torch

from dsv3.contracts import MeasuresQuantisation, QuantisationLoss
from dsv3.testing.plain import drawn
from plugins.precision.formats import E4M3
from plugins.precision.measurement import Measurement
from plugins.precision.plain import BF16
from plugins.precision.quantiser import Quantiser
from tests.plugins.precision import reference
from tests.plugins.precision.test_blockwise import TILE, fp64, inputs, made, results


def measured(x, scale=None, *, columns=4):
    measurement = Measurement()
    measurement.start()
    quantiser = Quantiser(E4M3, 1, columns, False, 1e-12, False)
    measurement.add("ffn_down", "x_held", quantiser, x, None, scale)
    return measurement.stop()["ffn_down", "x_held"]


def test_by_hand():
    """Scale 1: 448 and 20 are kept, 17 becomes 16, 0.0005 becomes 0."""
    loss = measured(torch.tensor([[448.0, 20.0, 17.0, 0.0005], [0.0, 0.0, 0.0, 0.0]]))
    signal, noise = 448**2 + 20**2 + 17**2 + 0.0005**2, 1 + 0.0005**2
    assert loss.snr_db == pytest.approx(10 * math.log10(signal / noise), rel=1e-5)
    assert (loss.underflow, loss.saturation, loss.amax) == (0.25, 0.0, 448.0)


def test_saturation_counts_what_lies_beyond_the_range():
    loss = measured(torch.tensor([[463.0, 465.0, -1e6, 1.0]]), torch.tensor(1.0))
    assert (loss.saturation, loss.amax) == (0.5, 1e6)


def test_nothing_lost_and_nothing_there():
    assert measured(torch.tensor([[448.0, 1.0, 2.0, 0.0]])) == QuantisationLoss(math.inf, 0.0, 0.0, 448.0)
    empty = measured(torch.zeros(1, 4))
    assert math.isnan(empty.snr_db)
    assert (empty.underflow, empty.saturation, empty.amax) == (0.0, 0.0, 0.0)


def test_a_layer_is_measured_by_role_and_factor_and_computes_the_same():
    precision = made()
    assert isinstance(precision, MeasuresQuantisation)
    assert not isinstance(BF16(), MeasuresQuantisation)
    layers = [drawn(precision.linear(2 * TILE, TILE, role="ffn_down")) for _ in range(2)]
    x, dy = inputs((40, 2 * TILE), 1), inputs((40, TILE), 2)
    plain = results(layers[0], x, dy)
    layers[0].weight.grad = None
    precision.start_measuring()
    watched = results(layers[0], x, dy)
    results(layers[1], x, dy)
    losses = precision.stop_measuring()
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))
    factors = ("x_held", "w_fprop", "dy_dgrad", "w_dgrad", "x_wgrad", "dy_wgrad")
    assert set(losses) == {("ffn_down", factor) for factor in factors}
    values = reference.quantise(fp64(dy), "E4M3", 1, TILE)[2]
    expected = 10 * math.log10((fp64(dy) ** 2).sum() / ((fp64(dy) - values) ** 2).sum())
    assert losses["ffn_down", "dy_dgrad"].snr_db == pytest.approx(expected)
    assert losses["ffn_down", "w_fprop"].amax == max(layer.weight.detach().abs().max().item() for layer in layers)
    results(layers[0], x, dy)
    assert precision.stop_measuring() == losses, "nothing is added between stop and start"
