"""P = softmax(S + mask) by rows: scores become weights that are positive and sum to 1.

    row m   s_0 s_1 ... s_m | s_m+1 ...      m_i = max s            the maximum is subtracted first, so that
            visible         | -inf           l_i = sum e^(s - m_i)  e never overflows; masked keys are -inf
                            |  0  0  0       p   = e^(s - m_i) / l_i

A row of up to ONE_PASS keys stays in registers: read once, written once, which is the floor. Longer rows are walked
twice in tiles; the first walk rescales l_i whenever m_i grows (Milakov and Gimelshein, "Online normalizer calculation
for softmax", 2018). A row that sees no key gives zeros. Tiles of S + mask come from load_logits (tiles.py); the
gradient dS = P * (dP - rowsum(P * dP)) is built alike (softmax_backward.py).
"""

import torch

from triton_attention.device import DEVICE  # before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention.checks import check_blocks, check_dropout, check_mask, check_tensors
from triton_attention.dropout import dropout
from triton_attention.launch import launch, mask_arguments
from triton_attention.operators import Function, define_op, differentiate, like_first, replayable
from triton_attention.softmax_backward import MaskGradient, SoftmaxBackward, softmax_tangent
from triton_attention.tile_choice import ONE_PASS, row_tile  # noqa: F401  public here
from triton_attention.tiles import (
    exp, finite, head_ptr, inverse_sum, load_logits, split_program, store_tile, visible_end,
)


@triton.jit
def _whole_rows(
    S, MASK, P, offs_m, diagonal,
    ACC: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Rows of which no key from BLOCK_N on is visible."""
    offs_n = tl.arange(0, BLOCK_N)
    s = load_logits(S, MASK, offs_m, offs_n, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS)
    p = exp(s - finite(tl.max(s, 1))[:, None])
    store_tile(*P, offs_m, offs_n, p * inverse_sum(tl.sum(p, 1))[:, None])


@triton.jit
def _softmax_kernel(
    s_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an,
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    H, M, N, diagonal,
    CAUSAL: tl.constexpr, FILLED: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
    WHOLE_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    pid = tl.num_programs(0) - 1 - tl.program_id(0)  # backwards: the end of S is what L2 still holds
    tiles = tl.cdiv(M, BLOCK_M)
    tile, off_b, off_h = split_program(pid, tiles, H)
    if not FILLED:  # a short row beside a long one, so that as many bytes are on their way at any time
        tile = tl.where(tile % 2 == 0, tile // 2, tiles - 1 - tile // 2)
    start_m, end_n = tile * BLOCK_M, N
    if CAUSAL:  # what no query of the tile sees is not read, and zero, or not written
        end_n = visible_end(start_m, N, diagonal, BLOCK_M)
    last_n = N if FILLED else end_n
    S = (head_ptr(s_ptr, stride_sb, stride_sh, off_b, off_h), (stride_sm, stride_sn), (M, N))
    P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h), (stride_pm, stride_pn), (M, last_n))
    MASK = (mask_ptr, (stride_am, stride_an), (M, N))
    if HAS_MASK or HAS_BIAS:
        MASK = (head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h), (stride_am, stride_an), (M, N))
    ACC: tl.constexpr = tl.float64 if s_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if WHOLE_ROW:
        if not FILLED and BLOCK_N >= 64 and last_n <= BLOCK_N // 4:
            _whole_rows(S, MASK, P, offs_m, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS, BLOCK_N // 4)
        elif not FILLED and BLOCK_N >= 64 and last_n <= BLOCK_N // 2:
            _whole_rows(S, MASK, P, offs_m, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS, BLOCK_N // 2)
        else:
            _whole_rows(S, MASK, P, offs_m, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS, BLOCK_N)
    else:
        m_i = tl.full([BLOCK_M], float("-inf"), ACC)
        l_i = tl.zeros([BLOCK_M], ACC)
        for start_n in range(0, end_n, BLOCK_N):
            s = load_logits(S, MASK, offs_m, start_n + offs_n, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS)
            m_new = tl.maximum(m_i, tl.max(s, 1))
            l_i = l_i * exp(m_i - finite(m_new)) + tl.sum(exp(s - finite(m_new)[:, None]), 1)
            m_i = m_new
        m_i, l_i = finite(m_i), inverse_sum(l_i)
        for start_n in range(0, last_n, BLOCK_N):
            s = load_logits(S, MASK, offs_m, start_n + offs_n, diagonal, ACC, CAUSAL, HAS_MASK, HAS_BIAS)
            store_tile(*P, offs_m, start_n + offs_n, exp(s - m_i[:, None]) * l_i[:, None])


@define_op("softmax", fake=like_first)
def softmax_op(
    scores: torch.Tensor, mask: torch.Tensor | None, diagonal: int | None, block_m: int | None, block_n: int | None,
    filled: bool = True,
) -> torch.Tensor:
    """P like scores [B, H, M, N]; mask is bool (True: may attend) or floating (added), 4-D with sizes 1 or full. The
    future, keys n > m + diagonal, is 0, or unwritten if not filled."""
    (B, H, M, N), probs = scores.shape, scores.new_empty(scores.shape)
    if probs.numel() == 0:
        return probs
    mask_strides, constants = mask_arguments(mask, scores.shape)
    tile = row_tile(scores, diagonal is not None, block_m, block_n)
    launch(
        _softmax_kernel, B * H * triton.cdiv(M, tile["BLOCK_M"]),
        scores, *scores.stride(), mask, *mask_strides, probs, *probs.stride(),
        H, M, N, diagonal or 0, CAUSAL=diagonal is not None, FILLED=filled or diagonal is None, **constants, **tile,
    )
    return probs


class Softmax(Function):
    """P of scores and mask; the arguments are those of softmax_op."""

    op = softmax_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, mask, ctx.diagonal, *_ = inputs
        ctx.mask_shape, ctx.mask_dtype = (None, None) if mask is None else (list(mask.shape), mask.dtype)
        ctx.filled = inputs[5]
        Softmax.save(ctx, output)

    @staticmethod
    def backward(ctx, dp):
        ds = differentiate(SoftmaxBackward, *ctx.saved_tensors, dp, ctx.diagonal, True)
        dmask = None
        if ctx.needs_input_grad[1]:
            dmask = differentiate(MaskGradient, ds, ctx.mask_shape, ctx.mask_dtype)
        return ds, dmask, None, None, None, None

    @staticmethod
    def tangent(ctx, ds, dmask, *_):
        return softmax_tangent(*ctx.saved_tensors, ds, dmask, ctx.diagonal, ctx.filled)


def softmax_dropout(scores, mask, diagonal, dropout_p, block_m=None, block_n=None, filled=True):
    """attention_softmax behind its checks: mask 4-D or None, query m sees the keys n <= m + diagonal; the others get
    0, or are left unwritten if not filled."""
    if dropout_p == 0.0:
        return differentiate(Softmax, scores, mask, diagonal, block_m, block_n, filled)
    return dropout(differentiate(Softmax, scores, mask, diagonal, block_m, block_n, False), dropout_p, diagonal, filled)


@replayable
def attention_softmax(
    scores: torch.Tensor, attn_mask: torch.Tensor | None = None, *, is_causal: bool = False, dropout_p: float = 0.0,
    block_m: int | None = None, block_n: int | None = None,
) -> torch.Tensor:
    """Attention weights, P = softmax(S + mask) over the keys.

    Args:
        scores: [B, H, M, N], float16, bfloat16, float32 or float64, any strides.
        attn_mask: bool (True: may attend) or floating (added to the scores, in float32), of a shape that broadcasts
            to [B, H, M, N]; or a torch.nn.attention.bias.CausalBias. Size-1 dimensions are not expanded in memory.
        is_causal: query m sees the keys n <= m only; may be combined with attn_mask, then both hold.
        dropout_p: probability with which a weight is set to zero; the others are divided by 1 - dropout_p. Drawn from
            torch's generator of the device; depends on (b, h, m, n), never on tile sizes.
        block_m, block_n: rows and keys per step, powers of two from 16; chosen from N if None.

    Returns:
        [B, H, M, N] in the dtype of scores, computed in float32 (float64 for float64). A query that may attend to
        nothing gives zeros, and its gradient is zero; a NaN stays in its row. Differentiable, also twice, also by
        a floating mask.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a device, or a tile that does not fit.
    """
    check_tensors(scores=scores)
    mask, diagonal = check_mask(attn_mask, is_causal, scores.shape, scores.device)
    dropout_p = check_dropout(dropout_p)
    block_m, block_n = check_blocks(block_m=block_m, block_n=block_n)
    return softmax_dropout(scores, mask, diagonal, dropout_p, block_m, block_n)


if __name__ == "__main__":
    s = torch.randn(2, 3, 37, 301, device=DEVICE)
    error = (attention_softmax(s) - s.softmax(-1)).abs().max().item()
    print(f"softmax {tuple(s.shape)} on {DEVICE}: max |error| {error:.1e}")
