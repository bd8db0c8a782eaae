"""Cost and gain of drafts, by counting, so that whether they are made depends on no clock.

The unit is the time in which a weight is read. A pass over n tokens, in a model of L layers with D weights in its dense
parts and head, and R in the routed experts, of which a token uses the share s, costs

    o L (1 + (n - 1) / 10) + D + R (1 - (1 - s)^n) + k n (D + s R)

for the calls of each layer's operations, the weights that are read, and the products. A draft costs as much in the MTP
module, a model of one layer with the same head. With a share a of the drafts kept, one draft per pass makes the text of
n rows faster by

    (1 + a) pass(n) / (pass(2 n) + draft(n)).
"""

from typing import Any, NamedTuple

from dsv3.model.decoder import Decoder
from dsv3.model.moe import MoE

PRODUCTS = 0.2
"""k: multiplying by a weight, over reading it. Fitted, as o is, to CPU time of one thread of an EPYC (docs/LOG.md)."""
EAGER, ONNX = 3e6, 1e5
"""o of either engine."""
LEAST_GAIN = 1.05
USUAL, WEIGHT = 0.75, 8
"""Share of the drafts that is kept, as long as a text does not say; and as how many of its own drafts that counts."""


class Weights(NamedTuple):
    """Numbers of them, of a model."""

    layers: int
    dense: int  # of all layers, and of the head
    routed: int  # of all layers
    share: float  # of the routed experts that a token uses

    def passed(self, tokens: int, overhead: float) -> float:
        """Cost of a pass."""
        called = overhead * self.layers * (1 + (tokens - 1) / 10)
        read = self.dense + self.routed * (1 - (1 - self.share) ** tokens)
        return called + read + PRODUCTS * tokens * (self.dense + self.routed * self.share)


class DraftCosts(NamedTuple):
    """Of a model with MTP."""

    model: Weights
    module: Weights
    overhead: float  # o

    def gain(self, kept: float, rows: int = 1) -> float:
        """How much faster texts become with one draft per pass, of which the share `kept` is kept."""
        plain = self.model.passed(rows, self.overhead)
        drafted = self.model.passed(2 * rows, self.overhead) + self.module.passed(rows, self.overhead)
        return (1 + kept) * plain / drafted

    def written(self) -> dict[str, Any]:
        """For a manifest."""
        return {"model": self.model._asdict(), "module": self.module._asdict()}

    def pay(self, made: int, kept: int, rows: int = 1) -> bool:
        """Whether one more draft is worth it in a text of whose drafts so many were kept, next to others."""
        return self.gain((kept + USUAL * WEIGHT) / (made + WEIGHT), rows) >= LEAST_GAIN


def usually_pay(costs: DraftCosts | None) -> bool:
    """Whether a text begins with drafts; None: its model cannot draft."""
    return costs is not None and costs.pay(0, 0)


def draft_costs(model: Decoder, overhead: float) -> DraftCosts | None:
    """None where the model has no MTP."""
    modules: Any = model.mtp
    depth = modules.depth
    if not depth:
        return None
    head = model.head_weight.numel()
    of_modules = weights_of(modules, depth)
    module = Weights(1, of_modules.dense // depth + head, of_modules.routed // depth, of_modules.share)
    main = weights_of(model.layers, len(model.layers))
    return DraftCosts(main._replace(dense=main.dense + head), module, overhead)


def read_costs(written: Any, overhead: float) -> DraftCosts | None:
    """`DraftCosts.written` back; None where an older export has none, or no MTP."""
    return DraftCosts(Weights(**written["model"]), Weights(**written["module"]), overhead) if written else None


def weights_of(module: Any, layers: int) -> Weights:
    moes: list[Any] = [m for m in module.modules() if isinstance(m, MoE)]
    routed = sum(p.numel() for moe in moes for p in moe.experts.parameters())
    share = moes[0].router.top_k / moes[0].balancing.bias.numel() if moes else 0.0
    return Weights(layers, sum(p.numel() for p in module.parameters()) - routed, routed, share)
