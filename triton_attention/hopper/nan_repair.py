"""Rows of O that a hidden NaN in V has spoilt on Hopper, computed again.

In the tile at the edge some queries see a key that others do not. For those its weight is 0, and the tensor cores
multiply it with V all the same; but 0 times NaN is NaN, in rows that have nothing to do with that key. Looking for NaN
in V beforehand would cost time at every edge. So the forward kernel (forward.py) looks at O, which it still has in
registers when it has sent it away, and writes down which 64 queries have NaN:

    log    of each tile     [warpgroup 0 found NaN, warpgroup 1, warpgroup 2, tile that the program had before]
           of each program  [any of them did, -, -, its last tile]

When a program has no tiles left, its first four warps walk back through its log, and compute what is marked again: the
finite values of V first, then who sees one that is not. No second launch, and nothing to wait for if nothing is marked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.mask import ROWS, hide, key_tiles
from triton_attention.hopper.ptx import opaque, program
from triton_attention.hopper.tma import load_async, store_async
from triton_attention.logits import LOG2E


# ---- the log, kept by the warp that fetches


@gluon.jit
def open_log(log_ptr, own):
    """own: the number of the program's entry, behind those of the tiles."""
    gl.store(log_ptr + own * 4, 0)


@gluon.jit
def write_down(log_ptr, tile, before, WARPGROUPS: gl.constexpr):
    """Begin the entry of a tile; before: the tile that this program had before it, or -1."""
    for w in gl.static_range(WARPGROUPS):
        gl.store(log_ptr + tile * 4 + w, 0)
    gl.store(log_ptr + tile * 4 + 3, before)
    return tile


@gluon.jit
def close_log(log_ptr, own, last):
    gl.store(log_ptr + own * 4 + 3, last)


# ---- the repair


@gluon.jit
def _load(desc, off_b, off_h, start, buf, full, loads):
    mbarrier.expect(full, desc.block_type.nbytes)
    load_async(desc, [off_b, off_h, start, 0], full, buf)
    mbarrier.wait(full, loads & 1)
    return loads + 1


@gluon.jit
def _attend_again(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, bufs, work, tile, WARPGROUP, loads,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):
    """O of 64 queries by four warps: the finite values of V, then who sees inf or NaN, then who sees -inf or NaN."""
    q_buf, k_buf, v_buf, o_buf, full = bufs
    items, row_tiles, heads, section, H, GROUP, M, N, left, right = work
    dtype: gl.constexpr = k_buf.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    COLUMNS: gl.constexpr = 128 if BLOCK_D == 256 else BLOCK_D  # of O and V at a time, for want of registers
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, COLUMNS, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    head, row = tile // row_tiles, tile % row_tiles * BLOCK_M + ROWS * WARPGROUP
    off_b, off_h = head // H, head % H
    q, k = q_buf.reshape([ROWS, BLOCK_D]), k_buf.reshape([BLOCK_N, BLOCK_D])
    v, o = v_buf.reshape([BLOCK_N, BLOCK_D]), o_buf.reshape([ROWS, BLOCK_D])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
    lse = gl.load(lse_ptr + head.to(gl.int64) * opaque(M) + rows, mask=rows < M, other=0.0)
    top = gl.expand_dims(gl.where(lse == float("-inf"), 0.0, lse * LOG2E), 1)
    first, last = key_tiles(row, N, left, right, LEFT, RIGHT, ROWS, BLOCK_N)
    loads = _load(q_desc, off_b, off_h, row, q_buf, full, loads)
    for part in gl.static_range(3 * BLOCK_D // COLUMNS):
        v_part = v.slice(part // 3 * COLUMNS, COLUMNS, dim=1)
        o_part = o.slice(part // 3 * COLUMNS, COLUMNS, dim=1)
        acc = gl.zeros([ROWS, COLUMNS], gl.float32, o_layout)
        for step in range(first, last + 1):
            loads = _load(v_desc, off_b, off_h // GROUP, step * BLOCK_N, v_buf, full, loads)
            x = v_part.load(o_layout)
            wide = x.to(gl.float32)
            if part % 3 == 0:
                v_part.store(gl.where(gl.abs(wide) < float("inf"), x, gl.zeros_like(x)))
            elif part % 3 == 1:
                v_part.store(gl.where(wide < float("inf"), 0.0, 1.0).to(dtype))
            else:
                v_part.store(gl.where(wide > float("-inf"), 0.0, 1.0).to(dtype))
            fence_async_shared()
            if part % 3 == 0:
                loads = _load(k_desc, off_b, off_h // GROUP, step * BLOCK_N, k_buf, full, loads)
                s = warpgroup_mma_wait(0, [warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)])
                s = s * scale - top
            else:
                s = zeros
            p = gl.exp2(hide(s, row, step * BLOCK_N, N, left, right, LEFT, RIGHT, s_layout)).to(dtype)
            acc = warpgroup_mma_wait(0, [warpgroup_mma(gl.convert_layout(p, p_layout), v_part, acc, is_async=True)])
        if part % 3 == 0:
            o_part.store(acc.to(dtype))
        else:
            so_far = o_part.load(o_layout)
            more = so_far + float("inf" if part % 3 == 1 else "-inf")
            o_part.store(gl.where(acc > 0.0, more, so_far).to(dtype))
    fence_async_shared()
    store_async(o_desc, [off_b, off_h, row, 0], o_buf)
    tma.store_wait(0)
    return loads


@gluon.jit
def repair(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, log_ptr, scale, bufs, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):
    """Compute again what is marked in the log of this program, all of whose warps have finished."""
    own_ptr = log_ptr + 4 * (work[0] + program())
    if gl.load(own_ptr) > 0:
        loads = gl.to_tensor(0)
        tile = gl.load(own_ptr + 3)
        while tile >= 0:
            for warpgroup in range(BLOCK_M // ROWS):
                if gl.load(log_ptr + tile * 4 + warpgroup) > 0:
                    loads = _attend_again(
                        q_desc, k_desc, v_desc, o_desc, lse_ptr, scale, bufs, work, tile, warpgroup, loads,
                        LEFT, RIGHT, BLOCK_M, BLOCK_N, BLOCK_D,
                    )
            tile = gl.load(log_ptr + tile * 4 + 3)
