"""GRPO: closed forms of small groups, what is trained on, and what is left out."""

import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Answer, Forward, Head, LossTerm, MicroBatch, Prompt, Rollout, Step, Turn
from plugins.objective.grpo import ADVANTAGE, GRPO, OLD, REFERENCE, STANDSTILL
from plugins.objective.grpo import ANSWERS as TARGETS
from plugins.objective.packing import Drawn, pack

V, EOS, PAD, LENGTH = 11, 1, 0, 16
PROMPTS = [Prompt([2, 3], "a", {}, 0), Prompt([4, 5, 6], "b", {}, 1)]
ANSWERS = ([[7, EOS], [8, 9, 10, PAD, EOS], [PAD, EOS], [7, 7, 7, 7]], [[9, EOS], [9, 9, EOS], [10, EOS], [8, EOS]])
"""Of each prompt a group; one answer is cut, and the id of padding is a token like others."""
REWARDS = [1.0, 0.0, 0.5, 0.0, 0.0, 1.0, 0.0, 0.0]
ANSWER_TOKENS = sum(len(ids) for group in ANSWERS for ids in group)
GROUP, MAX_TOKENS = 4, 6


class Models:
    """Gives the answers above, or those that it is told to, with log-probabilities of 1/V for each token."""

    def __init__(self, answers: Sequence[Sequence[list[int]]] = ANSWERS, reference: float = -2.0) -> None:
        self.policy = nn.Linear(1, 1)
        self.answers, self.of_reference = answers, reference
        self.asked: list[tuple[Any, ...]] = []

    def reference(self) -> str:
        return "reference"

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], **settings: Any) -> list[Rollout]:
        self.asked.append(([prompt.ids for prompt in prompts], list(seeds), settings))
        answers = [ids for group in self.answers for ids in group]
        return [
            Rollout([Turn(prompt.ids, ids, str(ids), ids[-1] == EOS, [-math.log(V)] * len(ids))])
            for prompt, ids in zip(prompts, answers, strict=False)
        ]

    def log_probs(self, model: Any, micro: MicroBatch, *, temperature: float) -> Tensor:
        assert model == "reference"
        return torch.full(micro.targets_BT.shape, self.of_reference).masked_fill(micro.targets_BT == IGNORE, 0.0)


class Fixed:
    """Rewards in the order of the answers."""

    def __init__(self, rewards: Sequence[float]) -> None:
        self.rewards = rewards

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return list(self.rewards[: len(answers)])


def grpo(rewards: Sequence[float] = REWARDS, **settings: Any) -> GRPO:
    defaults: dict[str, Any] = {
        "reward": Fixed(rewards), "seed": 3, "sequence_length": LENGTH, "micro_batch_size": 2, "group": GROUP,
        "max_tokens": MAX_TOKENS, "temperature": 1.0, "advantage": "mean", "denominator": "constant", "clip_low": 0.2,
        "clip_high": 0.28, "kl": 0.0, "off_policy_mask": None, "drop_flat_groups": True,
    }  # fmt: skip
    return GRPO(token_bytes_V=torch.ones(V), **{**defaults, **settings})


def prepared(objective: GRPO, models: Models | None = None) -> Step:
    return objective.prepare(Step([], 0, {}, prompts=PROMPTS), models or Models())  # type: ignore[arg-type]


def test_held_out_prompts_are_judged_alike_at_every_call_and_leave_training_as_it_was() -> None:
    objective, models = grpo(epochs=2), Models()
    step = prepared(objective, models)
    kept = objective.state()
    held_out = [Prompt([8, 9], "c", {}, 0), Prompt([8, 9, 10], "d", {}, 1)]
    found = objective.judge(held_out, models)
    assert found == {"reward": sum(REWARDS) / 8, "ended": 7 / 8}
    assert found == objective.judge(held_out, models)
    training, first, second = models.asked
    assert first == second
    assert first[0] == [[8, 9]] * GROUP + [[8, 9, 10]] * GROUP
    assert first[1] == training[1], "seeds follow from the number of the prompt"
    assert objective.state() == kept
    again = prepared(objective, models)
    assert answers_in(again) == answers_in(step)
    assert len(models.asked) == 3, "the second epoch has the answers of the first"


class Outcome:
    """The loss of a step whose logits are leaves, its gradients for them, and its sums."""

    def __init__(self, objective: GRPO, step: Step, logits: Callable[[Tensor], Tensor] = lambda z_BTV: z_BTV) -> None:
        """`logits`: changes those of a micro-batch, which are zero: all tokens are alike."""
        denominators = objective.denominators(step)
        head = Head(torch.eye(V), torch.eye(V))
        self.logits = [logits(torch.zeros(*m.tokens_BT.shape, V)).requires_grad_() for m in step.micro_batches]
        terms: list[LossTerm] = [
            objective.loss(Forward(z_BTV, [], {}), head, micro, denominators)
            for z_BTV, micro in zip(self.logits, step.micro_batches, strict=True)
        ]
        total = torch.stack([term.loss for term in terms]).sum()
        self.loss, self.gradients = total.detach(), torch.autograd.grad(total, self.logits)
        self.sums = {name: sum(float(term.sums[name]) for term in terms) for name in terms[0].sums}


def answers_in(step: Step) -> list[list[int]]:
    """The targets of each document, in order."""
    found = []
    for micro in step.micro_batches:
        for targets, ids in zip(micro.extra[TARGETS], micro.document_ids_BT, strict=True):
            for number in range(1, int(ids.max()) + 1):
                own = targets[ids == number]
                found.append(own[own != IGNORE].tolist())
    return found


def test_the_ids_trained_on_are_those_sampled_with_eos_and_after_their_prompt() -> None:
    step = prepared(grpo())
    assert answers_in(step) == [ids for group in ANSWERS for ids in group]
    asked = [prompt.ids for prompt in PROMPTS for _ in range(GROUP)]
    found = []
    for micro in step.micro_batches:
        for tokens, targets, ids in zip(micro.tokens_BT, micro.extra[TARGETS], micro.document_ids_BT, strict=True):
            for number in range(1, int(ids.max()) + 1):
                own, first = tokens[ids == number], int((targets[ids == number] != IGNORE).nonzero()[0])
                found.append(own[: first + 1].tolist())
    assert found == asked


def test_prompts_are_asked_as_often_as_a_group_has_answers_each_with_a_seed_of_its_own() -> None:
    models, other = Models(), Models()
    prepared(grpo(), models)
    (prompts, seeds, settings), *_ = models.asked
    assert prompts == [prompt.ids for prompt in PROMPTS for _ in range(GROUP)]
    assert len(set(seeds)) == len(seeds)
    assert settings == {"max_tokens": MAX_TOKENS, "temperature": 1.0, "experts": False}
    objective = grpo()
    objective.prepare(Step([], 0, {}, prompts=PROMPTS[1:]), other)  # type: ignore[arg-type]
    assert other.asked[0][1] == seeds[GROUP:], "a prompt's seeds do not depend on the prompts beside it"


def test_answers_serve_as_many_steps_as_there_are_epochs_also_where_a_checkpoint_lies_between() -> None:
    models, later = Models(), [prompt._replace(number=prompt.number + 2) for prompt in PROMPTS]
    objective, resumed = grpo(epochs=2), grpo(epochs=2)
    first = prepared(objective, models)
    saved = json.loads(json.dumps(objective.state()))
    second = prepared(objective, models)
    assert len(models.asked) == 1
    assert answers_in(second) == answers_in(first)
    assert [len(step.rollouts) for step in (first, second)] == [len(REWARDS), 0], "the table has each answer once"
    resumed.restore(saved)
    again, others = Outcome(resumed, prepared(resumed, models)), Outcome(objective, second)
    assert len(models.asked) == 1
    assert again.loss == others.loss
    assert all(map(torch.equal, again.gradients, others.gradients))
    for each in (objective, resumed):
        each.prepare(Step([], 0, {}, prompts=later), models)  # type: ignore[arg-type]
    assert len(models.asked) == 3
    alone = grpo()
    prepared(alone, models)
    prepared(alone, models)
    assert len(models.asked) == 5, "an epoch of one samples anew for every step"
    assert alone.state() == {}


def test_ranks_find_their_own_answers_among_those_of_all() -> None:
    models, ranks = Models(), [grpo(epochs=2) for _ in PROMPTS]
    for objective, prompt in zip(ranks, PROMPTS, strict=True):
        objective.prepare(Step([], 0, {}, prompts=[prompt]), models)  # type: ignore[arg-type]
    together = {name: value for objective in ranks for name, value in objective.state().items()}
    resumed = grpo(epochs=2)
    resumed.restore(together)
    resumed.prepare(Step([], 0, {}, prompts=PROMPTS[1:]), models)  # type: ignore[arg-type]
    assert len(models.asked) == 2


@pytest.mark.parametrize("advantage", ["mean", "mean_std"])
def test_advantages_are_relative_to_the_group(advantage: str) -> None:
    rewards = torch.tensor(REWARDS, dtype=torch.float64).view(-1, GROUP)
    expected = rewards - rewards.mean(1, keepdim=True)
    if advantage == "mean_std":
        expected = expected / (rewards.std(1, keepdim=True) + 1e-6)
    found = torch.tensor([row["advantage"] for row in prepared(grpo(advantage=advantage)).rollouts])
    torch.testing.assert_close(found.view(-1, GROUP), expected.float())
    assert found.view(-1, GROUP).sum(1).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("denominator", "divisor"),
    [
        ("constant", [8 * MAX_TOKENS] * 8),
        ("tokens", [ANSWER_TOKENS] * 8),
        ("sequence", [8 * len(ids) for group in ANSWERS for ids in group]),
    ],
)
def test_gradients_are_those_of_the_closed_form(denominator: str, divisor: list[int]) -> None:
    """Where w = 1, -A w / divisor has the gradient -A (onehot - p) / divisor for the logits of a token."""
    objective = grpo(denominator=denominator)
    step = prepared(objective)
    found = Outcome(objective, step)
    advantages = [row["advantage"] for row in step.rollouts]
    places = [
        (m, b, ids == number)
        for m, micro in enumerate(step.micro_batches)
        for b, ids in enumerate(micro.document_ids_BT)
        for number in range(1, int(ids.max()) + 1)
    ]
    loss = 0.0
    for (m, b, own), advantage, over in zip(places, advantages, divisor, strict=True):
        targets_T = step.micro_batches[m].extra[TARGETS][b].masked_fill(~own, IGNORE)
        real_T = targets_T != IGNORE
        onehot = nn.functional.one_hot(targets_T[real_T], V).float()
        torch.testing.assert_close(found.gradients[m][b, real_T], -advantage * (onehot - 1 / V) / over)
        loss -= advantage * int(real_T.sum()) / over
    assert float(found.loss) == pytest.approx(loss, abs=1e-6)
    for gradient, micro in zip(found.gradients, step.micro_batches, strict=True):
        assert not gradient[micro.extra[TARGETS] == IGNORE].any()


@pytest.mark.parametrize("drop", [True, False])
def test_constant_rewards_have_no_gradient(drop: bool) -> None:
    objective = grpo([1.0] * 8, drop_flat_groups=drop)
    step = prepared(objective)
    outcome = Outcome(objective, step)
    assert float(outcome.loss) == 0
    assert not any(gradient.any() for gradient in outcome.gradients)
    assert answers_in(step) == ([] if drop else [ids for group in ANSWERS for ids in group])


def test_flat_groups_are_left_out_and_counted_and_the_divisor_is_unchanged() -> None:
    rewards = [1.0, 0.0, 0.5, 0.0, *[1.0] * 4]
    kept, dropped = (grpo(rewards, drop_flat_groups=drop) for drop in (False, True))
    steps = [prepared(objective) for objective in (kept, dropped)]
    assert answers_in(steps[1]) == list(ANSWERS[0])
    counts = dropped.denominators(steps[1])
    assert int(counts["flat_answers"]) == 4
    assert int(counts["answers"]) == 8
    assert int(counts["answer_tokens"]) == ANSWER_TOKENS
    assert int(counts["trained_tokens"]) == sum(map(len, ANSWERS[0]))
    assert int(counts["mtp_divisor"]) == 8 * MAX_TOKENS, "a token counts as in the policy gradient"
    assert int(grpo(denominator="tokens").denominators(steps[1])["mtp_divisor"]) == 0, "nothing was sampled"
    assert float(Outcome(kept, steps[0]).loss) == pytest.approx(float(Outcome(dropped, steps[1]).loss), abs=1e-7)
    assert len(steps[1].rollouts) == 8, "the table has them all"


@pytest.mark.parametrize(("factor", "advantage", "clipped"), [
    (1.5, 1.0, True), (1.5, -1.0, False), (0.5, 1.0, False), (0.5, -1.0, True), (1.27, 1.0, False), (0.81, -1.0, False),
])  # fmt: skip
def test_clipping_takes_away_the_gradient_on_the_side_where_it_would_go_on(
    factor: float, advantage: float, clipped: bool
) -> None:
    """One token whose probability is `factor` times the old one; clip_low=0.2, clip_high=0.28."""
    objective = grpo()
    step = prepared(objective)
    micro, real_BT = step.micro_batches[0], step.micro_batches[0].extra[TARGETS] != IGNORE
    micro.extra[OLD][real_BT] = -math.log(V) - math.log(factor)
    micro.extra[ADVANTAGE][real_BT] = advantage
    outcome = Outcome(objective, step._replace(micro_batches=[micro]))
    limit = min(max(factor, 0.8), 1.28)
    weight = min(factor * advantage, limit * advantage)
    n = int(real_BT.sum())
    assert float(outcome.loss) == pytest.approx(-weight * n / (8 * MAX_TOKENS), rel=1e-4)
    assert outcome.gradients[0].any() == (not clipped)
    assert outcome.sums["clipped"] == (n if limit != factor else 0)


def test_the_divergence_of_two_tokens() -> None:
    """kl w (r - ln r - 1) with r = pi_ref / pi, w = pi / pi_old = 1; its gradient is that of KL(pi || pi_ref)."""
    objective = grpo([1.0] * 8, kl=0.5, drop_flat_groups=False)
    step = prepared(objective)
    outcome = Outcome(objective, step)
    ln_r = -2.0 + math.log(V)
    estimate = math.exp(ln_r) - ln_r - 1
    n = ANSWER_TOKENS
    assert outcome.sums["kl"] == pytest.approx(n * estimate, rel=1e-4)
    assert float(outcome.loss) == pytest.approx(0.5 * n * estimate / (8 * MAX_TOKENS), rel=1e-4)
    micro = step.micro_batches[0]
    b, t = (micro.extra[TARGETS] != IGNORE).nonzero()[0].tolist()
    onehot = nn.functional.one_hot(micro.extra[TARGETS][b, t], V).float()
    # d/dz of w (r - ln r - 1) = [w (r - ln r - 1) + w (1 - r)] (onehot - p) = -w ln r (onehot - p)
    torch.testing.assert_close(outcome.gradients[0][b, t], 0.5 * -ln_r * (onehot - 1 / V) / (8 * MAX_TOKENS))
    assert (micro.extra[REFERENCE] != 0).sum() == (micro.extra[TARGETS] != IGNORE).sum()


def test_answers_far_from_the_policy_with_a_negative_advantage_are_left_out() -> None:
    """Three answers are 3 nats per token less likely than when they were sampled; one has a negative advantage."""
    far = {0, 1, 5}
    gradients = {}
    for largest in (None, 1.0):
        objective = grpo(off_policy_mask=largest, clip_low=100.0)
        step = prepared(objective)
        answer = 0
        for micro in step.micro_batches:
            for b, ids in enumerate(micro.document_ids_BT):
                for number in range(1, int(ids.max()) + 1):
                    if answer in far:
                        micro.extra[OLD][b, (ids == number) & (micro.extra[TARGETS][b] != IGNORE)] += 3.0
                    answer += 1
        gradients[largest] = Outcome(objective, step).gradients
    step, answer = prepared(grpo()), 0
    for m, micro in enumerate(step.micro_batches):
        for b, ids in enumerate(micro.document_ids_BT):
            for number in range(1, int(ids.max()) + 1):
                own = ids == number
                without, masked = gradients[None][m][b, own], gradients[1.0][m][b, own]
                is_out = answer in far and REWARDS[answer] < 0.25
                assert without.any(), answer
                assert torch.equal(masked, torch.zeros_like(masked) if is_out else without), answer
                answer += 1
    assert answer == 8


@pytest.mark.parametrize("denominator", ["constant", "tokens", "sequence"])
def test_micro_batches_of_any_size_give_one_loss(denominator: str) -> None:
    losses = []
    for size in (1, 2, 8):
        objective = grpo(denominator=denominator, micro_batch_size=size)
        step = prepared(objective)
        losses.append((len(step.micro_batches), float(Outcome(objective, step).loss)))
    assert len({count for count, _ in losses}) == 3
    assert losses[0][1] == pytest.approx(losses[1][1], abs=1e-7) == pytest.approx(losses[2][1], abs=1e-7)


@pytest.mark.parametrize("denominator", ["constant", "tokens", "sequence"])
def test_ranks_add_up_to_one_process(denominator: str) -> None:
    """Two ranks have a prompt each; the core sums their denominators."""
    whole = grpo(denominator=denominator)
    expected = Outcome(whole, prepared(whole)).loss
    ranks, steps = [], []
    for rank in range(2):
        objective = grpo(REWARDS[rank * GROUP :], denominator=denominator)
        given = Step([], 0, {}, prompts=PROMPTS[rank : rank + 1])
        steps.append(objective.prepare(given, Models(ANSWERS[rank:])))  # type: ignore[arg-type]
        ranks.append(objective)
    own = [objective.denominators(step) for objective, step in zip(ranks, steps, strict=True)]
    together = {name: own[0][name] + own[1][name] for name in own[0]}
    for objective in ranks:
        objective.denominators = lambda step: together  # type: ignore[method-assign]
    losses = [Outcome(objective, step).loss for objective, step in zip(ranks, steps, strict=True)]
    assert float(sum(losses)) == pytest.approx(float(expected), abs=1e-7)


def test_a_temperature_divides_the_logits() -> None:
    objective = grpo(temperature=2.0)
    step = prepared(objective)
    generator = torch.Generator().manual_seed(0)
    outcome = Outcome(objective, step, lambda z: torch.randn(z.shape, generator=generator))
    expected = 0.0
    for z_BTV, micro in zip(outcome.logits, step.micro_batches, strict=True):
        log_probs = (z_BTV.detach() / 2).log_softmax(-1)
        found = log_probs.gather(2, micro.extra[TARGETS].clamp(min=0).unsqueeze(2)).squeeze(2)
        expected += float(found[micro.extra[TARGETS] != IGNORE].sum())
    assert outcome.sums["surprise"] == pytest.approx(-expected, rel=1e-5)


def test_a_run_that_learns_nothing_stops_and_says_so() -> None:
    objective = grpo([0.0] * 8)
    for _ in range(STANDSTILL - 1):
        prepared(objective)
    with pytest.raises(ValueError, match=r"reward: in 50 steps .* \(0\.00 in the mean\)"):
        prepared(objective)
    objective = grpo([0.0] * 8)
    for number in range(STANDSTILL + 5):
        objective.reward = Fixed(REWARDS if number % STANDSTILL == 40 else [0.0] * 8)
        prepared(objective)


@pytest.mark.parametrize(("settings", "words"), [
    ({"group": 1}, "group=1: must be"), ({"advantage": "rank"}, "advantage=rank"),
    ({"denominator": "mean"}, "denominator=mean"),
])  # fmt: skip
def test_settings_that_cannot_be_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        grpo(**settings)


def test_data_without_prompts_is_named() -> None:
    with pytest.raises(ValueError, match="data=prompts"):
        grpo().prepare(Step([], 0, {}), Models())  # type: ignore[arg-type]


def test_an_answer_that_does_not_fit_a_row_is_refused_and_one_that_just_fits_is_not() -> None:
    rollout = Rollout([Turn(PROMPTS[0].ids, [7] * 5, "", False, [0.0] * 5)])
    drawn = Drawn(rollout, {OLD: rollout.log_probs})
    (micro,) = pack([drawn, drawn], [OLD], rows=4, length=6, device=torch.device("cpu"))
    assert micro.document_ids_BT.tolist() == [[1] * 6] * 2 + [[0] * 6] * 2
    with pytest.raises(ValueError, match=r"objective\.max_tokens: a prompt and its answer have 7 tokens"):
        pack([drawn], [OLD], rows=1, length=5, device=torch.device("cpu"))


def test_no_answers_are_a_micro_batch_of_padding() -> None:
    (micro,) = pack([], [OLD], rows=2, length=5, device=torch.device("cpu"))
    assert micro.tokens_BT.shape == (2, 5)
    assert not micro.document_ids_BT.any()
    assert (micro.targets_BT == IGNORE).all()
