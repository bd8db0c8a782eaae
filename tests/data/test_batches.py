"""Rows as tensors: targets, document ids, positions."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.batches import micro_batch
from data.tokenizer import ByteLevelBPE
from dsv3.contracts import IGNORE, MicroBatch


def batch(tokenizer: ByteLevelBPE, row: list[int], *, isolate: bool, bos_is_target: bool = True) -> MicroBatch:
    tokens = np.array([row])
    return micro_batch(
        tokens, np.full_like(tokens, 2), tokenizer=tokenizer, isolate=isolate, bos_is_target=bos_is_target
    )


@given(data=st.data(), isolate=st.booleans(), bos_is_target=st.booleans())
def test_against_a_loop(tokenizer: ByteLevelBPE, data: st.DataObject, isolate: bool, bos_is_target: bool) -> None:
    ordinary = st.sampled_from([tokenizer.bos, tokenizer.eos, 300, 301, 302])
    row = data.draw(st.lists(ordinary, min_size=2, max_size=20)) + [tokenizer.pad] * data.draw(st.integers(0, 4))
    result = batch(tokenizer, row, isolate=isolate, bos_is_target=bos_is_target)
    document, position = 0, -1
    for t, token in enumerate(row[:-1]):
        if t == 0 or token == tokenizer.bos:
            document += 1
            position = -1 if isolate else position
        position += 1
        following = row[t + 1]
        is_target = following != tokenizer.pad and not (following == tokenizer.bos and (isolate or not bos_is_target))
        assert result.tokens_BT[0, t] == token
        assert result.targets_BT[0, t] == (following if is_target else IGNORE)
        assert result.positions_BT[0, t] == position
        assert result.document_ids_BT[0, t] == (0 if token == tokenizer.pad else document)
        assert result.domains_BT[0, t] == 2


def test_isolated_positions_restart_in_each_document(tokenizer: ByteLevelBPE) -> None:
    bos, eos = tokenizer.bos, tokenizer.eos
    row = [300, eos, bos, 301, eos, bos, 302]
    assert batch(tokenizer, row, isolate=True).positions_BT.tolist() == [[0, 1, 0, 1, 2, 0]]
    assert batch(tokenizer, row, isolate=False).positions_BT.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert batch(tokenizer, row, isolate=True).document_ids_BT.tolist() == [[1, 1, 2, 2, 2, 3]]
    assert batch(tokenizer, row, isolate=True).targets_BT.tolist() == [[eos, IGNORE, 301, eos, IGNORE, 302]]
