"""Micro-batches: packed sequences as the tensors that a model reads."""

import numpy as np
import torch

from dsv3.contracts import IGNORE, MicroBatch, Tokenizer


def micro_batch(
    tokens: np.ndarray, domains: np.ndarray, *, tokenizer: Tokenizer, isolate: bool, bos_is_target: bool
) -> MicroBatch:
    """Rows of T + 1 tokens, and the domain of each token, as inputs and the tokens that follow them.

    A document begins at each BOS, and at the start of a row. Padding has document id 0 and is no target. `isolate`:
    positions restart in each document, and the last token of a document has no target.
    """
    inputs, targets = tokens[:, :-1], tokens[:, 1:].copy()
    starts = inputs == tokenizer.bos
    starts[:, 0] = True
    document_ids = np.where(inputs == tokenizer.pad, 0, np.cumsum(starts, axis=1))
    positions = np.broadcast_to(np.arange(inputs.shape[1]), inputs.shape)
    if isolate:
        positions = positions - np.maximum.accumulate(np.where(starts, positions, 0), axis=1)
    targets[targets == tokenizer.pad] = IGNORE
    if isolate or not bos_is_target:
        targets[targets == tokenizer.bos] = IGNORE
    arrays = (inputs, targets, positions, document_ids, domains[:, :-1])
    tokens_BT, targets_BT, positions_BT, document_ids_BT, domains_BT = (
        torch.from_numpy(np.array(array, dtype=np.int64, order="C")) for array in arrays
    )
    return MicroBatch(tokens_BT, targets_BT, positions_BT, document_ids_BT, domains_BT)
