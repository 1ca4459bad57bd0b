"""O = softmax(scale * Q K^T + mask) V in one kernel: no [M, N] tensor ever reaches memory.

                  K^T, V^T            a program owns BLOCK_M queries and walks over the keys they see; a tile of
                +----+----+----+      scores lives in registers only. The maximum m_i and the sum l_i of a row are
                | k  | k  | k  |      not known before its last key, so what is accumulated is corrected when the
    Q           +----+----+----+      maximum grows:
      +----+    +----+----+----+        m_new = max(m_i, max qk),  alpha = e^(m_i - m_new),  p = e^(qk - m_new)
      | q  |    | p ---> p ---> p       l_i = alpha l_i + sum p,   acc = alpha acc + p v,    at the end O = acc / l_i
      +----+    +----+----+----+
                  acc  m_i  l_i       memory moved: Q, K, V, O and one number a row, lse = m_i + log l_i

Dao et al., "FlashAttention", 2022, with the loop order of Dao, "FlashAttention-2", 2023; the online softmax is Milakov
and Gimelshein's, 2018. Few queries and many keys (decoding) would leave the GPU idle: then programs share the keys of
a query tile (triton_attention/merge.py).

Exponentials are base 2 inside, one instruction on a GPU; log2(e) is folded into the scale. The public lse is natural.
"""

import math
import warnings

import torch

from triton_attention.device import DEVICE, INTERPRETED  # before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention.checks import (
    autocast, check_blocks, check_dropout, check_flag, check_heads, check_mask, check_scale, check_shape, check_sinks,
    check_softcap, check_tensors, check_window,
)
from triton_attention.dropout import draw_seed, dropout_op
from triton_attention.float32 import in_parts, load_rows, product, rows_dot, signed, whole
from triton_attention.fused_backward import fused_backward_op
from triton_attention.fused_common import FEW_QUERIES, fused_arguments, paired, tiles_of
from triton_attention.launch import empty_heads, launch, strided
from triton_attention.logits import (
    Band, Options, exponential, key_range, listed, listed_tile, load_mask, logits, lowest, start_of, steps, store_pair,
    trimmed,
)
from triton_attention.mask_map import map_of, units_of
from triton_attention.merge import count_splits, merge_attention, merge_splits  # noqa: F401  public here
from triton_attention.operators import Function, define_op, differentiate, fold, matmul_flops, replayable, unfold
from triton_attention.tile_choice import TUNED, compile_options, tile_for
from triton_attention.tiles import (
    DropoutMask, Matrix, head, head_ptr, hide_loads, inverse_sum, keep_mask, split_program, store_tile,
)
from triton_attention_scores import dot_products
from triton_attention_values import product as weighted_values

MAX_HEAD_DIM = 256  # wider accumulators do not fit the registers
HEAVY = 1 << 27  # bytes of keys and values; for a few queries of all of them, lists of the visible tiles pay from there


@triton.jit
def _fwd_inner(
    acc, m_i, l_i, q, k_head, v_head, band, dropout, scale, visits, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):
    """Attend to the keys that every query of the block sees, a tile at a time, or if MASKED to the others."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    BLOCK_N: tl.constexpr = OPTIONS.NARROW if MASKED else OPTIONS.BLOCK_N
    offs_d, offs_e = tl.arange(0, OPTIONS.BLOCK_D), tl.arange(0, OPTIONS.BLOCK_DV)
    first, last, gap = steps(visits, OPTIONS.BLOCK_N, MASKED, OPTIONS)
    tile = listed_tile(visits, first, OPTIONS.BLOCK_N, MASKED, OPTIONS)
    for at in range(first, last, BLOCK_N):
        start_n = start_of(visits, at, gap, tile, OPTIONS.BLOCK_N, MASKED, OPTIONS)
        tile = listed_tile(visits, at + BLOCK_N, OPTIONS.BLOCK_N, MASKED, OPTIONS)
        offs_n = start_n + tl.arange(0, BLOCK_N)
        k = load_rows(k_head, offs_n, offs_d, PRECISION, MASKED, OPTIONS.D != OPTIONS.BLOCK_D)
        mask = load_mask(band, q.offs, offs_n, 0, MASKED, OPTIONS)
        qk = rows_dot(q, k, tl.zeros([q.offs.shape[0], BLOCK_N], acc.dtype), PRECISION)
        x, raw = logits(qk, q.offs[:, None], offs_n[None, :], band, mask, scale, MASKED, OPTIONS)
        m_new = tl.maximum(m_i, tl.max(x, 1) * (1.0 if OPTIONS.SCALED else scale))
        p = exponential(x, raw, m_new[:, None], scale, MASKED, OPTIONS)
        alpha = tl.exp(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        if OPTIONS.DROPOUT:
            p = tl.where(keep_mask(dropout, q.offs, start_n, BLOCK_N), p, 0.0)
        p = hide_loads(p, OPTIONS)
        v = load_rows(v_head, offs_n, offs_e, PRECISION, MASKED, OPTIONS.DV != OPTIONS.BLOCK_DV)
        acc = product(p, v, acc * alpha[:, None], PRECISION)
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def _fwd_one_by_one(
    m_i, l_i, q_head, offs_m, k_head, v_head, band, dropout, scale, bounds, OPTIONS: tl.constexpr,
):
    """(acc, l_i) of a few rows, without the products 0 * NaN of a dot. m_i is their final maximum, l_i what a sink adds
    to the sum, which is that of these weights: scores are rounded otherwise than those of a dot."""
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    offs_d, offs_e = tl.arange(0, OPTIONS.BLOCK_D), tl.arange(0, OPTIONS.BLOCK_DV)
    q = whole(load_rows(q_head, offs_m, offs_d, PRECISION), PRECISION).to(m_i.dtype) * OPTIONS.SIGN
    acc = tl.zeros([offs_m.shape[0], OPTIONS.BLOCK_DV], m_i.dtype)
    for n in range(bounds[0], bounds[3]):
        offs_n = n + tl.arange(0, 1)
        k = whole(load_rows(k_head, offs_n, offs_d, PRECISION), PRECISION).to(m_i.dtype)
        mask = load_mask(band, offs_m, offs_n, 0, True, OPTIONS)
        qk = tl.sum(q * k, 1)[:, None]
        x, raw = logits(qk, offs_m[:, None], offs_n[None, :], band, mask, scale, True, OPTIONS)
        p = exponential(x, raw, m_i[:, None], scale, True, OPTIONS)
        l_i += tl.sum(p, 1)
        if OPTIONS.DROPOUT:
            keep = keep_mask(dropout, offs_m, n // 16 * 16, 16)
            here = tl.sum(tl.where(tl.arange(0, 16)[None, :] == n % 16, keep, 0).to(tl.int32), 1)
            p = tl.where(here[:, None] > 0, p, 0.0)
        v = whole(load_rows(v_head, offs_n, offs_e, PRECISION), PRECISION).to(m_i.dtype)
        acc += tl.where(p == 0.0, 0.0, p * v)
    return acc, l_i


@triton.jit(do_not_specialize=["H", "GROUP", "M", "N", "left", "right", "chunk"])
def _fwd_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, keys_ptr, stride_yb, stride_yn,
    lists_ptr, counts_ptr, stride_lb, stride_lh, stride_lm, capacity,
    sinks_ptr, stride_xh, stride_xm,
    o_ptr, stride_os, stride_ob, stride_oh, stride_om, stride_od,
    lse_ptr, stats_ptr, seed_ptr, scale, dropout_p, keep_factor, H, GROUP, M, N, left, right, chunk,
    D: tl.constexpr, DV: tl.constexpr, SIGN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, SOFTCAP: tl.constexpr,
    SCALED: tl.constexpr, DROPOUT: tl.constexpr, PAIRED: tl.constexpr, TCGEN05: tl.constexpr, EXACT: tl.constexpr,
    SPLIT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, ALIGNED: tl.constexpr, LISTED: tl.constexpr, NARROW: tl.constexpr, HAS_KEYS: tl.constexpr,
    TRIMMED: tl.constexpr, FEW: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        D, DV, SIGN, LEFT, RIGHT, HAS_MASK, HAS_BIAS, SOFTCAP, SCALED, DROPOUT, PAIRED, TCGEN05, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, ONE_ROW, ALIGNED, LISTED, NARROW, HAS_KEYS,
    )
    row_tiles, splits = tl.cdiv(M, BLOCK_M), tl.cdiv(N, chunk)
    tile, off_b, off_h = split_program(tl.program_id(0), row_tiles * splits, H)
    split, row_tile = tile % splits, row_tiles - 1 - tile // splits  # causal: the longest rows first
    start_m, first_n = row_tile * BLOCK_M, split * chunk
    q_head = head(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D), off_b, off_h)
    k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_h // GROUP)
    v_head = head(v_ptr, (stride_vb, stride_vh, stride_vn, stride_vd), (N, DV), off_b, off_h // GROUP)
    o_ptr = head_ptr(o_ptr, stride_ob, stride_oh, off_b, off_h) + split.to(tl.int64) * stride_os
    o_head = Matrix(o_ptr, (stride_om, stride_od), (M, DV))
    row = ((split * (tl.num_programs(0) // (row_tiles * splits * H)) + off_b).to(tl.int64) * H + off_h) * M
    mask = Matrix(None, (0, 0), (M, N))
    if HAS_MASK or HAS_BIAS:
        mask = head(mask_ptr, (stride_ab, stride_ah, stride_am, stride_an), (M, N), off_b, off_h)
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale, keep_factor = tl.cast(scale, ACC), tl.cast(keep_factor, ACC)  # as float64 kernels compute
    band = Band(left, right, mask, (keys_ptr, stride_yb, stride_yn, off_b))
    dropout = DropoutMask(dropout_p, keep_factor, seed, off_b, off_h)

    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q = load_rows(q_head, offs_m, offs_d, PRECISION)
    if SIGN != 1:  # the maximum is taken before the scale, so the scale must not be negative
        q = signed(q, SIGN)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], ACC)
    m_i = lowest(BLOCK_M, ACC, SCALED)
    l_i = tl.zeros([BLOCK_M], ACC)
    if HAS_SINKS:  # a key without a value
        sinks = tl.load(sinks_ptr + off_h * stride_xh + offs_m * stride_xm, mask=offs_m < M, other=0.0).to(ACC)
        m_i = tl.where(split == 0, tl.maximum(m_i, sinks), m_i)
        l_i = tl.where(split == 0, tl.exp(sinks - m_i), l_i)

    last_n = tl.minimum(first_n + chunk, N)
    if TRIMMED:
        first_n, last_n = trimmed(first_n, last_n, offs_m, band, OPTIONS)
    bounds = key_range(start_m, first_n, last_n, band, OPTIONS)
    list_strides = (stride_lb, stride_lh, stride_lm)
    visits = listed(bounds, lists_ptr, counts_ptr, list_strides, capacity, off_b, off_h, row_tile, split, OPTIONS)
    for masked in tl.static_range(1 if (HAS_MASK or HAS_BIAS) and not LISTED else 0, 2):
        acc, m_i, l_i = _fwd_inner(
            acc, m_i, l_i, q, k_head, v_head, band, dropout, scale, visits, masked == 1, OPTIONS
        )

    factor = tl.zeros([BLOCK_M], ACC) + keep_factor
    if not SPLIT:  # parts are divided when they are merged
        factor *= inverse_sum(l_i)
    store_tile(*o_head, offs_m, offs_e, acc * factor[:, None])
    if not SPLIT:
        tl.store(lse_ptr + row + offs_m, m_i + tl.log(l_i), mask=offs_m < M)
    if SPLIT or PAIRED:
        store_pair(stats_ptr, row + offs_m, m_i, l_i, offs_m < M)
    if LEFT or RIGHT or HAS_MASK or HAS_BIAS:
        if tl.sum((acc != acc).to(tl.int32)) > 0:  # NaN or inf in V, perhaps only where a mask hides it
            for first in range(0, BLOCK_M, FEW):
                chosen = first + tl.arange(0, FEW)
                here = tl.arange(0, BLOCK_M)[None, :] == chosen[:, None]
                m_few = tl.max(tl.where(here, m_i[None, :], float("-inf")), 1)
                factor_few = tl.sum(tl.where(here, (factor * l_i)[None, :], 0.0), 1)
                l_few = tl.zeros([FEW], ACC)
                if HAS_SINKS:
                    sink = tl.sum(tl.where(here, sinks[None, :], 0.0), 1)
                    l_few = tl.where(split == 0, tl.exp(sink - m_few), 0.0)
                acc_few, l_few = _fwd_one_by_one(
                    m_few, l_few, q_head, start_m + chosen, k_head, v_head, band, dropout, scale, bounds, OPTIONS
                )
                acc_few *= (factor_few * inverse_sum(l_few))[:, None]
                store_tile(*o_head, start_m + chosen, offs_e, acc_few)


def _outputs(q, k, v, mask, *_):
    (B, H, M), wide = q.shape[:3], torch.float64 if q.dtype == torch.float64 else torch.float32
    lse, stats = (q.new_empty(shape, dtype=wide) for shape in ((B, H, M), (B, H, M, 2 if paired(q, mask) else 0)))
    return empty_heads(q, B, H, M, v.shape[3]), lse, stats


def _one_query(q, k, v, mask, key_mask, sinks, o, lse, left, right):
    """A single query each: the heads that share keys become rows of one tile, and a causal bound becomes a slice."""
    first, last = max(0, left or 0), k.shape[2] if right is None else max(0, min(k.shape[2], right + 1))
    k, v = k[:, :, first:last], v[:, :, first:last]
    rows = lambda t: t.unflatten(1, (k.shape[1], -1)).squeeze(3)  # noqa: E731
    mask = None if mask is None else rows(mask[..., first:last])
    key_mask = None if key_mask is None else key_mask[:, first:last]
    sinks = None if sinks is None else sinks.unflatten(0, (k.shape[1], -1))
    return rows(q), k, v, mask, key_mask, sinks, rows(o), lse.unflatten(1, (k.shape[1], -1)).squeeze(3)


@define_op(
    "fused", fake=_outputs, wide=(1, 2), hopper="forward",
    flops=lambda q, k, v, *_: matmul_flops(q, k[2], q[3] + v[3]),
)
def fused_op(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None,
    seed: torch.Tensor | None, scale: float, softcap: float, dropout_p: float, left: int | None, right: int | None,
    block_m: int | None, block_n: int | None, key_mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(O [B, H, M, Dv], lse [B, H, M], stats); the mask is 4-D with sizes 1 or full; key_mask [B, N] is a second one,
    bool if that is, else floating; query m sees the keys m + left ... m + right, or all on a side that is None. stats
    [B, H, M, 2] are the maxima of rows and the sums of their exponentials, for the backward pass where the rounding of
    lse would show (see paired); else empty."""
    outputs = o, lse, stats = _outputs(q, k, v, mask)
    if lse.numel() == 0:
        return outputs
    mask = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
    if q.shape[2] == 1 and k.shape[1] > 0 and seed is None:
        q, k, v, mask, key_mask, sinks, o, lse = _one_query(q, k, v, mask, key_mask, sinks, o, lse, left, right)
        left = right = None
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    if N == 0:
        o.zero_()
        lse.copy_(float("-inf") if sinks is None else sinks.view(H, -1))
        if stats.numel():
            stats.copy_(torch.stack([outputs[1], (outputs[1] != -math.inf).to(stats.dtype)], -1))
        return outputs
    sinks_strides = (0, 0) if sinks is None else (sinks.stride(0), sinks.stride(1) if sinks.dim() == 2 else 0)
    q, v, scalars, constants = fused_arguments(q, v, mask, scale, softcap, dropout_p, left, right)
    width = max(constants["D"], constants["DV"])
    few = M <= FEW_QUERIES
    op = tiles_of("fused few" if few else "fused", mask, key_mask)
    tile = tile_for(op, q.dtype, width, right is not None, q.device, block_m, block_n)
    programs = B * H * triton.cdiv(M, tile.BLOCK_M)
    splits = count_splits(programs, N, tile.BLOCK_N, q.device)
    chunk = triton.cdiv(triton.cdiv(N, splits), tile.BLOCK_N) * tile.BLOCK_N
    splits = triton.cdiv(N, chunk)
    trims = few and (splits > 1 or (k.numel() + v.numel()) * k.element_size() < HEAVY)  # see trimmed in logits.py
    units = None if trims else units_of(mask, key_mask, always=few)
    lists, listing = map_of(mask, units, tile, M, N, left, right, chunk=chunk)
    q, k, v = in_parts(constants["PRECISION"], q, k, v)
    part, part_stats = o[None], stats
    if splits > 1:
        part, part_stats = lse.new_empty(splits, *o.shape), lse.new_empty(splits, *lse.shape, 2)
    launch(
        _fwd_kernel, splits * programs,
        *strided(q, k, v, mask), *strided(key_mask, dims=2), *lists, sinks, *sinks_strides,
        part, *part.stride(), lse, part_stats, seed, *scalars, H, H // Hk, M, N, left or 0, right or 0, chunk,
        **constants, **listing, HAS_KEYS=key_mask is not None, HAS_SINKS=sinks is not None, SPLIT=splits > 1,
        TRIMMED=trims and mask is not None, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N,
        FEW=tile.BLOCK_M if INTERPRETED else 16,
        **compile_options(tile, q.device),
    )
    if splits > 1:
        merge_splits(
            part, part_stats, o, lse, stats,
            PAIRED=constants["PAIRED"], DV=constants["DV"], BLOCK_DV=constants["BLOCK_DV"],
        )
    return outputs


def _save(ctx, inputs, output):
    q, k, v, mask, sinks, seed, *ctx.options, key_mask = inputs
    Function.save(ctx, q, k, v, mask, sinks, seed, *output, key_mask)
    ctx.set_materialize_grads(False)


def _backward(ctx, do, dlse):
    *saved, key_mask = ctx.saved_tensors
    _, _, _, mask, sinks, _, o, _, _ = saved
    if do is None and dlse is None:
        return (None,) * 14
    do = torch.zeros_like(o) if do is None else do.to(o.dtype)
    needs = (mask is not None and ctx.needs_input_grad[3], sinks is not None and ctx.needs_input_grad[4])
    grads = differentiate(FusedBackward, do, dlse, *saved, *ctx.options[:5], *needs, key_mask)
    return *grads, *(None,) * 9


def _tangents(ctx, dq, dk, dv, dmask, dsinks):
    """(dO, dlse): the forward-mode derivative, stage by stage. It has to store P, which the kernel does not."""
    warnings.warn("forward mode through attention_fused stores scores of M x N, as attention_staged does", stacklevel=2)
    q, k, v, mask, sinks, seed, o, lse, stats, key_mask = ctx.saved_tensors
    scale, softcap, dropout_p, left, right = ctx.options[:5]
    pairs = [(rows, cols) for rows, cols in ((dq, k), (q, dk)) if rows is not None and cols is not None]
    x, dx = dot_products(q, k, scale=scale).to(lse.dtype), lse.new_zeros(*lse.shape, k.shape[2])
    dx = sum((dot_products(*pair, scale=scale).to(lse.dtype) for pair in pairs), dx)
    if softcap > 0.0:
        tanh = torch.tanh(x / softcap)
        x, dx = tanh * softcap, dx * (1.0 - tanh * tanh)
    for m in (mask, None if key_mask is None else key_mask[:, None, None]):
        if m is not None:
            x = x.masked_fill(~m, -math.inf) if m.dtype == torch.bool else x + m.to(x.dtype)
    dx = dx if dmask is None else dx + dmask.to(dx.dtype)
    visible = torch.ones(x.shape[2:], dtype=torch.bool, device=x.device)
    visible = visible if right is None else visible.tril(right)
    visible = visible if left is None else visible.triu(left)
    x = x.masked_fill(~visible, -math.inf)
    top, total = stats.unbind(-1) if stats.numel() else (lse, torch.ones_like(lse))
    p = (torch.exp(x - top[..., None]) / total[..., None]).masked_fill(x == -math.inf, 0.0)
    dx = dx.masked_fill(p == 0.0, 0.0)  # a hidden key may hold NaN
    dlse = (p * dx).sum(-1)
    if sinks is not None and dsinks is not None:
        dlse = dlse + dsinks[:, None] * torch.exp(sinks[:, None].to(lse.dtype) - top) / total
    dp = p * (dx - dlse[..., None])
    if seed is not None:
        keep = dropout_op(torch.ones_like(p), seed, dropout_p)
        p, dp = p * keep, dp * keep
    do = weighted_values(dp.to(v.dtype), v)
    return do if dv is None else do + weighted_values(p.to(v.dtype), dv), dlse


class Fused(Function):
    """(O, lse, stats); the arguments are those of fused_op."""

    op = fused_op

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(output[2])

    @staticmethod
    def backward(ctx, do, dlse, _):
        return _backward(ctx, do, dlse)

    @staticmethod
    def tangent(ctx, dq, dk, dv, dmask, dsinks, *_):
        return *_tangents(ctx, dq, dk, dv, dmask, dsinks), None

    @staticmethod
    def vmap(info, in_dims, q, k, v, mask, sinks, seed, *options):
        if sinks is not None or seed is not None:
            return _one_by_one(Fused, info, in_dims, q, k, v, mask, sinks, seed, *options)
        outs = differentiate(Fused, *fold(info, in_dims, q, k, v, mask), None, None, *options)
        return tuple(unfold(info, out) for out in outs), (0, 0, 0)


class FusedOutput(Fused):
    """Fused, where nobody asks for lse: torch.compile would fill a gradient of it with zeros in each backward pass."""

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx, do, *_):
        return _backward(ctx, do, None)

    @staticmethod
    def tangent(ctx, dq, dk, dv, dmask, dsinks, *_):
        return _tangents(ctx, dq, dk, dv, dmask, dsinks)[0], None, None


class FusedBackward(Function):
    """(dQ, dK, dV, dmask or None, dsinks or None)."""

    @staticmethod
    def forward(
        do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right,
        needs_dmask, needs_dsinks, key_mask,
    ):
        full = None if mask is None else mask.expand(*q.shape[:3], k.shape[2])
        options = (scale, softcap, dropout_p, left, right)
        dsinks = None
        dbias_shape = list(mask.shape) if needs_dmask else None
        dq, dk, dv, record, dbias = fused_backward_op(
            do, dlse, q, k, v, full, sinks, seed, o, lse, stats, *options, key_mask, dbias_shape
        )
        if needs_dsinks:  # the sink's weight e^(sink - lse) has no value: dP = 0, so its gradient is -P delta
            top, total = (stats[..., 0], stats[..., 1]) if paired(q, mask) else (lse, torch.ones_like(lse))
            weight = (torch.exp(sinks[:, None].double() - top) / total).masked_fill(lse == -math.inf, 0.0)
            dsinks = -(weight * record[..., 2:].double().sum(-1)).sum((0, 2)).to(sinks.dtype)
        return dq, dk, dv, dbias if needs_dmask else None, dsinks

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError("attention_fused has no second derivative: use attention_staged, which has every one")

    @staticmethod
    def vmap(info, in_dims, do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, *options):
        tensors = (do, dlse, q, k, v, mask, sinks, seed, o, lse, stats)
        if mask is not None or sinks is not None or seed is not None:
            return _one_by_one(FusedBackward, info, in_dims, *tensors, *options)
        grads = differentiate(FusedBackward, *fold(info, in_dims, *tensors), *options)
        return tuple(None if g is None else unfold(info, g) for g in grads), (0, 0, 0, None, None)


def _one_by_one(function, info, in_dims, *args):
    """A vmap rule for what the batch cannot absorb: a call per example."""
    each = []
    for i in range(info.batch_size):
        one = (a if dim is None else a.select(dim, i) for a, dim in zip(args, in_dims, strict=True))
        each.append(differentiate(function, *one))
    outs = [None if parts[0] is None else torch.stack(parts) for parts in zip(*each, strict=True)]
    return tuple(outs), tuple(None if out is None else 0 for out in outs)


@replayable
def attention_fused(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor | None = None, dropout_p: float = 0.0,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False, *,
    window_size: tuple[int, int] | None = None, softcap: float | None = None, sinks: torch.Tensor | None = None,
    return_lse: bool = False, block_m: int | None = None, block_n: int | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention in one kernel, in memory that grows with M + N: O = softmax(scale * Q K^T + mask) V.

    The first eight arguments are those of torch.nn.functional.scaled_dot_product_attention. Where the mask has a
    gradient, the backward pass on Hopper may take up to 4 GiB more, for dS.

    Args:
        q: queries [B, H, M, D], float16, bfloat16, float32 or float64, any strides, D up to 256.
        k, v: keys [B, Hk, N, D] and values [B, Hk, N, Dv] of the same dtype, Dv up to 256.
        attn_mask: bool (True: may attend) or floating (added), broadcasting to [B, H, M, N]; or a CausalBias.
        dropout_p: probability with which a weight is dropped; the others are divided by 1 - dropout_p. The same
            weights as attention_staged drops after the same torch.manual_seed.
        is_causal: query m sees the keys n <= m only; may be combined with attn_mask and window_size: all hold.
        scale: factor on Q K^T, 1 / sqrt(D) if None.
        enable_gqa: allow Hk < H, a divisor of H; head h reads the keys and values of head h // (H / Hk).
        window_size: (left, right), how many keys before and after its own place a query sees, -1: all. The last query
            is at the place of the last key, as in flash-attn.
        softcap: scores become softcap * tanh(scores / softcap), before the mask.
        sinks: [H], a logit per head that takes its share of the softmax and has no value.
        return_lse: return the logarithm of the sum of exponentials too.
        block_m, block_n: queries and keys per step, powers of two from 16; the tuned table chooses if None.

    Returns:
        O [B, H, M, Dv] in q's dtype (under autocast, its dtype), accumulated in float32. With return_lse also
        lse [B, H, M], float32, natural logarithm, sinks included (float64 for float64 inputs). Both are
        differentiable, once. A query that may attend to nothing gives zeros and lse = -inf (with a sink: the sink).

    Raises:
        TypeError: an argument of another type or dtype. ValueError: a shape, a value, a device, a tile or head dim that
        does not fit.
    """
    q, k, v = autocast(q, k, v)
    check_tensors(q=q, k=k, v=v)
    (B, H, M, D), (Hk, N) = q.shape, k.shape[1:3]
    check_shape("k", k, "B Hk N D", B=B, D=D)
    check_shape("v", v, "B Hk N Dv", B=B, Hk=Hk, N=N)
    check_flag("enable_gqa", enable_gqa)
    check_flag("return_lse", return_lse)
    check_heads("k", Hk, H, enable_gqa)
    for name, size in (("q", D), ("v", v.shape[3])):
        if size > MAX_HEAD_DIM:
            raise ValueError(
                f"{name} must have a head dim of at most {MAX_HEAD_DIM}, got {size}: attention_staged takes any"
            )
    mask, diagonal = check_mask(attn_mask, is_causal, (B, H, M, N), q.device)
    left, right = check_window(window_size, diagonal, M, N)
    scale, dropout_p, softcap = check_scale(scale, D), check_dropout(dropout_p), check_softcap(softcap, q.dtype)
    check_sinks(sinks, H, q.device)
    block_m, block_n = check_blocks(block_m=block_m, block_n=block_n)
    seed = draw_seed(q) if dropout_p > 0.0 else None
    function = Fused if return_lse else FusedOutput
    o, lse, _ = differentiate(
        function, q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, block_m, block_n, None
    )
    return (o, lse) if return_lse else o


@replayable
def attend_under_two_masks(q, k, v, mask, key_mask, dropout_p):
    """attention_fused with a mask [B or 1, H or 1, M, N] and one of keys [B, N], both bool (True: may attend) or both
    floating, which are never combined in memory; no gradient for the latter."""
    q, k, v = autocast(q, k, v)
    seed = draw_seed(q) if dropout_p > 0.0 else None
    scale, softcap, sinks, left, right = q.shape[3] ** -0.5, 0.0, None, None, None
    return differentiate(
        FusedOutput, q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, *TUNED, key_mask
    )[0]


if __name__ == "__main__":
    q, k, v = (torch.randn(2, 3, n, 24, device=DEVICE) for n in (37, 53, 53))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = (attention_fused(q, k, v, is_causal=True) - expected).abs().max().item()
    print(f"fused {tuple(q.shape)} x {tuple(k.shape)} on {DEVICE}: max |error| {error:.1e}")
