"""Prefix sharing: sequences with a common prefix are scored together, the prefix once.

Few-shot prompts repeat the same examples before every question, and the choices of one question repeat the question.
Sorted as sequences, rows that share a beginning lie side by side.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

SHORTEST_SHARED = 64
"""Tokens that rows must have in common before computing them once pays for the smaller batches that it makes."""


class Group(NamedTuple):
    shared: int  # leading tokens that all members have in common; 0: computed row by row
    members: list[int]  # indices of rows


def padded(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """int64 [B, longest]; zeros follow the shorter rows, where a causal model does not look."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)


def common_prefix(rows: Sequence[Sequence[int]]) -> int:
    """Length of the longest common beginning of the rows."""
    ordered = sorted(map(list, rows))
    first, last = ordered[0], ordered[-1]  # all others lie between
    length = 0
    for a, b in zip(first, last):
        if a != b:
            break
        length += 1
    return length


def group_by_prefix(heads: Sequence[Sequence[int]], shortest: int = SHORTEST_SHARED) -> list[Group]:
    """Part rows into groups that share at least `shortest` tokens, and one group of all others.

    `heads`: of each row the tokens that no logits are asked for, which is what can be shared. A row joins the group
    before it as long as that keeps at least half of what the group shared so far.
    """
    order = sorted(range(len(heads)), key=lambda i: list(heads[i]))
    groups: list[Group] = []
    alone: list[int] = []
    while order:
        members, shared = [order[0]], len(heads[order[0]])
        for index in order[1:]:
            kept = min(shared, common_prefix([heads[members[0]], heads[index]]))
            if kept < shortest or (len(members) > 1 and 2 * kept < shared):
                break
            members.append(index)
            shared = kept
        order = order[len(members) :]
        if len(members) > 1:
            groups.append(Group(shared, members))
        else:
            alone += members
    return [*groups, Group(0, alone)] if alone else groups
