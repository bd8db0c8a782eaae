"""Each of the 17 traps that implementations of this model have fallen into has a test: `pytest -k trap_NN` runs it.

01 the routing bias is saved, and updated in place        10 masked groups are -inf, never 0
02 the MTP block's router is balanced too                 11 MTP's denominator, and document boundaries
03 evaluation is no load                                  12 YaRN's softmax factor is off at the first length
04 recomputation counts once                              13 the bias works at any width
05 one update per optimiser step, over all ranks          14 tokens are the loggers' axis, across a resume
06 bias and counts are never cast                         15 formats are chosen by role, masters are FP32
07 padding is no load                                     16 recomputed routing is the same at ties
08 the auxiliary loss's gradient arrives                  17 `evaluate.py` hides no package
09 training settings never come from a Hugging Face config
"""

import re

from tests.conftest import ROOT


def test_every_trap_has_a_test() -> None:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {int(number) for number in re.findall(r"^def test_trap_(\d\d)_", path.read_text(), re.MULTILINE)}
    assert found == set(range(1, 18))
