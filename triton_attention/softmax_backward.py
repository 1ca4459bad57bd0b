"""Back through the softmax of a row, dS = P * (dP - rowsum(P * dP)), and the gradient of a mask that was added to it.

Linear in dP with the symmetric matrix diag(P) - P P^T, so that its own gradient by dP is the same operation.
"""

import torch

import triton
import triton.language as tl

from triton_attention.launch import launch
from triton_attention.operators import Function, define_op, differentiate, like_first
from triton_attention.tile_choice import row_tile
from triton_attention.tiles import head_ptr, load_scores, load_tile, split_program, store_tile, visible_end


@triton.jit
def _load(P, DP, offs_m, offs_n, diagonal, ACC: tl.constexpr, CAUSAL: tl.constexpr):
    """Tiles of P and dP; dP counts only where P is not zero, so that a masked key cannot bring in its NaN."""
    p = load_scores(*P, offs_m, offs_n, diagonal, 0.0, CAUSAL).to(ACC)
    dp = load_scores(*DP, offs_m, offs_n, diagonal, 0.0, CAUSAL).to(ACC)
    return p, tl.where(p == 0.0, 0.0, dp)


@triton.jit
def _softmax_bwd_kernel(
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    dp_ptr, stride_gb, stride_gh, stride_gm, stride_gn,
    ds_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    H, M, N, diagonal,
    CAUSAL: tl.constexpr, FILLED: tl.constexpr, WHOLE_ROW: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), H)
    start_m, end_n = tile * BLOCK_M, N
    if CAUSAL:  # what no query of the tile sees is not read, and zero, or not written
        end_n = visible_end(start_m, N, diagonal, BLOCK_M)
    last_n = N if FILLED else end_n
    P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_h), (stride_pm, stride_pn), (M, N))
    DP = (head_ptr(dp_ptr, stride_gb, stride_gh, off_b, off_h), (stride_gm, stride_gn), (M, N))
    DS = (head_ptr(ds_ptr, stride_sb, stride_sh, off_b, off_h), (stride_sm, stride_sn), (M, last_n))
    ACC: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32

    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    if WHOLE_ROW:
        p, dp = _load(P, DP, offs_m, offs_n, diagonal, ACC, CAUSAL)
        dp -= tl.sum(p * dp, 1)[:, None]
        delta = tl.sum(p * dp, 1)  # what rounding left over: much, where one key has almost all of the weight
        store_tile(*DS, offs_m, offs_n, p * (dp - delta[:, None]))
    else:
        delta = tl.zeros([BLOCK_M], ACC)
        for start_n in range(0, end_n, BLOCK_N):
            p, dp = _load(P, DP, offs_m, start_n + offs_n, diagonal, ACC, CAUSAL)
            delta += tl.sum(p * dp, 1)
        for start_n in range(0, last_n, BLOCK_N):
            p, dp = _load(P, DP, offs_m, start_n + offs_n, diagonal, ACC, CAUSAL)
            store_tile(*DS, offs_m, start_n + offs_n, p * (dp - delta[:, None]))


@triton.jit
def _mask_grad_kernel(
    ds_ptr, stride_sb, stride_sh, stride_sm, stride_sn,
    g_ptr, stride_gb, stride_gh, stride_gm, stride_gn,
    B, H, M, N, GH, GM, GN,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One tile of the mask's gradient [GB, GH, GM, GN]: dS summed over the dimensions where the mask has size 1."""
    col_tiles = tl.cdiv(GN, BLOCK_N)
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(GM, BLOCK_M) * col_tiles, GH)
    start_m, start_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N
    offs_m, offs_n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)

    ACC: tl.constexpr = tl.float64 if ds_ptr.dtype.element_ty == tl.float64 else tl.float32
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for b in range(0, B if SUM_B else 1):
        for h in range(0, H if SUM_H else 1):
            head = head_ptr(ds_ptr, stride_sb, stride_sh, off_b + b, off_h + h)
            for m in range(start_m, M if SUM_M else start_m + 1, BLOCK_M):
                for n in range(start_n, N if SUM_N else start_n + 1, BLOCK_N):
                    acc += load_tile(head, (stride_sm, stride_sn), (M, N), m + offs_m, n + offs_n).to(ACC)
    if SUM_M:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], acc.shape)
    if SUM_N:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], acc.shape)
    g_ptr = head_ptr(g_ptr, stride_gb, stride_gh, off_b, off_h)
    store_tile(g_ptr, (stride_gm, stride_gn), (GM, GN), start_m + offs_m, start_n + offs_n, acc)


@define_op("softmax_backward", fake=like_first)
def softmax_backward_op(
    probs: torch.Tensor, dp: torch.Tensor, diagonal: int | None, filled: bool = True
) -> torch.Tensor:
    """dS = P * (dP - rowsum(P * dP)), like probs; the future is not read, and 0, or unwritten if not filled."""
    (B, H, M, N), ds = probs.shape, probs.new_empty(probs.shape)
    if ds.numel() == 0:
        return ds
    tile = row_tile(probs, False)
    launch(
        _softmax_bwd_kernel, B * H * triton.cdiv(M, tile["BLOCK_M"]),
        probs, *probs.stride(), dp, *dp.stride(), ds, *ds.stride(),
        H, M, N, diagonal or 0, CAUSAL=diagonal is not None, FILLED=filled or diagonal is None, **tile,
    )
    return ds


@define_op("mask_gradient", fake=lambda ds, shape, dtype: ds.new_empty(shape, dtype=dtype))
def mask_gradient_op(ds: torch.Tensor, shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    """dS [B, H, M, N] summed to the mask's 4-D shape."""
    (B, H, M, N), grad = ds.shape, ds.new_empty(shape, dtype=dtype)
    if grad.numel() == 0 or ds.numel() == 0:
        return grad.zero_()
    sums = [g == 1 for g in shape]
    launch(
        _mask_grad_kernel, shape[0] * shape[1] * triton.cdiv(shape[2], 16) * triton.cdiv(shape[3], 128),
        ds, *ds.stride(), grad, *grad.stride(), B, H, M, N, *shape[1:],
        SUM_B=sums[0], SUM_H=sums[1], SUM_M=sums[2], SUM_N=sums[3], BLOCK_M=16, BLOCK_N=128, num_warps=4,
    )
    return grad


class SoftmaxBackward(Function):
    """dS of P and dP, differentiable itself: linear in dP with the symmetric matrix diag(P) - P P^T."""

    op = softmax_backward_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        probs, dp, ctx.diagonal, ctx.filled = inputs
        SoftmaxBackward.save(ctx, probs, dp)

    @staticmethod
    def backward(ctx, g):
        probs, dp = ctx.saved_tensors
        g_probs, g_dp = None, None
        if ctx.diagonal is not None:  # for operations of torch: what was not written may be NaN
            probs, dp, g = (t.tril(ctx.diagonal) for t in (probs, dp, g))
        if ctx.needs_input_grad[0]:
            wide = torch.promote_types(probs.dtype, torch.float32)
            p, g_wide = probs.to(wide), g.to(wide).masked_fill(probs == 0, 0.0)
            dp_wide = dp.to(wide).masked_fill(probs == 0, 0.0)
            delta, gamma = (p * dp_wide).sum(-1, keepdim=True), (p * g_wide).sum(-1, keepdim=True)
            g_probs = (g_wide * (dp_wide - delta) - gamma * dp_wide).to(probs.dtype)
        if ctx.needs_input_grad[1]:
            g_dp = differentiate(SoftmaxBackward, probs, g, ctx.diagonal, ctx.filled)
        return g_probs, g_dp, None, None

    @staticmethod
    def tangent(ctx, t_probs, t_dp, *_):
        (probs, dp), tangent = ctx.saved_tensors, 0.0
        if t_dp is not None:
            tangent = differentiate(SoftmaxBackward, probs, t_dp, ctx.diagonal, ctx.filled)
        if t_probs is not None:
            if ctx.diagonal is not None:
                probs, dp, t_probs = (t.tril(ctx.diagonal) for t in (probs, dp, t_probs))
            wide = torch.promote_types(probs.dtype, torch.float32)
            p, t, dp = (x.to(wide).masked_fill(probs == 0, 0.0) for x in (probs, t_probs, dp))
            delta, gamma = (p * dp).sum(-1, keepdim=True), (t * dp).sum(-1, keepdim=True)
            tangent = tangent + (t * (dp - delta) - p * gamma).to(probs.dtype)
        return tangent


def softmax_tangent(probs, ds, dmask, diagonal, filled=True):
    """dP of the tangents of scores and of a floating mask, one of which may be None: the Jacobian is symmetric."""
    if dmask is not None:
        ds = dmask.to(probs.dtype).expand(probs.shape) if ds is None else ds + dmask.to(ds.dtype)
    return torch.zeros_like(probs) if ds is None else differentiate(SoftmaxBackward, probs, ds, diagonal, filled)


class MaskGradient(Function):
    """dS summed to the shape of the mask."""

    op = mask_gradient_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.shape, ctx.dtype, ctx.options = inputs[0].shape, inputs[0].dtype, inputs[1:]

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.dtype).expand(ctx.shape), None, None

    @staticmethod
    def tangent(ctx, ds, *_):
        return differentiate(MaskGradient, ds, *ctx.options)

    @staticmethod
    def vmap(info, in_dims, ds, shape, dtype):
        each = [differentiate(MaskGradient, one, shape, dtype) for one in ds.unbind(in_dims[0])]
        return torch.stack(each), 0
