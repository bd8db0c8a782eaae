"""Expert load: which tokens count, and how uneven it is."""

from torch import Tensor

from dsv3.contracts import MicroBatch, Routing


def real_tokens(micro: MicroBatch, routing: Routing) -> Tensor:
    """True where a routed position is not padding, [B, S]; MTP routes the last S < T positions of each row."""
    rows = micro.tokens_BT.shape[0]
    return micro.document_ids_BT[:, -(routing.experts_NK.shape[0] // rows) :] > 0


def max_violation(load_E: Tensor) -> float:
    """Largest load over the mean load, minus one; 0 where nothing was routed."""
    mean = load_E.double().mean().item()
    return load_E.max().item() / mean - 1 if mean else 0.0
