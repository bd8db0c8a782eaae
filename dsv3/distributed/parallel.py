"""`parallel=`: which ranks share the experts, the layers and the rest of the weights. Imports no torch.

    world = stages x data        data = replicas x experts        experts = nodes x local

Expert parallelism is borrowed from data parallelism: the `experts` ranks that hold the experts of a layer between them
train on different rows, and everything but the experts is sharded over all `data` ranks (ZeRO-3, by FSDP2).
"""

from typing import Literal, NamedTuple, get_args

from dsv3.bounds import PositiveInt

ScheduleName = Literal["1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev"]


class Sizes(NamedTuple):
    """Ranks along each axis of the mesh, in the order in which ranks are numbered, the last axis first."""

    stages: int  # of the pipeline
    replicas: int  # groups of ranks that hold all experts between them
    nodes: int  # that such a group is spread over
    local: int  # ranks of such a group on one node

    @property
    def experts(self) -> int:
        """Ranks that hold the experts of a layer between them."""
        return self.nodes * self.local

    @property
    def data(self) -> int:
        """Ranks that read different rows."""
        return self.replicas * self.experts

    @property
    def world(self) -> int:
        return self.stages * self.data


class Parallel:
    """Several ranks. `sizes` says how many of them there are along each axis."""

    def __init__(
        self,
        *,
        experts: PositiveInt | None,
        nodes: PositiveInt | None,
        stages: PositiveInt | None,
        schedule: ScheduleName | None,
    ) -> None:
        """experts: ranks that hold the experts of a layer between them; null: all that read different rows.
        nodes: nodes that these are spread over, between which a token travels once; null: as the launch has it.
        stages: of the pipeline; null: one for every rank. schedule: the order of a pipeline's passes.
        """
        self.experts, self.nodes, self.stages, self.schedule = experts, nodes, stages, schedule

    def sizes(self, devices: int, num_nodes: int) -> Sizes:
        """Of `devices` ranks on each of `num_nodes` nodes.

        Raises:
            ValueError: they cannot be divided so.
        """
        world = devices * num_nodes
        there = f"trainer.devices={devices}" + (f" x trainer.num_nodes={num_nodes}" if num_nodes > 1 else "")
        stages = world if self.stages is None else self.stages
        if world % stages:
            raise ValueError(f"parallel.stages={stages}: must divide {there}")
        if stages > 1 and self.schedule is None:
            raise ValueError(
                f"parallel.schedule=null: a pipeline of {stages} stages needs one: {', '.join(get_args(ScheduleName))}"
            )
        data = world // stages
        experts = data if self.experts is None else self.experts
        if data % experts:
            per_stage = f" / parallel.stages={stages}" if stages > 1 else ""
            raise ValueError(f"parallel.experts={experts}: must divide {there}{per_stage}")
        nodes = max(1, experts // devices) if self.nodes is None else self.nodes
        if experts % nodes:
            raise ValueError(f"parallel.nodes={nodes}: must divide parallel.experts={experts}")
        return Sizes(stages, data // experts, nodes, experts // nodes)


class OneProcess(Parallel):
    """The model, the data and the experts in one process."""

    def __init__(self) -> None:
        super().__init__(experts=1, nodes=1, stages=1, schedule=None)

    def sizes(self, devices: int, num_nodes: int) -> Sizes:
        if devices * num_nodes != 1:
            raise ValueError(
                f"trainer.devices={devices}, trainer.num_nodes={num_nodes}: parallel=none is one process; several need "
                "parallel=sharded, parallel=experts or parallel=pipeline"
            )
        return Sizes(1, 1, 1, 1)
