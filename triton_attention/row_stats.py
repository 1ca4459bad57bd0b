"""The maximum and the sum of a row of scores, from its lse, where PyTorch keeps no more than that between the passes.

    P = e^(logits - max) / sum            free of the rounding of lse
    P = e^(logits - lse)                  the same, while lse is small; of -1e9 + log 33 the log is lost

Rows of small lse have (lse, 1), which is as good. A tile with a row of large lse walks over its keys once more, without
their values: rows of one large negative constant, as padding makes them. In a batch without, nothing is computed.
"""

import triton
import triton.language as tl

from triton_attention.float32 import in_parts, load_rows, rows_dot, signed
from triton_attention.fused_common import fused_arguments, tiles_of
from triton_attention.launch import launch, strided
from triton_attention.logits import Band, Options, exponential, key_range, load_mask, logits, lowest, store_pair
from triton_attention.mask_map import map_of
from triton_attention.tile_choice import compile_options, tile_for
from triton_attention.tiles import Matrix, head, split_program

SMALL = 64.0  # rounding an lse below it changes P by less than 4e-6
SMALL_EXACT = 8.0  # the same for float32: by less than 5e-7


@triton.jit(do_not_specialize=["H", "GROUP", "M", "N", "left", "right"])
def _row_stats_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an,
    lse_ptr, stats_ptr, scale, small, H, GROUP, M, N, left, right,
    D: tl.constexpr, DV: tl.constexpr, SIGN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, SOFTCAP: tl.constexpr, SCALED: tl.constexpr, DROPOUT: tl.constexpr,
    PAIRED: tl.constexpr, TCGEN05: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ONE_ROW: tl.constexpr, ALIGNED: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        D, DV, SIGN, LEFT, RIGHT, HAS_MASK, HAS_BIAS, SOFTCAP, SCALED, DROPOUT, PAIRED, TCGEN05, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV, ONE_ROW, ALIGNED,
    )
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), H)
    start_m = tile * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    row = (off_b.to(tl.int64) * H + off_h) * M
    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < M, other=0.0)
    scale = tl.cast(scale, lse.dtype)
    m_i, l_i = lse, tl.where(lse == float("-inf"), 0.0, lse * 0.0 + 1.0)
    large = (tl.abs(lse) > small) & (lse != float("-inf"))
    if tl.sum(large.to(tl.int32), 0) > 0:
        q_head = head(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D), off_b, off_h)
        k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_h // GROUP)
        mask = Matrix(None, (0, 0), (M, N))
        if HAS_MASK or HAS_BIAS:
            mask = head(mask_ptr, (stride_ab, stride_ah, stride_am, stride_an), (M, N), off_b, off_h)
        band = Band(left, right, mask, None)
        offs_d = tl.arange(0, BLOCK_D)
        q = load_rows(q_head, offs_m, offs_d, PRECISION)
        if SIGN != 1:
            q = signed(q, SIGN)
        top, total = lowest(BLOCK_M, lse.dtype, SCALED), tl.zeros([BLOCK_M], lse.dtype)
        bounds = key_range(start_m, 0, N, band, OPTIONS)
        for start_n in range(bounds[0], bounds[3], BLOCK_N):
            offs_n = start_n + tl.arange(0, BLOCK_N)
            k = load_rows(k_head, offs_n, offs_d, PRECISION)
            tile_of_mask = load_mask(band, offs_m, offs_n, 0, True, OPTIONS)
            qk = rows_dot(q, k, tl.zeros([BLOCK_M, BLOCK_N], lse.dtype), PRECISION)
            x, raw = logits(qk, offs_m[:, None], offs_n[None, :], band, tile_of_mask, scale, True, OPTIONS)
            new = tl.maximum(top, tl.max(x, 1) * (1.0 if SCALED else scale))
            p = exponential(x, raw, new[:, None], scale, True, OPTIONS)
            total = total * tl.exp(top - new) + tl.sum(p, 1)
            top = new
        m_i, l_i = tl.where(large, top, m_i), tl.where(large, total, l_i)
    store_pair(stats_ptr, row + offs_m, m_i, l_i, offs_m < M)


def row_stats(q, k, mask, lse, scale, left, right):
    """stats [B, H, M, 2] as fused_op returns them: maxima of rows and the sums of their exponentials, of its lse.

    Args: as fused_op takes them; mask [B, H, M, N], expanded, or None; lse [B, H, M] contiguous, without sinks.
    """
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    stats = lse.new_empty(B, H, M, 2)
    if stats.numel() == 0:
        return stats
    q, _, scalars, constants = fused_arguments(q, k, mask, scale, 0.0, 0.0, left, right)
    tile = tile_for(tiles_of("fused", mask, None), q.dtype, constants["D"], right is not None, q.device)
    _, listing = map_of(mask, None, tile, M, N, left, right)
    dtype = q.dtype
    q, k = in_parts(constants["PRECISION"], q, k)
    launch(
        _row_stats_kernel, B * H * triton.cdiv(M, tile.BLOCK_M), *strided(q, k, mask), lse, stats, scalars[0],
        SMALL if dtype.itemsize == 2 else SMALL_EXACT, H, H // Hk, M, N, left or 0, right or 0,
        **constants, ONE_ROW=listing["ONE_ROW"], ALIGNED=listing["ALIGNED"],
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, **compile_options(tile, q.device),
    )
    return stats
