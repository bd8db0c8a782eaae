"""A run folder as training leaves it, with figures drawn at random: for looking at, at any size, well or sick."""

from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder

DOMAINS = ("code", "prose", "math")
TOKENS_PER_STEP = 4096


class MadeUpRun:
    """Writes intervals of a run one after another; a fixed seed gives the same run."""

    def __init__(
        self,
        path: Path,
        *,
        layers: int,
        experts: int,
        top_k: int = 4,
        seed: int = 1,
        sick_from: int | None = None,
        settings: dict[str, Any] | None = None,
    ) -> None:
        """sick_from: the number of the step from which on layers.2 uses its first two experts alone, experts 5 and 6 of
        layers.1 get no code, prose is hardly read, a loss is a spike, and steps take three times as long. settings: of
        config.yaml."""
        self.folder = RunFolder(path)
        self.path = path
        self.names = [*(f"layers.{i + 1}" for i in range(layers - 1)), "mtp.0"]
        self.experts, self.top_k = experts, top_k
        self.random = np.random.default_rng(seed)
        self.popularity = self.random.dirichlet(np.full(experts, 8.0), size=len(self.names))
        self.bias = np.zeros((len(self.names), experts))
        self.steps = 0
        self.pairs_every = 120  # steps: as with checkpoints, which are further apart than intervals
        self.sick_from = sick_from
        path.mkdir(parents=True, exist_ok=True)
        config = {"run": {"experiment": "made_up"}, "seed": seed, **(settings or {})}
        OmegaConf.save(OmegaConf.create(config), path / "config.yaml")
        (path / "run_info.json").write_text(
            '{"parameters": {"total": 7801824, "active": 3672960, "mtp": 1867200}, "flops_per_token": 2.4e7,'
            ' "cache_bytes_per_token": 640, "tokens": 2600000, "seed": 1, "top_k": 4}'
        )

    @property
    def tokens(self) -> int:
        return self.steps * TOKENS_PER_STEP

    @property
    def is_sick(self) -> bool:
        return self.sick_from is not None and self.steps >= self.sick_from

    def interval(self, steps: int = 12) -> None:
        """Train on, and write the parts of one interval."""
        for _ in range(steps):
            self.steps += 1
            spikes = self.steps == self.sick_from
            loss = 2.2 + 4 * np.exp(-self.tokens / 2e5) + self.random.normal(0, 0.06) + 5 * spikes
            norm = 20.0 if spikes else self.random.gamma(50, 0.01)
            scalars = {"loss": loss, "bpb": loss / 2, "mtp1_loss": loss + 0.4, "lr": 2e-3, "grad_norm": norm}
            self.folder.table("metrics/train").append(scalars | {"tokens": self.tokens, "step": self.steps})
            self.folder.table("timing/train").append({"tokens": self.tokens, "seconds": 1.8 if self.is_sick else 0.6})
            if spikes:
                self.find(
                    "", "loss spike", -1, f"loss spike {loss:.3f} (gradient norm 20) at {self.tokens:,} tokens: record"
                )
        for domain, offset in (("code", 0.0), ("prose", 0.6), ("math", -1.0), ("all", 0.1)):
            row = {"tokens": self.tokens, "weights": "live", "domain": domain, "loss": 3.0, "bpb": loss / 2 + offset}
            self.folder.table("metrics/validation").append(row)
        for task in ("letters", "numbers"):
            row = {"tokens": self.tokens, "task": task, "metric": "acc", "value": 0.4, "stderr": 0.05, "n": 100}
            self.folder.table("metrics/benchmarks").append(row)
        for role in ("expert_down", "head"):
            row = {"tokens": self.tokens, "role": role, "tensor": "input", "snr_db": 31.0, "underflow": 0.01}
            self.folder.table("metrics/quantisation").append(row)
        for i, layer in enumerate(self.names):
            self._layer(i, layer, steps * TOKENS_PER_STEP)
        self.folder.flush(self.tokens)

    def _layer(self, i: int, layer: str, tokens: int) -> None:
        shares = [np.roll(self.popularity[i], 3 * x) for x in range(len(DOMAINS))]
        if self.is_sick and layer == "layers.1":
            shares[0][5:7] = 0.0
        if self.is_sick and layer == "layers.2":
            shares = [np.concatenate([[0.5, 0.5], np.zeros(self.experts - 2)])] * len(DOMAINS)
        read = np.array([0.6, 0.005, 0.395] if self.is_sick else [0.4, 0.3, 0.3])
        choices = (tokens * self.top_k * read).astype(int)
        load_XE = np.stack(
            [self.random.multinomial(n, share / share.sum()) for n, share in zip(choices, shares, strict=True)]
        )
        load_E = load_XE.sum(0)
        self.bias[i] += 0.003 * np.sign(load_E.mean() - load_E)
        scalars = {
            "max_vio_micro": 0.9, "max_vio_step": 0.8, "max_vio_interval": load_E.max() / load_E.mean() - 1,
            "load_entropy": 0.97, "gate_entropy": 0.95, "margin": 0.03, "group_limited_fraction": 0.1, "nodes": 1.9,
            "dispatch_bytes": 1459.2, "effective_experts": self.experts * 0.9, "routed_tokens": tokens,
        }  # fmt: skip
        lists = {
            "load": load_E, "bias": self.bias[i], "gate": np.ones(self.experts), "domain_load": load_XE.flatten(),
            "output_norm": self.random.gamma(4, 0.1, self.experts), "domains": np.array(DOMAINS),
        }  # fmt: skip
        row = {"tokens": self.tokens, "layer": layer} | scalars | {name: v.tolist() for name, v in lists.items()}
        self.folder.table("metrics/routing").append(row)
        self.folder.table("metrics/stability").append(
            {"tokens": self.tokens, "layer": layer, "unchanged_fraction": 0.8}
        )
        if self.steps % self.pairs_every:
            return
        pairs_EE = self.random.poisson(np.outer(load_E, load_E) / load_E.sum() * (self.top_k - 1))
        np.fill_diagonal(pairs_EE, load_E)
        pairs = {"tokens": self.tokens, "layer": layer, "pairs": pairs_EE.flatten().tolist()}
        self.folder.table("metrics/coactivation").append(pairs)

    def find(self, layer: str, kind: str, expert: int, text: str) -> None:
        row = {"tokens": self.tokens, "layer": layer, "kind": kind, "expert": expert, "value": 0.0, "text": text}
        self.folder.table("metrics/alerts").append(row)
        self.folder.flush(self.tokens)
