"""dS = P * (dO V^T - rowsum(dO * O)): back through PV and the softmax in one pass, without storing dP.

    dO  M x Dv   V^T  Dv x N                     the softmax needs rowsum(P * dP) before it can write a
      +----+    +----+----+                      single dS, so two separate stages write dP and read it twice;
      | do | x  | v  |    |  = dP, a tile        but P dP^T = P (V dO^T) = O dO^T: the row sums are those of
      +----+    +----+----+    at a time         dO * O, two small tensors, and dP never leaves the registers

Bytes that must move per element of S: 2 (read P, write dS) instead of 6. The identity is FlashAttention's (Dao et al.,
2022, appendix B.2); attention_staged uses it for 16-bit inputs where no dropout, no gradient of the weights or of a
mask and no second derivative is in the way. In float32 dP - rowsum(dO * O) loses digits that dP - rowsum(P * dP) keeps.
"""

import torch

import triton_attention  # noqa: F401  before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention.launch import launch
from triton_attention.operators import Function, define_op, differentiate, in_forward_mode, matmul_flops
from triton_attention.softmax_backward import MaskGradient, SoftmaxBackward, softmax_tangent
from triton_attention.tile_choice import TUNED, compile_options, dot_precision, tile_for
from triton_attention.tiles import dot, head_ptr, load_tile, split_program, store_tile
from triton_attention_scores import dot_products, scores_op
from triton_attention_softmax import softmax_op
from triton_attention_values import product, transposed_product, values_op


@triton.jit
def _dscores_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd,
    o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    ds_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    H, GROUP, M, N, diagonal,
    D: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SPAN: tl.constexpr,
):
    row_tiles, spans = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N * SPAN)
    tile, off_b, off_h = split_program(tl.program_id(0), row_tiles * spans, H)
    start_m, first_n = tile // spans * BLOCK_M, tile % spans * (BLOCK_N * SPAN)
    DO = (head_ptr(do_ptr, stride_gb, stride_gh, off_b, off_h), (stride_gm, stride_gd), (M, D))
    OUT = (head_ptr(o_ptr, stride_ob, stride_oh, off_b, off_h), (stride_om, stride_od), (M, D))
    V_T = (head_ptr(v_ptr, stride_vb, stride_vh, off_b, off_h // GROUP), (stride_vd, stride_vn), (D, N))
    P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h), (stride_pm, stride_pn), (M, N))
    DS = (head_ptr(ds_ptr, stride_sb, stride_sh, off_b, off_h), (stride_sm, stride_sn), (M, N))
    ACC: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_d = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    do, o = load_tile(*DO, offs_m, offs_d), load_tile(*OUT, offs_m, offs_d)
    delta = tl.sum(do.to(ACC) * o.to(ACC), 1)
    for start_d in range(BLOCK_D, D, BLOCK_D):  # only heads wider than BLOCK_D
        do_e, o_e = load_tile(*DO, offs_m, start_d + offs_d), load_tile(*OUT, offs_m, start_d + offs_d)
        delta += tl.sum(do_e.to(ACC) * o_e.to(ACC), 1)

    last_n = tl.minimum(first_n + BLOCK_N * SPAN, N)
    end_n = last_n
    if CAUSAL:
        end_n = tl.maximum(tl.minimum(last_n, start_m + BLOCK_M + diagonal), first_n)
    for start_n in range(first_n, end_n, BLOCK_N):
        offs_n = start_n + tl.arange(0, BLOCK_N)
        p, v_t = load_tile(*P, offs_m, offs_n).to(ACC), load_tile(*V_T, offs_d, offs_n)
        dp = dot(do, v_t, tl.zeros([BLOCK_M, BLOCK_N], ACC), PRECISION)
        for start_d in range(BLOCK_D, D, BLOCK_D):
            do_e, v_e = load_tile(*DO, offs_m, start_d + offs_d), load_tile(*V_T, start_d + offs_d, offs_n)
            dp = dot(do_e, v_e, dp, PRECISION)
        # P is zero above the diagonal; a masked key cannot bring in its NaN
        ds = tl.where(p == 0.0, 0.0, p * (dp - delta[:, None]))
        store_tile(*DS, offs_m, offs_n, ds)


@define_op(
    "dscores", fake=lambda do, o, v, probs, diagonal: probs.new_empty(probs.shape),
    flops=lambda do, o, v, *_: matmul_flops(do, v[2], v[3]),
)
def dscores_op(
    do: torch.Tensor, o: torch.Tensor, v: torch.Tensor, probs: torch.Tensor, diagonal: int | None
) -> torch.Tensor:
    """dS like probs [B, H, M, N], of do and o [B, H, M, Dv], v [B, Hk, N, Dv]; unwritten in future tiles."""
    (B, H, M, N), D, ds = probs.shape, int(v.shape[3]), probs.new_empty(probs.shape)
    if ds.numel() == 0:
        return ds
    tile = tile_for("dscores", probs.dtype, D, diagonal is not None, probs.device)
    programs = B * H * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N * tile.SPAN)
    launch(
        _dscores_kernel, programs,
        do, *do.stride(), o, *o.stride(), v, *v.stride(), probs, *probs.stride(), ds, *ds.stride(),
        H, H // v.shape[1], M, N, diagonal or 0,
        D=D, CAUSAL=diagonal is not None, PRECISION=dot_precision(probs.dtype, probs.device),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=min(tile.BLOCK_D, max(16, triton.next_power_of_2(D))),
        SPAN=tile.SPAN, **compile_options(tile, probs.device),
    )
    return ds


class Staged(Function):
    """(O, P) of q, k, v and a 4-D mask or None; query m sees the keys n <= m + diagonal.

    Scores above the diagonal stay unwritten: the softmax does not read them. So do weights if not filled, and their
    gradients where nobody else reads them: only a caller who asks for the weights needs the zeros.

    O comes in out_dtype: float32 for 16-bit inputs that will need a gradient, because dP - rowsum(dO * O) cancels and
    shows O's rounding.
    """

    @staticmethod
    def forward(q, k, v, mask, diagonal, scale, out_dtype, filled):
        fill, heads, transposed, factor = None, q.shape[1], False, 1.0
        scores = scores_op(q, k, scale, diagonal, fill, *TUNED)
        probs = softmax_op(scores, mask, diagonal, *TUNED, filled)
        return values_op(probs, v, diagonal, heads, transposed, factor, out_dtype, *TUNED), probs

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, mask, ctx.diagonal, ctx.scale, _, ctx.filled = inputs
        ctx.mask_shape, ctx.mask_dtype = (None, None) if mask is None else (list(mask.shape), mask.dtype)
        Staged.save(ctx, q, k, v, *output)
        ctx.set_materialize_grads(False)
        if not in_forward_mode() and not any(ctx.needs_input_grad[i] for i in (0, 1, 3)):  # V alone
            ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, do, dprobs):
        (q, k, v, out, probs), diagonal = ctx.saved_tensors, ctx.diagonal
        needs_q, needs_k, needs_v, needs_mask = ctx.needs_input_grad[:4]
        dq = dk = dv = dmask = None
        if do is not None:
            do = do.to(v.dtype)
            if needs_v:
                dv = transposed_product(probs, do, v.shape[1], diagonal=diagonal)
        if not (needs_q or needs_k or needs_mask) or (do is None and dprobs is None):
            return None, None, dv, None, None, None, None, None
        differentiated = torch.is_grad_enabled() or in_forward_mode()
        if dprobs is None and not needs_mask and out.dtype != v.dtype and not differentiated:
            ds = dscores_op(do, out, v, probs, diagonal)
        else:  # one stage after the other
            filled = dprobs is not None or needs_mask or differentiated
            fill = 0.0 if filled else None
            dp = None if do is None else dot_products(do, v, scale=1.0, diagonal=diagonal, fill=fill)
            dp = dprobs if dp is None else dp if dprobs is None else dp + dprobs
            ds = differentiate(SoftmaxBackward, probs, dp, diagonal, filled)
        if needs_q:
            dq = product(ds, k, scale=ctx.scale, diagonal=diagonal)
        if needs_k:
            dk = transposed_product(ds, q, k.shape[1], scale=ctx.scale, diagonal=diagonal)
        if needs_mask:
            dmask = differentiate(MaskGradient, ds, ctx.mask_shape, ctx.mask_dtype)
        return dq, dk, dv, dmask, None, None, None, None

    @staticmethod
    def tangent(ctx, dq, dk, dv, dmask, *_):
        (q, k, v, out, probs), diagonal, filled = ctx.saved_tensors, ctx.diagonal, ctx.filled
        ds = [
            dot_products(rows, cols, scale=ctx.scale, diagonal=diagonal, fill=0.0 if filled else None)
            for rows, cols in ((dq, k), (q, dk)) if rows is not None and cols is not None
        ]
        dprobs = softmax_tangent(probs, sum(ds) if ds else None, dmask, diagonal, filled)
        do = product(dprobs, v, diagonal=diagonal)
        if dv is not None:
            do = do + product(probs, dv, diagonal=diagonal)
        return do.to(out.dtype), dprobs
