"""FP8 products by torch: codes and scales in the layout that cuBLAS reads, multiplied here as its documentation says.

Layouts are those of torch's own tests of block-wise scaling; a GPU multiplies in the last test.
"""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import Tensor

from dsv3.contracts import Role
from dsv3.model.layers import cached_weight_casts
from dsv3.paths import CONF
from dsv3.testing.precision import check_precision
from plugins.experts.grouped import grouped_mm
from plugins.precision import gpu_blockwise
from plugins.precision.plain import CastGroupedLinear

ROLES: list[Role] = ["attention_down", "attention_out", "ffn_gate_up"]


def made(name: str = "fp8_gpu", **settings: Any) -> Any:
    config = OmegaConf.load(CONF / f"precision/{name}.yaml")
    return instantiate(OmegaConf.merge(config, settings), _convert_="all")


def as_cublas(
    a: Tensor, b: Tensor, *, scale_a: Tensor, scale_recipe_a: Any, scale_b: Tensor, scale_recipe_b: Any,
    output_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """scaled_mm with scales for tiles and blocks, sums over 128 numbers scaled and added in FP32."""
    (m, k), n = a.shape, b.shape[1]
    assert a.dtype == b.dtype == torch.float8_e4m3fn
    assert (a.stride(), b.stride()) == ((k, 1), (1, k)), "a by rows, b by columns"
    assert m % 128 == n % 128 == k % 128 == 0
    assert scale_a.dtype == scale_b.dtype == torch.float32
    assert scale_recipe_a == F.ScalingType.BlockWise1x128
    assert scale_a.shape == (m, k // 128)
    assert scale_a.stride(0) == 1
    assert scale_a.stride(1) in (1, m)
    if scale_recipe_b == F.ScalingType.BlockWise128x128:
        held = -(-(k // 128) // 4) * 4
        assert scale_b.shape == (held, n // 128)
        assert scale_b.stride() == (1, held)
        of_columns = scale_b[: k // 128].mT.repeat_interleave(128, 0)
    else:
        assert scale_recipe_b == F.ScalingType.BlockWise1x128
        assert scale_b.shape == (n, k // 128)
        assert scale_b.stride(0) == 1
        of_columns = scale_b
    total = torch.zeros(m, n)
    for i in range(k // 128):
        part = a[:, i * 128 : (i + 1) * 128].float() @ b[i * 128 : (i + 1) * 128].float()
        total += part * scale_a[:, i : i + 1] * of_columns[:, i]
    return total.to(output_dtype)


@pytest.fixture
def cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_mm", as_cublas)


def results(precision: Any, role: Role, x: Tensor, weight: Tensor, dy: Tensor, *, held: bool = False) -> list[Tensor]:
    """y, dx and dw of a layer."""
    layer = precision.linear(weight.shape[1], weight.shape[0], role=role)
    with torch.no_grad():
        layer.weight.copy_(weight)
    leaf = x.clone().requires_grad_()
    with cached_weight_casts(layer) if held else torch.enable_grad():
        y = layer(leaf)
        y.backward(dy)
    return [y.detach(), leaf.grad, layer.weight.grad]  # type: ignore[list-item]


@pytest.mark.usefixtures("cublas")
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("sizes", [(256, 384, 128), (200, 96, 576), (3, 130, 48)])
@pytest.mark.parametrize("powers", [False, True])
@pytest.mark.parametrize("held", [False, True])
def test_products_are_those_of_the_emulation(role: Role, sizes: tuple[int, int, int], powers: bool, held: bool) -> None:
    """Codes and scales are alike; sums are rounded elsewhere."""
    rows, wide, out = sizes
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(2, rows, wide, generator=generator).bfloat16()
    x[0, 0] *= 50  # rows of unlike sizes
    weight = torch.randn(out, wide, generator=generator) / 20
    dy = torch.randn(2, rows, out, generator=generator).bfloat16()
    settings = {"power_of_two_scales": powers, "compile_quantiser": False}
    ours = results(made(**settings), role, x, weight, dy, held=held)
    theirs = results(made("fp8_blockwise", **settings), role, x, weight, dy)
    for name, one, other in zip(("y", "dx", "dw"), ours, theirs, strict=True):
        assert one.dtype == other.dtype
        bound = 1e-5 if name == "dw" else 4e-3  # of the largest: y and dx are rounded to BF16
        assert (one.float() - other.float()).abs().max() <= bound * other.abs().max(), name


@pytest.mark.usefixtures("cublas")
def test_it_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_blockwise.FP8GPU, "check", lambda self, device: [])
    check_precision(lambda: made(compile_quantiser=False))


def test_experts_compute_in_bf16() -> None:
    layer = made().grouped_linear(4, 32, 16, role="expert_down", grouped_mm=grouped_mm)
    assert isinstance(layer, CastGroupedLinear)
    with pytest.raises(InstantiationException, match=r"must not include expert_down.*fp8_te"):
        made(roles=["ffn_down", "expert_down"])


def test_a_device_without_such_products_is_told() -> None:
    (problem,) = made().check(torch.device("cpu"))
    assert problem.startswith("precision=fp8_gpu: it needs a Hopper GPU")
    assert "precision=fp8_blockwise" in problem


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
def test_on_a_gpu() -> None:
    if problems := made().check(torch.device("cuda")):
        pytest.skip(problems[0])
    check_precision(lambda: made(compile_quantiser=False), device="cuda", tolerance=0.06)
    x, dy = (torch.randn(2, 200, width, device="cuda", dtype=torch.bfloat16) for width in (384, 576))
    weight = torch.randn(576, 384, device="cuda") / 20
    with torch.device("cuda"):
        ours, theirs = (
            results(made(name, compile_quantiser=False), "ffn_gate_up", x, weight, dy)
            for name in ("fp8_gpu", "fp8_blockwise")
        )
    for one, other in zip(ours, theirs, strict=True):
        assert (one.float() - other.float()).norm() <= 5e-3 * other.float().norm(), "14 bits within sums of 128"
