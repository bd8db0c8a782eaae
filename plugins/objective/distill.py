"""Distillation over the whole vocabulary: the policy is drawn to the distributions of its teachers.

    L = mean over tokens t and teachers of  KL(pi(. | before t) || teacher(. | before t))        direction=reverse
                                            KL(teacher(. | before t) || pi(. | before t))        direction=forward

With prompts the tokens are those of answers that the policy itself samples (on-policy distillation, arXiv 2306.13649);
with conversations those of the replies that are given. Teachers have the policy's tokenizer, and any shape.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveFloat, PositiveInt, Seed
from dsv3.contracts import IGNORE, Denominators, Forward, Head, LossTerm, MicroBatch, Models, Statistic, Step
from dsv3.model.losses import token_divergences, token_losses
from plugins.objective.packing import Drawn, draw, pack


class Distill(nn.Module):
    """A divergence from teachers.

    token_bytes_V: not used; every objective is given it.
    """

    statistics = (
        Statistic("loss", "nats per token", "kl", over="targets", shown=True),
        Statistic("nll", "nats per token", "nll", over="targets"),
        Statistic("ended", "share of answers", "ended", over="answers"),
        Statistic("answer_length", "tokens per answer", "answer_tokens", over="answers"),
    )
    held_out_figures = ("loss", "nll")  # of the replies that held-out rows give

    def __init__(
        self,
        *,
        token_bytes_V: Tensor,
        teachers: Sequence[str] | None,
        direction: Literal["reverse", "forward"],
        seed: Seed,
        sequence_length: PositiveInt,
        micro_batch_size: PositiveInt,
        samples: PositiveInt,
        max_tokens: PositiveInt,
        temperature: PositiveFloat,
    ) -> None:
        super().__init__()
        if direction not in ("reverse", "forward"):
            raise ValueError(f"direction={direction}: must be reverse or forward")
        if teachers is not None and not teachers:
            raise ValueError("teachers=[]: must name at least one run, or be null: the run that weights come from")
        self.teachers, self.reverse, self.seed = teachers, direction == "reverse", seed
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.samples, self.max_tokens, self.temperature = samples, max_tokens, temperature
        self._models: list[Any] = []  # the teachers: in a list, so that they are no modules of this one
        self._counts: dict[str, int] = {}  # of the step that is being taken

    def prepare(self, step: Step, models: Models) -> Step:
        """Open the teachers; with prompts, sample and pack the answers."""
        if not self._models:
            names = self.teachers
            self._models = [models.reference()] if names is None else [models.teacher(name) for name in names]
        self._counts = {"answers": 0, "ended": 0, "answer_tokens": 0}
        if not step.prompts:
            return step
        rollouts = draw(
            step.prompts,
            models,
            count=self.samples,
            seed=self.seed,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
        )
        asked = [prompt for prompt in step.prompts for _ in range(self.samples)]
        drawn = [Drawn(one, {}) for one in rollouts]
        device = next(models.policy.parameters()).device
        packed = pack(drawn, (), rows=self.micro_batch_size, length=self.sequence_length, device=device)
        self._counts = {
            "answers": len(rollouts),
            "ended": sum(one.ended for one in rollouts),
            "answer_tokens": sum(len(one.ids) for one in rollouts),
        }
        rows = [
            {"prompt": prompt.text, "answer": one.text, "ended": one.ended}
            for prompt, one in zip(asked, rollouts, strict=True)
        ]
        return step._replace(micro_batches=packed, rollouts=rows)

    def denominators(self, step: Step) -> Denominators:
        targets = torch.stack([(micro.targets_BT != IGNORE).sum() for micro in step.micro_batches]).sum()
        counts = {name: torch.tensor(float(count), device=targets.device) for name, count in self._counts.items()}
        return {**counts, "targets": targets, "mtp": targets}

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        hidden_ND, targets_N = forward.hidden_BTD.flatten(0, 1), micro.targets_BT.flatten()
        real_N = targets_N != IGNORE
        divergences = []
        for teacher in self._models:
            with torch.no_grad():
                other_ND = teacher(micro, with_mtp=False).hidden_BTD.flatten(0, 1)
                other_head = Head(teacher.head_weight, teacher.cast_head())
            kl_N = token_divergences(hidden_ND, head, other_ND, other_head, reverse=self.reverse)
            divergences.append(kl_N.where(real_N, 0.0).sum())
        kl = torch.stack(divergences).mean()
        nll = token_losses(hidden_ND.detach(), head.copy_VD, targets_N).sum()
        return LossTerm(kl / denominators["targets"].clamp(min=1), {"kl": kl.detach(), "nll": nll})
