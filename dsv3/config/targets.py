"""Checks every `_target_` of a config against the signature it names."""

from omegaconf import DictConfig

from dsv3.config.annotations import fits, literals, words
from dsv3.config.moved import answer, todays_value
from dsv3.config.problems import NO_VALUE, Problem, did_you_mean, one_of
from dsv3.config.signatures import Argument, Module, NotFoundError, Signature, is_library, signature
from dsv3.config.view import View, type_needed

_HYDRA = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_TRAINER = "lightning.pytorch.trainer.trainer.Trainer"
"""What the keys under `trainer` are passed to."""


def check_targets(view: View, reference_config: DictConfig) -> tuple[list[Problem], set[str]]:
    """Problems of names, arguments and types; and the keys whose type a signature has decided."""
    reference = View(reference_config)
    problems: dict[str, Problem] = {}
    governed: set[str] = set()
    for node, names in view.mappings.items():
        trainer = node == "trainer" and "_target_" not in names
        target = _TRAINER if trainer else view.leaves.get(f"{node}._target_")
        if not isinstance(target, str) or (is_library(target.partition(".")[0]) and not trainer):
            continue
        try:
            accepted = signature(target)
        except NotFoundError as error:
            problems[f"{node}._target_"] = Problem(f"{node}._target_", target, str(error))
            continue
        if not trainer:
            for problem in _check_names(view, node, target, names, accepted):
                problems.setdefault(problem.key, problem)
        for name in (name for name in names if name in accepted.arguments):
            key, argument = f"{node}.{name}", accepted.arguments[name]
            verdict = _verdict(view, key, argument, accepted.module)
            if verdict is not None:
                governed |= {key, view.origin(key)}
            if verdict is False:
                problem = _wrong_type(view, reference, key, target, argument, accepted.module)
                problems.setdefault(problem.key, problem)
    return list(problems.values()), governed


def _verdict(view: View, key: str, argument: Argument, module: Module) -> bool | None:
    value = view.value(key)
    return None if argument.annotation is None or value is NO_VALUE else fits(argument.annotation, value, module)


def _check_names(view: View, node: str, target: str, names: list[str], accepted: Signature) -> list[Problem]:
    given = [name for name in names if name not in _HYDRA]
    problems = []
    for name in given:
        if name not in accepted.arguments and not accepted.open:
            key = f"{node}.{name}"
            value = view.value(key)
            unknown = f"{target} takes no such argument.{did_you_mean(name, accepted.arguments)}"
            message = answer(key, value, [f"{node}.{argument}" for argument in accepted.arguments]) or unknown
            problems.append(Problem(key, value, message))
    if view.leaves.get(f"{node}._partial_") is not True and "_args_" not in names:
        for name, argument in accepted.arguments.items():
            if argument.required and name not in given:
                problems.append(Problem(f"{node}.{name}", NO_VALUE, f"{target} needs this argument"))
    return problems


def _wrong_type(view: View, reference: View, key: str, target: str, argument: Argument, module: Module) -> Problem:
    assert argument.annotation is not None
    value, origin = view.value(key), view.origin(key)
    if options := literals(argument.annotation, module):
        now = todays_value(key, value)
        renamed = f"this value is now called {now}: write {origin}={now}"
        return Problem(origin, value, renamed if now in options else one_of(options, value))
    default = reference.leaves.get(origin)
    where = f" ({key} of {target.rpartition('.')[2]})" if origin != key else ""
    return Problem(origin, value, type_needed(words(argument.annotation), value, default) + where)
