"""Place redundant experts on GPUs by a run's logged load (report, section 3.4; the method of DeepSeek's EPLB).

python -m dsv3 eplb run=runs/default/seed1 gpus=8 nodes=2 redundant=8               the whole mix
python -m dsv3 eplb run=runs/default/seed1 gpus=8 nodes=2 redundant=8 domain=prose  a deployment for prose

The placement is fitted to the third quarter of the training's monitoring intervals and tested on the last.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.bounds import NonNegativeInt, PositiveInt
from dsv3.cli import REQUIRED, option

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from dsv3.planning.placement import Deployment

QUARTERS = {"fit": (2, 3), "test": (3, 4)}
"""Which of the intervals: from the first to before the second of these, in quarters of training."""


@dataclass
class Options:
    run: str = option(REQUIRED, "a run folder")
    gpus: PositiveInt = option(REQUIRED, "GPUs that share the experts of each layer")
    nodes: PositiveInt = option(REQUIRED, "nodes that they stand in, equally many in each")
    redundant: NonNegativeInt = option(REQUIRED, "redundant experts per layer, beyond one replica of each expert")
    domain: str | None = option(None, "the load of this domain's tokens alone; null: of the whole mix")
    out: str | None = option(None, "the folder to write placement.json and placement.png to; null: the run folder")


def run(options: Options) -> dict[str, Any]:
    """Print the loads before and after, and write the placement and a plot of it.

    Raises:
        FileNotFoundError: `run` is not a run folder.
        ValueError: the run has no load to place by, or options do not fit it or each other.
    """
    from dsv3.checkpoint.run_folder import RunFolder, write_atomically, write_text_atomically
    from dsv3.planning.placement import Deployment
    from dsv3.strict_json import text_of

    folder = RunFolder(options.run)
    if not folder.config_path.exists():
        raise FileNotFoundError(f"run={options.run}: must be a run folder; it has no config.yaml")
    groups = folder.config().get("router", {}).get("n_groups") or 1
    routing = folder.read("metrics/routing")
    if routing.empty:
        needed = "a model with experts, trained for an interval of callbacks.monitor.every_tokens"
        raise ValueError(f"run={options.run}: has no metrics/routing; take a run of {needed}")
    first = routing.iloc[0]
    experts = len(first.domain_load) // len(first.domains)
    deployment = Deployment(experts, groups, options.gpus, options.nodes, options.redundant)
    if problems := [*deployment.problems(), *data_problems(options, routing)]:
        raise ValueError("; ".join(problems))

    result = placed(routing, deployment, options.domain)
    out = Path(options.out) if options.out else folder.path
    files = {"json": str(out / "placement.json"), "png": str(out / "placement.png")}
    document = {"run": options.run, "domain": options.domain, **result}
    write_text_atomically(Path(files["json"]), text_of(document) + "\n")
    write_atomically(Path(files["png"]), lambda path: draw(document, path))
    show(document)
    print(f"written to {files['json']} and {files['png']}")
    return document | {"files": files}


def data_problems(options: Options, routing: "pd.DataFrame") -> list[str]:
    """Why the run's table does not serve: too short, no such domain, or no token of it where one is needed."""
    domains = list(routing.domains.iloc[0])
    intervals = routing.tokens.nunique()
    if intervals < 4:
        needed = "train longer, or with a smaller callbacks.monitor.every_tokens"
        return [f"run={options.run}: has {intervals} monitoring intervals, must have 4 or more; {needed}"]
    if options.domain is not None and options.domain not in domains:
        return [f"domain={options.domain}: must be one of {', '.join(domains)}"]
    layer = routing[routing.layer == routing.layer.iloc[0]]
    idle = [part for part in QUARTERS if not load_of(quarter(layer, part), options.domain).any()]
    return [f"domain={options.domain}: has no tokens in the intervals to {part}; take another" for part in idle]


def quarter(routing: "pd.DataFrame", part: str) -> "pd.DataFrame":
    """Rows of the intervals to fit or to test."""
    ends = sorted(routing.tokens.unique())
    start, stop = (len(ends) * number // 4 for number in QUARTERS[part])
    return routing[routing.tokens.isin(ends[start:stop])]


def load_of(rows: "pd.DataFrame", domain: str | None) -> "np.ndarray":
    """Tokens of a domain (None: of all) that chose each expert over these rows of one layer, float64 [E]."""
    import numpy as np

    chosen = slice(None) if domain is None else [list(rows.domains.iloc[0]).index(domain)]
    return sum(np.reshape(row.domain_load, (len(row.domains), -1))[chosen].sum(0) for row in rows.itertuples()) * 1.0


def placed(routing: "pd.DataFrame", d: "Deployment", domain: str | None) -> dict[str, Any]:
    """The fields of placement.json that follow from the run and the deployment."""
    layers = {str(name): placed_layer(rows, d, domain) for name, rows in routing.groupby("layer", sort=False)}
    peaks = [layer["peak"] for layer in layers.values()]
    mean_peak = {
        part: {when: sum(peak[part][when] for peak in peaks) / len(peaks) for when in ("before", "after")}
        for part in QUARTERS
    }
    intervals = {part: describe(routing, part) for part in QUARTERS}
    policy = "hierarchical" if d.is_hierarchical else "global"
    sizes = asdict(d) | {"slots_per_gpu": d.slots, "policy": policy}
    return {**sizes, "intervals": intervals, "mean_peak": mean_peak, "layers": layers}


def placed_layer(rows: "pd.DataFrame", d: "Deployment", domain: str | None) -> dict[str, Any]:
    """One layer's placement, and the relative load of its GPUs before and after."""
    from dsv3.planning.placement import gpu_load, in_order, place, relative, replica_count

    load = {part: load_of(quarter(rows, part), domain) for part in QUARTERS}
    placements = {"before": in_order(d), "after": place(load["fit"], d)}
    gpus = {
        part: {when: relative(gpu_load(placement, load_E)).tolist() for when, placement in placements.items()}
        for part, load_E in load.items()
    }
    return {
        "experts": [experts.tolist() for experts in placements["after"]],
        "replicas": replica_count(placements["after"], d.n_experts).tolist(),
        "gpu_load": gpus,
        "peak": {part: {when: max(load_P) for when, load_P in found.items()} for part, found in gpus.items()},
    }


def describe(routing: "pd.DataFrame", part: str) -> dict[str, int]:
    """Which intervals a part has: their number, and the training tokens before the first and after the last."""
    every, ends = (sorted(rows.tokens.unique()) for rows in (routing, quarter(routing, part)))
    before = every.index(ends[0]) - 1
    return {
        "number": len(ends),
        "from_tokens": int(every[before]) if before >= 0 else 0,
        "to_tokens": int(ends[-1]),
    }


def show(document: dict[str, Any]) -> None:
    """Print the peaks of every layer and their mean."""
    from dsv3.planning.render import Page

    d, columns = document, [(part, when) for part in QUARTERS for when in ("before", "after")]
    rows = [
        (name, *(f"{layer['peak'][part][when]:.3f}" for part, when in columns), str(max(layer["replicas"])))
        for name, layer in d["layers"].items()
    ]
    rows.append(("mean", *(f"{d['mean_peak'][part][when]:.3f}" for part, when in columns), ""))
    title = f"{d['n_experts']} experts and {d['redundant']} redundant, {d['slots_per_gpu']} on each of {d['gpus']} GPUs"
    fit, test = (f"{span['from_tokens']:,} to {span['to_tokens']:,}" for span in d["intervals"].values())
    note = "Load of the most loaded GPU over the mean; 1 = balanced. Before: experts in order, none redundant.\n"
    note += f"Fit: training tokens {fit}; test: {test}; {domain_of(d)}.\n"
    note += f"{d['policy'].capitalize()}: the router's groups ({d['n_groups']}) "
    note += f"{'divide' if d['policy'] == 'hierarchical' else 'do not divide'} by the nodes ({d['nodes']})."
    heads = ("peak relative load", *(f"{part}, {when}" for part, when in columns), "most replicas")
    Page().table(title, heads, rows, note=note)


def domain_of(document: dict[str, Any]) -> str:
    return "all domains" if document["domain"] is None else f"domain {document['domain']}"


def draw(document: dict[str, Any], path: Path) -> None:
    """A panel per layer: relative load of every GPU in the intervals to test, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    from dsv3.reporting.palette import COLOURS

    layers = document["layers"]
    across = min(4, len(layers))
    down = -(-len(layers) // across)
    size = (3.2 * across, 1.2 + 2.2 * down)
    figure, axes = plt.subplots(
        down, across, figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    edges = np.arange(document["gpus"] + 1) - 0.5
    for axis, (name, layer) in zip(axes.flat, layers.items(), strict=False):
        before, after = (layer["gpu_load"]["test"][when] for when in ("before", "after"))
        axis.stairs(before, edges, fill=True, color="0.8", label="before: experts in order")
        axis.stairs(after, edges, color=COLOURS[0], linewidth=1.5, label=f"after: {document['redundant']} redundant")
        axis.axhline(1, color="0.3", linewidth=0.6)
        axis.set_title(f"{name}: peak {max(before):.2f} before, {max(after):.2f} after", fontsize="medium")
    for axis in axes.flat[len(layers) :]:
        axis.set_visible(False)
    figure.supxlabel("GPU")
    figure.supylabel("relative load (1 = balanced)")
    figure.suptitle(f"Load of each GPU, {domain_of(document)}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower right", ncols=2)
    figure.savefig(path, format="png", dpi=100)
    plt.close(figure)
