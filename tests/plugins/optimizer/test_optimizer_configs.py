"""Every shipped optimiser builds from its YAML, takes steps that lower a loss, and starts at a learning rate of 0."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

CONF = Path(__file__).parents[3] / "conf" / "optimizer"


@pytest.mark.parametrize("name", sorted(path.stem for path in CONF.glob("*.yaml")))
def test_shipped_optimisers_train(name):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 2))
    optimizer = instantiate(OmegaConf.load(CONF / f"{name}.yaml"))(network.named_parameters())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert all(group["lr"] == 0 and group["lr_scale"] > 0 for group in optimizer.param_groups)
    x = torch.randn(64, 8)
    losses = []
    for _ in range(60):
        loss = (network(x) - x[:, :2]).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
