"""Verifiers of answers, for benchmarks, rewards and data.

    verification.py            what is called: an answer goes in, a score between 0 and 1 comes out
    extraction.py              final answers and programs, found in a text
    competition/               templates of competition problems with whole-number answers
    grammar.py                 the expressions in an answer that may be evaluated
    reasoning_gym_service.py   reasoning-gym's own verifiers, run in a jail
    math_service.py            math-verify, run in a jail
    task_service.py            lm-eval's scoring functions that parse mathematics, run in a jail

No answer is parsed in the calling process. The service that parses it has limits on memory and time; an answer that
breaks them scores 0, and the next gets a new service. Code in an answer is never executed, in a jail or without one:
what libraries would evaluate passes the grammar first.
"""

from dsv3.verifiers.extraction import boxed, boxed_integer, final_integer, program
from dsv3.verifiers.verification import Score, load_task_scoring, same_formula, same_value, score_task, verify

__all__ = [
    "Score",
    "boxed",
    "boxed_integer",
    "final_integer",
    "load_task_scoring",
    "program",
    "same_formula",
    "same_value",
    "score_task",
    "verify",
]
