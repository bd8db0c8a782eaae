"""Expert load by domain, against counting by hand."""

import torch

from dsv3.contracts import MicroBatch, Routing
from dsv3.monitoring.expert_load import ExpertLoad


def test_loads_are_counted_by_layer_domain_and_expert_without_padding() -> None:
    tokens_BT = torch.zeros(2, 3, dtype=torch.int64)
    documents_BT = torch.tensor([[1, 1, 0], [1, 2, 2]])
    domains_BT = torch.tensor([[0, 0, 0], [1, 1, 1]])
    experts_NK = torch.tensor([[0, 1], [0, 2], [3, 2], [1, 2], [1, 3], [1, 0]])
    routing = Routing(experts_NK, torch.ones(6, 2), torch.zeros(6, 4))
    load = ExpertLoad(["code", "prose", "empty"])
    for _ in range(2):
        load.observe(MicroBatch(tokens_BT, tokens_BT, tokens_BT, documents_BT, domains_BT), {"layers.1": routing})
    assert load.counts["layers.1"].tolist() == [[4, 2, 2, 0], [2, 6, 2, 2], [0, 0, 0, 0]]
    relative = load.relative()["layers.1"]
    assert relative == {"code": [2.0, 1.0, 1.0, 0.0], "prose": [2 / 3, 2.0, 2 / 3, 2 / 3]}
