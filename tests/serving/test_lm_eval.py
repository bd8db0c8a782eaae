"""lm-eval's `local-completions` on the server scores as our own adapter does in process."""

from typing import Any

import pytest
from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from dsv3.evaluation.benchmarks.adapter import Adapter
from tests.serving.running import Running

PAIRS = [
    ("def f(x):\n    return", " x + 1\n"),
    ("def f(x):\n    return", " x + 2\n"),
    ("It was a bright cold day", " in April."),
    ("", "It was a bright cold day in April. " * 3),
]


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(kind, {}, given, i, ("task", i, 1)) for i, given in enumerate(arguments)]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def remote(server: Running, tmp_path_factory: pytest.TempPathFactory) -> Any:
    tokenizer = server.service.models[server.model].grammars.tokenizer.parent
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", server.keys["ada"])
        yield LocalCompletionsAPI(
            base_url=f"{server.url}/v1/completions",
            model=server.model,
            tokenizer=str(tokenizer),
            add_bos_token=True,
            max_length=256,
        )


def test_log_likelihoods(server: Running, remote: Any) -> None:
    own = Adapter(server.scored(), batch_size=4, seed=0).loglikelihood(requests("loglikelihood", PAIRS))
    found = remote.loglikelihood(requests("loglikelihood", PAIRS))
    assert [is_greedy for _, is_greedy in found] == [is_greedy for _, is_greedy in own]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in own], abs=1e-3)


def test_texts(server: Running, remote: Any) -> None:
    arguments = [(context or "x", {"until": ["\n\n"], "max_gen_toks": 8}) for context, _ in PAIRS]
    own = Adapter(server.scored(), batch_size=4, seed=0).generate_until(requests("generate_until", arguments))
    assert remote.generate_until(requests("generate_until", arguments)) == own
