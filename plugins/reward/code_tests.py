"""Programs that pass the row's `tests`, run in the sandbox."""

from collections.abc import Sequence
from functools import cached_property

from dsv3.bounds import PositiveInt
from dsv3.contracts import Answer
from dsv3.sandbox import Limits, Program, Sandbox
from dsv3.verifiers import program
from plugins.reward.base import Judge, field


class CodeTests(Judge):
    """1 where the program passes every test. As many programs run at once as there are cores.

    The program is the code between fences of backticks, or the whole text; the row's `code`, which the prompt began,
    comes before it. The row has `tests`, assertions about names of the program; with `entry_point`, they define
    `check(candidate)` as HumanEval's do. `setup` runs before the tests.

    seconds: processor time of a program, its tests included.
    """

    reads = ("tests",)

    def __init__(self, *, seconds: PositiveInt) -> None:
        self.limits = Limits(seconds=seconds)

    @cached_property
    def sandbox(self) -> Sandbox:
        sandbox = Sandbox(self.limits)
        if not sandbox.usable:
            raise RuntimeError(f"reward code_tests: {sandbox.refusal}")
        return sandbox

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        written = [program(answer.text) for answer in answers]
        programs = [_program(answer, code) for answer, code in zip(answers, written, strict=True) if code]
        verdicts = iter(self.sandbox.run(programs) if programs else [])
        return [float(next(verdicts).passed) if code else 0.0 for code in written]


def _program(answer: Answer, code: str) -> Program:
    item = answer.item
    return Program(
        code=item.get("code", "") + code,
        test=field(answer, "tests"),
        setup=item.get("setup", ""),
        entry_point=item.get("entry_point", ""),
    )
