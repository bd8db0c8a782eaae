"""Parameters that a run does not train, chosen by patterns of their names: `run.freeze`."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase

from torch import nn

from dsv3.config.problems import did_you_mean


def freeze(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take no gradients of the parameters whose name matches a pattern, in which `*` stands for any characters.

    Routing biases are no parameters: a balancing goes on moving them.

    Raises:
        ValueError: a pattern matches nothing, or all is frozen.
    """
    parameters = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in parameters if fnmatchcase(name, pattern)]
        if not matching:
            near = did_you_mean(pattern, parameters)
            raise ValueError(
                f"run.freeze={pattern}: no parameter has such a name.{near} A pattern is matched as a whole"
            )
        for name in matching:
            parameters[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in parameters.values()):
        raise ValueError(f"run.freeze={list(patterns)}: all parameters are frozen, and nothing is left to train")


def trained_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Those that the optimiser is given, by name."""
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)
