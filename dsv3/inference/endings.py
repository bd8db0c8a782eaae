"""Likelihoods of a few endings of many prompts: prompts are read together, then all their endings."""

from collections.abc import Sequence

import torch

from dsv3.inference.backend import Backend
from dsv3.inference.engine import PREFILL


@torch.inference_mode()
def score_endings(
    backend: Backend, prompts: Sequence[Sequence[int]], endings: Sequence[Sequence[Sequence[int]]]
) -> list[list[float]]:
    """log p(ending | prompt), in nats, of every prompt's endings, none of which is empty.

    Rows of `backend` are taken and given back. Endings that begin alike share the row of their beginning.
    """
    after = _read_prompts(backend, prompts)
    scores = [[float(logp_V[ending[0]]) for ending in own] for logp_V, own in zip(after, endings, strict=True)]
    begun = {(p, tuple(ending[:-1])) for p, own in enumerate(endings) for ending in own if len(ending) > 1}
    rows = {beginning: len(prompts) + i for i, beginning in enumerate(sorted(begun))}
    for (p, _), row in rows.items():
        backend.add(row, drafts=False)
        backend.copy(p, row, len(prompts[p]))
    if rows:
        wanted = [len(beginning) for _, beginning in rows]
        logits = backend.read(list(rows.values()), [list(beginning) for _, beginning in rows], wanted)
        later = {key: logits_KV.log_softmax(-1) for key, logits_KV in zip(rows, logits, strict=True)}
        for p, own in enumerate(endings):
            for e, ending in enumerate(own):
                if len(ending) > 1:
                    rest_K = torch.tensor(ending[1:], device=later[p, tuple(ending[:-1])].device)
                    scores[p][e] += float(later[p, tuple(ending[:-1])].gather(1, rest_K[:, None]).sum())
    for row in (*range(len(prompts)), *rows.values()):
        backend.drop(row)
    return scores


def _read_prompts(backend: Backend, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-probabilities [V] after each prompt; row i of the backend holds prompt i."""
    for row in range(len(prompts)):
        backend.add(row, drafts=False)
    after: dict[int, torch.Tensor] = {}
    for start in range(0, max(map(len, prompts)), PREFILL):
        rows = [row for row, prompt in enumerate(prompts) if start < len(prompt)]
        pieces = [list(prompts[row][start : start + PREFILL]) for row in rows]
        wanted = [int(start + PREFILL >= len(prompts[row])) for row in rows]
        for row, count, logits_KV in zip(rows, wanted, backend.read(rows, pieces, wanted), strict=True):
            if count:
                after[row] = logits_KV[-1].log_softmax(-1)
    return [after[row] for row in range(len(prompts))]
