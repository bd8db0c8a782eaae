"""Rotary embedding against complex multiplication in FP64, and YaRN's published figures."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.attention import rope

YARN_V3 = {"factor": 40, "original_length": 4096, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
few = settings(max_examples=25, deadline=None, derandomize=True)
dims = st.integers(1, 12).map(lambda n: 2 * n)


def turned(x, positions, frequencies, pairing):
    """Multiply each pair, as a complex number, by e^(i p f)."""
    x = x.double()
    real, imaginary = (x[..., 0::2], x[..., 1::2]) if pairing is rope.rotate else x.chunk(2, -1)
    angle = positions.double()[..., None, None] * frequencies.double()
    product = torch.complex(real, imaginary) * torch.polar(torch.ones_like(angle), angle)
    if pairing is rope.rotate:
        return torch.view_as_real(product).flatten(-2)
    return torch.cat((product.real, product.imag), -1)


@pytest.mark.parametrize("pairing", [rope.rotate, rope.rotate_halves])
@given(dim=dims, theta=st.sampled_from([10.0, 1e4, 1e6]), seed=st.integers(0, 99))
@few
def test_turns_pairs_by_the_angle(pairing, dim, theta, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 5, 3, dim, generator=generator)
    positions = torch.randint(64, (2, 5), generator=generator)
    frequencies = rope.inverse_frequencies(dim, theta, None)
    expected_frequencies = [theta ** (-2 * j / dim) for j in range(dim // 2)]
    assert torch.allclose(frequencies, torch.tensor(expected_frequencies), rtol=1e-6)
    found = pairing(x, *rope.cos_sin(positions, frequencies))
    assert torch.allclose(found.double(), turned(x, positions, frequencies, pairing), atol=1e-5)


@pytest.mark.parametrize("pairing", [rope.rotate, rope.rotate_halves])
@given(dim=dims, shift=st.integers(0, 1000), seed=st.integers(0, 99))
@few
def test_products_depend_on_distance_only(pairing, dim, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k = torch.randn(2, 1, 2, 1, dim, generator=generator, dtype=torch.float64)
    frequencies = rope.inverse_frequencies(dim, 1e4, None)

    def product(first, second):
        at = [rope.cos_sin(torch.tensor([[p, p]]), frequencies.double()) for p in (first, second)]
        return (pairing(q, *at[0]) * pairing(k, *at[1])).sum(-1)

    assert torch.allclose(product(7, 3), product(7 + shift, 3 + shift), atol=2e-3)


@given(dim=dims, seed=st.integers(0, 99))
@few
def test_the_pairings_are_one_permutation_apart(dim, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, 2, dim, generator=generator)
    cos, sin = rope.cos_sin(torch.arange(4).unsqueeze(0), rope.inverse_frequencies(dim, 100.0, None))

    def halves_of(neighbours):
        return torch.cat((neighbours[..., 0::2], neighbours[..., 1::2]), -1)

    assert torch.allclose(rope.rotate_halves(halves_of(x), cos, sin), halves_of(rope.rotate(x, cos, sin)), atol=1e-6)


def test_results_keep_their_dtype():
    cos, sin = rope.cos_sin(torch.arange(3).unsqueeze(0), rope.inverse_frequencies(4, 1e4, None))
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        x = torch.randn(1, 3, 1, 4).to(dtype)
        for pairing in (rope.rotate, rope.rotate_halves):
            assert pairing(x, cos, sin).dtype == dtype
            assert torch.equal(pairing(x, cos, sin)[:, 0], x[:, 0])  # position 0 turns nothing


def test_yarn_of_deepseek_v3():
    """Report section 4.3: the ramp runs over pairs 10 to 23 of 32, the softmax scale is 0.13523."""
    assert rope.ramp(64, 10000.0, YARN_V3) == (10, 23)
    assert math.isclose(192**-0.5 * rope.softmax_factor(YARN_V3), 0.13523, abs_tol=5e-6)
    plain, stretched = (rope.inverse_frequencies(64, 10000.0, yarn) for yarn in (None, YARN_V3))
    assert torch.equal(stretched[:11], plain[:11])
    assert torch.allclose(stretched[23:], plain[23:] / 40)
    middle = plain[11:23] / stretched[11:23]
    assert ((middle > 1) & (middle < 40)).all()
    assert (middle.diff() > 0).all()


def test_yarn_is_off_without_a_factor():
    assert rope.softmax_factor(None) == 1.0
    assert rope.softmax_factor(YARN_V3 | {"factor": 1.0}) == 1.0
    unstretched = rope.inverse_frequencies(64, 1e4, YARN_V3 | {"factor": 1.0})
    assert torch.allclose(unstretched, rope.inverse_frequencies(64, 1e4, None))


@pytest.mark.parametrize("yarn", [{"factor": 2}, YARN_V3 | {"scale": 1}])
def test_keys_of_yarn(yarn):
    with pytest.raises(ValueError, match=r"model\.yarn="):
        rope.inverse_frequencies(8, 1e4, yarn)


def test_frequencies_first_asked_for_by_decoding_are_good_for_training() -> None:
    frequencies = rope.Frequencies(8, 100.0, None)
    with torch.inference_mode():
        frequencies.on(torch.device("meta"))
    assert not frequencies.on(torch.device("meta")).is_inference()
