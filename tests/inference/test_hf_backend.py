"""Models of transformers behind the engine: their own greedy text, whatever stands beside a row."""

import random

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dsv3.inference.engine import PREFILL, Engine, complete
from dsv3.inference.hf_backend import HFBackend
from dsv3.inference.sampling import Settings

SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def windowed():
    """Layers that forget what lies more than eight positions back."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8)).eval()


def prompts_of(count, longest):
    draw = random.Random(0)
    return [[draw.randrange(60) for _ in range(draw.randint(1, longest))] for _ in range(count)]


def theirs(model, prompt, tokens):
    ids_1T = torch.tensor([prompt])
    mask_1T = torch.ones_like(ids_1T)  # else token 0 is taken for padding
    found = model.generate(ids_1T, attention_mask=mask_1T, max_new_tokens=tokens, do_sample=False)
    return found[0, len(prompt) :].tolist()


@pytest.mark.parametrize("made", [llama, windowed])
def test_rows_of_unequal_length_write_what_transformers_writes(made):
    model = made()
    prompts = [*prompts_of(9, 40), *prompts_of(2, PREFILL + 60)]
    settings = [Settings(max_tokens=3 + i) for i in range(len(prompts))]
    backend = HFBackend(model)
    found = complete(backend, prompts, settings, decode=str, at_once=4)
    for prompt, one, completion in zip(prompts, settings, found, strict=True):
        assert completion.ids == theirs(model, prompt, one.max_tokens)
    assert not backend.held


@torch.no_grad()
def test_rewound_and_copied_rows_read_on_as_if_nothing_had_been():
    model, (first, second) = llama(), prompts_of(2, 30)
    second = [*first, *second]
    backend = HFBackend(model)
    for row in range(2):
        backend.add(row, drafts=False)
    backend.read([0, 1], [first, second], [0, 0])
    backend.rewind(0, 1)
    backend.add(2, drafts=False)
    backend.copy(1, 2, len(first))
    found = backend.read([2, 0], [[5, 6], [*first[1:], 5]], [2, 1])
    whole = model(torch.tensor([[*first, 5, 6]])).logits[0]
    torch.testing.assert_close(found[0], whole[-2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1], whole[-2:-1], atol=1e-4, rtol=1e-4)


def test_nothing_is_drafted():
    with pytest.raises(ValueError, match="needs MTP modules"):
        Engine(HFBackend(llama())).add([1], Settings(max_tokens=1, drafts=1))
