"""Nats and bytes of each held-out document, for errors of two models' difference (`dsv3.reporting.documents`)."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from dsv3.contracts import IGNORE, MicroBatch


class DocumentNats:
    """Sums over the micro-batches of `Data.validation_batches`, in their order.

    A document begins at a BOS, where the domain changes, and where its number changes within a row; a row that begins
    without a BOS goes on with the document before it.
    """

    def __init__(self, *, bos: int, bytes_V: Tensor, domains: Sequence[str]) -> None:
        """bytes_V: that each token stands for (`dsv3.build.token_bytes`)."""
        self.bos, self.bytes_V, self.domains = bos, bytes_V.numpy(), domains
        self.number, self.last_domain = -1, -1
        self.parts: list[np.ndarray] = []  # [4, N]: document, domain, nats, bytes of each target

    def observe(self, batch: MicroBatch, nll_N: Tensor) -> None:
        """nll_N: nats of each position's target, [B * T]; those of ignored targets are not read."""
        tokens_BT, targets_BT, _, ids_BT, domains_BT = (tensor.cpu().numpy() for tensor in batch.packed)
        domains_N, targets_N = domains_BT.ravel(), targets_BT.ravel()
        changes_BT = np.zeros(ids_BT.shape, dtype=bool)
        changes_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
        before_N = np.concatenate([[self.last_domain], domains_N[:-1]])
        starts_N = changes_BT.ravel() | (tokens_BT.ravel() == self.bos) | (domains_N != before_N)
        documents_N = self.number + starts_N.cumsum()
        self.number, self.last_domain = int(documents_N[-1]), int(domains_N[-1])
        counts_N = targets_N != IGNORE
        columns = (documents_N, domains_N, nll_N.double().cpu().numpy(), self.bytes_V[np.where(counts_N, targets_N, 0)])
        self.parts.append(np.stack([column[counts_N] for column in columns]).astype(float))

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each document that has a target: document (counted from 0 among these), domain, nats, bytes."""
        documents_N, domains_N, nats_N, bytes_N = np.concatenate(self.parts, axis=1)
        _, first_D, of_N = np.unique(documents_N, return_index=True, return_inverse=True)
        nats_D, bytes_D = np.bincount(of_N, nats_N), np.bincount(of_N, bytes_N)
        for number, at in enumerate(first_D):
            domain = self.domains[int(domains_N[at])]
            row = {"document": number, "domain": domain, "nats": float(nats_D[number]), "bytes": int(bytes_D[number])}
            yield row
