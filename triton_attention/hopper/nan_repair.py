"""Rows of O that a hidden NaN in V has spoilt on Hopper, computed again.

In the tile at the edge some queries see a key that others do not. For those its weight is 0, and the tensor cores
multiply it with V all the same; but 0 times NaN is NaN, in rows that have nothing to do with that key. Looking for NaN
in V beforehand would cost time at every edge. So the forward kernel (forward.py) looks at O, which it still has in
registers when its store has been issued, and marks in a log which 64 queries have NaN:

    entry of a tile         [warpgroup 0 found NaN, warpgroup 1, warpgroup 2, previous tile of the program]
    entry of a program      [any of them did, -, -, its last tile]

A program's tiles are a linked list, kept by its producer warp. When none are left, its first four warps follow that
list, and recompute what is marked: the finite values of V first, then the rows that see one that is not. No second
launch, and nothing to wait for if nothing is marked.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.mask import (
    ROWS, add_key_mask, key_tiles, mask_scores, tile_words, visible_bits, words_of_head,
)
from triton_attention.hopper.ptx import ctaid, opaque
from triton_attention.hopper.tma import load_async, store_async
from triton_attention.logits import LOG2E


class RepairBuffers(NamedTuple):
    """Shared memory for one tile each, and the mbarrier of their loads."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    o: gl.shared_memory_descriptor
    bias: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


# ---- the log


@gluon.jit
def init_log(log_ptr, entry):
    """entry: the number of the program's, after those of all tiles."""
    gl.store(log_ptr + entry * 4, 0)


@gluon.jit
def append_tile(log_ptr, tile, previous, WARPGROUPS: gl.constexpr):
    """Initialise the entry of a tile; previous: the tile that this program had before it, or -1."""
    for w in gl.static_range(WARPGROUPS):
        gl.store(log_ptr + tile * 4 + w, 0)
    gl.store(log_ptr + tile * 4 + 3, previous)
    return tile


@gluon.jit
def finish_log(log_ptr, entry, last):
    gl.store(log_ptr + entry * 4 + 3, last)


# ---- the repair


@gluon.jit
def _load(desc, off_b, off_h, start, buf, full, load_count):
    mbarrier.expect(full, desc.block_type.nbytes)
    load_async(desc, [off_b, off_h, start, 0], full, buf)
    mbarrier.wait(full, load_count & 1)
    return load_count + 1


@gluon.jit
def _recompute(
    q_desc, k_desc, v_desc, o_desc, bias_desc, lse_ptr, stats_ptr, scale, bufs, work, tile, warpgroup, load_count,
    OPTIONS: gl.constexpr,
):
    """O of 64 queries by four warps: of the finite values of V, then + inf or NaN where a query sees inf or NaN, then
    - inf or NaN where it sees -inf or NaN."""
    LEFT: gl.constexpr = OPTIONS.LEFT
    RIGHT: gl.constexpr = OPTIONS.RIGHT
    BLOCK_N: gl.constexpr = OPTIONS.BLOCK_N
    BLOCK_D: gl.constexpr = OPTIONS.BLOCK_D
    dtype: gl.constexpr = bufs.k.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    MOST: gl.constexpr = 64 if OPTIONS.LISTED else 128
    COLUMNS: gl.constexpr = min(BLOCK_D, MOST)  # of O and V at a time, for want of registers
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    head, start_m = tile // work.row_tiles, tile % work.row_tiles * OPTIONS.BLOCK_M + ROWS * warpgroup
    off_b, off_h = head // work.H, head % work.H
    q, k = bufs.q.reshape([ROWS, BLOCK_D]), bufs.k.reshape([BLOCK_N, BLOCK_D])
    v, o = bufs.v.reshape([BLOCK_N, BLOCK_D]), bufs.o.reshape([ROWS, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    offs_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    lse = gl.load(lse_ptr + head.to(gl.int64) * opaque(work.M) + offs_m, mask=offs_m < work.M, other=0.0)
    lse_2 = gl.expand_dims(gl.where(lse == float("-inf"), 0.0, lse * LOG2E), 1)
    if OPTIONS.BIASED:  # the maximum instead, and the inverse of the sum
        at = stats_ptr + 2 * (head.to(gl.int64) * opaque(work.M) + offs_m)
        lse_2 = gl.expand_dims(gl.load(at, mask=offs_m < work.M, other=0.0), 1)
        sums = gl.load(at + 1, mask=offs_m < work.M, other=1.0)
        inverse = gl.expand_dims(1.0 / gl.where(sums == 0.0, 1.0, sums), 1)
    first, last = key_tiles(start_m, ROWS, work, OPTIONS)
    words_ptr = work.map.words_ptr
    if OPTIONS.LISTED and not OPTIONS.BIASED:
        words_ptr = words_of_head(off_b, off_h, work)
    load_count = _load(q_desc, off_b, off_h, start_m, bufs.q, bufs.full, load_count)
    for part in gl.static_range(3 * BLOCK_D // COLUMNS):
        v_part = v.slice(part // 3 * COLUMNS, COLUMNS, dim=1)
        o_part = o.slice(part // 3 * COLUMNS, COLUMNS, dim=1)
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, o_layout)
        for step in range(first, last + 1):
            load_count = _load(v_desc, off_b, off_h // work.GROUP, step * BLOCK_N, bufs.v, bufs.full, load_count)
            x = v_part.load(o_layout)
            x_32 = x.to(gl.float32)
            if part % 3 == 0:
                v_part.store(gl.where(gl.abs(x_32) < float("inf"), x, gl.zeros_like(x)))
            elif part % 3 == 1:
                v_part.store(gl.where(x_32 < float("inf"), 0.0, 1.0).to(dtype))
            else:
                v_part.store(gl.where(x_32 > float("-inf"), 0.0, 1.0).to(dtype))
            fence_async_shared()
            if part % 3 == 0:
                load_count = _load(k_desc, off_b, off_h // work.GROUP, step * BLOCK_N, bufs.k, bufs.full, load_count)
                s = warpgroup_mma_wait(0, [warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)])
                if not OPTIONS.BIASED:
                    s = s * scale - lse_2
            else:
                s = zeros
            if OPTIONS.BIASED:
                at_b, at_h = off_b * work.map.word_b, off_h * work.map.word_h
                mbarrier.expect(bufs.full, bias_desc.block_type.nbytes)
                load_async(bias_desc, [at_b, at_h, start_m * work.map.word_m, step * BLOCK_N], bufs.full, bufs.bias)
                mbarrier.wait(bufs.full, load_count & 1)
                load_count += 1
                bias = bufs.bias.reshape([ROWS, BLOCK_N]).load(s_layout).to(gl.float32)
                if OPTIONS.KEYED:
                    bias = add_key_mask(bias, off_b, step * BLOCK_N, work, 1, s_layout)
                if part % 3 == 0:
                    s = (gl.fma(s, scale, bias) - lse_2) * LOG2E
                s = gl.where(bias == float("-inf"), bias, s)
                s = mask_scores(s, start_m, step * BLOCK_N, work, LEFT, RIGHT, s_layout)
            elif OPTIONS.LISTED:
                words = tile_words(words_ptr, start_m, step * BLOCK_N, step >= 0, zeros, work, LEFT, RIGHT)
                s = gl.where(visible_bits(words, zeros, s_layout), s, float("-inf"))
            else:
                s = mask_scores(s, start_m, step * BLOCK_N, work, LEFT, RIGHT, s_layout)
            p = gl.exp2(s)
            if OPTIONS.BIASED and part % 3 == 0:
                p = p * inverse
            p = p.to(dtype)
            acc = warpgroup_mma_wait(0, [warpgroup_mma(gl.convert_layout(p, p_layout), v_part, acc, is_async=True)])
        if part % 3 == 0:
            o_part.store(acc.to(dtype))
        else:
            finite = o_part.load(o_layout)
            infinite = finite + float("inf" if part % 3 == 1 else "-inf")
            o_part.store(gl.where(acc > 0.0, infinite, finite).to(dtype))
    fence_async_shared()
    store_async(o_desc, [off_b, off_h, start_m, 0], bufs.o)
    tma.store_wait(0)
    return load_count


@gluon.jit
def repair(
    q_desc, k_desc, v_desc, o_desc, bias_desc, lse_ptr, stats_ptr, log_ptr, scale, bufs, work, OPTIONS: gl.constexpr,
):
    """Recompute what is marked in the log of this program, all of whose warps have finished."""
    entry_ptr = log_ptr + 4 * (work.items + ctaid())
    if gl.load(entry_ptr) > 0:
        load_count = gl.to_tensor(0)
        tile = gl.load(entry_ptr + 3)
        while tile >= 0:
            for warpgroup in range(OPTIONS.BLOCK_M // ROWS):
                if gl.load(log_ptr + tile * 4 + warpgroup) > 0:
                    load_count = _recompute(
                        q_desc, k_desc, v_desc, o_desc, bias_desc, lse_ptr, stats_ptr, scale, bufs, work, tile,
                        warpgroup, load_count, OPTIONS,
                    )
            tile = gl.load(log_ptr + tile * 4 + 3)
