"""P V again, where it came out with a NaN: an element of P that is exactly zero reads nothing, so 0 * NaN counts as 0.

    p  .3 .7  0        v    1 2 3        A dot of tiles multiplies a masked key's NaN by zero, which is NaN. The few
                            4 5 6        tiles of O with one are computed once more, a column of P at a time, without
                          NaN 7 8        those products; so what NaN is left came from a key with a weight.

The second kernel costs a launch; a branch of the first one cost 120 registers.
"""

import triton
import triton.language as tl

from triton_attention.device import INTERPRETED
from triton_attention.launch import launch
from triton_attention.tiles import head_ptr, load_tile, split_program, store_tile, visible


@triton.jit
def _nonzero_kernel(
    p_ptr, stride_pb, stride_ph, stride_pm, stride_pn,
    v_ptr, stride_vb, stride_vh, stride_vn, stride_vd,
    o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    nan_ptr, scale, H, SHARE, M, N, diagonal,
    D: tl.constexpr, SUMMED: tl.constexpr, CAUSAL: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):
    """ROWS of the tile of O that a program of _values_kernel has written."""
    parts = BLOCK_M // ROWS
    if tl.load(nan_ptr + tl.program_id(0) // parts) != 0:
        col_tiles, row_tiles = tl.cdiv(D, BLOCK_D), tl.cdiv(M, BLOCK_M)
        tile, off_b, off_h = split_program(tl.program_id(0) // parts, row_tiles * col_tiles, H)
        row_tile = tile // col_tiles
        if CAUSAL and not TRANSPOSED:
            row_tile = row_tiles - 1 - row_tile
        offs_m = row_tile * BLOCK_M + tl.program_id(0) % parts * ROWS + tl.arange(0, ROWS)
        offs_d = tile % col_tiles * BLOCK_D + tl.arange(0, BLOCK_D)
        ACC: tl.constexpr = tl.float64 if p_ptr.dtype.element_ty == tl.float64 else tl.float32
        acc = tl.zeros([ROWS, BLOCK_D], ACC)
        for off_g in range(0, SUMMED):
            off_p = off_h * SUMMED + off_g
            P = (head_ptr(p_ptr, stride_pb, stride_ph, off_b, off_p), (stride_pm, stride_pn), (M, N))
            V = (head_ptr(v_ptr, stride_vb, stride_vh, off_b, off_p // SHARE), (stride_vn, stride_vd), (N, D))
            for n in range(0, N):
                offs_n = n + tl.arange(0, 1)
                p, v = load_tile(*P, offs_m, offs_n).to(ACC), load_tile(*V, offs_n, offs_d).to(ACC)
                if CAUSAL:
                    p = tl.where(visible(offs_m, offs_n, diagonal, TRANSPOSED), p, 0.0)
                acc += tl.where(p == 0.0, 0.0, p * v)
        o_ptr = head_ptr(o_ptr, stride_ob, stride_oh, off_b, off_h)
        store_tile(o_ptr, (stride_om, stride_od), (M, D), offs_m, offs_d, acc * scale)


def repair(has_nan, *arguments, **constants):
    """Compute the tiles again whose has_nan is not 0; the arguments are those of _values_kernel."""
    if not INTERPRETED or has_nan.any():
        rows = min(constants["BLOCK_M"], 32)
        programs = has_nan.shape[0] * constants["BLOCK_M"] // rows
        launch(_nonzero_kernel, programs, *arguments, **constants, ROWS=rows, num_warps=4)
