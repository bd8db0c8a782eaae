"""KV-cache size per token: keys and values, or MLA latents.

The tokens that `memory=ngram` keeps, 8 bytes each, are not counted.

For comparison, `expanded` is multi-head attention of the same heads: a key and a value of its own for each. An
attention of H heads costs 2 H (d_qk + d_v) operations for each position it sees, so that half the slope of its
cost is the numbers that H keys and H values hold.
"""

from dsv3.planning.skeleton import AttentionLayer


def cache_bytes(attention: AttentionLayer, layers: int, number: float) -> dict[str, float]:
    """Bytes per token over all layers, and what a position costs expanded; `number`: bytes of one number."""
    expanded = (attention.flops(1) - attention.flops(0)) // 2
    return {
        "numbers_per_layer": attention.cache_numbers,
        "bytes": attention.cache_numbers * layers * number,
        "expanded_numbers_per_layer": expanded,
        "expanded_bytes": expanded * layers * number,
    }
