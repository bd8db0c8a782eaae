"""Every shipped precision that runs here passes `check_precision`; faulty ones do not. BF16 in detail."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing import check_precision
from plugins.precision.plain import BF16, FP32, CastGroupedLinear, CastLinear

CONF = Path(__file__).parents[3] / "conf"


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "precision").glob("*.yaml")))
def test_shipped_precisions_conform(name):
    def factory():
        return instantiate(OmegaConf.load(CONF / "precision" / f"{name}.yaml"), _convert_="all")

    problems = factory().check(torch.device("cpu"))
    if problems:
        pytest.skip("; ".join(problems))
    check_precision(factory)


def test_fp32_is_exact_to_rounding():
    check_precision(FP32, tolerance=1e-5)


def test_bf16_products():
    """Factors rounded to BF16, accumulated in FP32: the error is that of the rounding, in all three products."""
    check_precision(BF16, tolerance=0.01)
    layer = BF16().linear(64, 32, role="ffn_down")
    torch.nn.init.normal_(layer.weight)
    x = torch.randn(16, 64)
    expected = (x.bfloat16().double() @ layer.weight.bfloat16().double().T).bfloat16()
    assert torch.allclose(layer(x).double(), expected.double(), rtol=2**-7, atol=2**-5)


def test_bf16_gradients_add_up_in_fp32():
    """512 equal micro-batches: a BF16 sum would stop growing at 256 times the first."""
    layer = BF16().linear(8, 8, role="ffn_down")
    torch.nn.init.ones_(layer.weight)
    x = torch.ones(1, 8)
    for _ in range(512):
        layer(x).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((8, 8), 512.0))


def test_master_weights_keep_small_updates():
    layer = BF16().linear(8, 8, role="ffn_down")
    torch.nn.init.ones_(layer.weight)
    for _ in range(8):
        layer.weight.data += 2**-12  # BF16 rounds each of them away
    assert torch.equal(layer.weight, torch.full((8, 8), 1 + 2**-9))


class Good(FP32):
    pass


class Biased(CastLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.bias = torch.nn.Parameter(torch.zeros(self.weight.shape[0]))


class HalfMaster(CastLinear):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = torch.nn.Parameter(self.weight.bfloat16())

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


class Transposed(CastLinear):
    def __init__(self, i, o, **kwargs):
        super().__init__(o, i, **kwargs)

    def forward(self, x):
        return x @ self.weight


class Wrong(CastLinear):
    def forward(self, x):
        return super().forward(x) * 1.2


class InputGradientLost(CastLinear):
    def forward(self, x):
        return super().forward(x.detach()) + 0 * x.sum()


class WeightGradientLost(CastLinear):
    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.detach()) + 0 * self.weight.sum()


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_equals_its_formula_and_its_gradient_finite_differences(weighted):
    gate_up = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    weights = torch.rand(3, dtype=torch.float64, requires_grad=True) if weighted else None
    gate, up = gate_up.chunk(2, -1)
    expected = gate / (1 + (-gate).exp()) * up
    found = FP32().swiglu(gate_up, weights)
    assert torch.allclose(found, expected if weights is None else expected * weights.unsqueeze(-1))
    inputs = (gate_up,) if weights is None else (gate_up, weights)
    assert torch.autograd.gradcheck(FP32().swiglu, inputs)


class Narrow(CastLinear):
    def forward(self, x):
        return super().forward(x).bfloat16()


class OtherInValidation(CastLinear):
    def forward(self, x):
        return super().forward(x) * (1 if torch.is_grad_enabled() else 1.05)


def with_layer(layer):
    class Precision(Good):
        def linear(self, i, o, *, role):
            return layer(i, o, dtype=torch.float32)

    return Precision


class Leaky(CastGroupedLinear):
    def forward(self, x, counts):
        return super().forward(x, counts) + 0 * self.weight[1].sum() + self.weight[1, 0, 0] * 1e-3


class LeakyGroups(Good):
    def grouped_linear(self, e, i, o, *, role, grouped_mm):
        return Leaky(e, i, o, dtype=torch.float32, grouped_mm=grouped_mm)


class RolesForgotten(Good):
    def linear(self, i, o, *, role):
        return (Wrong if role == "mtp_projection" else CastLinear)(i, o, dtype=torch.float32)


class OtherActivation(Good):
    def swiglu(self, gate_up, row_weights=None):
        gate, up = gate_up.chunk(2, -1)
        return torch.nn.functional.gelu(gate) * up


class ActivationGradientLost(Good):
    def swiglu(self, gate_up, row_weights=None):
        return super().swiglu(gate_up.detach(), row_weights) + 0 * gate_up.sum()


class RowWeightsForgotten(Good):
    def swiglu(self, gate_up, row_weights=None):
        return super().swiglu(gate_up)


class RowGradientLost(Good):
    def swiglu(self, gate_up, row_weights=None):
        return super().swiglu(gate_up, None if row_weights is None else row_weights.detach()) + (
            0 if row_weights is None else 0 * row_weights.sum()
        )


class NeverForgets(CastLinear):
    kept = None

    def hold_weights(self, hold):
        self.kept = self.kept or [self.weight.detach().clone()]
        return hold

    def cast_weight(self):
        return (
            self.weight if self.kept is None else self.kept[0] + 0 * self.weight + (self.weight - self.weight.detach())
        )


class Refusing(Good):
    def check(self, device):
        return ["it needs a GPU."]


class ChecksNothing(Good):
    def check(self, device):
        return True


class NoDtype(Good):
    activation_dtype = "float32"


@pytest.mark.parametrize(
    ("precision", "words"),
    [
        (with_layer(Biased), "no bias"),
        (with_layer(HalfMaster), "master weight must be float32"),
        (with_layer(Transposed), r"master weight must be float32 \[160, 192\]"),
        (with_layer(Wrong), "the output is 20.0% off"),
        (with_layer(InputGradientLost), "gradient of the input is 100.0% off"),
        (with_layer(WeightGradientLost), "gradient of the weight is 100.0% off"),
        (with_layer(Narrow), "must give torch.float32"),
        (with_layer(OtherInValidation), "the same without gradients"),
        (LeakyGroups, "a group without rows must get a gradient of zero"),
        (RolesForgotten, r"linear\(role='mtp_projection'\)"),
        (with_layer(NeverForgets), "must forget what it held"),
        (OtherActivation, "swiglu: the value is"),
        (RowWeightsForgotten, r"swiglu: the value is .* \* row_weights"),
        (RowGradientLost, "swiglu: the gradient of the row weights is 100.0% off"),
        (ActivationGradientLost, "swiglu: the gradient is 100.0% off"),
        (Refusing, "does not run on cpu: it needs a GPU"),
        (ChecksNothing, "list of sentences"),
        (NoDtype, "activation_dtype"),
    ],
)
def test_faulty_precisions_are_found(precision, words):
    with pytest.raises(AssertionError, match=words):
        check_precision(precision)


def test_a_shared_weight_is_found():
    layer = CastLinear(192, 160, dtype=torch.float32)

    class Shared(Good):
        def linear(self, i, o, *, role):
            return layer

    with pytest.raises(AssertionError, match="a new weight each time"):
        check_precision(Shared)
