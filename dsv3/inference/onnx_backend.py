"""ONNX graphs as a backend of the engine: the same text as a `Decoder`'s in FP32, in a third of the time on a CPU.

Shape legend: D model width, K experts per token.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.onnx.onnx_manifest import read_manifest
from dsv3.inference.backend import DraftingBackend
from dsv3.inference.onnx_step import OnnxStep, Outputs, session_of
from dsv3.inference.slots import SlotCaches
from dsv3.inference.speculation import Drafter
from dsv3.model.decoder import Decoder
from dsv3.planning.draft_costs import ONNX, DraftCosts, draft_costs, read_costs, usually_pay


class OnnxBackend(DraftingBackend):
    """`main` reads texts, `modules` are MTP's, one graph each.

    Weights are those of when it was made. All rows' caches are as wide as the longest row's.
    """

    def __init__(
        self,
        main: OnnxStep,
        modules: Sequence[OnnxStep],
        *,
        normed: bool,
        routed: Sequence[str],
        experts: int,
        costs: DraftCosts | None,
    ) -> None:
        """normed: MTP takes the main model's states after its final norm. routed: names of the MoE layers. experts: of
        each of them. costs: of drafts."""
        self.main, self.caches, self.routed, self.experts = main, main.caches, routed, experts
        self.drafter = Drafter(GraphModules(modules, normed))
        self.draft_costs = costs if modules else None
        self._slots = [step.caches for step in (main, *modules)]
        self._latest: tuple[Outputs, list[int]] | None = None

    @classmethod
    def of(cls, model: Decoder, parts: Parts, *, drafts: bool | None) -> "OnnxBackend":
        """The model as it is now. parts: of its configuration, which `expressible` found nothing in. drafts: with MTP's
        modules, where it has some; None: where drafts usually pay."""
        from dsv3.checkpoint.onnx.step_graph import StepGraph

        graph = StepGraph(model, parts)
        costs = draft_costs(model, ONNX) if drafts is not False else None
        depth = parts.mtp_layers if asked(drafts, costs) else 0
        graphs = [graph.main(states=depth > 0), *(StepGraph(model, parts).mtp(k + 1) for k in range(depth))]
        steps = [OnnxStep(session_of(g.model("step").SerializeToString(), g.weights)) for g in graphs]
        experts = parts.router["n_experts"] if graph.routed else 0
        return cls(
            steps[0], steps[1:], normed=model.mtp.after_final_norm, routed=graph.routed, experts=experts, costs=costs
        )

    @classmethod
    def opened(cls, folder: Path, *, drafts: bool | None) -> "OnnxBackend":
        """The graphs of an exported folder. drafts: as in `of`.

        Raises:
            ValueError: its manifest is of another format, or onnxruntime cannot open a graph.
        """
        manifest = read_manifest(folder)
        costs = read_costs(manifest.get("draft_costs"), ONNX)
        modules = [name for name in manifest["graphs"] if name != "model"] if asked(drafts, costs) else []
        try:
            steps = [OnnxStep(session_of(folder / f"{name}.onnx")) for name in ("model", *modules)]
        except Exception as error:  # onnxruntime has no class of its own errors
            raise ValueError(f"{folder}: onnxruntime cannot open it: {' '.join(str(error).split())[:300]}") from None
        normed, experts = bool(manifest["mtp_takes_normed_states"]), manifest.get("n_routed_experts", 0)
        routed = manifest["moe_layers"] if experts else []  # earlier exports do not say how many experts there are
        return cls(steps[0], steps[1:], normed=normed, routed=routed, experts=experts, costs=costs)

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        picked = [range(len(ids) - n, len(ids)) for ids, n in zip(tokens, wanted, strict=True)]
        outputs = self.main.run(rows, tokens, picked)
        for i, (row, ids) in enumerate(zip(rows, tokens, strict=True)):
            if self.drafter.holds(row):
                self.drafter.read([row], torch.from_numpy(outputs.of_row("states", i, len(ids))).unsqueeze(0))
        self._latest = outputs, list(map(len, tokens))
        return list(outputs.picked("logits").split(list(wanted)))

    def rest(self, row: int, length: int) -> None:
        super().rest(row, length)
        for caches in self._slots:
            if row in caches.lengths:
                caches.rest(row)

    def chosen_experts(self) -> list[dict[str, Tensor]]:
        if self._latest is None:
            return []
        outputs, counts = self._latest
        return [
            {
                name: torch.from_numpy(outputs.of_row(f"experts_{layer}", i, count).copy())
                for layer, name in enumerate(self.routed)
            }
            for i, count in enumerate(counts)
        ]

    def used_experts(self) -> dict[str, Tensor]:
        """As `chosen_experts`, of all rows together: int64 [M] by layer, until the next `read`."""
        if self._latest is None:
            return {}
        outputs, counts = self._latest
        return {name: torch.from_numpy(outputs.of_all(f"experts_{k}", counts)) for k, name in enumerate(self.routed)}


def asked(drafts: bool | None, costs: DraftCosts | None) -> bool:
    """Whether MTP's modules are wanted; None: where drafts usually pay."""
    return drafts if drafts is not None else usually_pay(costs)


class GraphModules:
    """MTP's modules for the drafter."""

    def __init__(self, steps: Sequence[OnnxStep], normed: bool) -> None:
        self.steps, self.normed = steps, normed
        self.caches: list[SlotCaches] = [step.caches for step in steps]
        self.width = steps[0].widths["states"] if steps else 0
        self.dtype, self.device = torch.float32, torch.device("cpu")

    def extend(
        self, k: int, rows: Sequence[int], pieces: Sequence[Tensor], tokens: Sequence[Sequence[int]]
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        last = [[len(ids) - 1] for ids in tokens]
        outputs = self.steps[k - 1].run(rows, tokens, last, [piece.numpy() for piece in pieces])
        states = [torch.from_numpy(outputs.of_row("states", i, len(ids)).copy()) for i, ids in enumerate(tokens)]
        return states, outputs.picked("hidden"), outputs.picked("logits")
