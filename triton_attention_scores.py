"""S = scale * Q K^T: how well each query matches each key.

                 K^T   D x N
                +----+----+----+      a program owns BLOCK_M queries, keeps them in registers and walks
                |    | k  |    |      SPAN tiles of BLOCK_N keys, one dot and one store each
    Q   M x D   +----+----+----+
      +----+    +----+----+----+
      | q  |    | s  | s  |-inf|      causal: tiles above the diagonal cost no dot, and nothing at all
      +----+    +----+----+----+      where the next stage does not read them (fill=None)

S is the largest tensor of attention by far: B H M N elements written for B H (M + N) D read, so this kernel is as
fast as its stores. It is linear in Q and in K, and its gradients dQ = scale * dS K, dK = scale * dS^T Q are the
product of triton_attention_values.py. Vaswani et al., "Attention Is All You Need", section 3.2.1.
"""

import torch

from triton_attention.device import DEVICE  # before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention.checks import (
    autocast, check_blocks, check_flag, check_heads, check_scale, check_shape, check_tensors,
)
from triton_attention.launch import launch
from triton_attention.operators import Function, define_op, differentiate, matmul_flops, replayable
from triton_attention.tile_choice import TUNED, compile_options, dot_precision, tile_for
from triton_attention.tiles import dot, head_ptr, load_tile, split_program, store_tile, visible


@triton.jit
def _scores_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    s_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    scale, H, GROUP, M, N, diagonal,
    D: tl.constexpr, CAUSAL: tl.constexpr, FILLED: tl.constexpr, MINUS_INF: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):
    row_tiles, spans = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N * SPAN)
    tile, off_b, off_h = split_program(tl.program_id(0), row_tiles * spans, H)
    start_m, first_n = tile // spans * BLOCK_M, tile % spans * (BLOCK_N * SPAN)
    Q = (head_ptr(q_ptr, stride_qb, stride_qh, off_b, off_h), (stride_qm, stride_qd), (M, D))
    K_T = (head_ptr(k_ptr, stride_kb, stride_kh, off_b, off_h // GROUP), (stride_kd, stride_kn), (D, N))
    S = (head_ptr(s_ptr, stride_sb, stride_sh, off_b, off_h), (stride_sm, stride_sn), (M, N))
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    q = load_tile(*Q, offs_m, offs_d)

    fill = float("-inf") if MINUS_INF else 0.0
    last_n = tl.minimum(first_n + BLOCK_N * SPAN, N)
    end_n = last_n
    if CAUSAL:  # the last query of the tile sees the keys below end_n
        end_n = tl.maximum(tl.minimum(last_n, start_m + BLOCK_M + diagonal), first_n)
    for start_n in range(first_n, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k_t = load_tile(*K_T, offs_d, offs_n)
        s = dot(q, k_t, tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        for start_d in range(BLOCK_D, D, BLOCK_D):  # only heads wider than BLOCK_D
            q_e, k_e = load_tile(*Q, offs_m, start_d + offs_d), load_tile(*K_T, start_d + offs_d, offs_n)
            s = dot(q_e, k_e, s, PRECISION)
        s *= scale
        if CAUSAL and FILLED:
            s = tl.where(visible(offs_m, offs_n, diagonal), s, fill)
        store_tile(*S, offs_m, offs_n, s)
    if CAUSAL and FILLED:
        future = tl.zeros([BLOCK_M, BLOCK_N], tl.float32) + fill
        for start_n in range(tl.cdiv(end_n - first_n, BLOCK_N) * BLOCK_N + first_n, last_n, BLOCK_N):
            store_tile(*S, offs_m, start_n + tl.arange(0, BLOCK_N), future)


def _scores_shape(q, k, scale, diagonal, fill, block_m, block_n):
    return q.new_empty(*q.shape[:3], k.shape[2])


@define_op(
    "scores", fake=_scores_shape, hopper="scores", flops=lambda q, k, *_: matmul_flops(q, k[2], q[3])
)
def scores_op(
    q: torch.Tensor, k: torch.Tensor, scale: float, diagonal: int | None, fill: float | None,
    block_m: int | None, block_n: int | None,
) -> torch.Tensor:
    """S [B, H, M, N] of q [B, H, M, D] and k [B, Hk, N, D]; the future is `fill`, 0 or -inf, or unwritten if None."""
    (B, H, M), D, (Hk, N) = q.shape[:3], int(q.shape[3]), k.shape[1:3]
    s = q.new_empty(B, H, M, N)
    if s.numel() == 0:
        return s
    if D == 0:  # sums over nothing
        s.zero_()
        return s if diagonal is None or not fill else s.masked_fill_(s.new_ones(M, N).triu(diagonal + 1).bool(), fill)
    if q.dtype == torch.float64:  # a kernel's scalar arguments are float32
        q, scale = q * scale, 1.0
    tile = tile_for("scores", q.dtype, D, diagonal is not None, q.device, block_m, block_n)
    programs = B * H * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N * tile.SPAN)
    launch(
        _scores_kernel, programs,
        q, *q.stride(), k, *k.stride(), s, *s.stride(),
        scale, H, H // Hk, M, N, diagonal or 0,
        D=D, CAUSAL=diagonal is not None, FILLED=fill is not None, MINUS_INF=bool(fill),
        PRECISION=dot_precision(q.dtype, q.device),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=min(tile.BLOCK_D, max(16, triton.next_power_of_2(D))),
        SPAN=tile.SPAN, **compile_options(tile, q.device),
    )
    return s


class Scores(Function):
    """S and its gradients; the arguments are those of scores_op."""

    op = scores_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, ctx.scale, ctx.diagonal, ctx.fill, *_ = inputs
        Scores.save(ctx, q, k)

    @staticmethod
    def backward(ctx, ds):
        # here, not at the top: QK^T and PV are each other's derivative, so the two files import one another
        from triton_attention_values import product, transposed_product

        (q, k), dq, dk = ctx.saved_tensors, None, None
        if ctx.needs_input_grad[0]:
            dq = product(ds, k, scale=ctx.scale, diagonal=ctx.diagonal)
        if ctx.needs_input_grad[1]:
            dk = transposed_product(ds, q, k.shape[1], scale=ctx.scale, diagonal=ctx.diagonal)
        return dq, dk, None, None, None, None, None

    @staticmethod
    def tangent(ctx, dq, dk, *_):
        (q, k), fill = ctx.saved_tensors, None if ctx.fill is None else 0.0
        pairs = [(rows, cols) for rows, cols in ((dq, k), (q, dk)) if rows is not None and cols is not None]
        return sum(dot_products(*pair, scale=ctx.scale, diagonal=ctx.diagonal, fill=fill) for pair in pairs)


def dot_products(rows, cols, *, scale, diagonal=None, fill=None):
    """scale * rows cols^T, differentiable; see scores_op."""
    return differentiate(Scores, rows, cols, scale, diagonal, fill, *TUNED)


@replayable
def attention_scores(
    q: torch.Tensor, k: torch.Tensor, *, scale: float | None = None, is_causal: bool = False,
    block_m: int | None = None, block_n: int | None = None,
) -> torch.Tensor:
    """Scaled dot products of all queries with all keys, S = scale * Q K^T.

    Args:
        q: queries [B, H, M, D], float16, bfloat16, float32 or float64, any strides, any D.
        k: keys [B, Hk, N, D] of the same dtype; head h reads the keys of head h // (H / Hk), so Hk divides H.
        scale: factor on the products, 1 / sqrt(D) if None; may be 0 or negative.
        is_causal: -inf where query m would see a key n > m.
        block_m, block_n: tile of S per step, powers of two from 16; the tuned table chooses if None.

    Returns:
        [B, H, M, N] in q's dtype (under autocast, its dtype), accumulated in float32 (float64 for float64) and
        rounded once. float32 follows torch.set_float32_matmul_precision(). Differentiable, also twice.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a device, or a tile that does not fit.
    """
    q, k = autocast(q, k)
    check_tensors(q=q, k=k)
    check_shape("k", k, "B Hk N D", B=q.shape[0], D=q.shape[3])
    check_heads("k", k.shape[1], q.shape[1])
    check_flag("is_causal", is_causal)
    block_m, block_n = check_blocks(block_m=block_m, block_n=block_n)
    scale = check_scale(scale, q.shape[3])
    diagonal, fill = (0, float("-inf")) if is_causal else (None, None)
    return differentiate(Scores, q, k, scale, diagonal, fill, block_m, block_n)


if __name__ == "__main__":
    q, k = torch.randn(2, 3, 37, 24, device=DEVICE), torch.randn(2, 3, 53, 24, device=DEVICE)
    error = (attention_scores(q, k) - q @ k.mT * 24**-0.5).abs().max().item()
    print(f"scores {tuple(q.shape)} x {tuple(k.shape)} on {DEVICE}: max |error| {error:.1e}")
