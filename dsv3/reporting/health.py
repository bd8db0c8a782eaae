"""Health of a run now: the experts of each layer, and one sentence about all of it."""

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from dsv3.monitoring.expert_states import DEAD, HOT, NAMES, STARVED, WELL, states
from dsv3.reporting.amounts import compact
from dsv3.reporting.findings import MOST_NAMED, Finding, findings
from dsv3.reporting.history import History
from dsv3.reporting.routing_history import RoutingHistory


class Unwell(NamedTuple):
    """An expert that is dead, starved or hot, over all tokens or (`domain`) dead on a domain's tokens only."""

    expert: int
    state: int
    since: int  # tokens
    load: float  # relative
    domain: str | None
    by_domain: dict[str, float]  # relative load; NaN where a domain has too few tokens


class LayerNow(NamedTuple):
    """A layer in the last interval that was not cut short."""

    layer: str
    n_experts: int
    max_vio: float
    unwell: list[Unwell]

    def of(self, state: int, *, domain: bool = False) -> list[Unwell]:
        """Those in a state over all tokens, or on one domain only."""
        return [each for each in self.unwell if each.state == state and (each.domain is not None) == domain]

    @property
    def badness(self) -> tuple[float, ...]:
        """The higher, the worse."""
        return (*(len(self.of(state)) for state in (DEAD, STARVED, HOT)), len(self.of(DEAD, domain=True)), self.max_vio)


def layers_now(run: History) -> list[LayerNow]:
    """Every MoE layer and MTP depth, in the order of the model."""
    routing = run.routing()
    if routing not in _KNOWN:
        _KNOWN[routing] = layers_of(routing)
    return _KNOWN[routing]


_KNOWN: WeakKeyDictionary[RoutingHistory, list[LayerNow]] = WeakKeyDictionary()
"""Parts of a screen ask for the same, and so does who goes back and forth between runs."""


def layers_of(routing: RoutingHistory) -> list[LayerNow]:
    now = []
    for layer, load in routing.layers.items():
        at = routing.judged[layer]
        if len(at):
            starts_T = np.concatenate([[0], load.tokens_T])[at]
            state_TE, domain_TXE = routing.states[layer], load.domain_TXE[at]
            last_E, last_XE = load.load_TE[at[-1]], domain_TXE[-1]
            over_all = (None, state_TE, last_E)
            on_domains = [(d, dead_only(domain_TXE[:, x]), last_XE[x]) for x, d in enumerate(routing.domains)]
            unwell = []
            for domain, column_TE, load_E in [over_all, *on_domains]:
                began_E = beginning(column_TE)
                for expert in np.flatnonzero(column_TE[-1] != WELL):
                    if domain is None or state_TE[-1, expert] != DEAD:
                        by_domain = dict(zip(routing.domains, last_XE[:, expert].tolist(), strict=False))
                        state, since = int(column_TE[-1, expert]), int(starts_T[began_E[expert]])
                        unwell.append(Unwell(int(expert), state, since, float(load_E[expert]), domain, by_domain))
            now.append(LayerNow(layer, len(last_E), float(last_E.max()) - 1, unwell))
    return now


def dead_only(relative_TE: np.ndarray) -> np.ndarray:
    """States in which any load is well: on one domain, experts are meant to differ."""
    state_TE = states(relative_TE)
    return np.where(state_TE == DEAD, state_TE, WELL)


def beginning(state_TE: np.ndarray) -> np.ndarray:
    """Number of the interval since which each expert is in its last state, int64 [E]."""
    other_TE = state_TE[::-1] != state_TE[-1]
    return np.where(other_TE.any(0), len(state_TE) - other_TE.argmax(0), 0)


def worst(layers: Sequence[LayerNow], chosen: str | None) -> LayerNow | None:
    """The chosen layer; the worst one where none is chosen, or the run has none of that name."""
    by_name = {layer.layer: layer for layer in layers}
    return by_name.get(chosen or "") or max(layers, key=lambda layer: layer.badness, default=None)


def chosen_layer(run: History, chosen: str | None) -> str | None:
    """Its name; see `worst`."""
    layer = worst(layers_now(run), chosen)
    return layer.layer if layer else None


def verdict(run: History) -> tuple[bool | None, str]:
    """Whether the run is well (None: not known yet), and a sentence that says what is not."""
    if run.info.get("experts") == 0:
        opened = [f.text for f in findings(run) if f.state == "open"]
        return not opened, "; ".join(opened) or "This model has no experts. Nothing else is wrong."
    layers = layers_now(run)
    if not layers:
        return None, "Nothing is known of the experts yet: the first interval is not over."
    said = [dead_text(layer) for layer in layers if layer.of(DEAD)]
    said += [
        text_of(f) for f in findings(run) if f.state == "open" and f.kind not in ("dead expert", "routing collapse")
    ]
    if said:
        more = f"; and {len(said) - MOST_NAMED} more" if len(said) > MOST_NAMED else ""
        return False, "; ".join(said[:MOST_NAMED]) + more + "."
    number = sum(layer.n_experts for layer in layers)
    counts = {NAMES[state]: sum(len(layer.of(state)) for layer in layers) for state in (STARVED, HOT)}
    noted = " and ".join(f"{count} {name}" for name, count in counts.items() if count)
    return True, f"All {number:,} experts in {len(layers)} layers get tokens" + (f"; {noted}." if noted else ".")


def dead_text(layer: LayerNow) -> str:
    dead = layer.of(DEAD)
    since = min(each.since for each in dead)
    return f"{layer.layer}: {len(dead)} of {layer.n_experts} experts dead since {compact(since)} tokens"


def text_of(finding: Finding) -> str:
    return f"{finding.kind} since {compact(finding.since)} tokens ({finding.text})"


def named(experts: Sequence[Unwell]) -> str:
    """Their numbers."""
    numbers = sorted({each.expert for each in experts})
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    return shown + (f" +{len(numbers) - MOST_NAMED}" if len(numbers) > MOST_NAMED else "")


def state_name(each: Unwell) -> str:
    return NAMES[each.state]
