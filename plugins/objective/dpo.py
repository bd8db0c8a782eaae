"""Direct preference optimisation (arXiv 2305.18290): a chosen reply is to gain on a rejected one.

    r(y) = ln pi(y | x) - ln pi_ref(y | x)               sums over the tokens of reply y and its EOS
    h    = r(chosen) - r(rejected)

    sigmoid             -(1 - s) ln sigma(beta h) - s ln sigma(-beta h)            s: label_smoothing
    length_normalised   the same, with r divided by the number of tokens
    ipo                 (h - 1 / (2 beta))^2, with r divided by it too (arXiv 2310.12036)

L = mean over pairs + nll * mean over tokens of chosen replies of -ln pi. The reference pi_ref is the model that
training began with. Rows hold pairs of documents, isolated from each other: 1 and 2, 3 and 4, and so on; the first is
the chosen one.

A reply's reference log-probability is computed from it alone, so that it does not depend on the row that it is packed
in, the number of ranks, or the step at which training resumes; it is kept by content. MTP learns the chosen replies.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bounds import Fraction, NonNegativeFloat, PositiveFloat
from dsv3.contracts import IGNORE, Denominators, Forward, Head, LossTerm, MicroBatch, Models, Statistic, Step
from dsv3.model.losses import token_log_probs
from plugins.objective.documents import of_documents, targets_of

LOSSES = ("sigmoid", "ipo", "length_normalised")
ANSWERS, REFERENCE = "dpo_answers", "dpo_reference"
"""In `MicroBatch.extra`: targets of both replies; and of each the reference's log-probability, where it begins."""


class DPO(nn.Module):
    """A loss of pairs.

    token_bytes_V: not used; every objective is given it.
    """

    statistics = (
        Statistic("loss", "nats per pair", "loss", shown=True),
        Statistic("reward_margin", "beta times nats", "margin", over="pairs", shown=True),
        Statistic("reward_accuracy", "share of pairs", "right", over="pairs", shown=True),
        Statistic("chosen_log_ratio", "nats per reply", "chosen_ratio", over="pairs"),
        Statistic("rejected_log_ratio", "nats per reply", "rejected_ratio", over="pairs"),
        Statistic("chosen_nll", "nats per token", "chosen_nll", over="chosen_tokens"),
        Statistic("chosen_length", "tokens per reply", "chosen_tokens", over="pairs"),
        Statistic("rejected_length", "tokens per reply", "rejected_tokens", over="pairs"),
    )
    held_out_figures = ("loss", "reward_margin", "reward_accuracy", "chosen_log_ratio", "rejected_log_ratio")

    def __init__(
        self,
        *,
        token_bytes_V: Tensor,
        loss: Literal["sigmoid", "ipo", "length_normalised"],
        beta: PositiveFloat,
        label_smoothing: Fraction,
        nll: NonNegativeFloat,
    ) -> None:
        super().__init__()
        if loss not in LOSSES:
            raise ValueError(f"loss={loss}: must be one of {', '.join(LOSSES)}")
        if not 0 <= label_smoothing < 0.5 or (label_smoothing and loss == "ipo"):
            raise ValueError(f"label_smoothing={label_smoothing}: must be from 0 to below 0.5, and 0 with loss=ipo")
        self.kind, self.beta, self.label_smoothing, self.nll = loss, beta, label_smoothing, nll
        self._reference: dict[bytes, float] = {}  # log-probability of a reply, by the tokens before and in it

    def prepare(self, step: Step, models: Models) -> Step:
        """Add the reference's log-probabilities, and leave the chosen replies' targets alone to MTP."""
        return step._replace(micro_batches=[self._with_reference(micro, models) for micro in step.micro_batches])

    def denominators(self, step: Step) -> Denominators:
        """Pairs, and tokens of the chosen and the rejected replies."""
        pairs = torch.stack([_pairs(micro).sum() for micro in step.micro_batches]).sum()
        answers = torch.stack([(micro.extra[ANSWERS] != IGNORE).sum() for micro in step.micro_batches]).sum()
        chosen = torch.stack([(micro.targets_BT != IGNORE).sum() for micro in step.micro_batches]).sum()
        return {
            "pairs": pairs,
            "chosen_tokens": chosen,
            "rejected_tokens": answers - chosen,
            "mtp": chosen,
        }

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        answers_BT = micro.extra[ANSWERS]
        log_probs_BT = token_log_probs(
            forward.hidden_BTD.flatten(0, 1), head.weight_VD, answers_BT.flatten(), copy_VD=head.copy_VD
        ).view_as(answers_BT)
        is_pair_BP, ids_BT = _pairs(micro), micro.document_ids_BT
        ratios = of_documents(log_probs_BT, ids_BT) - of_documents(micro.extra[REFERENCE], ids_BT)
        lengths = targets_of(answers_BT, ids_BT).clamp(min=1)
        chosen_BP, rejected_BP = _sides(ratios)
        h_BP = chosen_BP - rejected_BP
        if self.kind != "sigmoid":
            chosen, rejected = _sides(ratios / lengths)
            h_BP = chosen - rejected
        loss_BP = self._of_margin(h_BP).where(is_pair_BP, 0.0)
        n_pairs = denominators["pairs"].clamp(min=1)
        chosen_nll = -log_probs_BT.masked_fill(micro.targets_BT == IGNORE, 0.0).sum()
        loss = loss_BP.sum() / n_pairs + self.nll * chosen_nll / denominators["chosen_tokens"].clamp(min=1)
        with torch.no_grad():
            sums = {
                "loss": loss,
                "margin": (self.beta * h_BP).where(is_pair_BP, 0.0).sum(),
                "right": ((h_BP > 0) & is_pair_BP).sum(),
                "chosen_ratio": chosen_BP.where(is_pair_BP, 0.0).sum(),
                "rejected_ratio": rejected_BP.where(is_pair_BP, 0.0).sum(),
                "chosen_nll": chosen_nll,
            }
            return LossTerm(loss, {name: value.detach() for name, value in sums.items()})

    def _of_margin(self, h_BP: Tensor) -> Tensor:
        if self.kind == "ipo":
            return (h_BP - 1 / (2 * self.beta)) ** 2
        smoothing = self.label_smoothing
        return -(1 - smoothing) * F.logsigmoid(self.beta * h_BP) - smoothing * F.logsigmoid(-self.beta * h_BP)

    def _with_reference(self, micro: MicroBatch, models: Models) -> MicroBatch:
        ids_BT, answers_BT = micro.document_ids_BT, micro.targets_BT
        reference_BT = torch.zeros(answers_BT.shape, device=answers_BT.device)
        rows = ids_BT.cpu()
        for b, last in enumerate(rows.amax(1).tolist()):
            for number in range(1, last + 1):
                own = (rows[b] == number).nonzero().squeeze(1)
                first, end = int(own[0]), int(own[-1]) + 1
                reference_BT[b, first] = self._log_probability(micro, b, first, end, models)
        chosen_BT = answers_BT.masked_fill(ids_BT % 2 == 0, IGNORE)
        return micro._replace(targets_BT=chosen_BT, extra={ANSWERS: answers_BT, REFERENCE: reference_BT})

    def _log_probability(self, micro: MicroBatch, row: int, first: int, end: int, models: Models) -> float:
        """Of the reply in the document at positions `first` to `end` of a row, under the reference."""
        alone = micro.map(lambda tensor: tensor[row : row + 1, first:end].contiguous())
        alone = alone._replace(document_ids_BT=torch.ones_like(alone.document_ids_BT), extra={})
        key = torch.stack([alone.tokens_BT, alone.targets_BT]).cpu().numpy().tobytes()
        if key not in self._reference:
            self._reference[key] = float(models.log_probs(models.reference(), alone).double().sum())
        return self._reference[key]


def _sides(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair, [B, P] each: the values of the chosen document, 2 p + 1, and of the rejected one, 2 p + 2."""
    return values[:, 1::2], values[:, 2::2]


def _pairs(micro: MicroBatch) -> Tensor:
    """Which of the P pairs that a row may have are there, bool [B, P]."""
    answers = targets_of(micro.extra[ANSWERS], micro.document_ids_BT)
    chosen, rejected = _sides(answers)
    return (chosen > 0) & (rejected > 0)
