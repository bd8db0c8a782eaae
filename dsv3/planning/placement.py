"""Redundant-expert placement for expert parallelism (report, section 3.4), by the method of DeepSeek's EPLB.

The GPUs that share the experts of a layer wait for the most loaded of them. Copies of heavily loaded experts, and a
choice of which experts stand together, even the load out. With E experts and R redundant ones on P GPUs, every GPU has
S = (E + R) / P slots, one replica in each, and the load of an expert is split evenly over its replicas:

    load of GPU p        L_p = sum over its slots s of l_i / c_i,  i = experts_PS[p, s]
    peak relative load   max_p L_p / mean_p L_p                    1 = balanced

where l_i is the load of expert i and c_i >= 1 the number of its replicas. A layer is placed in three steps:

    1. groups to nodes   as many of the router's groups to each node, so that a token stays on few nodes
    2. replicas          on each node R / nodes times: one more replica of the expert with the largest l_i / c_i
    3. replicas to GPUs  S replicas to each GPU of the node

Steps 1 and 3 pack greedily: the heaviest first, each into the least loaded bin that has room. Where the groups do not
divide by the nodes, all experts are one group and all GPUs one node ("global" instead of "hierarchical").

Letters: E experts, P GPUs, S slots of a GPU, B bins, M items.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Load = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Deployment:
    """The GPUs that share the experts of every layer.

    n_groups: equal groups of neighbouring experts that the router limits a token's choice by; 1: no limit.
    redundant: R, replicas beyond one for each expert.
    """

    n_experts: int
    n_groups: int
    gpus: int
    nodes: int
    redundant: int

    @property
    def slots(self) -> int:
        """S, replicas on each GPU."""
        return (self.n_experts + self.redundant) // self.gpus

    @property
    def is_hierarchical(self) -> bool:
        return self.n_groups % self.nodes == 0

    def problems(self) -> list[str]:
        """What must hold for the options of these names and does not, each with the nearest right values."""
        found = []
        if self.gpus % self.nodes:
            divisors = ", ".join(str(n) for n in range(1, self.gpus + 1) if self.gpus % n == 0)
            found.append(f"nodes={self.nodes}: must divide gpus={self.gpus}; take one of {divisors}")
        if too_many := (self.n_experts + self.redundant) % self.gpus:
            nearest = [self.redundant - too_many, self.redundant - too_many + self.gpus]
            values = " or ".join(str(n) for n in nearest if n >= 0)
            total = f"{self.n_experts} experts and the redundant ones together"
            found.append(f"redundant={self.redundant}: {total} must be divisible by gpus={self.gpus}; take {values}")
        return found


def place(load_E: Load, d: Deployment) -> list[Indices]:
    """The experts in the slots of each GPU, in order: P arrays of S indices. No worse on `load_E` than `in_order`.

    Packing greedily is not optimal and may do worse than the order of the experts by chance. Then their order is kept,
    and the spare slots of a GPU repeat its own experts. That cannot happen where experts are no more than GPUs: each
    has S replicas or more, so that no S of them exceed the heaviest expert.
    """
    nodes, groups = (d.nodes, d.n_groups) if d.is_hierarchical else (1, 1)
    experts_of_groups = np.arange(d.n_experts).reshape(groups, -1)
    packed: list[Indices] = []
    for chosen in pack(load_E[experts_of_groups].sum(1), nodes):
        experts = experts_of_groups[chosen].ravel()
        replicas = experts[replicate(load_E[experts], d.redundant // nodes)]
        share_M = load_E[replicas] / replica_count([replicas], d.n_experts)[replicas]
        packed += [np.sort(replicas[items]) for items in pack(share_M, d.gpus // nodes)]
    ordered = in_order(d)
    if gpu_load(packed, load_E).max() <= gpu_load(ordered, load_E).max():
        return packed
    return [np.sort(np.resize(own, d.slots)) for own in ordered]


def in_order(d: Deployment) -> list[Indices]:
    """The experts of each GPU without redundant ones: in order, as even as can be."""
    gpu_E = np.arange(d.n_experts) * d.gpus // d.n_experts
    return [np.flatnonzero(gpu_E == gpu) for gpu in range(d.gpus)]


def pack(load_M: Load, bins: int) -> list[list[int]]:
    """M items into bins, M / B in each: the heaviest first, each into the least loaded bin that has room."""
    room = len(load_M) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    load_B = np.zeros(bins)
    for item in np.argsort(-load_M, kind="stable"):
        lightest = int(np.argmin(load_B))
        packed[lightest].append(int(item))
        load_B[lightest] += load_M[item] if len(packed[lightest]) < room else np.inf
    return packed


def replicate(load_E: Load, redundant: int) -> Indices:
    """The expert of each of E + R replicas: every expert once, then the redundant ones.

    No other choice of them has a smaller largest l_i / c_i.
    """
    count_E = np.ones(len(load_E), dtype=np.int64)
    experts = list(range(len(load_E)))
    for _ in range(redundant):
        heaviest = int(np.argmax(load_E / count_E))
        count_E[heaviest] += 1
        experts.append(heaviest)
    return np.array(experts)


def replica_count(placement: Sequence[Indices], n_experts: int) -> Indices:
    """c_i, the number of replicas of each expert; 0 for one that does not stand there."""
    return np.bincount(np.concatenate(placement), minlength=n_experts)


def gpu_load(placement: Sequence[Indices], load_E: Load) -> Load:
    """L_p, the load of each GPU."""
    share_E = load_E / replica_count(placement, len(load_E))
    return np.array([share_E[experts].sum() for experts in placement])


def relative(load_P: Load) -> Any:
    """Load over its mean, whose largest is the peak."""
    return load_P / load_P.mean()
