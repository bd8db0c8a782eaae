"""Code tasks: lm-eval's way to the sandbox.

A task of ours builds `Program`s' fields in a filter and passes them on to the filter `run_in_sandbox`:

    filter_list:
      - name: sandbox
        filter:
          - {function: custom, filter_fn: !function utils.programs}   # responses, documents -> dictionaries
          - {function: run_in_sandbox}                                # -> dictionaries: passed, detail, seconds

lm-eval's own HumanEval, HumanEval-infilling and MBPP call `evaluate.load("code_eval")`, which would fetch a script and
run programs unguarded; while tasks are loaded that name gives `CodeEval`, which asks the sandbox.
"""

import contextlib
import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from importlib.metadata import distribution
from importlib.util import module_from_spec
from types import ModuleType
from typing import Any

from lm_eval.api.filter import Filter
from lm_eval.api.registry import register_filter

from dsv3.evaluation.benchmarks.statistics import pass_at_k
from dsv3.sandbox import Program, Sandbox

_sandbox: Sandbox | None = None


@contextlib.contextmanager
def sandbox_in_use(sandbox: Sandbox) -> Iterator[None]:
    """Programs of tasks run in `sandbox` within this context."""
    global _sandbox
    before, _sandbox = _sandbox, sandbox
    try:
        yield
    finally:
        _sandbox = before


def run_nested(programs: Sequence[Sequence[Program]]) -> list[list[dict[str, Any]]]:
    """Verdicts as dictionaries, in the same nesting."""
    assert _sandbox is not None, "programs run within `sandbox_in_use` only"
    verdicts = iter(_sandbox.run(list(itertools.chain.from_iterable(programs))))
    return [[next(verdicts)._asdict() for _ in group] for group in programs]


@register_filter("run_in_sandbox")
class RunInSandbox(Filter):
    """Turns each response, the fields of a `Program`, into its verdict, with the code beside it."""

    def apply(self, resps: Any, docs: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
        verdicts = run_nested([[Program(**fields) for fields in group] for group in resps])
        return [
            [v | {"code": f["code"]} for v, f in zip(*pair, strict=True)] for pair in zip(verdicts, resps, strict=True)
        ]


class CodeEval:
    """Stands in for Hugging Face's metric `code_eval`."""

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], list[list[dict[str, Any]]]]:
        """pass@k over the problems, and the verdicts. Without a sandbox in use (a task being loaded) nothing runs."""
        if _sandbox is None:
            return {}, []
        pairs = zip(predictions, references, strict=True)
        verdicts = run_nested([[program_of(code, test) for code in group] for group, test in pairs])
        passed = [[v["passed"] for v in group] for group in verdicts]
        means = {n: sum(pass_at_k(len(g), sum(g), n) for g in passed) / len(passed) for n in k}
        return {f"pass@{n}": mean for n, mean in means.items()}, verdicts


def program_of(code: str, reference: str) -> Program:
    """lm-eval's references are a test; HumanEval's ends in `check(entry_point)`."""
    test, _, last = reference.rstrip().rpartition("\n")
    call = re.fullmatch(r"check\((\w+)\)", last.strip())
    return Program(code, test, entry_point=call[1]) if call else Program(code, reference)


class _Evaluate(ModuleType):
    """Stands in for Hugging Face's package `evaluate`; all but `code_eval` is the package's own."""

    def load(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return CodeEval() if path == "code_eval" else self._package().load(path, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._package(), name)

    def _package(self) -> ModuleType:
        """Imported from where it is installed: a script called evaluate.py may hide it."""
        folder = str(distribution("evaluate").locate_file(""))
        spec = PathFinder.find_spec("evaluate", [folder])
        assert spec is not None
        assert spec.loader is not None
        package = sys.modules["evaluate"] = module_from_spec(spec)
        spec.loader.exec_module(package)
        return package


@contextlib.contextmanager
def code_eval_replaced() -> Iterator[None]:
    """`import evaluate` gives a module whose `load("code_eval")` is a `CodeEval`, within this context."""
    before = sys.modules.get("evaluate")
    sys.modules["evaluate"] = _Evaluate("evaluate")
    try:
        yield
    finally:
        del sys.modules["evaluate"]
        if before is not None:
            sys.modules["evaluate"] = before


def runs_code(task: Any) -> bool:
    return bool(getattr(task, "UNSAFE_CODE", False))


def is_sandboxed(task: Any) -> bool:
    """Whether all programs of the task go through the sandbox."""
    filters = [step["function"] for chain in task.config.filter_list or [] for step in chain["filter"]]
    metrics = [metric["metric"] for metric in task.config.metric_list or []]
    stands_in = any(
        isinstance(value, CodeEval) for metric in metrics for value in getattr(metric, "__globals__", {}).values()
    )
    return "run_in_sandbox" in filters or stands_in
