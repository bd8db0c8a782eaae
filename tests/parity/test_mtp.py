"""MTP inference against transformers' `generate(use_mtp=True)`, which runs the layer only if its index is 61.

Every draft that transformers makes is kept with the tokens it was made from; our module, with the same weights by
way of our export, must give the same logits and the same tokens.
"""

import pytest
import torch
from transformers.modeling_layers import MtpModel

from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.inference.speculation import Speculation
from tests.parity.twins import configured, distance, load_twin, micro_batch, random_model, write_twin

PROMPT, NEW = 9, 7


@pytest.fixture(scope="module")
def twins(tmp_path_factory):
    config = configured(
        "router.group_score_top=2",
        vocab_size=50,
        dim=32,
        n_layers=61,
        n_dense_layers=60,
        inter_dim=24,
        moe_inter_dim=8,
        n_routed_experts=8,
        top_k=2,
        n_heads=2,
        q_lora_rank=None,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
    )
    ours = random_model(config, seed=3)
    folder = tmp_path_factory.mktemp("twin")
    write_twin(config, ours, folder, mtp=True)
    theirs = load_twin(folder, unexpected=False)
    return ours, theirs


@pytest.fixture(scope="module")
def drafts(twins):
    """(ids so far, drafted token, its logits) of every draft in one generation."""
    _, theirs = twins
    made = []
    original = MtpModel.forward

    def recorded(self, *args, full_input_ids, **kwargs):
        result = original(self, *args, full_input_ids=full_input_ids, **kwargs)
        made.append((full_input_ids.clone(), result[0], result[1]))
        return result

    prompt = torch.randint(50, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    MtpModel.forward = recorded
    try:
        theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, use_mtp=True)
    finally:
        MtpModel.forward = original
    return made


@torch.no_grad()
def test_drafts_equal_transformers(twins, drafts):
    ours, _ = twins
    assert len(drafts) >= 4
    for ids, token, logits in drafts:
        hidden_BSD = ours(micro_batch(ids, ids), with_mtp=True).predictions[0].hidden_BSD
        drafted = ours.lm_head(hidden_BSD[:, -1])
        assert distance(drafted, logits[:, 0]) <= 1e-5
        assert drafted.argmax(-1).tolist() == token[:, 0].tolist()


@torch.no_grad()
def test_cached_module_equals_uncached(twins):
    """Drafting token by token over a cache of the module's block."""
    ours, _ = twins
    module = ours.mtp.depths[0]
    ids = torch.randint(50, (2, 12), generator=torch.Generator().manual_seed(1))
    output = ours(micro_batch(ids, ids), with_mtp=True)
    expected = output.predictions[0].hidden_BSD
    cache = module.block.self_attn.new_cache(range(2))
    start = 0
    for length in (5, 1, 3, 2):
        part = slice(start, start + length)
        tokens = ids[:, 1:][:, part]
        positions = torch.arange(part.start, part.stop).expand(2, -1)
        h, _ = module(output.hidden_BTD[:, part], ours.embed(tokens), tokens, positions, None, cache)
        assert distance(module.norm(h), expected[:, part]) <= 1e-5
        start += length


def test_speculative_text_equals_transformers(twins):
    """With one draft a pass, as there, and with more."""
    ours, theirs = twins
    prompt = torch.randint(50, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    expected = theirs.generate(prompt, max_new_tokens=NEW, do_sample=False, use_mtp=True)[0, PROMPT:].tolist()
    for drafts in (1, 3):
        speculation = Speculation()
        found = generate(ours, prompt[0].tolist(), Settings(max_tokens=NEW, drafts=drafts), speculation=speculation)
        assert list(found) == expected
        assert speculation.made > 0


def test_the_oracle_sees_the_module(twins, drafts):
    """The comparison can fail: without its projection the module drafts otherwise."""
    ours, _ = twins
    ids, _, logits = drafts[0]
    weight = ours.mtp.depths[0].eh_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(weight.roll(weight.shape[1] // 2, dims=1))  # [hidden ; embedding] in place of [embedding ; hidden]
        drafted = ours.lm_head(ours(micro_batch(ids, ids), with_mtp=True).predictions[0].hidden_BSD[:, -1])
        weight.copy_(kept)
    assert distance(drafted, logits[:, 0]) > 0.1
