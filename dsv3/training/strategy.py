"""Lightning's part of a run with several ranks: process group, devices, checkpoints that any number of ranks reads.

Sharding itself is `dsv3.distributed.shard`. A checkpoint is the same file as that of one process: rank 0 gathers every
tensor and writes it; each rank reads its parts. Optimiser state is numbered by parameter group, as torch numbers it.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dsv3.checkpoint.run_folder import load_checkpoint
from dsv3.distributed.shard import load_parts, part_like, whole


class SeveralRanks(ModelParallelStrategy):
    """Ranks that share a model which is sharded already."""

    def __init__(self) -> None:
        super().__init__(data_parallel_size="auto", tensor_parallel_size="auto", save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Whole tensors, on the CPU of rank 0; none elsewhere."""
        assert self.lightning_module is not None
        return self._whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return self._whole(getattr(optimizer, "_optimizer", optimizer).state_dict())

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(checkpoint_path, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_parts(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            optimizer.load_state_dict(parts_of_state(optimizer, state))

    def _whole(self, state: dict[str, Any]) -> dict[str, Any]:
        """All ranks gather tensor after tensor; only rank 0 keeps them."""

        def kept(tensor: Tensor) -> Tensor | None:
            gathered = whole(tensor.detach())
            return gathered.cpu() if self.is_global_zero else None

        result: dict[str, Any] = tree_map_only(Tensor, kept, dict(state))
        return result


def parts_of_state(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """An optimiser's saved state with this rank's parts in place of whole tensors of a parameter's shape."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    of_parameters = {
        number: {
            key: part_like(value, parameters[number]) if _is_sharded(value, parameters[number]) else value
            for key, value in values.items()
        }
        for number, values in state["state"].items()
    }
    return {"state": of_parameters, "param_groups": state["param_groups"]}


def _is_sharded(value: Any, parameter: torch.nn.Parameter) -> bool:
    return isinstance(value, Tensor) and value.shape == parameter.shape
