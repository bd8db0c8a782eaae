"""Replayed routing: recorded experts at gates of now, in the model and from the sampler to the loss."""

import copy
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from dsv3.contracts import IGNORE, Prompt, Routing
from dsv3.inference.engines import Source, source_of
from dsv3.inference.prefixes import SHORTEST_SHARED
from dsv3.model.decoder import Decoder
from dsv3.model.load import Loads
from dsv3.model.moe import MoE
from dsv3.rollout.sampler import sample
from dsv3.rollout.turns import rollouts_of
from dsv3.training.run_models import RunModels
from plugins.objective.packing import Drawn, pack
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, micro_batch, random_model

E, K = SHAPES["n_routed_experts"], 3
ONE_GROUP = {"n_groups": 1, "topk_groups": 1, "top_k": K}


class Ids:
    """A tokenizer of numbers."""

    eos = 0

    def decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


def twins(*options: str) -> tuple[DictConfig, Decoder, Decoder]:
    """A policy in which experts 2i and 2i + 1 have one affinity, so that the last choice is one of two alike; and the
    policy as an engine has it that rounds otherwise: it takes the second of them, where training takes the first."""
    config = configured(*options, **SHAPES | ONE_GROUP)
    config.data.isolate_documents = True  # as data of prompts has it
    policy = random_model(config, seed=1)
    for _, moe in policy.moe_layers():
        weight: Any = moe.router.weight
        weight.data[1::2] = weight.data[::2]
        for buffer in moe.balancing.buffers():
            buffer.zero_()
    engine = copy.deepcopy(policy)
    for name, buffer in engine.named_buffers():
        if name.endswith("loss_free.bias"):
            buffer[1::2] = 1e-6
    return config, policy, engine


def rolled(source: Source, prompts: list[list[int]], *, experts: bool = True) -> list[Drawn]:
    asked = [Prompt(ids, "", {}, number) for number, ids in enumerate(prompts)]
    reply = lambda ids, seeds: sample(source, Ids(), ids, seeds, max_tokens=12, temperature=1.0, experts=experts)  # noqa: E731
    found = rollouts_of(asked, range(len(asked)), reply, Ids(), room=128)  # type: ignore[arg-type]
    return [Drawn(one, {"old": one.log_probs}) for one in found]


@pytest.mark.parametrize("engine", ["eager", "onnx"])
def test_training_has_the_probabilities_of_the_sampler_where_they_choose_other_experts(engine: str) -> None:
    """Groups of answers to one prompt, whose beginning is read once."""
    config, policy, other = twins()
    prompts = [[1 + i % 49 for i in range(SHORTEST_SHARED + 9)]] * 3 + [[5, 6, 7]] * 3 + [[9]]
    drawn = rolled(source_of(other, config, engine), prompts)
    (micro,) = pack(drawn, ["old"], rows=16, length=128, device=torch.device("cpu"))
    real_BT = micro.document_ids_BT > 0
    models = RunModels(config, policy, Ids())  # type: ignore[arg-type]
    away = {}
    for name, own in (("replayed", micro), ("free", micro._replace(replay={}))):
        new_BT = models.log_probs(policy, own)
        away[name] = float((new_BT - own.extra["old"]).abs().where(own.targets_BT != IGNORE, 0.0).max())
    assert away["replayed"] < 1e-5
    assert away["free"] > 1e-2
    routings = policy(micro, with_mtp=True).routings
    assert set(micro.replay) == {name for name in routings if name.startswith("layers.")}
    for name, recorded_BTK in micro.replay.items():
        assert (recorded_BTK[real_BT] >= 0).all(), "also of prompts that were copied"
        assert (recorded_BTK[~real_BT] == -1).all()
        used_BTK = routings[name].experts_NK.view_as(recorded_BTK)
        assert torch.equal(used_BTK[real_BT], recorded_BTK[real_BT])


def test_experts_are_recorded_on_request_alone() -> None:
    config, policy, _ = twins()
    assert all(not one.rollout.turns[0].experts for one in rolled(policy, [[1, 2]], experts=False))
    assert rolled(source_of(policy, config, "onnx"), [[1, 2]])[0].rollout.turns[0].experts


def layer_of(option: str) -> MoE:
    config = configured(option, **SHAPES | ONE_GROUP)
    return next(moe for _, moe in random_model(config, seed=2).moe_layers())


def reference(moe: MoE, x_ND: Tensor, experts_NK: Tensor, weights: dict[str, Tensor], softmax: bool) -> Tensor:
    """The layer in float64, one token and expert after the other."""

    def ffn(x_D: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        gate, up = (gate_up @ x_D).chunk(2)
        return down @ (torch.nn.functional.silu(gate) * up)

    logits_NE = x_ND @ weights["router.weight"].T
    s_NE = logits_NE.softmax(-1) if softmax else logits_NE.sigmoid()
    outputs = []
    for x_D, s_E, chosen_K in zip(x_ND, s_NE, experts_NK, strict=True):
        gates_K = s_E[chosen_K] if softmax else s_E[chosen_K] / s_E[chosen_K].sum()
        gates_K = gates_K * float(moe.router.route_scale)  # type: ignore[attr-defined]
        total = torch.zeros_like(x_D)
        for gate, e in zip(gates_K, chosen_K.tolist(), strict=True):
            total = total + gate * ffn(x_D, *(weights[f"experts.{p}_proj.weight"][e] for p in ("gate_up", "down")))
        outputs.append(total)
    return torch.stack(outputs)


@pytest.mark.parametrize("option", ["router=sigmoid_group_limited", "router=softmax"])
def test_the_gradient_is_that_of_a_float64_reference(option: str) -> None:
    moe = layer_of(option)
    moe.shared_experts = None
    generator = torch.Generator().manual_seed(0)
    x_BTD = torch.randn(1, 9, SHAPES["dim"], generator=generator, requires_grad=True)
    recorded_BTK = torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(9)]).unsqueeze(0)
    tokens_BT, w_BTD = torch.arange(9).unsqueeze(0), torch.randn(1, 9, SHAPES["dim"], generator=generator)
    y_BTD, routing = moe(x_BTD, tokens_BT, recorded_BTK)
    names, parameters = zip(*moe.named_parameters(), strict=True)
    found = torch.autograd.grad((y_BTD * w_BTD).sum(), [x_BTD, *parameters])
    weights = {name: p.detach().double().requires_grad_() for name, p in zip(names, parameters, strict=True)}
    x_ND = x_BTD.detach().double()[0].requires_grad_()
    expected_ND = reference(moe, x_ND, recorded_BTK[0], weights, softmax="softmax" in option)
    torch.testing.assert_close(y_BTD[0].double(), expected_ND, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad((expected_ND * w_BTD[0]).sum(), [x_ND, *weights.values()])
    for name, one, other in zip(["x", *names], found, expected, strict=True):
        assert other.any(), name
        torch.testing.assert_close(one.view_as(other).double(), other, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.equal(routing.experts_NK, moe(x_BTD, tokens_BT)[1].experts_NK)


def test_positions_that_are_not_recorded_choose_for_themselves_and_load_is_of_what_was_used() -> None:
    config = configured(**SHAPES | ONE_GROUP)
    model = random_model(config, seed=3)
    tokens_BT = torch.randint(50, (2, 6), generator=torch.Generator().manual_seed(0))
    plain = micro_batch(tokens_BT, tokens_BT)
    recorded_BTK = torch.full((2, 6, K), -1)
    recorded_BTK[0, 2:4] = torch.tensor([6, 7, 1])
    replaying = plain._replace(replay={"layers.1": recorded_BTK})

    def routed(batch: Any) -> Routing:
        with torch.no_grad():
            return model(batch, with_mtp=False).routings["layers.1"]

    own, used = (routed(batch).experts_NK.view(2, 6, K) for batch in (plain, replaying))
    assert (used[0, 2:4] == torch.tensor([6, 7, 1])).all()
    assert torch.equal(used[1], own[1])
    assert torch.equal(used[0, :2], own[0, :2]), "before the first that is recorded nothing differs"
    loads = Loads.zeros({"layers.1": E}, torch.device("cpu"))
    loads.add(replaying, {"layers.1": routed(replaying)})
    assert torch.equal(loads.counts, torch.bincount(used.flatten(), minlength=E))
    moved = replaying.map(lambda tensor: tensor[:1])
    assert moved.replay["layers.1"].shape == (1, 6, K)
    assert (replaying.padding().replay["layers.1"] == -1).all()


def test_a_router_without_gates_is_refused_by_name() -> None:
    config = configured("router=hash", **SHAPES)
    models = RunModels(config, random_model(config, seed=1), Ids())  # type: ignore[arg-type]
    asked = [Prompt([1, 2], "", {}, 0)]
    with pytest.raises(ValueError, match=r"objective\.replay_routing=true: the router of layers\.1, HashRouter"):
        models.sample(asked, [1], max_tokens=2, temperature=1.0, experts=True)
