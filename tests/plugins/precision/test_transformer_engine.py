"""FP8 by Transformer Engine: what can be known without a GPU, on a stand-in for its modules; and on a GPU, itself."""

import contextlib
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from dsv3.build import build_model
from dsv3.testing import check_precision
from dsv3.testing.requirement import require_uncast
from plugins.experts.grouped import loop_mm
from plugins.precision import transformer_engine
from plugins.precision.formats import E4M3
from plugins.precision.plain import CastLinear
from plugins.precision.quantiser import Quantiser, matrix_of
from plugins.precision.transformer_engine import FP8TransformerEngine, TEGroupedLinear, TELinear, te_recipe

FILE = Path(__file__).parents[3] / "conf" / "precision" / "fp8_te.yaml"
ROLES = tuple(OmegaConf.load(FILE).roles)


class StandIn:
    """The part of transformer_engine.pytorch that is used, in BF16, with TE's demands on its callers."""

    recipes: ClassVar[list] = []  # of the autocasts under way

    @staticmethod
    @contextlib.contextmanager
    def autocast(*, enabled, recipe):
        assert enabled
        StandIn.recipes.append(recipe)
        yield
        StandIn.recipes.pop()

    class Linear(nn.Module):
        names = ("weight",)

        def __init__(self, *sizes, bias, params_dtype, device):
            super().__init__()
            assert not bias
            *_, width, out = sizes
            for name in self.names_of(*sizes):
                self.register_parameter(name, nn.Parameter(torch.empty(out, width, dtype=params_dtype, device=device)))

        @staticmethod
        def names_of(width, out):
            return ["weight"]

        def forward(self, x):
            return self.product(x, self.weight)

        def product(self, x, weight):
            assert StandIn.recipes == ["the recipe"], "within TE's autocast"
            assert torch.is_autocast_enabled("cpu"), "or TE would refuse FP32 weights for BF16 inputs"
            assert x.dtype == torch.bfloat16
            assert not len(x) % 16
            return F.linear(x, weight.to(x.dtype))

    class GroupedLinear(Linear):
        @staticmethod
        def names_of(n_groups, width, out):
            return [f"weight{i}" for i in range(n_groups)]

        def forward(self, x, m_splits):
            parts = enumerate(x.split(m_splits))
            return torch.cat([self.product(part, getattr(self, f"weight{i}")) for i, part in parts])

    class Fp8Padding(nn.Module):
        def __init__(self, n_groups):
            super().__init__()

        def forward(self, x, m_splits):
            assert StandIn.recipes == ["the recipe"], "the multiple follows from the recipe"
            filled = [F.pad(part, (0, 0, 0, -len(part) % 16)) for part in x.split(m_splits)]
            return torch.cat(filled), [len(part) for part in filled]

    class Fp8Unpadding(Fp8Padding):
        def forward(self, x, m_splits):
            parts = x.split([m + -m % 16 for m in m_splits])
            return torch.cat([part[:m] for part, m in zip(parts, m_splits, strict=True)])


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(transformer_engine, "library", lambda: StandIn)
    monkeypatch.setattr(transformer_engine, "te_recipe", lambda name, **settings: "the recipe")
    monkeypatch.setattr(FP8TransformerEngine, "check", lambda self, device: [])


def made(**settings):
    return instantiate(OmegaConf.merge(OmegaConf.load(FILE), settings), _convert_="all")


@pytest.mark.usefixtures("stand_in")
def test_its_layers_conform():
    check_precision(made, tolerance=0.01)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("tied", [False, True])
def test_only_the_roles_asked_for_and_the_same_tensors_as_bf16(composed, tied):
    tie = f"model.tie_embeddings={tied}"
    model = build_model(composed("precision=fp8_te", tie))
    plain = build_model(composed("precision=bf16", tie))
    te_layers = {name for name, module in model.named_modules() if isinstance(module, TELinear)}
    linear = {name for name, module in plain.named_modules() if hasattr(module, "weight") and "proj" in name}
    assert te_layers == linear
    assert type(model.lm_head) is CastLinear
    assert (model.lm_head.weight is model.embed_tokens.weight) == tied
    for one, other in ((model, plain), (plain, model)):
        one.load_state_dict(other.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    for _, moe in model.moe_layers():
        require_uncast(moe.router)
        require_uncast(moe.balancing)


@pytest.mark.usefixtures("stand_in")
def test_roles_left_out():
    precision = made(roles=["expert_down"])
    assert type(precision.linear(32, 32, role="ffn_down")) is CastLinear
    layer = precision.grouped_linear(2, 32, 32, role="expert_down", grouped_mm=loop_mm)
    assert type(layer) is TEGroupedLinear


@pytest.mark.usefixtures("stand_in")
def test_sizes_that_fp8_products_lack():
    with pytest.raises(ValueError, match=r"ffn_down has size 40, not a multiple of 16.*precision\.roles"):
        made().linear(32, 40, role="ffn_down")


def test_without_a_gpu_or_the_package_it_says_what_to_do(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: None)
    (missing,) = made().check(cpu)
    assert "pip install 'transformer-engine[pytorch]==" in missing
    assert "precision=fp8_blockwise" in missing
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: "there")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (no_gpu,) = made().check(cpu)
    assert "needs a CUDA GPU, and there is none" in no_gpu
    assert "precision=fp8_blockwise" in no_gpu
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (unused,) = made().check(cpu)
    assert "trainer.accelerator=cuda" in unused


def test_a_library_that_cannot_be_imported_is_told(monkeypatch):
    def broken():
        raise OSError("no libcuda")

    monkeypatch.setattr(transformer_engine, "library", broken)
    with pytest.raises(ValueError, match=r"cannot be imported \(no libcuda\).*pip install"):
        made().linear(32, 32, role="ffn_down")


@pytest.fixture
def recipes(monkeypatch):
    """TE's recipe classes, which can be imported without a GPU this way."""
    pytest.importorskip("pydantic")
    monkeypatch.setenv("NVTE_PROJECT_BUILDING", "1")
    return pytest.importorskip("transformer_engine.common.recipe")


@pytest.mark.filterwarnings("ignore:Detected a PyTorch installation:RuntimeWarning")
def test_the_reports_recipe(recipes):
    recipe = te_recipe("Float8BlockScaling", power_of_two_scales=False, amax_floor=1e-4)
    assert isinstance(recipe, recipes.Float8BlockScaling)
    assert recipe.fp8_format == recipes.Format.E4M3
    blocks = (recipe.x_block_scaling_dim, recipe.w_block_scaling_dim, recipe.grad_block_scaling_dim)
    assert blocks == (1, 2, 1), "1 x 128 tiles of activations and gradients, 128 x 128 blocks of weights"
    for tensor in (recipe.fp8_quant_fwd_inp, recipe.fp8_quant_fwd_weight, recipe.fp8_quant_bwd_grad):
        assert (tensor.power_2_scale, tensor.amax_epsilon) == (False, 1e-4)
    for product in (recipe.fp8_gemm_fprop, recipe.fp8_gemm_dgrad, recipe.fp8_gemm_wgrad):
        assert product.use_split_accumulator, "partial sums are promoted"


@pytest.mark.filterwarnings("ignore:Detected a PyTorch installation:RuntimeWarning")
@pytest.mark.parametrize(
    "name", ["Float8BlockScaling", "Float8CurrentScaling", "DelayedScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"]
)
def test_recipes_by_name(recipes, name):
    recipe = te_recipe(name, power_of_two_scales=True, amax_floor=0.0)
    assert type(recipe) is getattr(recipes, name)
    if name.startswith("Float8"):
        assert recipe.fp8_quant_bwd_grad.power_2_scale
    if name == "DelayedScaling":
        assert recipe.fp8_format == recipes.Format.E4M3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """TE's products by the report's recipe are as near to the exact ones as FP8 allows, and to the emulation."""
    problems = made().check(torch.device("cuda"))
    assert not problems, problems
    check_precision(made, device="cuda", tolerance=0.06)
    emulated = instantiate(OmegaConf.load(FILE.with_name("fp8_blockwise.yaml")), _convert_="all")
    layers = [precision.linear(256, 384, role="ffn_gate_up").cuda() for precision in (made(), emulated)]
    with torch.no_grad():
        layers[1].weight.copy_(layers[0].weight.normal_(std=0.05))
    x = torch.randn(512, 256, device="cuda", dtype=torch.bfloat16)
    one, other = (layer(x).float() for layer in layers)
    assert (one - other).norm() <= 0.01 * other.norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("power_of_two", [False, True])
def test_codes_and_scales_are_those_of_the_emulation(power_of_two):
    """Bit for bit, of 1 x 128 tiles and 128 x 128 blocks. TE holds scales of tiles turned, and fills them up."""
    problems = made().check(torch.device("cuda"))
    assert not problems, problems
    tex = pytest.importorskip("transformer_engine_torch")
    quantizers = pytest.importorskip("transformer_engine.pytorch.tensor.float8_blockwise_tensor")
    x = torch.randn(256, 384, device="cuda", dtype=torch.bfloat16) * torch.rand(256, 1, device="cuda").bfloat16()
    for rows, dimension in ((1, 1), (128, 2)):
        quantizer = quantizers.Float8BlockQuantizer(
            fp8_dtype=tex.DType.kFloat8E4M3, rowwise=True, columnwise=False, amax_epsilon=1e-4,
            force_pow_2_scales=power_of_two, block_scaling_dim=dimension,
        )  # fmt: skip
        theirs = quantizer(x)
        ours = Quantiser(E4M3, rows, 128, power_of_two, 1e-4, False).held(x)
        codes = matrix_of(ours.codes, (256, 384))
        assert torch.equal(theirs._rowwise_data.view(torch.float8_e4m3fn).float(), codes.float())
        scales = ours.scales.reshape(256 // rows, 3)
        held = theirs._rowwise_scale_inv
        held = held[:3, : len(scales)].T if dimension == 1 else held[: len(scales), :3]
        assert torch.equal(held, scales)
