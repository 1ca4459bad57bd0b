"""O = P V: each query collects the values it attends to.

               V   N x Dv
              +----+              a program owns BLOCK_M rows of O in registers and walks the keys once:
              | v  | |            P, the large tensor, streams through shared memory exactly once, V is
    P  M x N  +----+ v            re-read from L2
    +----+----+----+
    | p  | p  |////|  ->  O       causal: P is zero right of the diagonal, those tiles are never read
    +----+----+----+

The same kernel gives the product with P transposed, out = P^T X, by swapping the two strides of P: that is dV = P^T dO
here and dK = scale * dS^T Q in triton_attention_scores.py (where dQ = scale * dS K is the plain product). In both
directions an element of P that is exactly zero reads nothing, so a masked key never contributes its NaN: tiles of O
that come out with one are computed again (triton_attention/nan_repair.py).
"""

import torch

from triton_attention.device import DEVICE  # before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention.checks import autocast, check_blocks, check_flag, check_heads, check_shape, check_tensors
from triton_attention.launch import empty_heads, launch
from triton_attention.nan_repair import repair
from triton_attention.operators import Function, define_op, differentiate, matmul_flops, replayable
from triton_attention.tile_choice import TUNED, compile_options, dot_precision, tile_for
from triton_attention.tiles import dot, head_ptr, load_tile, split_program, store_tile, visible
from triton_attention_scores import dot_products


@triton.jit
def _accumulate(
    acc, P, V, offs_m, offs_d, begin, end, diagonal,
    MASKED: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """acc += P V over the columns begin : end of P; MASKED tiles are cut by the diagonal."""
    for start_n in range(begin, end, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        p = load_tile(*P, offs_m, offs_n)
        v = load_tile(*V, offs_n, offs_d)
        if MASKED:
            p = tl.where(visible(offs_m, offs_n, diagonal, TRANSPOSED), p, 0.0)
        acc = dot(p, v, acc, PRECISION)
    return acc


@triton.jit
def _values_kernel(
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    nan_ptr, scale, H, SHARE, M, N, diagonal,
    D: tl.constexpr, SUMMED: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    col_tiles = tl.cdiv(D, BLOCK_D)
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile, off_b, off_h = split_program(tl.program_id(0), row_tiles * col_tiles, H)
    row_tile = tile // col_tiles
    if CAUSAL and not TRANSPOSED:
        row_tile = row_tiles - 1 - row_tile  # the longest rows first, so that the last programs are short
    start_m = row_tile * BLOCK_M
    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tile % col_tiles * BLOCK_D + tl.arange(0, BLOCK_D)

    begin, end = 0, N  # the columns of P that some row of the tile sees
    full_begin, full_end = 0, N  # and those that every row sees
    if CAUSAL and TRANSPOSED:
        begin = tl.minimum(tl.maximum(start_m - diagonal, 0), N) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(tl.cdiv(tl.maximum(start_m + BLOCK_M - 1 - diagonal, 0), BLOCK_N) * BLOCK_N, N)
    elif CAUSAL:
        end = tl.minimum(tl.maximum(start_m + BLOCK_M + diagonal, 0), N)
        full_end = tl.minimum(tl.maximum(start_m + 1 + diagonal, 0), N) // BLOCK_N * BLOCK_N

    ACC: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    for off_g in range(0, SUMMED):  # the query heads that share a key head: one, or all of its group
        off_p = off_h * SUMMED + off_g
        P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_p), (stride_pm, stride_pn), (M, N))
        V = (head_ptr(v_ptr, stride_vb, stride_vh, off_b, off_p // SHARE), (stride_vn, stride_vd), (N, D))
        if CAUSAL and TRANSPOSED:
            acc = _accumulate(
                acc, P, V, offs_m, offs_d, begin, full_begin, diagonal, True, TRANSPOSED, PRECISION, BLOCK_N
            )
        acc = _accumulate(
            acc, P, V, offs_m, offs_d, full_begin, full_end, diagonal, False, TRANSPOSED, PRECISION, BLOCK_N
        )
        if CAUSAL and not TRANSPOSED:
            acc = _accumulate(
                acc, P, V, offs_m, offs_d, full_end, end, diagonal, True, TRANSPOSED, PRECISION, BLOCK_N
            )
    o_ptr = head_ptr(o_ptr, stride_ob, stride_oh, off_b, off_h)
    store_tile(o_ptr, (stride_om, stride_od), (M, D), offs_m, offs_d, acc * scale)
    tl.store(nan_ptr + tl.program_id(0), tl.sum((acc != acc).to(tl.int32)) > 0)


def _values_shape(p, v, diagonal, heads, transposed, scale, dtype, block_m, block_n):
    return empty_heads(v, p.shape[0], heads, p.shape[3 if transposed else 2], v.shape[3], dtype=dtype)


@define_op(
    "values", fake=_values_shape, hopper="values", flops=lambda p, v, *_: matmul_flops(p, p[3], v[3])
)
def values_op(
    p: torch.Tensor, v: torch.Tensor, diagonal: int | None, heads: int, transposed: bool, scale: float,
    dtype: torch.dtype, block_m: int | None, block_n: int | None,
) -> torch.Tensor:
    """scale * P V, [B, heads, M, Dv] in `dtype`, of p [B, H, M, N] and v [B, Hk, N, Dv], heads = H.

    transposed: scale * P^T X, [B, heads, N, Dv], of p and x [B, H, M, Dv], summed over the groups, heads = Hk.
    """
    o = _values_shape(p, v, diagonal, heads, transposed, scale, dtype, block_m, block_n)
    (B, _, M), D, H = o.shape[:3], int(o.shape[3]), p.shape[1]
    if transposed:
        p = p.mT
    N = p.shape[3]
    if o.numel() == 0 or N == 0 or H == 0:
        return o.zero_()
    if p.dtype == torch.float64:  # a kernel's scalar arguments are float32
        v, scale = v * scale, 1.0
    op = "values, transposed" if transposed else "values"
    tile = tile_for(op, p.dtype, D, diagonal is not None, p.device, block_m, block_n)
    block_d = min(tile.BLOCK_D, max(16, triton.next_power_of_2(D)))
    programs = B * heads * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(D, block_d)
    has_nan = torch.empty(programs, dtype=torch.int8, device=p.device)
    arguments = (
        p, *p.stride(), v, *v.stride(), o, *o.stride(),
        has_nan, scale, heads, H // v.shape[1], M, N, diagonal or 0,
    )
    constants = {
        "D": D, "SUMMED": H // heads, "CAUSAL": diagonal is not None, "TRANSPOSED": transposed,
        "BLOCK_M": tile.BLOCK_M, "BLOCK_D": block_d,
    }
    launch(
        _values_kernel, programs, *arguments, **constants,
        BLOCK_N=tile.BLOCK_N, PRECISION=dot_precision(p.dtype, p.device), **compile_options(tile, p.device),
    )
    repair(has_nan, *arguments, **constants)
    return o


class Values(Function):
    """scale * P V or scale * P^T X, and its gradients; the arguments are those of values_op."""

    op = values_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        p, v, ctx.diagonal, ctx.heads, ctx.transposed, ctx.scale, ctx.dtype, *_ = inputs
        Values.save(ctx, p, v)

    @staticmethod
    def backward(ctx, do):
        (p, v), dp, dv = ctx.saved_tensors, None, None
        do, options = do.to(v.dtype), {"scale": ctx.scale, "diagonal": ctx.diagonal}
        if ctx.needs_input_grad[0]:
            rows, cols = (v, do) if ctx.transposed else (do, v)
            dp = dot_products(rows, cols, **options, fill=0.0)
        if ctx.needs_input_grad[1]:
            dv = product(p, do, **options) if ctx.transposed else transposed_product(p, do, v.shape[1], **options)
        return dp, dv, None, None, None, None, None, None, None

    @staticmethod
    def tangent(ctx, dp, dv, *_):
        (p, v), options = ctx.saved_tensors, (ctx.diagonal, ctx.heads, ctx.transposed, ctx.scale, ctx.dtype, *TUNED)
        pairs = [(left, right) for left, right in ((dp, v), (p, dv)) if left is not None and right is not None]
        return sum(differentiate(Values, *pair, *options) for pair in pairs)


def product(p, v, *, scale=1.0, diagonal=None):
    """scale * P V in the dtype of v, differentiable; see values_op."""
    return differentiate(Values, p, v, diagonal, p.shape[1], False, scale, v.dtype, *TUNED)


def transposed_product(p, x, heads, *, scale=1.0, diagonal=None):
    """scale * P^T X in the dtype of x, summed over the query heads that share one of `heads`; see values_op."""
    return differentiate(Values, p, x, diagonal, heads, True, scale, x.dtype, *TUNED)


@replayable
def attention_values(
    probs: torch.Tensor, v: torch.Tensor, *, is_causal: bool = False,
    block_m: int | None = None, block_n: int | None = None,
) -> torch.Tensor:
    """Weighted sums of the values, O = P V.

    Args:
        probs: weights [B, H, M, N], float16, bfloat16, float32 or float64, any strides.
        v: values [B, Hk, N, Dv] of the same dtype; head h reads the values of head h // (H / Hk), so Hk divides H.
        is_causal: probs is taken as zero where n > m, so that those tiles are skipped.
        block_m, block_n: tile of P per step, powers of two from 16; the tuned table chooses if None.

    Returns:
        [B, H, M, Dv] in the dtype of v (under autocast, its dtype), accumulated in float32 (float64 for float64) and
        rounded once. A weight of exactly zero reads nothing: 0 * NaN and 0 * inf count as 0. float32 follows
        torch.set_float32_matmul_precision(). Differentiable, also twice.

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a device, or a tile that does not fit.
    """
    probs, v = autocast(probs, v)
    check_tensors(probs=probs, v=v)
    check_shape("v", v, "B Hk N Dv", B=probs.shape[0], N=probs.shape[3])
    check_heads("v", v.shape[1], probs.shape[1])
    check_flag("is_causal", is_causal)
    block_m, block_n = check_blocks(block_m=block_m, block_n=block_n)
    diagonal, transposed, scale = 0 if is_causal else None, False, 1.0
    return differentiate(Values, probs, v, diagonal, probs.shape[1], transposed, scale, v.dtype, block_m, block_n)


if __name__ == "__main__":
    p, v = torch.randn(2, 3, 37, 53, device=DEVICE).softmax(-1), torch.randn(2, 3, 53, 24, device=DEVICE)
    error = (attention_values(p, v) - p @ v).abs().max().item()
    print(f"values {tuple(p.shape)} x {tuple(v.shape)} on {DEVICE}: max |error| {error:.1e}")
