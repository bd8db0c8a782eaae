"""Activation memory: bytes per token that one block saves for backward.

Kept per token, in numbers times the bytes of their kind (d width; attention's matrices by role: a the outputs of
the down-projections, l the inputs of up-projections that are not the layer's own, q the outputs of the up-projections,
o the inputs of W_O; f, m, S, E, K as in parameters.py):

                          none                                    selective
    norm's input, twice   2 d activation                          the same
    norm's output, twice  2 d linear_input                        -
    attention             a activation + l linear_input           a activation
                          + q activation + o attention_output     + o attention_output
    dense FFN             2 f swiglu_input + f linear_input       2 f swiglu_input
    shared experts        the same with S                         the same with S
    router                4 E (FP32 affinities)                   the same
    routed experts        K (d linear_input + 2 m swiglu_input    K (d linear_input + 2 m swiglu_input)
                          + m linear_input)

A gate multiplies its expert's row before W_down, so that the output of W_down is not needed for the gate's gradient.
`full` keeps each block's input, d activation, only.
Left out, being small: softmax and norm statistics, indices, RoPE's tables. A key that all heads share (MLA's k_R) is
counted once, as a kernel that reads it once needs it. Where a layer's input feeds several matrices, it is kept once.
"""

from dsv3.planning.recipe import Formats, Recomputation
from dsv3.planning.skeleton import Skeleton

AFFINITY = LOGIT = 4
"""Bytes: both are FP32 in every format."""


def block_activations(s: Skeleton, f: Formats, recompute: Recomputation, *, moe: bool) -> float:
    """Bytes per token of one block."""
    if recompute == "full":
        return s.dim * f.activation
    norms = 2 * s.dim * (f.activation + (f.linear_input if recompute == "none" else 0))
    attention = _attention(s, f, recompute)
    if not moe:
        return norms + attention + _swiglu(s.inter_dim, f, recompute)
    expert = s.dim * f.linear_input + _swiglu(s.expert_dim, f, recompute)
    router = s.n_experts * AFFINITY
    return norms + attention + router + _swiglu(s.shared_dim, f, recompute) + s.top_k * expert


def mtp_activations(s: Skeleton, f: Formats, recompute: Recomputation) -> float:
    """Bytes per token of one MTP module outside its block: its two norms' inputs, and the input of its projection."""
    if recompute == "full":
        return s.dim * f.activation
    return 2 * s.dim * (f.activation + (f.linear_input if recompute == "none" else 0))


def logits(s: Skeleton) -> int:
    """Bytes per token of the FP32 logits of the main model and of each MTP depth."""
    return (1 + s.mtp.depth) * s.vocab_size * LOGIT


def _attention(s: Skeleton, f: Formats, recompute: Recomputation) -> float:
    matrices = s.attention.matrices
    down = sum(m.outputs for m in matrices if m.role == "attention_down")
    into_out = sum(m.inputs for m in matrices if m.role == "attention_out")
    kept = down * f.activation + into_out * f.attention_output
    if recompute == "none":
        up = [m for m in matrices if m.role == "attention_up"]
        latents = sum(m.inputs for m in up if m.inputs != s.dim)
        kept += latents * f.linear_input + sum(m.outputs for m in up) * f.activation
    return kept


def _swiglu(width: int, f: Formats, recompute: Recomputation) -> float:
    return width * (2 * f.swiglu_input + (f.linear_input if recompute == "none" else 0))
