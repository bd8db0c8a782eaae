"""Tuning of each arm by successive halving (`study.tune`): one learning rate for all arms favours the baseline.

Every combination of the values is a candidate. Of C candidates, all train first, then the better half, and so on until
one is left, each time on twice the tokens and with another seed; the last time on a quarter of the study's. Such short
runs are whole runs: schedules end where they end. Their seeds, from FIRST_SEED on, are never those of a study, so that
no candidate is chosen for the luck of a seed that it is judged by.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, write_text_atomically
from dsv3.config.arms import expanded
from dsv3.reporting.history import find_runs
from dsv3.reporting.study_results import Study, study_of
from dsv3.strict_json import read_json, text_of
from dsv3.study.matching import Compose, with_overrides

FILE = "tuning.json"
FIRST_SEED = 1_000_000
LAST_SHARE = 4  # of the study's tokens, the last candidates' run is one part in so many
BEST = "{}_best"
TRIAL = "{}_trial{}"

Values = Mapping[str, Any]
"""Key -> value."""


class Trial(NamedTuple):
    """A short run. `bpb` None: it failed."""

    values: Values
    seed: int
    tokens: int
    bpb: float | None


class Tuned(NamedTuple):
    """An arm's own values of the keys, those that were best, and the runs that said so."""

    arm: str
    own: Values
    best: Values
    trials: list[Trial]

    @property
    def tokens(self) -> int:
        return sum(trial.tokens for trial in self.trials)

    @property
    def changed(self) -> bool:
        return self.best != self.own


def candidates(tune: Mapping[str, Sequence[Any]]) -> list[Values]:
    """Every combination of the values."""
    return [dict(zip(tune, values, strict=True)) for values in itertools.product(*tune.values())]


class Search:
    """Successive halving of all arms of a study together, rung by rung."""

    def __init__(self, study: Mapping[str, Any], job: Sequence[str], compose: Compose) -> None:
        self.study, self.job, self.compose = study, list(job), compose
        self.candidates = candidates(study["tune"])
        names = study["only"] or list(study["arms"])
        self.left = {name: list(range(len(self.candidates))) for name in names}
        self.trials: dict[str, list[Trial]] = {name: [] for name in names}

    def rungs(self) -> Iterator[list[list[str]]]:
        """The runs of a rung, all of which must have ended before the next is asked for."""
        rungs = math.ceil(math.log2(len(self.candidates)))
        for rung in range(rungs):
            runs = {
                (name, number): self._run(name, number, FIRST_SEED + rung, LAST_SHARE * 2 ** (rungs - 1 - rung))
                for name, numbers in self.left.items()
                for number in numbers
            }
            yield list(runs.values())
            scores = {key: self._score(*key, run) for key, run in runs.items()}
            for name, numbers in self.left.items():
                ordered = sorted((scores[name, number], number) for number in numbers)
                self.left[name] = [number for _, number in ordered[: math.ceil(len(numbers) / 2)]]

    def _run(self, name: str, number: int, seed: int, share: int) -> list[str]:
        arm = with_overrides(self.study["arms"][name], self.candidates[number])
        tokens = max(1, self.compose([*arm, *self._others()]).run.tokens // share)
        given = [*self._others(), f"run.tokens={tokens}", "study.tuned=trial"]
        alone = {"arms": {TRIAL.format(name, number): arm}, "only": None, "seeds": [seed]}
        (((run,),)) = expanded(given, alone)
        return run

    def _others(self) -> list[str]:
        """The command's overrides but its seed."""
        return [override for override in self.job if not override.startswith("seed=")]

    def _score(self, name: str, number: int, run: list[str]) -> float:
        config = self.compose(run)
        summary = RunFolder(config.run.dir).summary()
        bpb = summary["validation"]["after"]["all"]["bpb"] if summary else None
        self.trials[name].append(Trial(self.candidates[number], config.seed, config.run.tokens, bpb))
        return math.inf if bpb is None or math.isnan(bpb) else bpb

    def result(self) -> list[Tuned]:
        """After all rungs."""
        return [self._tuned(name) for name in self.left]

    def _tuned(self, name: str) -> Tuned:
        config = self.compose([*self.study["arms"][name], *self._others()])
        own = {key: OmegaConf.select(config, key) for key in self.study["tune"]}
        trials = self.trials[name]
        works = any(trial.bpb is not None for trial in trials)
        return Tuned(name, own, self.candidates[self.left[name][0]] if works else own, trials)


def tuned_arms(study: Mapping[str, Any], tuned: Sequence[Tuned]) -> dict[str, Any]:
    """Arms to train besides the study's own: those whose best values are not their own."""
    arms = study["arms"]
    return {BEST.format(arm.arm): with_overrides(arms[arm.arm], arm.best) for arm in tuned if arm.changed}


def write_tuning(folder: Path, tuned: Sequence[Tuned]) -> None:
    content = [arm._asdict() | {"trials": [trial._asdict() for trial in arm.trials]} for arm in tuned]
    write_text_atomically(folder / FILE, text_of(content) + "\n")


def read_tuning(folder: Path) -> list[Tuned]:
    """What `write_tuning` wrote into the study's folder; [] where nothing was tuned."""
    path = folder / FILE
    kept = read_json(path) if path.exists() else []
    return [Tuned(**{**arm, "trials": [Trial(**trial) for trial in arm["trials"]]}) for arm in kept]


def tuned_study(study: Study) -> Study | None:
    """The same study with each arm at its best values; None where none has others than its own.

    An arm whose own values were best has the runs of the study; one whose best values have no finished run is left out.
    """
    tuned = read_tuning(study.folder)
    if not any(arm.changed for arm in tuned):
        return None
    try:
        best = study_of(study.folder, find_runs(study.folder), tuned="best").runs
    except LookupError:
        return None
    changed = {arm.arm for arm in tuned if arm.changed}
    runs = {arm: best.get(BEST.format(arm), {}) if arm in changed else own for arm, own in study.runs.items()}
    runs = {arm: seeds for arm, seeds in runs.items() if seeds}
    return study._replace(runs=runs) if study.baseline in runs else None
