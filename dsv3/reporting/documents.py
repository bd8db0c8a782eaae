"""Error of a difference in held-out bits per byte that comes from the choice of documents.

Runs of one study are scored on the same documents, so that arms are paired by document, too. With d_kj the difference
in bits on document j with seed k, b_j its bytes, and documents of domain h drawn with replacement, the same ones for
all seeds (they share them, so that more seeds make this error no smaller):

    R_h = sum_j mean_k(d_kj) / sum_j b_j          difference of the domain
    V_h = variance of R_h over resamples          of n_h - 1 documents each, which leaves it unbiased (Rao and Wu 1988)
    V   = sum_h (B_h / B)^2 V_h                   with the domain's share of all bytes, which is fixed
    D   = t_0.975(nu) sqrt(V)                     half width, with the degrees of freedom nu of Satterthwaite

A domain of one document adds nothing to V: its error cannot be known.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dsv3.reporting.history import History

RESAMPLES = 1000
TABLE = "metrics/documents"
MOST_DRAWN = 4_000_000  # counts that are in memory at once


class Documents(NamedTuple):
    """Difference of two arms on every held-out document."""

    bits_KD: np.ndarray  # by seed
    bytes_D: np.ndarray
    domains_D: np.ndarray


def differing_by_document(
    ours: Sequence[History], theirs: Sequence[History], *, weights: str, domain: str
) -> Documents | None:
    """Runs of two arms in one order of seeds. None where one of them did not record the documents that all have.

    weights: live or ema. domain: one, or `all`.
    """
    tables = [_table(run, weights, domain) for run in (*ours, *theirs)]
    first = tables[0][["domain", "bytes"]] if tables else pd.DataFrame()
    if first.empty or any(not table[["domain", "bytes"]].equals(first) for table in tables):
        return None
    nats_KD = np.stack([table.nats.to_numpy() for table in tables]) / math.log(2)
    bits_KD = nats_KD[: len(ours)] - nats_KD[len(ours) :]
    return Documents(bits_KD, first.bytes.to_numpy(), first.domain.to_numpy())


def _table(run: History, weights: str, domain: str) -> pd.DataFrame:
    table = run.table(TABLE)
    if table.empty:
        return pd.DataFrame(columns=["domain", "bytes", "nats"])
    chosen = (table.weights == weights) & (table.tokens == table.tokens.max())
    return table[chosen & ((table.domain == domain) | (domain == "all"))].reset_index(drop=True)


def half_widths(documents: Documents) -> np.ndarray:
    """D after the first, the first two, ... of the seeds, [K]; 0 where it cannot be known."""
    from scipy.special import stdtrit

    bits_KD, bytes_D, domains_D = documents
    means_KD = bits_KD.cumsum(0) / np.arange(1, len(bits_KD) + 1)[:, None]
    draw = np.random.default_rng(0)
    variances, degrees = [], []
    for domain in dict.fromkeys(domains_D):
        own = domains_D == domain
        if own.sum() > 1 and bytes_D[own].sum() > 0:
            share = bytes_D[own].sum() / bytes_D.sum()
            variances.append(share**2 * _variances(means_KD[:, own], bytes_D[own], draw))
            degrees.append(own.sum() - 1)
    if not variances:
        return np.zeros(len(bits_KD))
    V_HK, nu_H = np.stack(variances), np.array(degrees)[:, None]
    V_K = V_HK.sum(0)
    nu_K = np.divide(V_K**2, (V_HK**2 / nu_H).sum(0), out=np.ones_like(V_K), where=V_K > 0)
    return stdtrit(nu_K, 0.975) * np.sqrt(V_K)


def _variances(means_KD: np.ndarray, bytes_D: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """V_h after each number of seeds, [K]."""
    n, at_once = len(bytes_D), max(1, MOST_DRAWN // len(bytes_D))
    found = []
    for start in range(0, RESAMPLES, at_once):
        counts_RD = draw.multinomial(n - 1, np.full(n, 1 / n), size=min(at_once, RESAMPLES - start))
        counts_RD = counts_RD[(counts_RD @ bytes_D) > 0]
        found.append(counts_RD @ means_KD.T / (counts_RD @ bytes_D)[:, None])
    return np.concatenate(found).var(0, ddof=1)
