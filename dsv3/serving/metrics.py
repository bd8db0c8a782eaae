"""/metrics: figures of the engines for Prometheus."""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dsv3.serving.routed_backend import RoutedBackend
from dsv3.serving.served_model import Served

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


def registry(models: dict[str, Served]) -> CollectorRegistry:
    """A registry of its own for each server."""
    made = CollectorRegistry()
    name, help_ = "dsv3_first_token_seconds", "Seconds from a request to its first token"
    first = Histogram(name, help_, ["model"], buckets=SECONDS, registry=made)
    for served in models.values():
        served.scheduler.on_first = first.labels(served.name).observe
    made.register(Figures(models))
    return made


class Figures(Collector):
    """Read from the schedulers when they are asked for."""

    def __init__(self, models: dict[str, Served]) -> None:
        self.models = models

    def collect(self) -> Iterator[Metric]:
        gauges = {
            "waiting_texts": "Texts that wait for a slot",
            "running_texts": "Texts that are being written",
            "kept_positions": "Positions of finished texts kept for later prompts",
        }
        counters = {
            "prompt_tokens": "Tokens of prompts of ended texts",
            "copied_prompt_tokens": "Of these, tokens that were not computed again",
            "written_tokens": "Tokens written; their rate is the throughput",
            "engine_steps": "Steps of the engine",
            "refused_texts": "Texts refused because too many waited",
            "drafts_made": "Tokens drafted by MTP",
            "drafts_kept": "Drafts that the model kept",
        }
        values = {name: self._values(served) for name, served in self.models.items()}
        for metrics, family in ((gauges, GaugeMetricFamily), (counters, CounterMetricFamily)):
            for metric, help_ in metrics.items():
                made = family(f"dsv3_{metric}", help_, labels=["model"])
                for name, of_model in values.items():
                    made.add_metric([name], of_model[metric])
                yield made
        yield from self._by_label()

    def _values(self, served: Served) -> dict[str, float]:
        scheduler = served.scheduler
        counts, speculation = scheduler.counts, served.speculation
        return {
            "waiting_texts": scheduler.waiting,
            "running_texts": len(scheduler.running),
            "kept_positions": scheduler.engine.kept_positions,
            "prompt_tokens": counts.prompt_tokens,
            "copied_prompt_tokens": counts.copied_tokens,
            "written_tokens": counts.written_tokens,
            "engine_steps": counts.steps,
            "refused_texts": counts.refused,
            "drafts_made": speculation.made,
            "drafts_kept": speculation.kept,
        }

    def _by_label(self) -> Iterator[Metric]:
        ends = CounterMetricFamily("dsv3_ended_texts", "Texts by the reason of their end", labels=["model", "end"])
        load = CounterMetricFamily("dsv3_expert_tokens", "Tokens of each expert", labels=["model", "layer", "expert"])
        for name, served in self.models.items():
            for end, count in list(served.scheduler.counts.ends.items()):
                ends.add_metric([name, end], count)
            backend = served.backend
            if isinstance(backend, RoutedBackend):
                for layer, tokens in backend.load.items():
                    for expert, count in enumerate(tokens.tolist()):
                        load.add_metric([name, layer, str(expert)], count)
        yield ends
        yield load
