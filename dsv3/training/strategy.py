"""Lightning's part of a run with several ranks: process group, devices, checkpoints that any number of ranks reads.

Sharding itself is `dsv3.distributed.shard`. Every rank's state is that of one process, with a DTensor where it has a
part; the formats differ in how that is written. As a file, it is that of one process: rank 0 gathers every tensor. To a
folder, each rank writes its parts. Each rank reads its parts of either. Optimiser state is numbered by parameter group,
as torch numbers it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from dsv3.checkpoint.checkpoint_folder import Stored, read
from dsv3.checkpoint.run_folder import load_checkpoint
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.save_folder import outline, save_folder, shards_of
from dsv3.distributed.shard import load_parts, part_like, whole


class SeveralRanks(ModelParallelStrategy):
    """Ranks that share a model which is sharded already."""

    def __init__(self, mesh: Mesh, numbering: "Numbering") -> None:
        """numbering: of the parameters of the whole model in its optimiser."""
        super().__init__(data_parallel_size="auto", tensor_parallel_size="auto", save_distributed_checkpoint=False)
        self.mesh, self.numbering = mesh, numbering

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        own = getattr(optimizer, "_optimizer", optimizer)
        numbers = self._numbers(own)
        return {
            "state": {numbers[i]: values for i, values in own.state_dict()["state"].items()},
            "param_groups": self.numbering.groups(own),
        }

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """`storage_options` is the format."""
        if storage_options == "folder":
            save_folder(Path(filepath), self._of_all_stages(outline(checkpoint)), shards_of(checkpoint))
            return
        content = self.whole_on_rank_zero(checkpoint)
        if self.is_global_zero:
            self.checkpoint_io.save_checkpoint(content, filepath, storage_options)

    def whole_on_rank_zero(self, content: dict[str, Any]) -> dict[str, Any]:
        """On rank 0 the content with whole tensors, on its CPU, those of all stages. All ranks call this together."""
        return self._of_all_stages(self._whole(content))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        return load_checkpoint(checkpoint_path, mmap=True)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        load_parts(self.lightning_module, checkpoint["state_dict"])

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            own = optimizer.state_dict()["param_groups"]
            numbers = self._numbers(optimizer)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            parts = {
                i: {key: part_of_state(value, parameters[i]) for key, value in state["state"][numbers[i]].items()}
                for i in range(len(parameters))
                if numbers[i] in state["state"]
            }
            optimizer.load_state_dict({"state": parts, "param_groups": own})

    def _numbers(self, optimizer: Optimizer) -> list[int]:
        """The number in the whole model's optimiser of each parameter of this rank's."""
        assert self.lightning_module is not None
        names = {parameter: name for name, parameter in self.lightning_module.model.named_parameters()}  # type: ignore[operator,union-attr]
        return [self.numbering.number(names[p]) for group in optimizer.param_groups for p in group["params"]]

    def _of_all_stages(self, content: dict[str, Any]) -> dict[str, Any]:
        """On rank 0, what the first ranks of all stages have between them; on others, what they have."""
        if self.mesh.data_rank == 0 and self.mesh.sizes.stages > 1:
            parts: list[Any] = [None] * self.mesh.sizes.stages
            to_first = parts if self.is_global_zero else None
            dist.gather_object(content, to_first, group=self.mesh.stages.get_group(), group_dst=0)
            for part in parts[1:] if self.is_global_zero else []:
                merge(content, part)
        return content

    def _whole(self, state: dict[Any, Any]) -> dict[Any, Any]:
        """The ranks of a stage gather tensor after tensor; only the first keeps them, on its CPU."""

        def kept(tensor: Tensor) -> Tensor | None:
            gathered = whole(tensor.detach())
            return gathered.cpu() if self.mesh.data_rank == 0 else None

        result: dict[Any, Any] = tree_map_only(Tensor, kept, dict(state))
        return result


class Numbering:
    """How the optimiser of the whole model numbers its parameters: group by group."""

    def __init__(self, optimizer: Optimizer, model: torch.nn.Module) -> None:
        names = {parameter: name for name, parameter in model.named_parameters()}
        ordered = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        self._numbers = {name: number for number, name in enumerate(ordered)}
        self._groups = optimizer.state_dict()["param_groups"]

    def number(self, name: str) -> int:
        return self._numbers[name]

    def groups(self, optimizer: Optimizer) -> list[dict[str, Any]]:
        """Of the whole model, with the learning rate that this rank's optimiser has."""
        group = optimizer.param_groups[0]
        rate = group["lr"] / (group.get("lr_scale", 1.0) or 1.0)
        return [{**each, "lr": rate * each.get("lr_scale", 1.0)} for each in self._groups]


def part_of_state(value: Any | Stored, parameter: torch.nn.Parameter) -> Any:
    """This rank's part of a whole tensor of the parameter's shape, or with one number for each of its rows; other
    values as they are."""
    value = read(value)
    is_shared = isinstance(value, Tensor) and value.ndim > 0 and value.shape == parameter.shape[: value.ndim]
    return part_like(value, parameter) if is_shared else value


def merge(into: dict[Any, Any], other: Mapping[Any, Any]) -> None:
    """Add to a nested dict what another has beside it; where both have a value, the first stays."""
    for key, value in other.items():
        if key not in into:
            into[key] = value
        elif isinstance(into[key], dict) and isinstance(value, Mapping):
            merge(into[key], value)
        elif isinstance(into[key], list) and isinstance(value, list):
            for mine, theirs in zip(into[key], value):
                if isinstance(mine, dict) and isinstance(theirs, Mapping):
                    merge(mine, theirs)
