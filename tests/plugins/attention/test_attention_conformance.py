"""Every shipped attention passes `check_attention`; attentions with one fault each do not."""

import copy
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.model.layers import PositionCache
from dsv3.testing import check_attention
from dsv3.testing.plain import Plain
from plugins.attention.gqa import GroupedQueryAttention

CONF = Path(__file__).parents[3] / "conf"
SIZES = {"dim": 32, "n_heads": 4, "n_kv_heads": 2, "head_dim": 8, "rope_theta": 100.0, "yarn": None}
MODEL = SIZES | {
    "q_lora_rank": 16,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 12,
    "norm_eps": 1e-6,
}
YARN = {"factor": 4.0, "original_length": 64, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "attention").glob("*.yaml")))
@pytest.mark.parametrize("changes", [{}, {"q_lora_rank": None, "n_kv_heads": 1}, {"yarn": YARN, "n_kv_heads": 4}])
def test_shipped_attentions_conform(name, changes):
    part = OmegaConf.load(CONF / "attention" / f"{name}.yaml")
    root = OmegaConf.create({"model": MODEL | changes, "attention": part})
    check_attention(instantiate(root.attention, _convert_="all"), dim=32)


def test_naive_decoding_conforms():
    root = OmegaConf.create({"model": MODEL, "attention": OmegaConf.load(CONF / "attention" / "mla.yaml")})
    check_attention(instantiate(root.attention, _convert_="all", decode="naive"), dim=32)


class Good(GroupedQueryAttention):
    def __init__(self, *, precision):
        super().__init__(**SIZES, precision=precision)


def test_the_good_attention_conforms():
    check_attention(Good, dim=32)


class Noncausal(Good):
    def forward(self, x, positions, ids=None, cache=None):
        return super().forward(x, positions, ids, cache) + x.mean(1, keepdim=True)


class Blind(Good):
    def forward(self, x, positions, ids=None, cache=None):
        if cache is not None:
            super().forward(x, positions, ids, cache)
        return self.o_proj(self.q_proj(x))


class Upcast(Good):
    def forward(self, x, positions, ids=None, cache=None):
        return super().forward(x, positions, ids, cache).float()


class Unmasked(Good):
    def forward(self, x, positions, ids=None, cache=None):
        return super().forward(x, positions, None, cache)


class PaddingIsNaN(Good):
    def forward(self, x, positions, ids=None, cache=None):
        out = super().forward(x, positions, ids, cache)
        return out if ids is None else out.masked_fill((ids == 0).unsqueeze(-1), float("nan"))


class MixedRows(Good):
    def forward(self, x, positions, ids=None, cache=None):
        return super().forward(x, positions, ids, cache) + 0.1 * x.flip(0)


class PositionsFromZero(Good):
    def forward(self, x, positions, ids=None, cache=None):
        return super().forward(x, torch.zeros_like(positions) if cache else positions, ids, cache)


class Forgetful(PositionCache):
    def rewind(self, row, length):
        super().rewind(row, length)
        self.rows[row].first(length).zero_()


class NoRewind(PositionCache):
    def rewind(self, row, length):
        """Nothing."""


class Doubled(PositionCache):
    copies = ()

    def append(self, new):
        super().append(new)
        self.copies = [row.held.clone() for row in self.rows.values()]


class WholeLength(PositionCache):
    """Room for the longest text from the beginning."""

    def append(self, new):
        for row in self.rows.values():
            row.reserve(4096)
        super().append(new)


class CopiesRows(PositionCache):
    def select(self, rows):
        return copy.deepcopy(super().select(rows))


class SharesCopies(PositionCache):
    def copy(self, source, row, length):
        self.rows[row] = self.rows[source]


class EndsTogether(PositionCache):
    """Reads shorter rows with zeros before them."""

    def read(self):
        together, longest = super().read(), max(self.lengths.values())
        return torch.stack([x.roll(longest - n, -2) for x, n in zip(together, self.lengths.values(), strict=True)])


def with_cache(cache):
    class Attention(Good):
        def new_cache(self, rows=()):
            shape = (2, self.n_kv_heads, self.head_dim)
            return cache(*shape, dtype=self.cache_dtype, device=torch.device("cpu"), rows=rows)

    return Attention


class Counting(Good):
    calls = 0

    def forward(self, x, positions, ids=None, cache=None):
        self.calls += 1
        return super().forward(x, positions, ids, cache) * (1 + self.calls % 2)


class Frozen(Good):
    def __init__(self, *, precision):
        super().__init__(precision=precision)
        self.k_proj.weight.requires_grad_(False)


class NoFlops(Good):
    def flops_per_token(self, context):
        return context


class Joins(Good):
    def __init__(self, *, precision, name, rows):
        super().__init__(precision=precision)
        self.joined = {name: rows}


class OwnLinear(Good):
    def __init__(self, *, precision):
        class Own:
            activation_dtype = precision.activation_dtype

            def linear(self, i, o, role):
                return torch.nn.Linear(i, o, bias=False)

        super().__init__(precision=Own())


@pytest.mark.parametrize(
    ("attention", "words"),
    [
        (OwnLinear, "must be made by `precision.linear"),
        (Upcast, "like the input"),
        (Noncausal, "must be causal"),
        (Blind, "must see the first one"),
        (MixedRows, "other rows of the batch"),
        (Unmasked, "its own document only"),
        (PaddingIsNaN, "padding"),
        (PositionsFromZero, "over a cache in chunks"),
        (with_cache(Forgetful), r"after rewind\(row, 4\) must be forgotten"),
        (with_cache(NoRewind), r"must be 4 after rewind"),
        (with_cache(EndsTogether), "must give among others"),
        (with_cache(CopiesRows), "its own positions and the new ones|must give among others"),
        (with_cache(SharesCopies), "copy, add and drop"),
        (with_cache(Doubled), "numbers for a row"),
        (with_cache(WholeLength), "at most 64 more may be held"),
        (Counting, "must be causal|same output again"),
        (Frozen, "k_proj.weight must get a gradient"),
        (NoFlops, "counts the projections"),
        (partial(Joins, name="qkv_proj.weight", rows=(8, 8)), "names 'qkv_proj.weight'; Joins has q_proj.weight, "),
        (partial(Joins, name="q_proj.weight", rows=(31, 2)), "the pattern must fill its last dimension but one"),
    ],
)
def test_faulty_attentions_are_found(attention, words):
    with pytest.raises(AssertionError, match=words):
        check_attention(attention, dim=32)


def test_shared_parameters_are_found():
    weight = Good(precision=Plain(torch.float32)).q_proj.weight

    def factory(*, precision):
        attention = Good(precision=precision)
        attention.q_proj.weight = weight
        return attention

    with pytest.raises(AssertionError, match="an attention of its own"):
        check_attention(factory, dim=32)


@pytest.mark.parametrize(
    ("changes", "words"), [({"n_kv_heads": 3}, "n_kv_heads=3: must divide"), ({"head_dim": 7}, "head_dim=7")]
)
def test_impossible_shapes(changes, words):
    with pytest.raises(ValueError, match=words):
        partial(GroupedQueryAttention, **(SIZES | changes))(precision=Plain(torch.float32))
