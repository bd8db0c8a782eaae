"""Every shipped router passes `check_router`; routers with one fault each do not."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing import check_router
from plugins.router.softmax import SoftmaxRouter

CONF = Path(__file__).parents[3] / "conf"
UNLEARNED = {"hash": {"learned": False}, "random": {"learned": False, "token_wise": False}}
SIZES = {"dim": 32, "n_experts": 16, "top_k": 4}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "router").glob("*.yaml")))
@pytest.mark.parametrize("changes", [{}, {"n_groups": 1, "topk_groups": 1}, {"top_k": 2}])
def test_shipped_routers_conform(name, changes):
    model = {"dim": 32, "n_routed_experts": 16, "top_k": 4, "n_groups": 4, "topk_groups": 2, "route_scale": 2.5}
    root = OmegaConf.create({"model": model | changes, "router": OmegaConf.load(CONF / "router" / f"{name}.yaml")})
    sizes = SIZES | {key: value for key, value in changes.items() if key == "top_k"}
    check_router(instantiate(root.router), **sizes, **UNLEARNED.get(name, {}))


class Good(SoftmaxRouter):
    def __init__(self) -> None:
        super().__init__(**SIZES, n_groups=1, topk_groups=1, route_scale=1.0, normalise_gates=True)


def test_the_good_router_conforms():
    check_router(Good, **SIZES)


class BiasInGate(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(gates_NK=routing.gates_NK + bias_E[routing.experts_NK])


class BiasInAffinity(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(affinities_NE=routing.affinities_NE + bias_E.clamp(min=0))


class BiasIgnored(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        return super().forward(x_ND, torch.zeros_like(bias_E), tokens_N)


class Repeated(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(experts_NK=routing.experts_NK[:, :1].expand(-1, self.top_k))


class NarrowIndices(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(experts_NK=routing.experts_NK.int())


class HalfPrecision(Good):
    def logits(self, x_ND):
        return (x_ND.bfloat16() @ self.weight.bfloat16().T).float()


class RoundedWeight(Good):
    def logits(self, x_ND):
        with torch.autocast("cpu", enabled=False):
            return x_ND.float() @ self.weight.bfloat16().float().T


class Autocast(Good):
    def logits(self, x_ND):
        return (x_ND.float() @ self.weight.T).float()


class Castable(Good):
    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


class DetachedGates(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(gates_NK=routing.gates_NK.detach())


class Centred(Good):
    def logits(self, x_ND):
        return super().logits(x_ND.float() + torch.arange(len(x_ND)).unsqueeze(1))


class Silent(Good):
    def __getattr__(self, name):
        if name == "top_k":
            raise AttributeError(name)
        return super().__getattr__(name)

    def __setattr__(self, name, value):
        super().__setattr__("k" if name == "top_k" else name, value)


class Uncast(Good):
    def forward(self, x_ND, bias_E, tokens_N):
        torch.nn.functional.linear(x_ND, self.weight)
        return super().forward(x_ND, bias_E, tokens_N)


class Drifting(Good):
    calls = 0

    def forward(self, x_ND, bias_E, tokens_N):
        self.calls += 1
        routing = super().forward(x_ND, bias_E, tokens_N)
        return routing._replace(experts_NK=(routing.experts_NK + self.calls) % SIZES["n_experts"])


@pytest.mark.parametrize(
    ("router", "words"),
    [
        (Silent, "`top_k` must be 4"),
        (BiasInGate, "selection only"),
        (BiasInAffinity, "must not enter affinities"),
        (BiasIgnored, "must send it more tokens"),
        (Repeated, "distinct"),
        (NarrowIndices, "experts_NK must be torch.int64"),
        (Uncast, r"x_ND.float\(\) casts it"),
        (HalfPrecision, "input must be routed in FP32"),
        (RoundedWeight, "weights must be used in FP32"),
        (Autocast, "under autocast"),
        (Castable, "must stay so"),
        (DetachedGates, "gates_NK must carry a gradient"),
        (Centred, "depend on the other tokens"),
        (Drifting, "differs"),
    ],
)
def test_faulty_routers_are_found(router, words):
    with pytest.raises(AssertionError, match=words):
        check_router(router, **SIZES)


def test_a_shared_weight_is_found():
    weight = Good().weight

    def factory():
        router = Good()
        router.weight = weight
        return router

    with pytest.raises(AssertionError, match="a router of its own"):
        check_router(factory, **SIZES)
