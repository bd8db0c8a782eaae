"""FlexAttention's blocks against the mask that they stand for; the kernels themselves need a GPU, but for the forward
pass without a gradient."""

import pytest
import torch
from torch import Tensor

from plugins.attention.causal import causal_attention
from plugins.attention.documents import BLOCK, block_mask, document_attention
from plugins.attention.masks import attention_mask

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


def random_ids(rows: int, length: int, seed: int) -> Tensor:
    """Documents of very unlike lengths, numbered from 1; the last row ends in padding."""
    generator = torch.Generator().manual_seed(seed)
    rarely = torch.rand(rows, 1, generator=generator) / 20
    ids_BT = (torch.rand(rows, length, generator=generator) < rarely).cumsum(1) + 1
    ids_BT[-1, length - length // 5 :] = 0
    return ids_BT


@pytest.mark.parametrize("length", [1, 100, 128, 129, 512, 700])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_are_those_of_the_mask(length: int, seed: int) -> None:
    ids_BT = random_ids(3, length, seed)
    expected = attention_mask(length, length, ids_BT, ids_BT.device)
    assert expected is not None
    blocks = -(-length // BLOCK)
    padded = torch.zeros(3, blocks * BLOCK, blocks * BLOCK, dtype=torch.bool)
    padded[:, :length, :length] = expected.squeeze(1)
    tiles = padded.unflatten(2, (blocks, BLOCK)).unflatten(1, (blocks, BLOCK)).transpose(2, 3).flatten(3)
    mask = block_mask(ids_BT)
    read = torch.zeros(3, blocks, blocks, dtype=torch.int64)
    whole = torch.zeros_like(read)
    for counts, indices, of in (
        (mask.kv_num_blocks, mask.kv_indices, (read,)),
        (mask.full_kv_num_blocks, mask.full_kv_indices, (read, whole)),
    ):
        for row in range(3):
            for query in range(blocks):
                for key in indices[row, 0, query, : counts[row, 0, query]].tolist():
                    for found in of:
                        found[row, query, key] += 1
    assert torch.equal(read, tiles.any(-1).long()), "each block that is not empty is read once"
    beyond_I1J = (torch.arange(blocks * BLOCK) >= length).view(blocks, 1, BLOCK, 1)
    nothing_masked = (tiles | beyond_I1J.expand(-1, blocks, -1, BLOCK).flatten(2)).all(-1)
    assert torch.equal(whole.bool(), nothing_masked & tiles.any(-1))
    for query, key in ((0, 0), (length - 1, 0), (length // 2, length // 3)):
        seen = mask.mask_mod(torch.tensor(1), torch.tensor(0), torch.tensor(query), torch.tensor(key))
        assert bool(seen) == bool(expected[1, 0, query, key])


@pytest.mark.slow
def test_the_kernel_reads_the_blocks() -> None:
    """The kernel for the CPU, which has no backward pass."""
    ids_BT = random_ids(2, 300, 5)
    q, k, v = (torch.randn(2, 2, 300, width) for width in (24, 24, 16))
    with torch.no_grad():
        found = document_attention(q, k, v, ids_BT)
        torch.testing.assert_close(found, causal_attention(q, k, v, document_ids_BT=ids_BT))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("widths", [(192, 128), (48, 32), (64, 64)])
@pytest.mark.parametrize("length", [512, 700])
def test_gpus_have_the_result_and_gradients_of_the_cpu(
    dtype: torch.dtype, widths: tuple[int, int], length: int
) -> None:
    ids_BT = random_ids(2, length, 7)
    inputs = [torch.randn(2, 3, length, width) for width in (widths[0], *widths)]
    weights = torch.randn(2, 3, length, widths[1])
    found = []
    for device in ("cuda", "cpu"):
        leaves = [x.to(dtype).to(device, dtype if device == "cuda" else torch.float32).requires_grad_() for x in inputs]
        out = causal_attention(*leaves, document_ids_BT=ids_BT.to(device))
        grads = torch.autograd.grad(out, leaves, weights.to(device, out.dtype))
        found.append([tensor.detach().cpu().float() for tensor in (out, *grads)])
    for ours, theirs in zip(*found, strict=True):
        assert (ours - theirs).norm() <= (1e-5 if dtype == torch.float32 else 1e-2) * theirs.norm()
