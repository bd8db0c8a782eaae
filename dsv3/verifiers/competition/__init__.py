"""Competition mathematics: templates of problems whose answer is a whole number from 0 to 999.

    template.py       a template, the split of its parameters, drawing problems
    number_theory.py  combinatorics.py  algebra.py  geometry.py: the templates, by field

A template's parameters are split between training and test by a hash of the problem's text, so that what is trained on
never occurs in the test, whatever is drawn.
"""

from dsv3.verifiers.competition import algebra, combinatorics, geometry, number_theory
from dsv3.verifiers.competition.template import LEVELS, Problem, Split, Template, drawn, split_of

TEMPLATES: tuple[Template, ...] = (
    *number_theory.TEMPLATES,
    *combinatorics.TEMPLATES,
    *algebra.TEMPLATES,
    *geometry.TEMPLATES,
)

__all__ = ["LEVELS", "TEMPLATES", "Problem", "Split", "Template", "drawn", "split_of"]
