"""P = softmax(S + mask) and its mean over the heads, [B, M, N], from the registers that hold the rows.

    for each head    P = softmax of the rows      one program has the same rows of all heads, one after the other:
                     total += P                   the mean costs its own bytes, P is not read again

For inference, and rows of up to ONE_PASS / 2 keys: it has no derivative. Where there is no mask, mean_weights.py does
without S and P.
"""

import torch

import triton
import triton.language as tl

from triton_attention.launch import launch, mask_arguments
from triton_attention.operators import define_op
from triton_attention.tile_choice import row_tile
from triton_attention.tiles import exp, finite, head_ptr, inverse_sum, load_logits, split_program, store_tile


@triton.jit
def _softmax_mean_kernel(
    s_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an,
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    mean_ptr, H, M, N, diagonal,
    CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the end of S is what L2 still holds
    tile, off_b, _ = split_program(pid, tl.cdiv(M, BLOCK_M), 1)
    ACC: tl.constexpr = tl.float64 if s_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_n = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for h in range(0, H):
        off_h = off_b * 0 + h
        S = (head_ptr(s_ptr, stride_sb, stride_sh, off_b, off_h), (stride_sm, stride_sn), (M, N))
        P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h), (stride_pm, stride_pn), (M, N))
        MASK = (mask_ptr, (stride_am, stride_an), (M, N))
        if HAS_MASK or HAS_BIAS:
            MASK = (head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h), (stride_am, stride_an), (M, N))
        s = load_logits(S, MASK, offs_m, offs_n, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS)
        p = exp(s - finite(tl.max(s, 1))[:, None])
        p *= inverse_sum(tl.sum(p, 1))[:, None]
        store_tile(*P, offs_m, offs_n, p)
        total += p
    mean_ptr += off_b.to(tl.int64) * M * N
    store_tile(mean_ptr, (N, 1), (M, N), offs_m, offs_n, total / H)


@define_op("softmax_mean", fake=lambda s, mask, diagonal: (s.new_empty(s.shape), s.new_empty(s[:, 0].shape)))
def softmax_mean_op(
    scores: torch.Tensor, mask: torch.Tensor | None, diagonal: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(P like scores [B, H, M, N], its mean over the heads [B, M, N]), for N <= ONE_PASS / 2."""
    (B, H, M, N), probs = scores.shape, scores.new_empty(scores.shape)
    mean = scores.new_empty(B, M, N)
    if probs.numel() == 0:
        return probs, mean
    mask_strides, constants = mask_arguments(mask, scores.shape)
    tile = row_tile(scores, diagonal is not None)
    del tile["WHOLE_ROW"]
    launch(
        _softmax_mean_kernel, B * triton.cdiv(M, tile["BLOCK_M"]),
        scores, *scores.stride(), mask, *mask_strides, probs, *probs.stride(), mean, H, M, N, diagonal or 0,
        CAUSAL=diagonal is not None, **constants, **tile,
    )
    return probs, mean
