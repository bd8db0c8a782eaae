"""vLLM writes what we write, from our export as it is. Needs `make vllm`."""

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dsv3.checkpoint.loading import load_run
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.serving.vllm_process import ENVIRONMENT
from tests.inference.test_engine import NEAR, between_the_best_two
from tests.serving.running import running

SHAPES = {"n_groups": 1, "topk_groups": 1, "qk_nope_head_dim": 48, "qk_rope_head_dim": 16, "v_head_dim": 64}
"""Its attention on a CPU has heads of 64 numbers, not of any size."""
PROMPTS, TOKENS = 32, 64


@pytest.mark.slow
@pytest.mark.skipif(not ENVIRONMENT.exists(), reason="make vllm sets it up")
def test_texts_are_ours(tmp_path: Path) -> None:
    draw = random.Random(0)
    prompts = [[draw.randrange(50) for _ in range(draw.randint(4, 40))] for _ in range(PROMPTS)]
    with running(
        tmp_path, engine="vllm", shapes=SHAPES, vllm=["--enforce-eager"], slots=PROMPTS, account_slots=PROMPTS
    ) as server:
        model = load_run(tmp_path / "one" / "seed1").model
        tokenizer = server.service.models[server.model].model.tokenizer
        with server.client() as client:

            def ask(prompt: list[int]) -> str:
                asked = {"model": server.model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
                text: str = client.post("/v1/completions", json=asked, timeout=600).json()["choices"][0]["text"]
                return text

            with ThreadPoolExecutor(PROMPTS) as pool:
                found = list(pool.map(ask, prompts))
    for prompt, text in zip(prompts, found, strict=True):
        ids = list(generate(model, prompt, Settings(max_tokens=TOKENS, eos=(tokenizer.eos,))))
        if text != tokenizer.decode(ids):
            near = (i for i in range(len(ids)) if between_the_best_two(model, [*prompt, *ids[:i]]) < NEAR)
            assert any(text.startswith(tokenizer.decode(ids[:i])) for i in near)
