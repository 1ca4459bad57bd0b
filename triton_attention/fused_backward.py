"""dQ, dK, dV of the fused kernel: P is computed again, tile by tile, instead of stored.

    P  = e^(logits - lse)                 see fused_probs.py: no maximum, no sum, no correction
    dS = P * (dO V^T - delta)             delta = rowsum(P * dP) - dlse, of which the first is rowsum(dO * O)
    dV = P^T dO     dQ = scale dS K     dK = scale dS^T Q

Two kernels, so that every sum belongs to one program and none needs atomics: results are bitwise repeatable. A floating
mask that has a gradient too gets it from a third one (fused_bias.py).

    _dq_kernel      owns BLOCK_M queries, walks over the keys they see;     also writes delta
    _dkdv_kernel    owns BLOCK_N keys, walks over the queries that see them, of all heads that share the keys; it
                    works on transposed tiles, so that P^T and dS^T go from registers straight into their products

Dao et al., "FlashAttention", 2022, appendix B; Dao, "FlashAttention-2", 2023, section 3.1.2.
"""

import torch

import triton
import triton.language as tl

from triton_attention.float32 import in_parts, load_rows, map_finite, product, rows_dot, signed, whole
from triton_attention.fused_bias import bias_gradient
from triton_attention.fused_common import FEW_QUERIES, fused_arguments, tiles_of
from triton_attention.fused_probs import Record, dscores, load_record, normalizer, probs, store_record
from triton_attention.launch import empty_heads, launch, strided
from triton_attention.logits import (
    Band, Options, key_range, listed, listed_tile, load_mask, query_range, start_of, steps,
)
from triton_attention.mask_map import map_of, units_of
from triton_attention.operators import define_op, matmul_flops
from triton_attention.tile_choice import compile_options, tile_for
from triton_attention.tiles import (
    DropoutMask, Heads, Matrix, dot, head, hide_loads, keep_mask, load_tile, split_program, store_tile,
)


@triton.jit
def _dq_inner(
    dq, pk, left_over, q, do, record, dlse, k_head, v_head, band, dropout, scale, visits,
    HAS_DLSE: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):
    """(dq + dS K, pk + P K, left_over + rowsum(dS without dlse)) over some keys, the last two only if EXACT."""
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
        v = load_rows(v_head, offs_n, offs_e, PRECISION, MASKED, OPTIONS.DV != OPTIONS.BLOCK_DV)
        if MASKED and (OPTIONS.LEFT or OPTIONS.RIGHT or OPTIONS.HAS_MASK or OPTIONS.HAS_BIAS):
            # NaN or inf in a hidden key, times its dS of 0, would be NaN; a query that sees NaN has it in lse already
            k = map_finite(k, PRECISION)
        mask = load_mask(band, q.offs, offs_n, 0, MASKED, OPTIONS)
        zeros = tl.zeros([q.offs.shape[0], BLOCK_N], dq.dtype)
        qk = rows_dot(q, k, zeros, PRECISION)
        dp = rows_dot(do, v, zeros, PRECISION)
        p, tanh = probs(qk, record, q.offs, offs_n, band, mask, scale, 0, MASKED, OPTIONS)
        if OPTIONS.DROPOUT:
            dp = tl.where(keep_mask(dropout, q.offs, start_n, BLOCK_N), dp * dropout.factor, 0.0)
        ds_logits, ds = dscores(p, dp, tanh, record, 0, MASKED, OPTIONS)
        if OPTIONS.EXACT:
            left_over += tl.sum(ds_logits, 1)
            if OPTIONS.SOFTCAP > 0.0:
                p = tl.where(p == 0.0, 0.0, p * (1.0 - tanh * tanh))
            if HAS_DLSE:
                ds += tl.where(p == 0.0, 0.0, p * dlse[:, None])
            p, high = hide_loads(p, OPTIONS), k.parts[0]
            pk = dot(p.to(high.dtype), high, pk, "ieee" if PRECISION == "parts" else PRECISION)
        ds = hide_loads(ds, OPTIONS)
        dq = product(ds, k, dq, PRECISION)
    return dq, pk, left_over


@triton.jit(do_not_specialize=["H", "GROUP", "M", "N", "left", "right"])
def _dq_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd,
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, keys_ptr, stride_yb, stride_yn,
    lists_ptr, counts_ptr, stride_lb, stride_lh, stride_lm, capacity, sinks_ptr, stride_xh,
    lse_ptr, stats_ptr, dlse_ptr, record_ptr, dq_ptr, stride_rb, stride_rh, stride_rm, stride_rd,
    seed_ptr, scale, dropout_p, keep_factor, H, GROUP, M, N, left, right,
    D: tl.constexpr, DV: tl.constexpr, SIGN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_DLSE: tl.constexpr,
    SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr, PAIRED: tl.constexpr, TCGEN05: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, ALIGNED: tl.constexpr, LISTED: tl.constexpr, NARROW: tl.constexpr, HAS_KEYS: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        D, DV, SIGN, LEFT, RIGHT, HAS_MASK, HAS_BIAS, SOFTCAP, SCALED, DROPOUT, PAIRED, TCGEN05, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, ONE_ROW, ALIGNED, LISTED, NARROW, HAS_KEYS,
    )
    row_tiles = tl.cdiv(M, BLOCK_M)
    tile, off_b, off_h = split_program(tl.program_id(0), row_tiles, H)
    row_tile = row_tiles - 1 - tile  # causal: the longest rows first
    start_m = row_tile * BLOCK_M
    do_head = head(do_ptr, (stride_gb, stride_gh, stride_gm, stride_gd), (M, DV), off_b, off_h)
    q_head = head(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D), off_b, off_h)
    k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_h // GROUP)
    v_head = head(v_ptr, (stride_vb, stride_vh, stride_vn, stride_vd), (N, DV), off_b, off_h // GROUP)
    o_head = head(o_ptr, (stride_ob, stride_oh, stride_om, stride_od), (M, DV), off_b, off_h)
    dq_head = head(dq_ptr, (stride_rb, stride_rh, stride_rm, stride_rd), (M, D), off_b, off_h)
    mask = Matrix(None, (0, 0), (M, N))
    if HAS_MASK or HAS_BIAS:
        mask = head(mask_ptr, (stride_ab, stride_ah, stride_am, stride_an), (M, N), off_b, off_h)
    row = (off_b.to(tl.int64) * H + off_h) * M
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
    if SIGN != 1:
        q = signed(q, SIGN)
    do = load_rows(do_head, offs_m, offs_e, PRECISION)
    o = load_tile(*o_head, offs_m, offs_e)
    top, inverse = normalizer(lse_ptr, stats_ptr, row, offs_m, M, PAIRED)
    bounds, list_strides = key_range(start_m, 0, N, band, OPTIONS), (stride_lb, stride_lh, stride_lm)
    visits = listed(bounds, lists_ptr, counts_ptr, list_strides, capacity, off_b, off_h, row_tile, 0, OPTIONS)

    delta = tl.sum(whole(do, PRECISION).to(ACC) * o.to(ACC), 1)
    dlse, rest = tl.zeros([BLOCK_M], ACC), tl.zeros([BLOCK_M], ACC)
    if HAS_DLSE:
        dlse = tl.load(dlse_ptr + row + offs_m, mask=offs_m < M, other=0.0)
        if not EXACT:
            delta -= dlse
    if not EXACT:  # now, not when the sum is done: what is kept until then takes registers
        store_record(record_ptr, row + offs_m, Record(top, inverse, delta, rest), offs_m < M)
    dq = tl.zeros([BLOCK_M, BLOCK_D], ACC)
    pk = dq
    for masked in tl.static_range(1 if (HAS_MASK or HAS_BIAS) and not LISTED else 0, 2):
        dq, pk, rest = _dq_inner(
            dq, pk, rest, q, do, Record(top, inverse, delta, None), dlse, k_head, v_head, band, dropout, scale, visits,
            HAS_DLSE, masked == 1, OPTIONS,
        )
    if EXACT:  # rowsum(P * dP) less what rounding made of it in delta: much, where one key has almost all of the weight
        if HAS_SINKS:  # then P has a sum of 1 less the sink's weight
            rest -= delta * tl.exp(tl.load(sinks_ptr + off_h * stride_xh).to(ACC) - top) * inverse
        dq -= rest[:, None] * pk
        rest -= dlse
        store_record(record_ptr, row + offs_m, Record(top, inverse, delta, rest), offs_m < M)
    store_tile(*dq_head, offs_m, offs_d, dq * (scale * SIGN))


@triton.jit
def _dkdv_inner(
    dk, dv, k, v, q_heads, do_heads, record_ptr, band, dropout, scale, start_n, visits,
    off_b, first_h, H, GROUP: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr,
):
    """(dk + dS^T Q, dv + P^T dO) over the queries that see every key of the block, or if MASKED over the others; the
    mask of the band is one of all heads.

    One loop over all heads of the group: a loop around it would keep the addresses of both in registers.
    """
    PRECISION: tl.constexpr = OPTIONS.PRECISION
    BLOCK_M: tl.constexpr = OPTIONS.NARROW if MASKED else OPTIONS.BLOCK_M
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    offs_d, offs_e = tl.arange(0, OPTIONS.BLOCK_D), tl.arange(0, OPTIONS.BLOCK_DV)
    M = q_heads.shape[0]
    first, last, gap = steps(visits, OPTIONS.BLOCK_M, MASKED, OPTIONS)
    tiles = tl.cdiv(last - first, BLOCK_M)
    tile = listed_tile(visits, first, OPTIONS.BLOCK_M, MASKED, OPTIONS)
    for step in range(0, GROUP * tiles):
        off_g = step // tiles if GROUP > 1 else 0
        off_h, at = first_h + off_g, first + (step - off_g * tiles) * BLOCK_M
        start_m = start_of(visits, at, gap, tile, OPTIONS.BLOCK_M, MASKED, OPTIONS)
        following = at + BLOCK_M
        if GROUP > 1:
            following = tl.where(following < last, following, first)
        tile = listed_tile(visits, following, OPTIONS.BLOCK_M, MASKED, OPTIONS)
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q_head = head(*q_heads, off_b, off_h)
        q = load_rows(q_head, offs_m, offs_d, PRECISION, MASKED, OPTIONS.D != OPTIONS.BLOCK_D)
        do_head = head(*do_heads, off_b, off_h)
        do = load_rows(do_head, offs_m, offs_e, PRECISION, MASKED, OPTIONS.DV != OPTIONS.BLOCK_DV)
        record = load_record(record_ptr, (off_b.to(tl.int64) * H + off_h) * M, offs_m, M)
        band_of_head = band
        if OPTIONS.HAS_MASK or OPTIONS.HAS_BIAS:
            band_of_head = Band(band.left, band.right, head(*band.mask, off_b, off_h), band.keys)
        mask = load_mask(band_of_head, offs_m, k.offs, 1, MASKED, OPTIONS)
        zeros = tl.zeros([BLOCK_N, BLOCK_M], dk.dtype)
        qk_t = rows_dot(k, q, zeros, PRECISION)
        p_t, tanh = probs(qk_t, record, offs_m, k.offs, band_of_head, mask, scale, 1, MASKED, OPTIONS)
        kept = p_t
        if OPTIONS.DROPOUT:
            dropout_of_head = DropoutMask(dropout.p, dropout.factor, dropout.seed, off_b, off_h)
            keep = tl.trans(keep_mask(dropout_of_head, offs_m, start_n, BLOCK_N).to(tl.int32)) > 0
            kept = tl.where(keep, p_t * dropout.factor, 0.0)
        kept = hide_loads(kept, OPTIONS)
        dv = product(kept, do, dv, PRECISION)  # before dP: frees the registers that hold P as an operand
        dp_t = rows_dot(v, do, zeros, PRECISION)
        if OPTIONS.DROPOUT:
            dp_t = tl.where(keep, dp_t * dropout.factor, 0.0)
        _, ds_t = dscores(p_t, dp_t, tanh, record, 1, MASKED, OPTIONS)
        ds_t = hide_loads(ds_t, OPTIONS)
        dk = product(ds_t, q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["H", "M", "N", "left", "right"])
def _dkdv_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd,
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, keys_ptr, stride_yb, stride_yn,
    lists_ptr, counts_ptr, stride_lb, stride_lh, stride_lm, capacity,
    record_ptr,
    dk_ptr, stride_rb, stride_rh, stride_rn, stride_rd,
    dv_ptr, stride_wb, stride_wh, stride_wn, stride_wd,
    seed_ptr, scale, dropout_p, keep_factor, H, M, N, left, right,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, SIGN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRED: tl.constexpr, TCGEN05: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, ALIGNED: tl.constexpr, LISTED: tl.constexpr, NARROW: tl.constexpr, HAS_KEYS: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        D, DV, SIGN, LEFT, RIGHT, HAS_MASK, HAS_BIAS, SOFTCAP, SCALED, DROPOUT, PAIRED, TCGEN05, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, ONE_ROW, ALIGNED, LISTED, NARROW, HAS_KEYS,
    )
    tile, off_b, off_hk = split_program(tl.program_id(0), tl.cdiv(N, BLOCK_N), H // GROUP)
    start_n = tile * BLOCK_N
    k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_hk)
    v_head = head(v_ptr, (stride_vb, stride_vh, stride_vn, stride_vd), (N, DV), off_b, off_hk)
    dk_head = head(dk_ptr, (stride_rb, stride_rh, stride_rn, stride_rd), (N, D), off_b, off_hk)
    dv_head = head(dv_ptr, (stride_wb, stride_wh, stride_wn, stride_wd), (N, DV), off_b, off_hk)
    q_heads = Heads(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D))
    do_heads = Heads(do_ptr, (stride_gb, stride_gh, stride_gm, stride_gd), (M, DV))
    mask_heads = Heads(mask_ptr, (stride_ab, stride_ah, stride_am, stride_an), (M, N))
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale, keep_factor = tl.cast(scale, ACC), tl.cast(keep_factor, ACC)  # as float64 kernels compute
    band = Band(left, right, mask_heads, (keys_ptr, stride_yb, stride_yn, off_b))
    dropout = DropoutMask(dropout_p, keep_factor, seed, off_b, off_hk)

    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    k = load_rows(k_head, offs_n, offs_d, PRECISION)
    if SIGN != 1:
        k = signed(k, SIGN)
    v = load_rows(v_head, offs_n, offs_e, PRECISION)
    dk = tl.zeros([BLOCK_N, BLOCK_D], ACC)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], ACC)

    bounds, list_strides = query_range(start_n, M, band, OPTIONS), (stride_lb, stride_lh, stride_lm)
    visits = listed(bounds, lists_ptr, counts_ptr, list_strides, capacity, off_b, off_hk, tile, 0, OPTIONS)
    for masked in tl.static_range(1 if (HAS_MASK or HAS_BIAS) and not LISTED else 0, 2):
        dk, dv = _dkdv_inner(
            dk, dv, k, v, q_heads, do_heads, record_ptr, band, dropout, scale, start_n, visits,
            off_b, off_hk * GROUP, H, GROUP, masked == 1, OPTIONS,
        )
    store_tile(*dk_head, offs_n, offs_d, dk * (scale * SIGN))
    store_tile(*dv_head, offs_n, offs_e, dv)


def _fused_gradients(
    do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right, key_mask=None,
    dbias_shape=None,
):
    dbias = (q if mask is None else mask).new_empty(dbias_shape or 0)
    return *(empty_heads(t, *t.shape) for t in (q, k, v)), lse.new_empty(*lse.shape, 4), dbias


@define_op(
    "fused_backward", fake=_fused_gradients, wide=(3,), like={4: 5}, hopper="backward",
    flops=lambda do, dlse, q, k, v, *_: matmul_flops(q, k[2], 3 * q[3] + 2 * v[3]),
)
def fused_backward_op(
    do: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    mask: torch.Tensor | None, sinks: torch.Tensor | None, seed: torch.Tensor | None, o: torch.Tensor,
    lse: torch.Tensor, stats: torch.Tensor, scale: float, softcap: float, dropout_p: float, left: int | None,
    right: int | None, key_mask: torch.Tensor | None = None, dbias_shape: list[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(dQ, dK, dV, record [B, H, M, 4] of each query, see load_record, dbias) of do like O, dlse like lse, and what
    fused_op took and returned. dbias is the gradient of a floating mask, expanded here, in the 4-D shape that it had
    before; empty, if no shape is given."""
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    options = scale, softcap, dropout_p, left, right
    dq, dk, dv, record, dbias = outputs = _fused_gradients(
        do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, *options, key_mask, dbias_shape
    )
    if B * H * M * N == 0:
        for t in outputs:
            t.zero_()
        return outputs
    lse, stats = lse.contiguous(), stats.contiguous()  # which vmap may have expanded
    dlse = None if dlse is None else dlse.contiguous()
    given = do, q, k, v
    q, v, scalars, constants = fused_arguments(q, v, mask, *options)
    width = max(constants["D"], constants["DV"])
    op_dq, op_dkdv = (
        f"{op}, few" if M <= FEW_QUERIES else tiles_of(op, mask, key_mask) for op in ("fused dq", "fused dkdv")
    )
    dtype = q.dtype
    do, q, k, v = in_parts(constants["PRECISION"], do, q, k, v)
    units = units_of(mask, key_mask)
    tile = tile_for(op_dq, dtype, width, right is not None, q.device)
    lists, listing = map_of(mask, units, tile, M, N, left, right)
    launch(
        _dq_kernel, B * H * triton.cdiv(M, tile.BLOCK_M),
        *strided(do, q, k, v, o, mask), *strided(key_mask, dims=2), *lists,
        sinks, 0 if sinks is None else sinks.stride(0),
        lse, stats, dlse, record, *strided(dq),
        seed, *scalars, H, H // Hk, M, N, left or 0, right or 0,
        **constants, **listing, HAS_KEYS=key_mask is not None, HAS_SINKS=sinks is not None, HAS_DLSE=dlse is not None,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **compile_options(tile, q.device),
    )
    tile = tile_for(op_dkdv, dtype, width, right is not None, q.device)
    lists, listing = map_of(mask, units, tile, M, N, left, right, transposed=True, group=H // Hk)
    launch(
        _dkdv_kernel, B * Hk * triton.cdiv(N, tile.BLOCK_N),
        *strided(do, q, k, v, mask), *strided(key_mask, dims=2), *lists, record, *strided(dk, dv),
        seed, *scalars, H, M, N, left or 0, right or 0,
        GROUP=H // Hk, **constants, **listing, HAS_KEYS=key_mask is not None,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **compile_options(tile, q.device),
    )
    if dtype == torch.float64:
        dq *= scale
        dv *= 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
    if dbias_shape is not None:
        bias_gradient(dbias, *given, mask, key_mask, seed, record, *options)
    return outputs
