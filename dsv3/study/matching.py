"""Arms of equal budgets: a size of each arm (`study.match.by`) is solved so that a quantity equals the baseline's.

Quantities follow from a configuration by arithmetic (`dsv3.planning`), with no weights; seconds per step are measured.
MTP modules are counted in none but FLOPs and seconds, as they are in the report's sizes. A size is admissible where the
preflight's relations hold and the model can be built: heads divide, RoPE is even, a kernel's multiples are kept.
"""

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.config.arms import stages_of
from dsv3.config.declared import Match
from dsv3.config.relations import check_relations
from dsv3.config.view import View
from dsv3.planning.flops import training_flops
from dsv3.planning.kv_cache import cache_bytes
from dsv3.planning.sizes import parameters
from dsv3.planning.skeleton import read_skeleton
from dsv3.strict_json import read_json, text_of
from dsv3.study.step_time import step_seconds

FILE = "matching.json"
LARGEST = 2**20  # of a size
LOOKED_AT = 64  # neighbours of a size that is not admissible
BYTES_OF_BF16 = 2

Compose = Callable[[list[str]], DictConfig]
"""Overrides -> config, with the node `hydra`."""


class Matched(NamedTuple):
    """One arm's size. `value` None: the arm is the baseline, which keeps its own."""

    arm: str
    value: int | None
    reached: float

    def error(self, target: float) -> float:
        """Relative."""
        return self.reached / target - 1


class Matching(NamedTuple):
    quantity: str
    by: str
    tolerance: float
    target: float
    arms: list[Matched]

    def lines(self) -> list[str]:
        """What was solved, an arm a line."""
        sizes = {arm.arm: "as it is" if arm.value is None else f"{self.by}={arm.value}" for arm in self.arms}
        return [
            f"{arm.arm}: {sizes[arm.arm]}, {self.quantity} {arm.reached:,.6g} ({arm.error(self.target):+.2%})"
            for arm in self.arms
        ]


def quantity_of(config: DictConfig, quantity: str) -> float:
    """What a run of this config would have of a quantity that arms are matched by.

    Raises:
        ValueError: the config describes no model.
    """
    if quantity == "step_seconds":
        return step_seconds(config)
    skeleton = read_skeleton(config)
    if quantity == "flops_per_token":
        return training_flops(skeleton, config.data.sequence_length)["total"]
    if quantity == "cache_bytes":
        return cache_bytes(skeleton.attention, skeleton.layers, BYTES_OF_BF16)["bytes"]
    count = parameters(skeleton)["model"]
    return count.active if quantity == "active_parameters" else count.total


def matched(
    study: Mapping[str, Any], job: Sequence[str], compose: Compose, folder: Path
) -> tuple[dict[str, Any], Matching]:
    """The study with the solved size as the last override of each arm, and what was solved.

    `matching.json` in the study's folder keeps that, and is read again where it is of the same arms: a measured
    quantity would not come out equal.

    Raises:
        ValueError: an arm does not reach the tolerance; the message names the nearest that it does reach.
    """
    match = Match(**study["match"])
    key = hashlib.sha256(json.dumps([study["arms"], study["baseline"], study["match"], *job]).encode()).hexdigest()
    path = folder / FILE
    kept = read_json(path) if path.exists() else {}
    found = read_matching(folder) if kept.get("key") == key else None
    if found is None:
        found = solved_arms(study, match, job, compose)
        text = text_of({"key": key, **found._asdict(), "arms": [arm._asdict() for arm in found.arms]}) + "\n"
        write_text_atomically(path, text)
    values = {arm.arm: arm.value for arm in found.arms if arm.value is not None}
    arms = {name: with_overrides(arm, {match.by: values.get(name)}) for name, arm in study["arms"].items()}
    return {**study, "arms": arms}, found


def with_overrides(arm: Sequence[Any], values: Mapping[str, Any]) -> list[Any]:
    """An arm, all of whose stages set these keys last; those that are None are left out."""
    added = [f"{key}={value}" for key, value in values.items() if value is not None]
    stages = [[*stage, *added] for stage in stages_of(arm)]
    return stages if len(stages) > 1 else stages[0]


def read_matching(folder: Path) -> Matching | None:
    """What `matched` wrote into the study's folder; None: nothing was matched."""
    path = folder / FILE
    if not path.exists():
        return None
    kept = read_json(path)
    arms = [Matched(arm["arm"], arm["value"], arm["reached"]) for arm in kept["arms"]]
    return Matching(kept["quantity"], kept["by"], kept["tolerance"], kept["target"], arms)


def solved_arms(study: Mapping[str, Any], match: Match, job: Sequence[str], compose: Compose) -> Matching:
    """See `matched`."""
    configs = {name: compose([*stages_of(arm)[-1], *job]) for name, arm in study["arms"].items()}
    baseline = study["baseline"] or next(iter(configs))
    target = quantity_of(configs[baseline], match.quantity)
    if not target:
        raise ValueError(f"study.match.quantity={match.quantity}: the baseline {baseline} has none to be matched")
    arms = []
    for name, config in configs.items():
        solved = Matched(name, None, target) if name == baseline else solve(name, config, match, target)
        error = solved.error(target)
        if abs(error) > match.tolerance and match.unreachable == "refuse":
            raise ValueError(
                f"study.match.tolerance={match.tolerance:g}: {name} comes no nearer to {match.quantity}={target:,.6g} "
                f"of {baseline} than {solved.reached:,.6g} ({error:+.2%}), with {match.by}={solved.value}; allow it by "
                "study.match.unreachable=nearest, or choose another size by which to match"
            )
        arms.append(solved)
    return Matching(match.quantity, match.by, match.tolerance, target, arms)


def solve(arm: str, config: DictConfig, match: Match, target: float) -> Matched:
    """The admissible size with which the arm is nearest to the target, for a quantity that the size does not lower.

    Raises:
        ValueError: the quantity does not depend on the size.
    """
    config = copy.deepcopy(config)
    known: dict[int, float | None] = {}

    def at(size: int) -> float | None:
        """The quantity, None where the size is not admissible."""
        if size not in known:
            known[size] = _quantity_with(config, match, size)
        return known[size]

    def nearest(size: int, low: int, high: int) -> int | None:
        """The admissible size nearest to `size`, from `low` to `high`."""
        near = (size + sign * step for step in range(LOOKED_AT) for sign in (1, -1))
        return next((place for place in near if low <= place <= high and at(place) is not None), None)

    start = int(OmegaConf.select(config, match.by))
    nearest(2 * start, start + 1, LARGEST)  # of an arm that is matched already the quantity may depend on it, too
    low = high = nearest(start, 1, LARGEST) or start
    while high < LARGEST and (at(high) or 0) < target and (up := nearest(2 * high, high + 1, LARGEST)):
        low, high = high, up
    while low > 1 and (at(low) or 0) > target and (down := nearest(low // 2, 1, low - 1)):
        low, high = down, low
    for turn in itertools.count():  # quantities are nearly straight lines: a chord and a bisection in turns
        chord = (target - (at(low) or 0)) / max((at(high) or 0) - (at(low) or 0), 1e-9)
        guess = low + round((high - low) * (0.5 if turn % 2 else min(max(chord, 0), 1)))
        middle = nearest(min(max(guess, low + 1), high - 1), low + 1, high - 1)
        if middle is None:
            break
        low, high = (middle, high) if (at(middle) or 0) <= target else (low, middle)
    values = {size: value for size, value in known.items() if value is not None}
    if len(set(values.values())) < 2:
        raise ValueError(f"study.match.by={match.by}: {match.quantity} of {arm} does not depend on it")
    best = min(values, key=lambda size: (abs(values[size] - target), size))
    return Matched(arm, best, values[best])


def _quantity_with(config: DictConfig, match: Match, size: int) -> float | None:
    OmegaConf.update(config, match.by, size)
    if check_relations(View(config), skip=()):
        return None
    try:
        return quantity_of(config, match.quantity)
    except ValueError:
        return None
