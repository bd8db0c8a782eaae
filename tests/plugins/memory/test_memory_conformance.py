"""Every shipped memory passes `check_memory`; memories with one fault each do not."""

import pytest
import torch

from dsv3.testing.memory import check_memory
from plugins.memory.ngram import NGramMemory
from plugins.memory.none import NoMemory

SIZES = {"dim": 12, "vocab_size": 50}


class Good(NGramMemory):
    def __init__(self, orders=(2, 3), match_orders=(1, 2)):
        super().__init__(**SIZES, orders=orders, rows=1009, match_orders=match_orders)


def test_shipped_memories_conform():
    for factory in (NoMemory, Good, lambda: Good(match_orders=()), lambda: Good(orders=())):
        check_memory(factory, **SIZES)


class Uncounted(Good):
    def __init__(self):
        super().__init__()
        del self.active_parameters


class TooMany(Good):
    def __init__(self):
        super().__init__()
        self.active_parameters = 10**9


class Widening(Good):
    def forward(self, x_BTD, *more):
        return super().forward(x_BTD.float(), *more)


class Scaling(Good):
    def forward(self, x_BTD, *more):
        return 2 * super().forward(x_BTD, *more)


class LooksAhead(Good):
    def forward(self, x_BTD, tokens_BT, *more):
        return super().forward(x_BTD, tokens_BT.roll(-1, 1), *more)


class Mixing(Good):
    def forward(self, x_BTD, tokens_BT, *more):
        return super().forward(x_BTD, tokens_BT, *more) + self.tables[0].weight[0, 0] * tokens_BT.sum()


class CrossesDocuments(Good):
    def forward(self, x_BTD, tokens_BT, document_ids_BT=None, cache=None):
        return super().forward(x_BTD, tokens_BT, None, cache)


class Forgetful(Good):
    def forward(self, x_BTD, tokens_BT, document_ids_BT=None, cache=None):
        return super().forward(x_BTD, tokens_BT, document_ids_BT, None)


class NeverRewinds(Good):
    def new_cache(self, rows=()):
        cache = super().new_cache(rows)
        rewind = cache.rewind
        cache.rewind = lambda row, length: rewind(row, 12) if length == 12 else None
        return cache


class Drifting(Good):
    calls = 0

    def forward(self, x_BTD, *more):
        self.calls += 1
        return super().forward(x_BTD, *more) + (x_BTD.shape[0] == 3) * 1e-7 * self.calls


class Frozen(Good):
    def __init__(self):
        super().__init__()
        self.tables[0].requires_grad_(False)


class Unsaved(Good):
    def state_dict(self, *args, **kwargs):
        return {name: torch.zeros_like(tensor) for name, tensor in super().state_dict(*args, **kwargs).items()}


@pytest.mark.parametrize(
    ("memory", "words"),
    [
        (Uncounted, "`active_parameters`"),
        (TooMany, "`active_parameters`"),
        (Widening, "must be torch.bfloat16"),
        (Scaling, "from the tokens alone"),
        (LooksAhead, "no later ones"),
        (Mixing, "no later ones|other rows"),
        (CrossesDocuments, "nothing of another is read"),
        (Forgetful, "`lengths` must be 12"),
        (NeverRewinds, "must be forgotten"),
        (Drifting, "the same again"),
        (Frozen, "must get a gradient"),
        (Unsaved, "restored from a state_dict"),
    ],
)
def test_faulty_memories_are_found(memory, words):
    with pytest.raises(AssertionError, match=words):
        check_memory(memory, **SIZES)
