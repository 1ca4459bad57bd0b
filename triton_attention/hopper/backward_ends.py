"""Before and after the Hopper backward (backward.py): what a query needs of its own.

    preprocess     lse, delta = sum(O dO)   ->  a row for each tile of queries, loaded by TMA with its Q; semaphores
    postprocess    accumulated dQ           ->  dQ, from the order of registers to rows

Both are limited by memory.
"""

import torch

import triton
import triton.language as tl

from triton_attention.launch import launch
from triton_attention.logits import LOG2E, load_pair, store_pair
from triton_attention.tiles import head_ptr, inverse_sum, load_tile, store_tile


@triton.jit(do_not_specialize=["H", "M", "row_tiles"])
def _preprocess_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd, o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    lse_ptr, pairs_ptr, dlse_ptr, record_ptr, stats_ptr, semaphores_ptr, H, M, row_tiles,
    DV: tl.constexpr, HAS_DLSE: tl.constexpr, PAIRED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """For each tile of queries: lse of base 2, +inf where no key is seen (P = 0 there), and -delta; its
    semaphore, 0; and the record, see load_record, in which the gradient of sinks finds delta. PAIRED: instead of lse
    the maximum, and behind delta the logarithm of the sum, of base 2."""
    tile = tl.program_id(0)
    head, start_m = tile // row_tiles, tile % row_tiles * BLOCK_M
    off_b, off_h = head // H, head % H
    offs_m, offs_e = start_m + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_DV)
    o = load_tile(head_ptr(o_ptr, stride_ob, stride_oh, off_b, off_h), (stride_om, stride_od), (M, DV), offs_m, offs_e)
    do = load_tile(
        head_ptr(do_ptr, stride_gb, stride_gh, off_b, off_h), (stride_gm, stride_gd), (M, DV), offs_m, offs_e
    )
    row = head.to(tl.int64) * M
    lse = tl.load(lse_ptr + row + offs_m, mask=offs_m < M, other=float("inf"))
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + row + offs_m, mask=offs_m < M, other=0.0)
    stats_ptr += tile.to(tl.int64) * (4 if PAIRED else 2) * BLOCK_M + tl.arange(0, BLOCK_M)
    blind = lse == float("-inf")
    tl.store(stats_ptr + BLOCK_M, tl.where(blind, 0.0, -delta))
    if PAIRED:
        top, sums = load_pair(pairs_ptr, row + offs_m, offs_m < M, 0.0)
        blind = blind | (offs_m >= M)
        top, inverse = tl.where(blind, 0.0, top), inverse_sum(sums)
        tl.store(stats_ptr, top)
        tl.store(stats_ptr + 2 * BLOCK_M, tl.where(blind, float("inf"), tl.log(sums) * LOG2E))
    else:
        tl.store(stats_ptr, tl.where(blind, float("inf"), lse * LOG2E))
        top = tl.where(blind, 0.0, lse)
        inverse = top
    store_pair(record_ptr, 2 * (row + offs_m), top, inverse, offs_m < M)
    store_pair(record_ptr, 2 * (row + offs_m) + 1, delta, tl.zeros_like(delta), offs_m < M)
    tl.store(semaphores_ptr + tile, 0)


@triton.jit(do_not_specialize=["scale", "H", "M", "N", "row_tiles", "left", "right", "total_b", "total_h", "GROUP"])
def _postprocess_kernel(
    dq_accum_ptr, dq_ptr, stride_rb, stride_rh, stride_rm, stride_rd, scale, H, M, N, row_tiles, left, right,
    totals_ptr, total_b, total_h, GROUP,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, HAS_TOTALS: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """dQ = scale * the accumulated, from the order of registers to rows; 0 where a tile of queries sees no keys, which
    is what its total says, if there are."""
    tile = tl.program_id(0)
    head, start_m = tile // row_tiles, tile % row_tiles * BLOCK_M
    dq_ptr = head_ptr(dq_ptr, stride_rb, stride_rh, head // H, head % H)
    first_n, last_n = 0, N - 1
    if RIGHT:
        last_n = tl.minimum(last_n, start_m + (BLOCK_M - 1) + right)
    if LEFT:
        first_n = tl.maximum(start_m + left, 0)
    seen = (last_n >= 0) & (first_n // 128 <= last_n // 128)
    if HAS_TOTALS:
        seen = tl.load(totals_ptr + head // H * total_b + head % H // GROUP * total_h + tile % row_tiles) > 0
    for w in tl.static_range(2):
        offs = tile.to(tl.int64) * 8192 + w * 4096 + tl.arange(0, 4096)
        mask = tl.where(seen, offs >= 0, offs < 0)  # all or none: Triton 3.9's interpreter takes no & with a number
        x = tl.load(dq_accum_ptr + offs, mask=mask, other=0.0) * scale
        x = tl.reshape(tl.permute(tl.reshape(x, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5]), [64, 64])
        rows, columns = (0, w * 64) if BLOCK_M == 64 else (w * 64, 0)
        offs_m, offs_d = start_m + rows + tl.arange(0, 64), columns + tl.arange(0, 64)
        store_tile(dq_ptr, (stride_rm, stride_rd), (M, D), offs_m, offs_d, x)


def preprocess(do, dlse, o, lse, pairs, record, block_m):
    """(stats, semaphores) of the queries, a row for each tile of them; fills record. pairs: the stats of fused_op, or
    None where P comes from lse."""
    B, H, M, DV = o.shape
    row_tiles = triton.cdiv(M, block_m)
    stats = lse.new_empty(B * H * row_tiles, (2 if pairs is None else 4) * block_m)  # a power of 2
    semaphores = lse.new_empty(B * H * row_tiles, dtype=torch.int32)
    launch(
        _preprocess_kernel, B * H * row_tiles,
        do, *do.stride(), o, *o.stride(), lse, pairs, dlse, record, stats, semaphores, H, M, row_tiles, device=o.device,
        DV=int(DV), HAS_DLSE=dlse is not None, PAIRED=pairs is not None, BLOCK_M=block_m,
        BLOCK_DV=max(16, triton.next_power_of_2(DV)), num_warps=4,
    )
    return stats, semaphores


def postprocess(dq_accum, dq, N, scale, left, right, block_m, totals=None, total_steps=(0, 0), group=1):
    """Fill dq from what was accumulated. totals: of a mask, see orders_of in mask_map.py, of heads in groups."""
    B, H, M, D = dq.shape
    row_tiles = triton.cdiv(M, block_m)
    launch(
        _postprocess_kernel, B * H * row_tiles,
        dq_accum, dq, *dq.stride(), scale, H, M, N, row_tiles, left or 0, right or 0,
        totals, *total_steps, group, device=dq.device,
        D=int(D), LEFT=left is not None, RIGHT=right is not None, HAS_TOTALS=totals is not None,
        BLOCK_M=block_m, num_warps=4,
    )
