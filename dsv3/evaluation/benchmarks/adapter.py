"""Any `ScoredModel` as an lm-eval model.

    loglikelihood           log p(continuation | context), and whether it is what greedy decoding gives
    loglikelihood_rolling   log p(text), in windows of the model's length, each conditioned on one token before it
    generate_until          text after a prompt, up to a stop sequence
    play                    episodes of an agent (see `dsv3.evaluation.agents`)

Requests are sorted by length; so many are scored or continued at once as a batch holds. Requests that lead to the same
row of tokens (one-token choices) are scored once, and rows that begin alike share the computation of their beginning
(see `prefixes`). A context too long for the model loses tokens on its left, as in lm-eval; an infilling prompt loses
them at its far ends; a continuation too long is scored in parts.
"""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsv3.evaluation.agents.journal import Journal
from dsv3.evaluation.agents.play import Game, play
from dsv3.evaluation.agents.player import ModelPlayer
from dsv3.evaluation.agents.shown import with_experts
from dsv3.inference.engine import complete
from dsv3.inference.prefixes import group_by_prefix
from dsv3.inference.sampling import Settings
from dsv3.inference.scored_model import ScoredModel

DEFAULT_TOKENS = 256
"""The longest generation where a task does not say; lm-eval's own default."""

Scored = tuple[float, bool]


class Written(str):
    """A generated text that knows whether the room for it ended first."""

    truncated: bool

    def __new__(cls, text: str, *, truncated: bool = False) -> "Written":
        """`truncated` has a default because lm-eval makes a text of the same type of the right answer."""
        written = super().__new__(cls, text)
        written.truncated = truncated
        return written


class Adapter(TemplateLM):
    """`model` behind lm-eval's interface; draws of sampled generations follow from `seed` and the request's number."""

    def __init__(self, model: ScoredModel, *, batch_size: int, seed: int) -> None:
        super().__init__()
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.max_length = model.max_length
        self.journal: Journal | None = None  # of episodes

    @property
    def eot_token_id(self) -> int:
        return min(self.model.eos)

    @property
    def prefix_token_id(self) -> int:
        return self.model.prefix_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.encode(string, bos=add_special_tokens is not False)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[Scored]:
        return super().loglikelihood(requests, disable_tqdm=True)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        ending = self.model.encode(continuation.lstrip(" ") if self.model.chat else continuation, bos=False)
        framed = self.model.encode_framed(context, self.max_length + 1 - len(ending))
        return (framed, ending) if framed is not None else super()._encode_pair(context, continuation)

    def _loglikelihood_tokens(self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any) -> list[Scored]:
        pieces, owners = [], []
        for i, (_, context, ending) in enumerate(requests):
            for piece in self._pieces(context, ending):
                pieces.append((None, *piece))
                owners.append(i)
        scores: list[Scored] = [(0.0, True)] * len(requests)
        for i, (logp, greedy) in zip(owners, self._score(pieces), strict=True):
            scores[i] = (scores[i][0] + logp, scores[i][1] and greedy)
        return scores

    def _pieces(self, context: list[int], ending: list[int]) -> Iterator[tuple[list[int], list[int]]]:
        """The ending, or, where the model cannot hold it, parts of it, each with all that is before it as context."""
        size = len(ending) if 0 < len(ending) <= self.max_length else self.max_length // 2
        for start in range(0, len(ending), size):
            yield context + ending[:start], ending[start : start + size]

    def _score(self, requests: list[tuple[Any, list[int], list[int]]]) -> list[Scored]:
        """Requests whose endings the model holds."""
        same_row: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for i, (_, context, ending) in enumerate(requests):
            same_row[tuple(context + ending[:-1])].append(i)
        longest = [max(members, key=lambda i: len(requests[i][2])) for members in same_row.values()]
        longest.sort(key=lambda i: (-len(requests[i][1] + requests[i][2]), requests[i][1] + requests[i][2]))
        rows = [(requests[i][1] + requests[i][2])[-(self.max_length + 1) :][:-1] for i in longest]
        scores: dict[int, Scored] = {}
        kept = [len(requests[i][2]) for i in longest]
        for shared, members in self._batches(rows, kept):
            keep = [kept[m] for m in members]
            for m, logits_KV in zip(members, self.model.logits([rows[m] for m in members], keep, shared), strict=True):
                logp_KV = logits_KV.log_softmax(-1)
                context, ending = requests[longest[m]][1:]
                for i in same_row[tuple(context + ending[:-1])]:
                    scores[i] = score_ending(logp_KV, requests[i][2])
        return [scores[i] for i in range(len(requests))]

    def _batches(self, rows: Sequence[Sequence[int]], keep: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """How much each of a batch's rows shares, and their indices. Of `keep` logits are asked."""
        groups: Sequence[tuple[int, Sequence[int]]] = [(0, range(len(rows)))]
        if self.model.shares_prefixes:
            groups = group_by_prefix([row[: len(row) - k] for row, k in zip(rows, keep, strict=True)])
        batch: list[tuple[int, int]] = []
        for shared, members in groups:
            if batch and (not shared or len(batch) + len(members) > self.batch_size):
                yield split(batch)
                batch = []
            for member in sorted(members):  # the rows come sorted by length
                batch.append((shared, member))
                if len(batch) == self.batch_size:
                    yield split(batch)
                    batch = []
        if batch:
            yield split(batch)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        windows, counts = [], []
        for (text,) in (request.args for request in requests):
            ids = self.model.encode(text, bos=self.model.scores_bos)
            pairs = list(get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1))
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            counts.append(len(pairs))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        alike: dict[str, list[int]] = defaultdict(list)
        for i, request in enumerate(requests):
            alike[repr(sorted(request.args[1].items()))].append(i)
        answers: dict[int, str] = {}
        for members in alike.values():
            settings = dict(normalize_gen_kwargs(requests[members[0]].args[1], DEFAULT_TOKENS))
            max_tokens = min(int(settings["max_gen_toks"]), self.max_length // 2)
            prompts = {i: self._prompt(requests[i].args[0], self.max_length - max_tokens) for i in members}
            ordered = sorted(members, key=lambda i: (-len(prompts[i]), prompts[i], i))
            texts = self._continue([prompts[i] for i in ordered], ordered, settings, max_tokens)
            answers.update(zip(ordered, texts, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _prompt(self, context: str, room: int) -> list[int]:
        framed = self.model.encode_framed(context, room)
        return framed if framed is not None else self.tok_encode(context)[-room:]

    def _continue(
        self, prompts: list[list[int]], numbers: list[int], settings: dict[str, Any], max_tokens: int
    ) -> list[str]:
        common = Settings(
            max_tokens=max_tokens,
            temperature=settings["temperature"] if settings["do_sample"] else 0.0,
            top_p=settings.get("top_p", 1.0),
            stop=tuple(stop for stop in settings["until"] if stop),
            eos=tuple(self.model.eos),
        )
        completions = complete(
            self.model.backend(),
            prompts,
            [replace(common, seed=seed_of(self.seed, number)) for number in numbers],
            decode=self.model.decode,
            at_once=self.batch_size,
        )
        return [Written(completion.text, truncated=completion.finished == "length") for completion in completions]

    def play(self, requests: list[Instance]) -> list[dict[str, Any]]:
        games = [Game(name, seed, **how, draws=self.seed) for name, seed, how in (r.args for r in requests)]
        return play(games, self._player(), journal=self.journal)

    def explained(self, result: dict[str, Any]) -> dict[str, Any]:
        """An episode with the experts that its prompts used."""
        return with_experts(result, self._player())

    def _player(self) -> ModelPlayer:
        return ModelPlayer(self.model, at_once=self.batch_size)


def split(batch: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    return [shared for shared, _ in batch], [member for _, member in batch]


def seed_of(seed: int, number: int) -> int:
    """Of one request. PyTorch's generator on the CPU takes 32 bits of a seed, so both numbers are hashed into them."""
    digest = hashlib.sha256(f"{seed} {number}".encode()).digest()
    return int.from_bytes(digest[:4], "little")


def score_ending(logp_KV: torch.Tensor, ending: list[int]) -> Scored:
    """Summed log-probability of `ending` at the last positions, and whether each of its tokens is the likeliest."""
    ids_K = torch.tensor(ending, device=logp_KV.device)
    logp_KV = logp_KV[-len(ending) :]
    chosen = logp_KV.gather(1, ids_K.unsqueeze(1)).squeeze(1)
    return float(chosen.sum()), bool((logp_KV.max(-1).indices == ids_K).all())
