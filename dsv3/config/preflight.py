"""Reports every mistake in a configuration at once, before any work, and without a slow import.

Hydra stops at the first unknown key and composes wrong types silently. So the overrides are read before
`@hydra.main` runs:

    compose.py      composes as Hydra will
    overrides.py    each override is tried on top of those that fit; what does not fit is explained
    study_jobs.py   the runs of a study, each arm's overrides with them, and the folders that they write to
    study_metrics.py   what a study's verdict may be on
    view.py         the composed config as dotted keys; types of the defaults; names that an experiment file misspells
    targets.py      names, arguments and types behind every `_target_`
    signatures.py, annotations.py   which are read by `ast`
    relations.py    bounds between keys, such as top-k against the experts kept
    help_page.py    what `--help` prints, made from the same files

Problems are reported at the key that the user would change: where `attention.dim` is `${model.dim}`, at `model.dim`.
"""

import sys
from collections.abc import Sequence

from dsv3.config.compose import asks_for_help, hydra_flags, opened, shows_only
from dsv3.config.help_page import help_page
from dsv3.config.overrides import jobs_of, parsed, without_parts
from dsv3.config.problems import Problem, print_page, report, shown
from dsv3.config.relations import check_relations
from dsv3.config.study_jobs import arms_of, shared_folders
from dsv3.config.study_metrics import unknown_metric
from dsv3.config.targets import check_targets
from dsv3.config.view import View, check_defaults


def check(config_name: str, arguments: Sequence[str], *, also: Sequence[str] = ()) -> list[Problem]:
    """Return every problem in the configuration that these command-line arguments compose; none: an empty list.

    config_name: a file in conf/, without its ending. arguments: overrides and Hydra's flags, as in `sys.argv[1:]`.
    also: further keys that a misspelled one may have meant.
    """
    flags = hydra_flags(arguments)
    with opened(config_name, flags) as composer:
        overrides, problems = parsed(composer, flags.overrides)
        if config_name == "evaluate":
            overrides, refused = without_parts(composer, overrides)
            problems += refused
        jobs, unfit = jobs_of(composer, overrides, multirun=flags.multirun, also=also)
        problems += unfit
        runs, trained = [], []
        for job in jobs:
            fitting, misfits = arms_of(composer, job)
            runs += fitting
            trained += fitting[1:] or fitting
            problems += misfits
        if config_name == "train":
            problems += shared_folders(composer, trained, multirun=flags.multirun)
        for job in runs:
            config = composer.compose(job)
            view = View(config)
            problems += view.problems
            reference = View(composer.reference(job, config))
            found, governed = check_targets(view, reference, config_name)
            found += check_defaults(view, reference, governed)
            problems += found
            problems += check_relations(view, skip={problem.key for problem in found})
            problems += unknown_metric(config)
    first: dict[tuple[str, str], Problem] = {}
    for problem in problems:
        first.setdefault((problem.key, shown(problem.value)), problem)
    return list(first.values())


def check_or_exit(config_name: str, arguments: Sequence[str]) -> None:
    """Return if the configuration is sound; otherwise print all problems to stderr and exit with status 2.

    `--help` prints the page made from conf/ and exits; flags with which Hydra only shows something are left to it.
    """
    if asks_for_help(arguments):
        print_page(help_page(config_name, arguments))
        sys.exit(0)
    if shows_only(arguments):
        return
    problems = check(config_name, arguments)
    if problems:
        report(problems, hint=f"python {sys.argv[0]} --help lists every group, option and key.")
        sys.exit(2)
