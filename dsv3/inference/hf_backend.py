"""A causal model of transformers as a backend of the engine.

Rows that are read together lie in one cache of transformers. Where they differ in length, positions that no row holds
are masked: a mask says which of the cache's positions are a row's own. Other rows than last time are gathered into a
new cache. A model whose layers keep anything but keys and values of all positions (a sliding window, a state) reads
every row in a cache of its own.

Shape legend: B rows, T positions, S positions of the cache, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dsv3.inference.prefixes import padded
from dsv3.planning.draft_costs import DraftCosts


@dataclass
class Batch:
    """Rows that were read together last."""

    rows: list[int]
    cache: Any  # of transformers; None while nothing was read
    own_BS: Tensor  # bool: positions of the cache that a row holds

    def of_row(self, row: int) -> int:
        return self.rows.index(row)


class HFBackend:
    """`model`: as AutoModelForCausalLM opens it."""

    shares_prefixes = False  # so that texts are those of transformers
    most_ragged = 0
    draft_costs: DraftCosts | None = None

    def __init__(self, model: Any) -> None:
        self.model = model
        self.gathers = keeps_every_position(model)
        self.held: dict[int, Batch] = {}
        self._rows = 0  # of the latest `read`

    def add(self, row: int, *, drafts: bool) -> None:
        if drafts:
            raise ValueError("speculative decoding needs MTP modules, and a model of transformers is read without")
        self.held[row] = Batch([row], None, torch.zeros(1, 0, dtype=torch.bool, device=self.model.device))

    def copy(self, source: int, row: int, length: int) -> None:
        self.held[row] = self._gathered([source])
        self.held[row].rows = [row]
        self.rewind(row, length)

    def drop(self, row: int) -> None:
        del self.held[row]

    def rewind(self, row: int, length: int) -> None:
        batch = self.held[row]
        own_S = batch.own_BS[batch.of_row(row)]
        own_S &= own_S.cumsum(0) <= length

    def rest(self, row: int, length: int) -> None:
        self.rewind(row, length)

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        if len(rows) > 1 and not self.gathers:
            logits = [self.read([row], [t], [w])[0] for row, t, w in zip(rows, tokens, wanted, strict=True)]
            self._rows = len(rows)
            return logits
        self._rows = len(rows)
        batch = self.held[rows[0]]
        if batch.rows != list(rows) or any(self.held[row] is not batch for row in rows):
            batch = self._gathered(rows)
        for row in rows:
            self.held[row] = batch
        longest = max(map(len, tokens))
        device = self.model.device
        tokens_BT = padded([[*[0] * (longest - len(ids)), *ids] for ids in tokens], device)  # rows end together
        new_BT = padded([[*[0] * (longest - len(ids)), *[1] * len(ids)] for ids in tokens], device).bool()
        held_B1 = batch.own_BS.sum(1, keepdim=True)
        batch.own_BS = torch.cat((batch.own_BS, new_BT), dim=1)
        output = self.model(
            tokens_BT,
            past_key_values=batch.cache,
            use_cache=True,
            logits_to_keep=max(1, *wanted),
            **self._placed(batch.own_BS, (held_B1 + new_BT.cumsum(1) - 1).clamp(min=0)),
        )
        batch.cache = output.past_key_values
        return [logits_TV[len(logits_TV) - n :].float() for logits_TV, n in zip(output.logits, wanted, strict=True)]

    def chosen_experts(self) -> list[dict[str, Tensor]]:
        """None are told: architectures name and shape them as they like."""
        return [{}] * self._rows

    def draft(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
        counts: Sequence[int],
        choose: Sequence[Callable[[Tensor], int]],
    ) -> list[list[int]]:
        raise ValueError("a model of transformers drafts nothing")

    def _placed(self, own_BS: Tensor, positions_BT: Tensor) -> dict[str, Tensor]:
        """Nothing where all positions are held, which every architecture understands."""
        return {} if bool(own_BS.all()) else {"attention_mask": own_BS.long(), "position_ids": positions_BT}

    def _gathered(self, rows: Sequence[int]) -> Batch:
        """Copies of what these rows hold, ending together."""
        from transformers.cache_utils import DynamicCache

        places = [(batch := self.held[row], batch.of_row(row)) for row in rows]
        lengths = [int(batch.own_BS[b].sum()) for batch, b in places]
        longest = max(lengths)
        device = self.model.device
        own_BS = torch.arange(longest, device=device) >= longest - torch.tensor(lengths, device=device).unsqueeze(1)
        first = next((batch.cache for batch, _ in places if batch.cache is not None), None)
        if first is None:
            return Batch(list(rows), None, own_BS)
        layers = []
        for layer in range(len(first.layers)):
            pair = []
            for name in ("keys", "values"):
                like = getattr(first.layers[layer], name)
                together = like.new_zeros(len(rows), like.shape[1], longest, like.shape[3])
                for row, (batch, b), length in zip(together, places, lengths, strict=True):
                    if length:
                        row[:, longest - length :] = getattr(batch.cache.layers[layer], name)[b][:, batch.own_BS[b]]
                pair.append(together)
            layers.append(tuple(pair))
        return Batch(list(rows), DynamicCache(layers), own_BS)


def keeps_every_position(model: Any) -> bool:
    """Whether decoding keeps keys and values of all positions, in every layer, and nothing else."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    return not getattr(model, "_is_stateful", False) and all(type(layer) is DynamicLayer for layer in layers)
