"""Load of every expert over all intervals of a run as arrays, read part by part as training writes them."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow

from dsv3.checkpoint.older_runs import arrow_rows
from dsv3.monitoring.expert_states import FEWEST, states, whole

SCALARS = (
    "max_vio_interval", "max_vio_step", "max_vio_micro", "load_entropy", "gate_entropy", "margin",
    "group_limited_fraction", "nodes", "dispatch_bytes",
)  # fmt: skip
"""Figures of a layer in an interval."""
COLUMNS = ("tokens", "layer", "load", "domain_load", "bias", *SCALARS)
PARTS_AT_ONCE = 32
"""More would be read into more memory, whose pages cost as much as reading does."""


class LayerLoad(NamedTuple):
    """Counts of one layer. Letters: T intervals, X domains, E experts, S `SCALARS`."""

    tokens_T: np.ndarray  # int64, at the end of each interval
    load_TE: np.ndarray  # float32, relative to a balanced load
    domain_TXE: np.ndarray  # float32, relative to a balanced load of the domain; NaN where it has too few tokens
    share_TX: np.ndarray  # float32, fraction of the interval's tokens
    bias_TE: np.ndarray  # float32; NaN where none is recorded
    scalars_TS: np.ndarray  # float32; NaN where one is not recorded


def joined(loads: Sequence[LayerLoad]) -> LayerLoad:
    """One after another."""
    return LayerLoad(*map(np.concatenate, zip(*loads, strict=True)))


class RoutingHistory:
    """The loads of one state of `metrics/routing`; `grown` reads on from it."""

    def __init__(
        self, parts: Sequence[Path] = (), layers: dict[str, LayerLoad] | None = None, domains: Sequence[str] = ()
    ) -> None:
        self.parts, self.layers, self.domains = parts, layers or {}, list(domains)

    def grown(self, parts: Sequence[Path]) -> "RoutingHistory":
        """With the parts that were written since, of all that are there now; itself where there are none."""
        if parts == self.parts:
            return self
        known = self if parts[: len(self.parts)] == self.parts else RoutingHistory()  # else: a run that rolled back
        new = parts[len(known.parts) :]
        if not new:
            return RoutingHistory()
        domains = domains_of(new[-1])
        if known.domains and known.domains != domains:  # arrays of one shape: the newest domains count
            known, new = RoutingHistory(), parts
        layers: dict[str, list[LayerLoad]] = {name: [load] for name, load in known.layers.items()}
        for i in range(0, len(new), PARTS_AT_ONCE):
            for name, load in by_layer(arrow_rows(new[i : i + PARTS_AT_ONCE], COLUMNS), domains).items():
                layers.setdefault(name, []).append(load)
        return RoutingHistory(parts, {name: joined(loads) for name, loads in layers.items()}, domains)

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


def domains_of(part: Path) -> list[str]:
    rows = arrow_rows([part], ("domains",))
    return [str(name) for name in rows["domains"][-1].as_py()] if "domains" in rows.column_names else []


def by_layer(rows: pyarrow.Table, domains: Sequence[str]) -> dict[str, LayerLoad]:
    """Rows of `metrics/routing`, in the order of layers. Rows with other domains than these are left out."""
    layer = rows["layer"].combine_chunks().dictionary_encode()
    place_R, tokens_R = layer.indices.to_numpy(), rows["tokens"].to_numpy()
    load = Lists(rows["load"])
    of_domain = Lists(rows["domain_load"]) if domains else load
    bias = Lists(rows["bias"]) if "bias" in rows.column_names else None
    missing_R = np.full(len(rows), np.nan)
    scalars_RS = np.stack([rows[s].to_numpy() if s in rows.column_names else missing_R for s in SCALARS], axis=1)
    layers = {}
    for number, name in enumerate(layer.dictionary.to_pylist()):
        at = np.flatnonzero(place_R == number)
        n_experts = load.length_R[at[-1]]
        n_counts = n_experts * max(len(domains), 1)
        at = at[(load.length_R[at] == n_experts) & (of_domain.length_R[at] == n_counts)]
        counts_TXE = of_domain.of_rows(at, n_counts).reshape(len(at), -1, n_experts)
        total_TX = counts_TXE.sum(-1)
        domain_TXE = relative_to(total_TX, counts_TXE)
        domain_TXE[total_TX < FEWEST * n_experts] = np.nan
        load_TE = load.of_rows(at, n_experts)
        has_bias = bias is not None and (bias.length_R[at] == n_experts).all()
        layers[name] = LayerLoad(
            tokens_R[at],
            relative_to(load_TE.sum(-1), load_TE),
            domain_TXE,
            total_TX / np.maximum(total_TX.sum(1, keepdims=True), 1),
            bias.of_rows(at, n_experts) if bias is not None and has_bias else np.full_like(load_TE, np.nan),
            scalars_RS[at].astype(np.float32),
        )
    return layers


def relative_to(total: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Counts of experts (the last axis) over their mean, in place; see `relative`."""
    counts *= (counts.shape[-1] / np.maximum(total, 1e-9))[..., None]
    return counts


class Lists:
    """A column of lists, as all values one after another."""

    def __init__(self, column: pyarrow.ChunkedArray) -> None:
        array = column.combine_chunks()
        self.values = array.flatten().to_numpy(zero_copy_only=False)
        self.length_R = array.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        self.start_R = np.cumsum(self.length_R) - self.length_R

    def of_rows(self, at: np.ndarray, length: int) -> np.ndarray:
        """Lists of these rows, all of which have this length, as float32 [rows, length]."""
        start = self.start_R[at]
        step = int(start[1] - start[0]) if len(at) > 1 else length
        if (
            step >= length and (np.diff(start) == step).all()
        ):  # as a run writes them: evenly apart, which takes no index
            end = start[0] + step * (len(at) - 1) + length
            strides = (step * self.values.strides[0], self.values.strides[0])
            rows = np.lib.stride_tricks.as_strided(self.values[start[0] : end], (len(at), length), strides)
            return rows.astype(np.float32)
        return self.values[start[:, None] + np.arange(length)].astype(np.float32)
