"""Few-shot examples, as many as fit in the model's context.

A prompt that is too long loses whole examples from its beginning, never half of one, until it fits; only if it is too
long without any does the adapter cut tokens from its left.
"""

from collections.abc import Callable, Sequence
from typing import Any

from dsv3.evaluation.benchmarks.adapter import DEFAULT_TOKENS, Adapter
from dsv3.evaluation.benchmarks.remote import RemoteAdapter


class FittingShots:
    """Replaces a task's `fewshot_context`; counts the examples that were left."""

    def __init__(self, task: Any, adapter: Adapter | RemoteAdapter) -> None:
        self.task, self.adapter = task, adapter
        self.build: Callable[..., Any] = task.fewshot_context
        self.used: list[int] = []  # examples in each prompt

    def __call__(self, doc: dict[str, Any], num_fewshot: int, **settings: Any) -> Any:
        """The prompt (or one for each choice), as lm-eval builds it, with the last examples that fit."""
        sampler = getattr(self.task, "sampler", None)
        if not num_fewshot or sampler is None:
            self.used.append(0)
            return self.build(doc, num_fewshot=num_fewshot, **settings)
        split, test = self.task.fewshot_cfg.split, self.task.config.test_split
        drawn = list(sampler.sample(n=num_fewshot, eval_doc=doc if split == test else None))
        room = self.room(doc)
        try:
            for left in range(len(drawn), -1, -1):
                self.task.sampler = _Fixed(drawn[len(drawn) - left :])
                prompt = self.build(doc, num_fewshot=left, **settings)
                if not left or self.length(prompt) <= room:
                    self.used.append(left)
                    return prompt
        finally:
            self.task.sampler = sampler
        raise AssertionError("unreachable: no examples always end the loop")

    def room(self, doc: dict[str, Any]) -> int:
        """Tokens that a prompt may have beside what follows it: the generation, or the longest choice or answer."""
        if self.task.OUTPUT_TYPE == "generate_until":
            wanted = int((self.task.config.generation_kwargs or {}).get("max_gen_toks", DEFAULT_TOKENS))
            return self.adapter.max_length - min(wanted, self.adapter.max_length // 2)
        if self.task.config.doc_to_choice is not None:
            endings = self.task.doc_to_choice(doc)
        else:
            endings = [str(self.task.doc_to_target(doc))]
        return self.adapter.max_length - max(len(self.adapter.model.encode(text, bos=False)) for text in endings)

    def length(self, prompt: str | Sequence[str]) -> int:
        prompts = [prompt] if isinstance(prompt, str) else prompt
        return max(len(self.adapter.tok_encode(text)) for text in prompts)


class _Fixed:
    """A sampler of examples that are drawn already."""

    def __init__(self, examples: list[Any]) -> None:
        self.examples = examples

    def sample(self, **_: Any) -> list[Any]:
        return self.examples
