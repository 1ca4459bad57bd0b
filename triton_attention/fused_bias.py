"""The gradient of a floating mask in the fused kernel: dS, summed over the dimensions where the mask has size 1.

    bias  [1, H, M, N]                    a program owns a tile of the bias and walks over the tiles of dS that it was
      +----+----+                         added to, here one a batch element: P and dS are computed again, as for dQ,
      | db |    |  = sum over b of dS     and the sum stays in registers. No atomics, and nothing of size [B, H, M, N]
      +----+----+                         unless the bias has that size itself

Where a kernel stores dS on its way to dQ (Hopper, up to MOST_DS bytes), it is only added up.
"""

import triton
import triton.language as tl

from triton_attention.float32 import in_parts, load_rows, rows_dot, signed
from triton_attention.fused_common import fused_arguments
from triton_attention.fused_probs import dscores, load_record, probs
from triton_attention.launch import launch, strided
from triton_attention.logits import Band, Options, load_mask
from triton_attention.mask_map import UNIT, unit_strides
from triton_attention.tile_choice import compile_options, tile_for
from triton_attention.tiles import DropoutMask, head, head_ptr, keep_mask, split_program, store_tile


@triton.jit(do_not_specialize=["B", "H", "GROUP", "M", "N", "left", "right", "GH", "GM", "GN"])
def _dbias_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd,
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, keys_ptr, stride_yb, stride_yn,
    record_ptr, dbias_ptr, stride_rb, stride_rh, stride_rm, stride_rn,
    seed_ptr, scale, dropout_p, keep_factor, B, H, GROUP, M, N, left, right, GH, GM, GN,
    D: tl.constexpr, DV: tl.constexpr, SIGN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr,
    DROPOUT: tl.constexpr, PAIRED: tl.constexpr, TCGEN05: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    ALIGNED: tl.constexpr, HAS_KEYS: tl.constexpr,
    SUM_B: tl.constexpr, SUM_H: tl.constexpr, SUM_M: tl.constexpr, SUM_N: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """One tile of the bias's gradient [GB, GH, GM, GN]: dS summed over the dimensions where the bias has size 1."""
    OPTIONS: tl.constexpr = Options(
        D, DV, SIGN, LEFT, RIGHT, HAS_MASK, HAS_BIAS, SOFTCAP, SCALED, DROPOUT, PAIRED, TCGEN05, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, False, ALIGNED, HAS_KEYS=HAS_KEYS,
    )
    col_tiles = tl.cdiv(GN, BLOCK_N)
    tile, first_b, first_h = split_program(tl.program_id(0), tl.cdiv(GM, BLOCK_M) * col_tiles, GH)
    start_m, start_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N
    offs_d, offs_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    ACC: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
    scale, keep_factor = tl.cast(scale, ACC), tl.cast(keep_factor, ACC)  # as float64 kernels compute
    seed = 0
    if DROPOUT:
        seed = tl.load(seed_ptr)

    # one loop over all that is summed, whose next loads are under way while a tile is computed
    count_h = H if SUM_H else 1
    count_m, count_n = tl.cdiv(M, BLOCK_M) if SUM_M else 1, tl.cdiv(N, BLOCK_N) if SUM_N else 1
    acc = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for step in range(0, (B if SUM_B else 1) * count_h * count_m * count_n):
        head_step, tile_step = step // (count_m * count_n), step % (count_m * count_n)
        off_b, off_h = first_b + head_step // count_h, first_h + head_step % count_h
        first_m, first_n = start_m + tile_step // count_n * BLOCK_M, start_n + tile_step % count_n * BLOCK_N
        offs_m, offs_n = first_m + tl.arange(0, BLOCK_M), first_n + tl.arange(0, BLOCK_N)
        row = (off_b.to(tl.int64) * H + off_h) * M
        do_head = head(do_ptr, (stride_gb, stride_gh, stride_gm, stride_gd), (M, DV), off_b, off_h)
        q_head = head(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D), off_b, off_h)
        k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_h // GROUP)
        v_head = head(v_ptr, (stride_vb, stride_vh, stride_vn, stride_vd), (N, DV), off_b, off_h // GROUP)
        mask = head(mask_ptr, (stride_ab, stride_ah, stride_am, stride_an), (M, N), off_b, off_h)
        band = Band(left, right, mask, (keys_ptr, stride_yb, stride_yn, off_b))
        dropout = DropoutMask(dropout_p, keep_factor, seed, off_b, off_h)
        q = load_rows(q_head, offs_m, offs_d, PRECISION)
        if SIGN != 1:
            q = signed(q, SIGN)
        record = load_record(record_ptr, row, offs_m, M)
        k = load_rows(k_head, offs_n, offs_d, PRECISION)
        mask_tile = load_mask(band, offs_m, offs_n, 0, True, OPTIONS)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        qk = rows_dot(q, k, zeros, PRECISION)
        p, tanh = probs(qk, record, offs_m, offs_n, band, mask_tile, scale, 0, True, OPTIONS)
        do, v = load_rows(do_head, offs_m, offs_e, PRECISION), load_rows(v_head, offs_n, offs_e, PRECISION)
        dp = rows_dot(do, v, zeros, PRECISION)
        if DROPOUT:
            dp = tl.where(keep_mask(dropout, offs_m, first_n, BLOCK_N), dp * keep_factor, 0.0)
        ds, _ = dscores(p, dp, tanh, record, 0, True, OPTIONS)
        acc += tl.where(offs_m[:, None] < M, ds, 0.0)
    if SUM_M:
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], acc.shape)
    if SUM_N:
        acc = tl.broadcast_to(tl.sum(acc, 1)[:, None], acc.shape)
    dbias_head = head(dbias_ptr, (stride_rb, stride_rh, stride_rm, stride_rn), (GM, GN), first_b, first_h)
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    store_tile(*dbias_head, offs_m, offs_n, acc)


@triton.jit(do_not_specialize=["B", "H", "left", "right", "GH"])
def _sum_kernel(
    ds_ptr, stride_sb, stride_sh, stride_sn, units_ptr, stride_ub, stride_uh, stride_um, stride_un,
    dbias_ptr, stride_rb, stride_rh, stride_rm, stride_rn, B, H, M, N, left, right, GH,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, SUM_B: tl.constexpr, SUM_H: tl.constexpr,
    UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """One tile of the bias's gradient from dS^T in memory; where the mask hides all of the tile, nothing may have been
    written there. Triton sees that the mask of a load is the same for 16 queries, so that a thread loads 16 bytes."""
    col_tiles = tl.cdiv(N, BLOCK_N)
    tile, first_b, first_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M) * col_tiles, GH)
    start_m, start_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N
    offs_m, offs_n = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N)
    inside = (offs_n < N)[:, None] & (offs_m // 16 * 16 < M)[None, :]
    units_m = start_m // UNIT + tl.arange(0, BLOCK_M // UNIT)
    units_n = start_n // UNIT + tl.arange(0, BLOCK_N // UNIT)
    units_inside = (units_n * UNIT < N)[:, None] & (units_m * UNIT < M)[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    count_h = H if SUM_H else 1
    for step in range(0, (B if SUM_B else 1) * count_h):
        off_b, off_h = first_b + step // count_h, first_h + step % count_h
        units = head_ptr(units_ptr, stride_ub, stride_uh, off_b, off_h)
        ptrs = units + units_n[:, None] * stride_un + units_m[None, :] * stride_um
        visited = tl.max(tl.max(tl.load(ptrs, mask=units_inside, other=0).to(tl.int32), 1), 0) > 0
        if RIGHT:
            visited = visited & (start_n <= start_m + (BLOCK_M - 1) + right)
        if LEFT:
            visited = visited & (start_n + (BLOCK_N - 1) >= start_m + left)
        ds = head_ptr(ds_ptr, stride_sb, stride_sh, off_b, off_h)
        ptrs = ds + offs_n.to(tl.int64)[:, None] * stride_sn + offs_m[None, :]
        acc += tl.load(ptrs, mask=inside & visited, other=0.0)
    if RIGHT:
        acc = tl.where(offs_n[:, None] <= offs_m[None, :] + right, acc, 0.0)
    if LEFT:
        acc = tl.where(offs_n[:, None] >= offs_m[None, :] + left, acc, 0.0)
    dbias_head = head(dbias_ptr, (stride_rb, stride_rh, stride_rm, stride_rn), (M, N), first_b, first_h)
    store_tile(*dbias_head, offs_m, offs_n, tl.trans(acc))


def sum_scores(dbias, ds, units, left, right):
    """Fill dbias [B or 1, H or 1, M, N] from dS^T [B, H, N, a multiple of 16] of a kernel that had it, written in all
    tiles of 64 x 64, or larger ones, where the mask's units (see units_of) and the bounds let a query see a key."""
    (B, H), (GB, GH, M, N) = ds.shape[:2], dbias.shape
    block_m, block_n = 64, 64
    launch(
        _sum_kernel, GB * GH * triton.cdiv(M, block_m) * triton.cdiv(N, block_n),
        ds, *ds.stride()[:3], units, *unit_strides(units), *strided(dbias), B, H, M, N, left or 0, right or 0, GH,
        LEFT=left is not None, RIGHT=right is not None, SUM_B=GB == 1, SUM_H=GH == 1,
        UNIT=UNIT, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
    )


def bias_gradient(
    dbias, do, q, k, v, mask, key_mask, seed, record, scale, softcap, dropout_p, left, right
):
    """Fill dbias with dS, summed to its 4-D shape; `mask` is the bias, expanded, the others as in fused_backward_op."""
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    q, v, scalars, constants = fused_arguments(q, v, mask, scale, softcap, dropout_p, left, right)
    dtype = q.dtype
    do, q, k, v = in_parts(constants["PRECISION"], do, q, k, v)
    tile = tile_for("fused dbias", dtype, max(constants["D"], constants["DV"]), False, q.device)
    shape = dbias.shape
    sums = [size == 1 for size in shape]
    launch(
        _dbias_kernel, shape[0] * shape[1] * triton.cdiv(shape[2], tile.BLOCK_M) * triton.cdiv(shape[3], tile.BLOCK_N),
        *strided(do, q, k, v, mask), *strided(key_mask, dims=2), record, *strided(dbias),
        seed, *scalars, B, H, H // Hk, M, N, left or 0, right or 0, *shape[1:],
        **constants, ALIGNED=N % 16 == 0 and mask.stride(3) == 1, HAS_KEYS=key_mask is not None,
        SUM_B=sums[0], SUM_H=sums[1], SUM_M=sums[2], SUM_N=sums[3],
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **compile_options(tile, q.device),
    )
