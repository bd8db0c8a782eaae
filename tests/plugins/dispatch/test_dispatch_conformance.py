"""The shipped dispatch passes `check_dispatch`; dispatches with one fault each do not."""

import pytest
import torch

from dsv3.testing.dispatch import check_dispatch
from plugins.dispatch.local import LocalDispatch


@pytest.mark.parametrize("multiple", [1, 32])
def test_the_shipped_dispatch_conforms(multiple):
    check_dispatch(lambda: LocalDispatch(pad_multiple=multiple))


def local(x_ND, routing, experts):
    return LocalDispatch(pad_multiple=1)(x_ND, routing, experts)


def capacity(x_ND, routing, experts):
    """Drops what exceeds 20 tokens of an expert."""
    load = torch.nn.functional.one_hot(routing.experts_NK, 5).cumsum(0).gather(2, routing.experts_NK.unsqueeze(-1))
    return local(x_ND, routing._replace(gates_NK=routing.gates_NK * (load.squeeze(-1) <= 20)), experts)


def gated_twice(x_ND, routing, experts):
    return local(x_ND, routing._replace(gates_NK=routing.gates_NK.square()), experts)


def detached_gates(x_ND, routing, experts):
    return local(x_ND, routing._replace(gates_NK=routing.gates_NK.detach()), experts)


def detached_input(x_ND, routing, experts):
    return local(x_ND.detach(), routing, experts)


def float_counts(x_ND, routing, experts):
    return local(x_ND, routing, lambda x, counts_E, gates: experts(x, counts_E.float(), gates))


def ungated_padding(x_ND, routing, experts):
    return local(x_ND, routing, lambda x, counts_E, gates: experts(x, counts_E, gates[:-1]))


def by_name(x_ND, routing, experts):
    return local(x_ND, routing, lambda x, counts_E, gates: experts(x, counts_E=counts_E, gates_M=gates))


def wide(x_ND, routing, experts):
    return local(x_ND, routing, experts).float()


def wrong_when_decoding(x_ND, routing, experts):
    return local(x_ND, routing, experts) * (1.0 if torch.is_grad_enabled() else 2.0)


@pytest.mark.parametrize(
    ("dispatch", "words"),
    [
        (capacity, "all chose two experts: the output must be the sum"),
        (gated_twice, "applied twice"),
        (detached_gates, "no gradient arrives at gates_NK"),
        (detached_input, "no gradient arrives at the input"),
        (float_counts, "counts_E int64"),
        (ungated_padding, "a row and a gate for each count"),
        (by_name, "must be called by position"),
        (wide, "must be bfloat16"),
        (wrong_when_decoding, "without gradients"),
    ],
)
def test_faulty_dispatches_are_found(dispatch, words):
    with pytest.raises(AssertionError, match=words):
        check_dispatch(lambda: dispatch)
