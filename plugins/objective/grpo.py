"""Group relative policy optimisation (arXiv 2402.03300, with the options of 2503.14476, 2503.20783 and 2512.02556).

For each prompt the policy samples a group of G answers, which a reward judges. Of answer i with reward R_i,

    A_i  = R_i - mean of the group                             advantage=mean
    A_i  = (R_i - mean) / (standard deviation + 1e-6)          advantage=mean_std
    w_t  = pi(o_t) / pi_old(o_t)
    r_t  = pi_ref(o_t) / pi(o_t)
    L    = - sum over answers and tokens of [ min(w_t A_i, clip(w_t, 1 - clip_low, 1 + clip_high) A_i)
                                              - kl w_t (r_t - ln r_t - 1) ] / denominator

pi_old is the policy as it sampled the answer. Of the `epochs` steps that are made of the same answers, the first has a
w_t that differs from 1 only as far as the sampler differs from training; in the others it differs by what was learnt
since. `rollout_mismatch` records it; clipping and `off_policy_mask` bound the weight of such tokens and answers. The
divergence is the unbiased estimate of DeepSeek-V3.2. The denominator is one that no micro-batch changes: answers times
max_tokens (`constant`), all answers' tokens (`tokens`), or answers times the length of each (`sequence`).

MTP learns the answers that are better than their group's mean, and none of the others. One of their tokens counts as
one with an advantage of 1 does above: a mean over these tokens alone would outweigh the policy gradient.

An answer that has not ended by itself is judged by the reward like the others; the rewards here give it 0. The tokens
that are trained on are those that were sampled, EOS among them. Where prompts open episodes, an answer is all that the
policy wrote in an episode's turns; what the environment said between them is read and not trained on.

`replay_routing` (arXiv 2512.02556 calls it keeping the routing): training uses the experts that the sampler chose for
each token, at gates from the affinities of now. Where the two would round to unlike experts, or the router has moved
since, w_t is then about the tokens' probabilities alone. The divergence's reference chooses for itself.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from dsv3.bounds import AtLeast, NonNegativeFloat, PositiveFloat, PositiveInt, Seed
from dsv3.contracts import (
    IGNORE,
    Denominators,
    Forward,
    Head,
    LossTerm,
    MicroBatch,
    Models,
    Prompt,
    Reward,
    Rollout,
    Statistic,
    Step,
    Turn,
)
from dsv3.model.losses import token_log_probs
from plugins.objective.documents import of_documents, targets_of
from plugins.objective.packing import Drawn, draw, pack

ADVANTAGE, OLD, REFERENCE, WEIGHT = "grpo_advantage", "grpo_old", "grpo_reference", "grpo_weight"
"""Names in `MicroBatch.extra`, float32 [B, T] at the positions of targets."""

ANSWERS = "grpo_answers"
"""In `MicroBatch.extra`: targets of all answers, int64 [B, T]."""


STANDSTILL = 50
"""Steps without a gradient after which training gives up."""


class Sampled(NamedTuple):
    """An answer, or an episode, with what it is worth."""

    prompt: Prompt
    rollout: Rollout
    reward: float
    advantage: float
    flat: bool  # all answers of its group have one reward


class GRPO(nn.Module):
    """The policy gradient of sampled answers.

    token_bytes_V: not used; every objective is given it.
    """

    def __init__(
        self,
        *,
        token_bytes_V: Tensor,
        reward: Reward,
        seed: Seed,
        sequence_length: PositiveInt,
        micro_batch_size: PositiveInt,
        group: Annotated[int, AtLeast(2)],
        max_tokens: PositiveInt,
        temperature: PositiveFloat,
        advantage: Literal["mean", "mean_std"],
        denominator: Literal["constant", "tokens", "sequence"],
        clip_low: NonNegativeFloat,
        clip_high: NonNegativeFloat,
        kl: NonNegativeFloat,
        off_policy_mask: NonNegativeFloat | None,
        drop_flat_groups: bool,
        epochs: PositiveInt = 1,
        replay_routing: bool = False,
    ) -> None:
        super().__init__()
        if group < 2:
            raise ValueError(f"group={group}: must be at least 2; an answer alone has no group to be compared with")
        if epochs < 1:
            raise ValueError(f"epochs={epochs}: must be at least 1")
        for name, value, choices in (
            ("advantage", advantage, ("mean", "mean_std")),
            ("denominator", denominator, ("constant", "tokens", "sequence")),
        ):
            if value not in choices:
                raise ValueError(f"{name}={value}: must be one of {', '.join(choices)}")
        self.reward, self.seed, self.group = reward, seed, group
        self.sequence_length, self.micro_batch_size = sequence_length, micro_batch_size
        self.max_tokens, self.temperature = max_tokens, temperature
        self.standardised, self.denominator = advantage == "mean_std", denominator
        self.clip_low, self.clip_high, self.kl = clip_low, clip_high, kl
        self.off_policy_mask, self.drop_flat_groups = off_policy_mask, drop_flat_groups
        self.statistics = [
            Statistic("loss", "", "loss"),
            Statistic("reward", "mean of answers", "reward", over="answers", shown=True),
            Statistic("ended", "share of answers", "ended", over="answers", shown=True),
            Statistic("answer_length", "tokens per answer", "answer_tokens", over="answers"),
            Statistic("turns", "per answer", "turns", over="answers"),
            Statistic("flat_groups", "share of groups", "flat_answers", over="answers"),
            Statistic("clipped", "share of tokens", "clipped", over="trained_tokens"),
            Statistic("rollout_mismatch", "mean |ln p - ln p of the sampler|", "mismatch", over="trained_tokens"),
            Statistic("surprise", "nats per token", "surprise", over="trained_tokens"),
        ]
        if kl:
            self.statistics.append(Statistic("kl", "nats per token", "kl", over="trained_tokens"))
        self.epochs, self.replay_routing = epochs, replay_routing
        self._sampled: list[Sampled] = []  # of the step that is being taken
        self._answers: dict[int, list[Rollout]] = {}  # to the prompts of the last step, by their numbers
        self._flat_steps = 0  # in a row

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Raise ValueError where the reward cannot use the row of a prompt."""
        self.reward([prompt.unanswered() for prompt in prompts])

    def prepare(self, step: Step, models: Models) -> Step:
        """Sample, judge and pack the answers."""
        if not step.prompts:
            raise ValueError("objective=grpo: the data has no prompts; data=prompts has")
        is_new = self.epochs == 1 or any(prompt.number not in self._answers for prompt in step.prompts)
        if is_new:
            rollouts = self._written(step.prompts, models, experts=self.replay_routing)
            self._answers = {
                prompt.number: rollouts[i * self.group : (i + 1) * self.group] for i, prompt in enumerate(step.prompts)
            }
        if is_new or not self._sampled:
            self._sampled = self._judged(step.prompts)
        self._refuse_standstill()
        kept = [self._drawn(one) for one in self._sampled if not (one.flat and self.drop_flat_groups)]
        packed = pack(
            kept,
            (ADVANTAGE, OLD, WEIGHT),
            rows=self.micro_batch_size,
            length=self.sequence_length,
            device=next(models.policy.parameters()).device,
        )
        if self.kl:
            packed = [self._with_reference(micro, models) for micro in packed]
        packed = [_better_for_mtp(micro) for micro in packed]
        return step._replace(micro_batches=packed, rollouts=[self._row(one) for one in self._sampled if is_new])

    def judge(self, prompts: Sequence[Prompt], models: Models) -> Mapping[str, float]:
        """Of as many answers to each held-out prompt as a group has."""
        rollouts = self._written(prompts, models, experts=False)
        earned = self._earned(prompts, rollouts)
        return {"reward": fmean(earned), "ended": fmean(one.ended for one in rollouts)}

    def _written(self, prompts: Sequence[Prompt], models: Models, *, experts: bool) -> list[Rollout]:
        """A group of answers to each prompt; `experts`: with what every MoE layer chose."""
        return draw(
            prompts,
            models,
            count=self.group,
            seed=self.seed,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            experts=experts,
        )

    def state(self) -> dict[str, Any]:
        """The answers that the next step may be made of too; see `dsv3.contracts.KeepsSamples`."""
        kept = self._answers if self.epochs > 1 else {}
        return {
            str(number): [[list(turn) for turn in one.turns] for one in rollouts] for number, rollouts in kept.items()
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        self._answers = {
            int(number): [Rollout([Turn(*turn) for turn in turns]) for turns in rollouts]
            for number, rollouts in state.items()
        }

    def denominators(self, step: Step) -> Denominators:
        """Of the answers that were sampled, and of the tokens that are trained on."""
        trained = torch.stack([(micro.extra[ANSWERS] != IGNORE).sum() for micro in step.micro_batches]).sum()
        better = torch.stack([(micro.targets_BT != IGNORE).sum() for micro in step.micro_batches]).sum()
        sampled = self._sampled
        counts = {
            "answers": len(sampled),
            "reward": sum(one.reward for one in sampled),
            "ended": sum(one.rollout.ended for one in sampled),
            "answer_tokens": sum(len(one.rollout.ids) for one in sampled),
            "turns": sum(len(one.rollout.turns) for one in sampled),
            "flat_answers": sum(one.flat for one in sampled),
        }
        by_answers = len(sampled) * self.max_tokens
        counts["mtp_divisor"] = by_answers if self.denominator == "constant" else counts["answer_tokens"]
        found = {name: torch.tensor(float(count), device=trained.device) for name, count in counts.items()}
        return {**found, "trained_tokens": trained, "mtp": better}

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        targets_BT, extra = micro.extra[ANSWERS], micro.extra
        hidden_ND = forward.hidden_BTD.flatten(0, 1) / self.temperature  # logits are linear in it
        new_BT = token_log_probs(hidden_ND, head.weight_VD, targets_BT.flatten(), copy_VD=head.copy_VD).view_as(
            targets_BT
        )
        real_BT = targets_BT != IGNORE
        ratio_BT = (new_BT - extra[OLD]).exp()
        advantage_BT = extra[ADVANTAGE]
        clipped_BT = ratio_BT.clamp(1 - self.clip_low, 1 + self.clip_high)
        gain_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
        sums: dict[str, Tensor] = {}
        if self.off_policy_mask is not None:
            gain_BT = gain_BT * _is_near(micro, new_BT, self.off_policy_mask)
        if self.kl:
            away_BT = extra[REFERENCE] - new_BT
            divergence_BT = (ratio_BT * (away_BT.exp() - away_BT - 1)).where(real_BT, 0.0)
            gain_BT = gain_BT - self.kl * divergence_BT
            sums["kl"] = divergence_BT.sum()
        over = self._divisor(denominators)
        loss = -(gain_BT * extra[WEIGHT]).where(real_BT, 0.0).sum() / over
        sums |= {
            "loss": loss,
            "clipped": ((ratio_BT != clipped_BT) & real_BT).sum(),
            "mismatch": (new_BT - extra[OLD]).abs().where(real_BT, 0.0).sum(),
            "surprise": -new_BT.sum(),
        }
        return LossTerm(loss, {name: value.detach() for name, value in sums.items()})

    def _divisor(self, denominators: Denominators) -> Tensor:
        over = {
            "constant": denominators["answers"] * self.max_tokens,
            "tokens": denominators["answer_tokens"],
            "sequence": denominators["answers"],
        }
        return over[self.denominator].clamp(min=1)

    def _judged(self, prompts: Sequence[Prompt]) -> list[Sampled]:
        rollouts = [one for prompt in prompts for one in self._answers[prompt.number]]
        rewards = torch.tensor(self._earned(prompts, rollouts), dtype=torch.float64).view(-1, self.group)
        advantages = rewards - rewards.mean(1, keepdim=True)
        if self.standardised:
            advantages = advantages / (rewards.std(1, keepdim=True) + 1e-6)
        flat = (rewards == rewards[:, :1]).all(1, keepdim=True).expand_as(rewards)
        values = zip(rewards.flatten().tolist(), advantages.flatten().tolist(), flat.flatten().tolist(), strict=True)
        asked = self._asked(prompts)
        return [Sampled(prompt, one, *each) for prompt, one, each in zip(asked, rollouts, values, strict=True)]

    def _asked(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Each of them as often as a group has answers."""
        return [prompt for prompt in prompts for _ in range(self.group)]

    def _earned(self, prompts: Sequence[Prompt], rollouts: Sequence[Rollout]) -> list[float]:
        asked = self._asked(prompts)
        return self.reward([prompt.answered(one) for prompt, one in zip(asked, rollouts, strict=True)])

    def _with_reference(self, micro: MicroBatch, models: Models) -> MicroBatch:
        own = micro._replace(replay={})
        log_probs_BT = models.log_probs(models.reference(), own, temperature=self.temperature)
        return micro._replace(extra={**micro.extra, REFERENCE: log_probs_BT})

    def _refuse_standstill(self) -> None:
        """Raise ValueError where nothing has been learnt for many steps, since every group earned one reward."""
        self._flat_steps = self._flat_steps + 1 if all(one.flat for one in self._sampled) else 0
        if self._flat_steps == STANDSTILL:
            mean = sum(one.reward for one in self._sampled) / len(self._sampled)
            raise ValueError(
                f"reward: in {STANDSTILL} steps in a row all answers of each group earned the same ({mean:.2f} in the "
                "mean), so that there is nothing to learn: choose prompts that the policy answers now and then "
                "(data.path), a larger objective.group or objective.temperature, or fine-tune it first"
            )

    def _drawn(self, one: Sampled) -> Drawn:
        weight = 1 / len(one.rollout.ids) if self.denominator == "sequence" else 1.0
        return Drawn(
            one.rollout,
            {ADVANTAGE: one.advantage, OLD: one.rollout.log_probs, WEIGHT: weight},
        )

    def _row(self, one: Sampled) -> Mapping[str, Any]:
        """For the table of rollouts."""
        return {
            "prompt": one.prompt.text,
            "answer": one.rollout.text,
            "ended": one.rollout.ended,
            "reward": one.reward,
            "advantage": one.advantage,
        }


def _is_near(micro: MicroBatch, new_BT: Tensor, largest: float) -> Tensor:
    """Of each position, whether its answer is at most `largest` nats per token away, or has no negative advantage."""
    ids_BT = micro.document_ids_BT
    away = of_documents((micro.extra[OLD] - new_BT).detach(), ids_BT)
    counts = targets_of(micro.extra[ANSWERS], ids_BT).clamp(min=1)
    far_BT = (away / counts).gather(1, ids_BT) > largest
    return ~(far_BT & (micro.extra[ADVANTAGE] < 0))


def _better_for_mtp(micro: MicroBatch) -> MicroBatch:
    """Only the targets of answers with a positive advantage, all of them under `ANSWERS`."""
    better_BT = micro.targets_BT.masked_fill(micro.extra[ADVANTAGE] <= 0, IGNORE)
    return micro._replace(targets_BT=better_BT, extra={**micro.extra, ANSWERS: micro.targets_BT})
