"""Load of every expert over all intervals of a run as arrays, read part by part as training writes them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow

from dsv3.checkpoint.older_runs import arrow_rows, table_parts
from dsv3.monitoring.expert_states import FEWEST, relative, states, whole

COLUMNS = ("tokens", "layer", "load", "domain_load", "domains")


class LayerLoad(NamedTuple):
    """Counts of one layer. Letters: T intervals, X domains, E experts."""

    tokens_T: np.ndarray  # int64, at the end of each interval
    load_TE: np.ndarray  # float32, relative to a balanced load
    domain_TXE: np.ndarray  # float32, relative to a balanced load of the domain; NaN where it has too few tokens
    share_TX: np.ndarray  # float32, fraction of the interval's tokens

    def then(self, later: "LayerLoad") -> "LayerLoad":
        return LayerLoad(*(np.concatenate(pair) for pair in zip(self, later, strict=True)))


class RoutingHistory:
    """The loads of one state of `metrics/routing`; `grown` reads on from it."""

    def __init__(
        self, parts: Sequence[Path] = (), layers: dict[str, LayerLoad] | None = None, domains: Sequence[str] = ()
    ) -> None:
        self.parts, self.layers, self.domains = list(parts), layers or {}, list(domains)

    def grown(self, run: Path) -> "RoutingHistory":
        """With the parts that were written since; itself where there are none."""
        parts = table_parts(run, "metrics/routing")
        if parts == self.parts:
            return self
        known = self if parts[: len(self.parts)] == self.parts else RoutingHistory()  # else: a run that rolled back
        new = parts[len(known.parts) :]
        if not new:
            return RoutingHistory()
        rows = arrow_rows(new, COLUMNS)
        domains = [str(name) for name in rows["domains"][-1].as_py()] if "domains" in rows.column_names else []
        if known.domains and known.domains != domains:  # arrays of one shape: the newest domains count
            known, rows = RoutingHistory(), arrow_rows(parts, COLUMNS)
        added = by_layer(rows, domains)
        layers = {name: known.layers[name].then(load) if name in known.layers else load for name, load in added.items()}
        return RoutingHistory(parts, layers, domains)

    @property
    def moments(self) -> list[int]:
        """Tokens at the end of each interval."""
        return [int(t) for load in list(self.layers.values())[:1] for t in load.tokens_T]

    @cached_property
    def judged(self) -> dict[str, np.ndarray]:
        """Numbers of the intervals that experts are judged by, int64, by layer; see `whole`."""
        return {name: np.flatnonzero(whole(load.tokens_T)) for name, load in self.layers.items()}

    @cached_property
    def states(self) -> dict[str, np.ndarray]:
        """State of each expert in the judged intervals, int8 [T, E], by layer."""
        return {name: states(load.load_TE[self.judged[name]]) for name, load in self.layers.items()}


def by_layer(rows: pyarrow.Table, domains: Sequence[str]) -> dict[str, LayerLoad]:
    """Rows of `metrics/routing`, in the order of layers. Rows with other domains than these are left out."""
    layer = rows["layer"].combine_chunks().dictionary_encode()
    place = layer.indices.to_numpy()
    tokens = rows["tokens"].to_numpy()
    load, load_at = lists_of(rows["load"])
    of_domain, domain_at = lists_of(rows["domain_load"]) if domains else (load, load_at)
    n_domains = max(len(domains), 1)
    layers = {}
    for number, name in enumerate(layer.dictionary.to_pylist()):
        at = np.flatnonzero(place == number)
        n_experts = load_at[at[-1] + 1] - load_at[at[-1]]
        same = load_at[at + 1] - load_at[at] == n_experts
        at = at[same & (domain_at[at + 1] - domain_at[at] == n_experts * n_domains)]
        load_TE = load[load_at[at][:, None] + np.arange(n_experts)]
        counts = of_domain[domain_at[at][:, None] + np.arange(n_experts * n_domains)]
        counts_TXE = counts.reshape(len(at), n_domains, n_experts)
        domain_TXE = relative(counts_TXE)
        domain_TXE[counts_TXE.mean(-1) < FEWEST] = np.nan
        total_TX = counts_TXE.sum(-1, dtype=np.float64)
        share_TX = total_TX / np.maximum(total_TX.sum(1, keepdims=True), 1)
        layers[name] = LayerLoad(tokens[at], relative(load_TE), domain_TXE, share_TX.astype(np.float32))
    return layers


def lists_of(column: pyarrow.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """A column of lists: all values one after another, and where each row's begin, with the end of the last."""
    array = column.combine_chunks()
    lengths = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    return array.flatten().to_numpy(zero_copy_only=False), np.concatenate([[0], np.cumsum(lengths)])
