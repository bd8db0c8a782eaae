"""Does a multi-token prediction keep to `dsv3.contracts.MTP`?"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Forward, HasAuxiliaryLoss, Head, LossTerm, MicroBatch, MTPPrediction, Statistic
from dsv3.model.decoder import moe_name
from dsv3.model.moe import MoE
from dsv3.testing.plain import Plain, drawn, error
from dsv3.testing.requirement import require, require_joined, require_meta, require_reloadable
from dsv3.testing.small_model import block, micro_batch

ROWS, LENGTH, VOCABULARY = 3, 12, 50
ROUNDING = 1e-4  # relative, of FP32 sums in another order
TOKENS = (0, 1000, 10**9)  # asked of the weight
CHUNKS = (12, 5, 1)  # positions at a time


def check_mtp(factory: Callable[..., nn.Module], *, dim: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(block=, precision=)` is MTP that the core can use.

    dim: the model width that the factory was given.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        require_meta(lambda: _made(factory, dim))
        mtp = _made(factory, dim)
        embed = nn.Embedding(VOCABULARY, dim)
        _attributes(mtp)
        h_BTD, batch = torch.randn(ROWS, LENGTH, dim), micro_batch(ROWS, LENGTH, seed=0, vocab_size=VOCABULARY)
        with torch.no_grad():
            _predictions(mtp, h_BTD, batch, embed)
            _routings(mtp, h_BTD, batch, embed)
            _targets(mtp, h_BTD, batch, embed)
            _causal(mtp, h_BTD, batch, embed)
            _documents(mtp, h_BTD, batch, embed)
            _extends(mtp, h_BTD, batch, embed)
            _state(mtp, factory, h_BTD, batch, embed)
        _loss(mtp, h_BTD, batch, embed)


def _made(factory: Callable[..., nn.Module], dim: int) -> Any:
    precision = Plain(torch.float32)
    mtp = factory(block=lambda: block(dim=dim, precision=precision, moe=True), precision=precision)
    require(isinstance(mtp, nn.Module), "multi-token prediction is an nn.Module")
    return drawn(mtp)


def _attributes(mtp: Any) -> None:
    depth, after = getattr(mtp, "depth", None), getattr(mtp, "after_final_norm", None)
    require(isinstance(depth, int) and depth >= 0, f"`depth` must be an integer, at least 0; not {depth!r}")
    require(isinstance(after, bool), f"`after_final_norm` must be True or False, not {after!r}")
    for tokens in TOKENS:
        value = mtp.weight(tokens)
        require(
            isinstance(value, int | float) and math.isfinite(value) and value >= 0,
            f"`weight({tokens})` must be a finite number, at least 0; not {value!r}",
        )
    caches = mtp.new_caches(range(ROWS))
    require(len(caches) == depth, f"new_caches() must give one cache for each of {depth} depths, not {len(caches)}")
    require(
        depth == 0 or isinstance(mtp, HasAuxiliaryLoss),
        "MTP of depth 1 or more must have `statistics` and `auxiliary_loss` (dsv3.contracts.HasAuxiliaryLoss)",
    )


def _predictions(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> list[MTPPrediction]:
    found = mtp(h_BTD, batch, embed, False)
    require(len(found) == mtp.depth, f"one prediction must be given for each of {mtp.depth} depths, not {len(found)}")
    for k, prediction in enumerate(found, start=1):
        left = (ROWS, LENGTH - k)
        hidden, targets = prediction.hidden_BSD, prediction.targets_BS
        require(
            hidden.shape == (*left, h_BTD.shape[-1]) and hidden.dtype == h_BTD.dtype and hidden.isfinite().all(),
            f"depth {k}: hidden_BSD must be finite, {h_BTD.dtype} {[*left, h_BTD.shape[-1]]}: positions without a "
            f"token {k} further on are cut off; not {hidden.dtype} {list(hidden.shape)}",
        )
        require(
            targets.shape == left and targets.dtype == torch.int64,
            f"depth {k}: targets_BS must be int64 {list(left)}, not {targets.dtype} {list(targets.shape)}",
        )
    return found


def _routings(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    """The given block has a MoE: its load is counted, and its balance loss taken, from what a prediction returns."""
    predictions = mtp(h_BTD, batch, embed, False)
    for k, prediction in enumerate(predictions, start=1):
        tokens, routing = ROWS * (LENGTH - k), prediction.routing
        require(
            routing is not None and len(routing.experts_NK) == tokens,
            f"depth {k}: `routing` must be that of the block's MoE for its {tokens} positions, which load is counted "
            "from",
        )
    named = [moe_name(f"mtp.{name}") for name, module in mtp.named_modules() if isinstance(module, MoE)]
    expected = [f"mtp.{k}" for k in range(len(predictions))]
    require(
        named == expected,
        f"the MoE layers must be known as {expected}, and are {named}: keep the modules of the depths in one "
        "nn.ModuleList, whose index names the depth",
    )


def _targets(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    whole = batch._replace(document_ids_BT=torch.ones_like(batch.document_ids_BT))
    whole = whole._replace(targets_BT=torch.randint(VOCABULARY, (ROWS, LENGTH)))
    for k, prediction in enumerate(mtp(h_BTD, whole, embed, False), start=1):
        require(
            torch.equal(prediction.targets_BS, whole.targets_BT[:, k:]),
            f"depth {k}, rows of one document: the target of position i must be t_(i+{k}+1), targets_BT[:, {k}:]",
        )
    for k, prediction in enumerate(mtp(h_BTD, batch, embed, False), start=1):
        of_batch = batch.targets_BT[:, k:]
        require(
            ((prediction.targets_BS == of_batch) | (prediction.targets_BS == IGNORE)).all(),
            f"depth {k}: a target must be t_(i+{k}+1) or IGNORE, and IGNORE where the batch has none",
        )


def _causal(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    """States from position t on replaced, and of depth k the tokens from t + k on."""
    plain = mtp(h_BTD, batch, embed, False)
    for t in (1, LENGTH // 2):
        later_BTD = h_BTD.clone()
        later_BTD[:, t:] = torch.randn_like(later_BTD[:, t:])
        for k in range(1, mtp.depth + 1):
            tokens_BT = batch.tokens_BT.clone()
            tokens_BT[:, t + k :] = (tokens_BT[:, t + k :] + 1) % VOCABULARY
            moved = mtp(later_BTD, batch._replace(tokens_BT=tokens_BT), embed, False)[k - 1]
            require(
                error(moved.hidden_BSD[:, :t], plain[k - 1].hidden_BSD[:, :t]) <= ROUNDING,
                f"depth {k}: position i may read states up to i and tokens up to i + {k}, and positions before {t} "
                f"changed when only later ones were replaced",
            )
            known_BT = batch.tokens_BT.clone()
            known_BT[:, t + k - 1] = (known_BT[:, t + k - 1] + 1) % VOCABULARY
            moved = mtp(h_BTD, batch._replace(tokens_BT=known_BT), embed, False)[k - 1]
            require(
                error(moved.hidden_BSD[:, t - 1], plain[k - 1].hidden_BSD[:, t - 1]) > ROUNDING,
                f"depth {k}: position i must read the token t_(i+{k}), and does not change with it",
            )


def _documents(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    first_BT = batch.document_ids_BT == 1
    other_BTD = torch.where(first_BT.unsqueeze(-1), torch.randn_like(h_BTD), h_BTD)
    plain, moved = mtp(h_BTD, batch, embed, True), mtp(other_BTD, batch, embed, True)
    for k, (a, b) in enumerate(zip(plain, moved, strict=True), start=1):
        second_BS = (batch.document_ids_BT == 2)[:, : LENGTH - k]
        require(
            error(b.hidden_BSD[second_BS], a.hidden_BSD[second_BS]) <= ROUNDING,
            f"depth {k}: with `isolate`, states of another document must not be seen: give the block the document ids",
        )


def _extends(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    """The depths over caches, a chunk of positions at a time, against the forward pass."""
    expected = mtp(h_BTD, batch, embed, False)
    for chunk in CHUNKS:
        before_BTD = h_BTD
        for k, cache in enumerate(mtp.new_caches(range(ROWS)), start=1):
            length = LENGTH - k
            hidden, carried = [], []
            parts = zip(before_BTD[:, :length].split(chunk, 1), batch.tokens_BT[:, k:].split(chunk, 1), strict=True)
            for h, tokens in parts:
                following, out = mtp.extend(k, h, tokens, embed, cache)
                carried.append(following)
                hidden.append(out)
            require(
                error(torch.cat(hidden, 1), expected[k - 1].hidden_BSD) <= ROUNDING,
                f"depth {k}: extend() over a cache must give the states for the head that the forward pass gives",
            )
            found = cache.lengths
            require(
                found == dict.fromkeys(range(ROWS), length), f"depth {k}: `lengths` must be {length} each, not {found}"
            )
            before_BTD = torch.cat(carried, 1)


def _state(mtp: Any, factory: Callable[..., nn.Module], h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    fresh = _made(factory, h_BTD.shape[-1])
    shared = {id(p) for p in mtp.parameters()} & {id(p) for p in fresh.parameters()}
    require(not shared, "the factory must make new parameters each time")
    require_reloadable(mtp, fresh)
    require_joined(mtp)
    for a, b in zip(mtp(h_BTD, batch, embed, False), fresh(h_BTD, batch, embed, False), strict=True):
        require(torch.equal(a.hidden_BSD, b.hidden_BSD), "MTP restored from a state_dict must predict like the saved")


def _loss(mtp: Any, h_BTD: Tensor, batch: MicroBatch, embed: Any) -> None:
    if not mtp.depth:
        return
    leaf, weight_VD = h_BTD.clone().requires_grad_(), torch.randn(VOCABULARY, h_BTD.shape[-1], requires_grad=True)
    forward = Forward(leaf, mtp(leaf, batch, embed, False), {})
    terms: dict[float, LossTerm] = {}
    for divisor in (30.0, 60.0):
        denominators = {"mtp": torch.tensor(divisor), "tokens": torch.tensor(1.0)}
        terms[divisor] = mtp.auxiliary_loss(forward, Head(weight_VD, weight_VD.detach()), batch, denominators, 0)
    term = terms[30.0]
    require(
        term.loss.shape == () and term.loss.isfinite() and error(term.loss, 2 * terms[60.0].loss) <= ROUNDING,
        'auxiliary_loss() must be a finite scalar, divided by denominators["mtp"]',
    )
    known = {*term.sums, "mtp", "tokens"}
    for figure in mtp.statistics:
        require(isinstance(figure, Statistic), "`statistics` must be dsv3.contracts.Statistic")
        for name in (figure.total, figure.over):
            require(
                name is None or name in known,
                f"the statistic {figure.name} is made of {name!r}, and neither `sums` nor the denominators have it",
            )
    for name, value in term.sums.items():
        require(value.shape == () and not value.requires_grad, f"`sums[{name!r}]` must be a scalar without a gradient")
    if mtp.weight(0) == 0:
        return
    term.loss.backward()
    for name, tensor in [("the hidden states", leaf), ("the head's weight", weight_VD), *mtp.named_parameters()]:
        require(
            tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(),
            f"{name} must get a gradient of auxiliary_loss() that is finite and not zero",
        )
