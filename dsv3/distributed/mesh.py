"""Meshes of ranks and what this rank is in them."""

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3.distributed.parallel import Sizes


class Mesh(NamedTuple):
    """The ranks of a run. Weights are sharded over `data`, those of experts over `experts` and `replicas`."""

    sizes: Sizes
    data: DeviceMesh  # of this rank's stage: ranks that read different rows
    replicas: DeviceMesh  # ranks with the same experts
    experts: DeviceMesh  # ranks that hold the experts of a layer between them
    nodes: DeviceMesh  # of these, those with the same place on their node
    local: DeviceMesh  # of these, those on this node
    stages: DeviceMesh  # ranks that a micro-batch passes through

    @property
    def stage(self) -> int:
        return self.stages.get_local_rank()

    @property
    def data_rank(self) -> int:
        return self.data.get_local_rank()

    @property
    def expert_rank(self) -> int:
        return self.experts.get_local_rank()


def make_mesh(sizes: Sizes, device: torch.device | str) -> Mesh:
    """The meshes of an initialised process group. All ranks must call this together.

    Raises:
        ValueError: the process group has another number of ranks.
    """
    if dist.get_world_size() != sizes.world:
        raise ValueError(
            f"{dist.get_world_size()} processes were started, and trainer.devices and trainer.num_nodes ask for "
            f"{sizes.world}"
        )
    kind = torch.device(device).type
    names = ("stages", "data")
    dense = init_device_mesh(kind, (sizes.stages, sizes.data), mesh_dim_names=names)
    sparse = init_device_mesh(
        kind, (sizes.stages, sizes.replicas, sizes.experts), mesh_dim_names=("stages", "replicas", "experts")
    )
    hops = init_device_mesh(
        kind,
        (sizes.stages, sizes.replicas, sizes.nodes, sizes.local),
        mesh_dim_names=("stages", "replicas", "nodes", "local"),
    )
    return Mesh(
        sizes,
        dense["data"],
        sparse["replicas"],
        sparse["experts"],
        hops["nodes"],
        hops["local"],
        dense["stages"],
    )
