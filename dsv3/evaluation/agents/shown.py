"""Episodes to look at: the first won and the first lost one of a task, with the experts that the model used."""

from collections.abc import Sequence
from typing import Any

import torch

from dsv3.contracts import MicroBatch
from dsv3.environments import ask, opened
from dsv3.evaluation.agents.player import ModelPlayer
from dsv3.model.decoder import Decoder

MOST_EXPERTS = 4
"""Of each layer that are named."""
MOST_STEPS = 64
"""Of an episode whose experts are looked up."""


def won_and_lost(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first episode with the most progress, and the first with the least if that is less."""
    by_progress = sorted(results, key=lambda result: result["progress"])
    lost = by_progress[0]
    won = next(result for result in results if result["progress"] == by_progress[-1]["progress"])
    return [won] if won["progress"] == lost["progress"] else [won, lost]


def with_experts(result: dict[str, Any], player: ModelPlayer) -> dict[str, Any]:
    """The result with `experts` in each step: by MoE layer the most used experts and their fractions of what the
    prompt's tokens chose. Unchanged for models without experts, and those of transformers.
    """
    decoder = getattr(player.model, "model", None)
    if not isinstance(decoder, Decoder):
        return result
    rules = opened(result["environment"], seed=result["seed"], steps=1).rules
    earlier: list[tuple[str, str]] = []
    steps = []
    for step in result["trajectory"][:MOST_STEPS]:
        held = earlier[len(earlier) - step["history"] :]
        ids = player.prompt_ids(ask(rules, held, step["observation"]))
        steps.append(step | {"experts": _experts(decoder, ids)})
        earlier.append((step["observation"], step["action"] or step.get("reply", "")))
    return result | {"trajectory": [*steps, *result["trajectory"][MOST_STEPS:]]}


@torch.no_grad()
def _experts(decoder: Decoder, ids: Sequence[int]) -> dict[str, list[tuple[int, float]]]:
    tokens_BT = torch.tensor([ids], device=decoder.device)
    positions_BT = torch.arange(len(ids), device=decoder.device).unsqueeze(0)
    ones, zeros = torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT)
    output = decoder(MicroBatch(tokens_BT, tokens_BT, positions_BT, ones, zeros), with_mtp=False)
    found = {}
    for layer, routing in output.routings.items():
        counts_E = torch.bincount(routing.experts_NK.flatten(), minlength=routing.affinities_NE.shape[1])
        top = counts_E.topk(min(MOST_EXPERTS, len(counts_E)))
        shares = (top.values / counts_E.sum()).tolist()
        found[layer] = list(zip(top.indices.tolist(), [round(share, 3) for share in shares], strict=True))
    return found
