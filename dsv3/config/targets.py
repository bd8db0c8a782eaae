"""Checks every value against where it is declared: the signature behind its `_target_`, or `dsv3.config.declared`."""

from collections.abc import Iterator
from typing import NamedTuple

from dsv3.config import declared
from dsv3.config.annotations import arguments_of, fits, literals, out_of_range, words
from dsv3.config.moved import answer, todays_value
from dsv3.config.problems import NO_VALUE, Problem, did_you_mean, one_of
from dsv3.config.signatures import Argument, NotFoundError, Signature, is_library, signature
from dsv3.config.view import View, type_needed

_HYDRA = {"_target_", "_partial_", "_recursive_", "_convert_", "_args_"}
_OF_EXPERTS = ("router", "balancing", "experts", "dispatch")
"""Kinds of part that a model without experts has none of, so that their sizes may be 0."""


class _Node(NamedTuple):
    """A mapping of the config, and the signature that its keys are arguments of."""

    key: str  # "" is the top level
    names: list[str]
    target: str  # what the signature is of
    accepted: Signature
    closed: bool  # whether a name that the signature lacks is a mistake that no other check tells


def check_targets(view: View, reference: View, config_name: str) -> tuple[list[Problem], set[str]]:
    """Problems of names, arguments, types and ranges; and the keys whose type a signature has decided."""
    problems: dict[str, Problem] = {}
    governed: set[str] = set()
    for found in _nodes(view, config_name):
        if isinstance(found, Problem):
            problems[found.key] = found
            continue
        if found.closed:
            for problem in _check_names(view, found):
                problems.setdefault(problem.key, problem)
        for name in (name for name in found.names if name in found.accepted.arguments):
            key = f"{found.key}.{name}" if found.key else name
            verdict, mistake = _check_value(view, reference, key, found, found.accepted.arguments[name])
            if verdict is not None:
                governed |= {key, view.origin(key)}
            if mistake is not None:
                problems.setdefault(mistake.key, mistake)
    return list(problems.values()), governed


def _nodes(view: View, config_name: str) -> Iterator[_Node | Problem]:
    """Every mapping whose keys are declared somewhere; a Problem where a `_target_` is not to be found."""
    if config_name in declared.PRIMARY:
        yield _declared("", sorted({key.partition(".")[0] for key in view.keys}), declared.PRIMARY[config_name])
    for key, names in view.mappings.items():
        if name := declared.class_of(key):
            yield _declared(key, names, name)
        target = view.leaves.get(f"{key}._target_")
        if key == "trainer" and "_target_" not in names:
            accepted = signature(declared.TRAINER)
            yield _Node(key, names, "lightning.Trainer", _without(accepted, declared.TRAINER_IS_GIVEN), closed=True)
        elif isinstance(target, str) and not is_library(target.partition(".")[0]):
            try:
                node = _Node(key, names, target, signature(target), closed=True)
            except NotFoundError as error:
                yield Problem(f"{key}._target_", target, str(error))
                continue
            yield node
            yield from _nested(view, node)


def _declared(key: str, names: list[str], name: str) -> _Node:
    target = f"{declared.__name__}.{name}" if "." not in name else name
    return _Node(key, names, target, signature(target), closed="." in name)


def _without(accepted: Signature, names: dict[str, str]) -> Signature:
    left = {name: argument for name, argument in accepted.arguments.items() if name not in names}
    return Signature(accepted.module, left, accepted.open)


def _nested(view: View, node: _Node) -> Iterator[_Node]:
    """Mappings in a part's arguments that are themselves the arguments of a class."""
    for name in node.names:
        argument, key = node.accepted.arguments.get(name), f"{node.key}.{name}"
        if argument is None or argument.annotation is None:
            continue
        for place, kind in arguments_of(argument.annotation, view.value(key), node.accepted.module):
            target = f"{node.accepted.module.name}.{kind}"
            yield _Node(key + place, view.mappings[key + place], target, signature(target), closed=True)


def _check_value(
    view: View, reference: View, key: str, node: _Node, argument: Argument
) -> tuple[bool | None, Problem | None]:
    """Whether the value has the type that is declared (None: it cannot be told), and what is wrong with it."""
    value, module = view.value(key), node.accepted.module
    if argument.annotation is None or value is NO_VALUE or key not in view.keys or key in view.missing:
        return None, None
    verdict = fits(argument.annotation, value, module)
    origin = view.origin(key)
    where = f" ({key} of {node.target.rpartition('.')[2]})" if origin != key else ""
    if verdict is not False:
        unbuilt = node.key.partition(".")[0] in _OF_EXPERTS and view.leaves.get("model.n_routed_experts") == 0
        message = None if unbuilt else out_of_range(argument.annotation, value, module)
        return verdict, Problem(origin, value, message + where) if message else None
    if options := literals(argument.annotation, module):
        now = todays_value(key, value)
        renamed = f"this value is now called {now}: write {origin}={now}"
        return verdict, Problem(origin, value, renamed if now in options else one_of(options, value))
    needed = type_needed(words(argument.annotation, module), value, reference.leaves.get(origin))
    return verdict, Problem(origin, value, needed + where)


def _check_names(view: View, node: _Node) -> Iterator[Problem]:
    given = [name for name in node.names if name not in _HYDRA]
    accepted = node.accepted
    for name in given:
        key = f"{node.key}.{name}"
        if name not in accepted.arguments and not accepted.open:
            own = declared.TRAINER_IS_GIVEN.get(name) if node.key == "trainer" else None
            near = did_you_mean(name, accepted.arguments) or f" It takes {', '.join(accepted.arguments)}."
            renamed = answer(key, view.value(key), [f"{node.key}.{argument}" for argument in accepted.arguments])
            message = own or renamed or f"{node.target} takes no such argument.{near}"
            yield Problem(key, view.value(key), message)
    if "_args_" in node.names:
        return
    partial = view.leaves.get(f"{node.key}._partial_") is True
    kind, _, inner = node.key.partition(".")
    later = declared.GIVEN_BY_THE_CORE.get(kind) if partial else ()
    if kind == declared.SEVERAL:
        inner = inner.partition(".")[2]
    if later is None or (partial and inner):  # what a part gives to its own parts is its own business
        return
    for name, argument in accepted.arguments.items():
        if argument.required and name not in given and name not in later:
            yield Problem(f"{node.key}.{name}", NO_VALUE, f"{node.target} needs this argument")
