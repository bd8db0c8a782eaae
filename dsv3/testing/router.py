"""Does a router keep to `dsv3.contracts.Router`?"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dsv3.contracts import ReplaysRouting, Routing
from dsv3.testing.requirement import require, require_meta, require_reloadable, require_uncast

TOKENS = 96
VOCABULARY = 1000
NUDGE = 1 + 2**-12  # within the rounding of BF16, far above FP32's


def check_router(
    factory: Callable[[], nn.Module],
    *,
    dim: int,
    n_experts: int,
    top_k: int,
    learned: bool = True,
    token_wise: bool = True,
) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a router that the core can use.

    learned: the affinities come from parameters, and the bias moves the selection (not so for hash routing).
    token_wise: what happens to a token does not depend on the others or on its place (not so for random routing).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        require_meta(factory)
        router = factory()
        require(isinstance(router, nn.Module), "a router is an nn.Module")
        found = getattr(router, "top_k", None)
        require(found == top_k, f"`top_k` must be {top_k}, the experts per token that others read; it is {found}")
        x_ND, tokens_N = torch.randn(TOKENS, dim), torch.randint(VOCABULARY, (TOKENS,))
        bias_E = torch.zeros(n_experts)
        _shapes(router, x_ND, bias_E, tokens_N, n_experts, top_k)
        _precision(router, x_ND, bias_E, tokens_N)
        _state(router, factory, x_ND, bias_E, tokens_N)
        _bias(router, x_ND, tokens_N, n_experts, learned)
        if isinstance(router, ReplaysRouting):
            _replay(router, router(x_ND, bias_E, tokens_N))
        if token_wise:
            _permutation(router, x_ND, bias_E, tokens_N)
        if learned:
            _resolution(router, x_ND, bias_E, tokens_N)
            _gradients(router, x_ND, bias_E, tokens_N, top_k)


def _shapes(router: nn.Module, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor, n_experts: int, top_k: int) -> None:
    for n in (TOKENS, 1):
        routing = router(x_ND[:n], bias_E, tokens_N[:n])
        for name, tensor, width, dtype in (
            ("experts_NK", routing.experts_NK, top_k, torch.int64),
            ("gates_NK", routing.gates_NK, top_k, torch.float32),
            ("affinities_NE", routing.affinities_NE, n_experts, torch.float32),
        ):
            require(
                tensor.shape == (n, width) and tensor.dtype == dtype,
                f"{name} must be {dtype} [{n}, {width}] for {n} tokens, not {tensor.dtype} {list(tensor.shape)}",
            )
            require(tensor.isfinite().all(), f"{name} has values that are not finite")
        experts_NK = routing.experts_NK
        require(((experts_NK >= 0) & (experts_NK < n_experts)).all(), f"experts_NK must lie in 0..{n_experts - 1}")
        ordered = experts_NK.sort(dim=1).values
        require((ordered[:, 1:] != ordered[:, :-1]).all(), "a token's experts_NK must be distinct")
        require((routing.affinities_NE >= 0).all(), "affinities_NE are raw scores, never below 0")


def _precision(router: nn.Module, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> None:
    rounded = x_ND.bfloat16()
    full = router(rounded.float(), bias_E, tokens_N)
    sentence = "a BF16 input must be routed in FP32, like the same numbers in FP32; x_ND.float() casts it"
    try:
        of_bf16 = router(rounded, bias_E, tokens_N)
    except RuntimeError as error:  # a product of BF16 and FP32
        raise AssertionError(f"{sentence} ({error})") from error
    _same(of_bf16, full, sentence)
    with torch.autocast(x_ND.device.type, dtype=torch.bfloat16):
        sentence = "routing must stay in FP32 under autocast: `with torch.autocast(x_ND.device.type, enabled=False)`"
        _same(router(rounded.float(), bias_E, tokens_N), full, sentence)
    require_uncast(router)
    _same(router(rounded.float(), bias_E, tokens_N), full, "routing must stay in FP32 after `.to(torch.bfloat16)`")


def _resolution(router: nn.Module, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> None:
    """Changes that FP32 holds and BF16 rounds away must reach the affinities, from the input and from the weights."""
    rounded = x_ND.bfloat16().float()
    coarse, nudged = copy.deepcopy(router), copy.deepcopy(router)
    for one, other in zip(coarse.parameters(), nudged.parameters(), strict=True):
        one.data.copy_(one.data.bfloat16())
        other.data.copy_(one.data * NUDGE)
    plain = coarse(rounded, bias_E, tokens_N).affinities_NE
    moved = coarse(rounded * NUDGE, bias_E, tokens_N).affinities_NE
    require((moved != plain).any(), "an FP32 input must be routed in FP32; it is rounded first")
    moved = nudged(rounded, bias_E, tokens_N).affinities_NE
    require((moved != plain).any(), "the weights must be used in FP32; they are rounded first")


def _state(router: nn.Module, factory: Callable[[], nn.Module], x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> None:
    def routed(module: nn.Module) -> Routing:
        torch.manual_seed(1)
        return module(x_ND, bias_E, tokens_N)

    first = routed(router)
    _same(routed(router), first, "the same tokens must be routed alike when they are routed again (recomputation)")
    torch.manual_seed(2)
    fresh = factory()
    require(
        not {id(p) for p in router.parameters()} & {id(p) for p in fresh.parameters()},
        "the factory must make new parameters each time: every layer has a router of its own",
    )
    require_reloadable(router, fresh)
    _same(routed(fresh), first, "a router restored from a state_dict must route like the one saved")


def _bias(router: nn.Module, x_ND: Tensor, tokens_N: Tensor, n_experts: int, learned: bool) -> None:
    plain = router(x_ND, torch.zeros(n_experts), tokens_N)
    for expert in range(n_experts):
        bias_E = torch.zeros(n_experts)
        bias_E[expert] = 2.0
        biased = router(x_ND, bias_E, tokens_N)
        require(
            torch.equal(biased.affinities_NE, plain.affinities_NE),
            "bias_E must not enter affinities_NE, which are the raw scores",
        )
        chosen, order = biased.experts_NK.sort(dim=1)
        chosen_plain, order_plain = plain.experts_NK.sort(dim=1)
        same_N = (chosen == chosen_plain).all(1)
        require(
            torch.allclose(
                biased.gates_NK.gather(1, order)[same_N], plain.gates_NK.gather(1, order_plain)[same_N], rtol=1e-5
            ),
            "bias_E must move the selection only: tokens whose experts it left alone have other gates",
        )
        if learned:
            before, after = (int((routing.experts_NK == expert).sum()) for routing in (plain, biased))
            require(
                after > before or after == before == len(x_ND),
                f"a bias of 2 on expert {expert} must send it more tokens; it went from {before} to {after}",
            )


def _replay(router: ReplaysRouting, routing: Routing) -> None:
    found_NK = router.gates(routing.affinities_NE, routing.experts_NK)
    require(
        torch.allclose(found_NK, routing.gates_NK, rtol=1e-5, atol=1e-7),
        "gates() of the experts that the router chose must be the gates that it gave them",
    )
    turned_NK = router.gates(routing.affinities_NE, routing.experts_NK.flip(1))
    require(
        torch.allclose(turned_NK.flip(1), routing.gates_NK, rtol=1e-5, atol=1e-7),
        "gates() must give each expert its own gate, in whatever order they come",
    )


def _permutation(router: nn.Module, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> None:
    order_N = torch.randperm(len(x_ND))
    plain, moved = router(x_ND, bias_E, tokens_N), router(x_ND[order_N], bias_E, tokens_N[order_N])
    require(
        torch.allclose(moved.affinities_NE, plain.affinities_NE[order_N], rtol=1e-4, atol=1e-6),
        "a token's affinities must not depend on the other tokens or on its place (else: token_wise=False)",
    )
    exact_N = (moved.affinities_NE == plain.affinities_NE[order_N]).all(1)
    require(
        torch.equal(moved.experts_NK[exact_N], plain.experts_NK[order_N][exact_N]),
        "tokens with equal affinities must go to equal experts, wherever they stand (else: token_wise=False)",
    )


def _gradients(router: nn.Module, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor, top_k: int) -> None:
    parameters = list(router.parameters())
    require(bool(parameters), "a learned router has parameters (else: learned=False)")
    for parameter in parameters:
        require(parameter.dtype == torch.float32, "a router's parameters are float32")
    x_ND = x_ND.clone().requires_grad_()
    routing = router(x_ND, bias_E, tokens_N)
    for name, output in (("affinities_NE", routing.affinities_NE), ("gates_NK", routing.gates_NK)):
        if name == "gates_NK" and top_k == 1:
            continue  # a single normalised gate is constant
        require(output.requires_grad, f"{name} must carry a gradient to the router's parameters")
        weights = torch.randn_like(output)
        gradients = torch.autograd.grad((output * weights).sum(), [x_ND, *parameters], retain_graph=True)
        for gradient in gradients:
            require(gradient.isfinite().all(), f"the gradient through {name} is not finite")
            require(gradient.abs().sum() > 0, f"the gradient through {name} must reach the input and every parameter")


def _same(routing: Routing, expected: Routing, sentence: str) -> None:
    for name, tensor, other in zip(Routing._fields, routing, expected, strict=True):
        require(torch.equal(tensor, other), f"{sentence}; {name} differs")
