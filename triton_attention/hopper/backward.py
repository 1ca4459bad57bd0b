"""dQ, dK, dV on Hopper in one walk over the scores: five products a tile instead of the plain kernels' seven.

The plain kernels (fused_backward.py) compute S and dP twice, once for dQ and once for dK and dV, so that every sum
belongs to one program. Here a program takes 128 keys, walks over the queries that see them, and computes all three.
dK and dV stay in its registers; dQ goes from tile to tile of keys, each of which adds its part:

    producer warp        Q1 dO1              Q2 dO2              ...            by TMA, into the stages of a pipeline
    eight consumer warps S0   dP0     dV  dQ0  dK | S1   dP1     dV  dQ1  dK    tensor cores, asynchronous
                              P0  dS0             |      P1  dS1                 the other units, P overlaps dP
    semaphore warp       until dQ0 has what is added to it before this, until dQ1 ...
    store warp                                dQ0 added to memory, by TMA; the next tile may add its part       ...

S^T = K Q^T and dP^T = V dO^T come transposed out of the tensor cores, the way dV += P^T dO and dK += dS^T Q take them
in, straight from registers. Only dS goes through shared memory too, for dQ = dS K is a sum over the keys of all warps.

Invariants
    the parts of a dQ are added in a fixed order, by a semaphore in memory for each tile of queries: bitwise repeatable;
    a tile waits only for those with lower numbers, which are under way already: no deadlock, however few programs run;
    the last keys come first, so that causal programs lag by a step each and hardly wait; in the last section of the
    list the first keys come first, and all programs end together;
    persistent: tiles of keys are drawn from a counter, the first queries of the next prefetched during the epilogue;
    once a step all consumer warps meet, between dS and dQ = dS K, and before dK and dV take the places of K and V;
    hidden scores start from -inf, and K and V are clamped to finite numbers: 0 * inf would be NaN.

What was measured, and what gained nothing: NOTES.md. Shah et al., "FlashAttention-3", 2024, for one walk with warp
specialisation; FlashAttention-2, for sums in a fixed order.
"""

import torch

from triton_attention.device import TRITON, counter, processors
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.backward_ends import finish, prepare
from triton_attention.hopper.ptx import (
    arrive_at, barrier, clamp, inline, meet_at, opaque, publish, spin_until, take_number, uniform,
)
from triton_attention.hopper.tma import add_async, describe, describe_rows, load_async, readable, store_async
from triton_attention.launch import launch
from triton_attention.logits import LN2, LOG2E
from triton_attention.tile_choice import tile_for

KEYS = gl.constexpr(128)  # of a tile
FREE, DQ_FULL = gl.constexpr(8), gl.constexpr(12)  # the first of four named barriers; those below are Triton's
THREADS = gl.constexpr(288)  # that use one: the eight warps which multiply, and another
WAITS_MEET = gl.constexpr(TRITON >= (3, 9))  # Triton 3.9 puts a barrier of all warps behind each wait for products
ROOM = gl.constexpr(TRITON != (3, 8))  # in registers for K at D 64 without a mask; the ptxas of Triton 3.8 spills
SMALLEST = 1 << 34  # floating-point operations from which the GPU is busy for longer than the host
FEWEST = 1  # tiles of keys a multiprocessor (a quarter, if causal); with fewer, the plain kernels share the work better
L2 = 32 << 20  # bytes: heads whose queries, and what belongs to them, fit there are worked on together


# ---- which keys, which queries, whose turn


@gluon.jit
def _walk(item, work, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """(tile of keys, head, up, first and number of the tiles of queries that may see it) of an item: a section of heads
    at a time, last keys first; in the last section, if there is only a right bound, first keys and last queries first
    (`up`): the long walks, so that all programs end together."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    whole = item // (tiles * section) * section
    rest = item - whole * tiles
    wide = gl.minimum(section, heads - whole)
    tile_n, up = tiles - 1 - rest // wide, gl.to_tensor(False)
    if RIGHT and not LEFT:
        up = whole + section >= heads
        tile_n = gl.where(up, rest // wide, tile_n)
    head = whole + rest % wide
    first, end = gl.to_tensor(0), row_tiles
    if RIGHT:
        first = gl.maximum(tile_n * KEYS - right, 0) // BLOCK_M
    if LEFT:
        end = gl.minimum(end, gl.maximum(tile_n * KEYS + (KEYS - 1 + BLOCK_M) - left, 0) // BLOCK_M)
    return tile_n, head, up, first, gl.maximum(end - first, 0)


@gluon.jit
def _turn(tile_n, tile_m, up, work, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """How many tiles of keys add to a tile of queries before this one: those seen after it; if `up`, all before it."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    last = tiles - 1
    if RIGHT:
        last = gl.minimum(last, (tile_m * BLOCK_M + (BLOCK_M - 1) + right) // KEYS)
    return gl.where(up, tile_n, last - tile_n)


@gluon.jit
def _step(step, first, count, head, up, work):
    """(tile of queries, its number among those of all heads): head after head; if `up`, the last queries first."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    tile_m = first + gl.where(up, count - 1 - step % count, step % count)
    return tile_m, (head * GROUP + step // count) * row_tiles + tile_m


# ---- the list, told by the warp that fetches to the others


@gluon.jit
def _announce(item, told, turn):
    """Write which item is next where the others find it, once they have left the place."""
    tickets, full, empty = told
    mbarrier.wait(empty.index(turn % 2), (turn // 2 & 1) ^ 1)
    tickets.index(turn % 2).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    inline("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
    mbarrier.arrive(full.index(turn % 2), count=1)


@gluon.jit
def _next_item(told, turn, WARPS: gl.constexpr):
    """The next item; -1 after the last."""
    tickets, full, empty = told
    mbarrier.wait(full.index(turn % 2), turn // 2 & 1)
    item = gl.max(tickets.index(turn % 2).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(empty.index(turn % 2), count=1)
    return uniform(item)


# ---- the warps that fetch, wait and store


@gluon.jit
def _leave(dk_desc, dv_desc, keys, off_b, off_hk, start_n, turn):
    """Store dK and dV of an item, from the places of K and V, and wait until these are free."""
    k_buf, v_buf, k_full, v_full, finished = keys
    mbarrier.wait(finished, turn & 1)
    store_async(dv_desc, [off_b, off_hk, start_n, 0], v_buf)
    store_async(dk_desc, [off_b, off_hk, start_n, 0], k_buf)
    tma.store_wait(0)


@gluon.jit
def _fetch(
    descs, counter_ptr, keys, queries, told, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc = descs
    k_buf, v_buf, k_full, v_full, finished = keys
    q_bufs, do_bufs, stats_bufs, q_full, do_full = queries
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    items = tiles * heads
    item = uniform(take_number(counter_ptr))  # the first too: nobody waits for a program that has not started
    turn = gl.to_tensor(0)
    total = gl.to_tensor(0)  # steps, of all items so far
    last_b, last_hk, last_n = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    while item < items:
        _announce(item, told, turn)
        tile_n, head, up, first, count = _walk(item, work, LEFT, RIGHT, BLOCK_M)
        off_b, off_hk, start_n = head // Hk, head % Hk, tile_n * KEYS
        steps = GROUP * count
        for step in range(gl.maximum(steps, 1)):
            slot = total % STAGES
            tile_m, tile = _step(step, first, gl.maximum(count, 1), head, up, work)
            at = [off_b, off_hk * GROUP + step // gl.maximum(count, 1), tile_m * BLOCK_M, 0]
            if steps > 0:
                meet_at(FREE + slot, THREADS)
                mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
                load_async(q_desc, at, q_full.index(slot), q_bufs.index(slot))
                load_async(stats_desc, [tile, 0], q_full.index(slot), stats_bufs.index(slot))
                mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
                load_async(do_desc, at, do_full.index(slot), do_bufs.index(slot))
                total += 1
            if step == 0:
                if turn > 0:
                    _leave(dk_desc, dv_desc, keys, last_b, last_hk, last_n, turn - 1)
                mbarrier.expect(k_full, k_desc.block_type.nbytes)
                load_async(k_desc, [off_b, off_hk, start_n, 0], k_full, k_buf)
                mbarrier.expect(v_full, v_desc.block_type.nbytes)
                load_async(v_desc, [off_b, off_hk, start_n, 0], v_full, v_buf)
        item = uniform(take_number(counter_ptr))
        last_b, last_hk, last_n = off_b, off_hk, start_n
        turn += 1
    gl.store(counter_ptr, 0, mask=item == items + gl.num_programs(0) - 1)  # the last one leaves it as it was
    _announce(-1, told, turn)
    if turn > 0:
        _leave(dk_desc, dv_desc, keys, last_b, last_hk, last_n, turn - 1)


@gluon.jit
def _await_turns(tickets_ptr, turns, told, work, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """Say when it is the turn of this tile of keys, up to two steps ahead."""
    come, gone = turns
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    turn = gl.to_tensor(0)
    total = gl.to_tensor(0)
    item = _next_item(told, turn, 1)
    while item >= 0:
        tile_n, head, up, first, count = _walk(item, work, LEFT, RIGHT, BLOCK_M)
        for step in range(GROUP * count):
            tile_m, tile = _step(step, first, count, head, up, work)
            mbarrier.wait(gone.index(total % 2), (total // 2 & 1) ^ 1)
            spin_until(tickets_ptr + tile, _turn(tile_n, tile_m, up, work, RIGHT, BLOCK_M))
            mbarrier.arrive(come.index(total % 2), count=1)
            total += 1
        turn += 1
        item = _next_item(told, turn, 1)


@gluon.jit
def _store(
    sum_desc, tickets_ptr, dq_parts, turns, told, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, DQ_STAGES: gl.constexpr,
):
    """Store or add dQ of every step, when it is its turn."""
    dq_bufs, dq_empty = dq_parts
    come, gone = turns
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    turn = gl.to_tensor(0)
    total = gl.to_tensor(0)
    item = _next_item(told, turn, 1)
    while item >= 0:
        tile_n, head, up, first, count = _walk(item, work, LEFT, RIGHT, BLOCK_M)
        for step in range(GROUP * count):
            tile_m, tile = _step(step, first, count, head, up, work)
            before = _turn(tile_n, tile_m, up, work, RIGHT, BLOCK_M)
            slot = total % DQ_STAGES
            mbarrier.wait(come.index(total % 2), total // 2 & 1)
            meet_at(DQ_FULL + slot, THREADS)
            if before == 0:
                store_async(sum_desc, [tile * 64, 0], dq_bufs.index(slot))
            else:
                add_async(sum_desc, [tile * 64, 0], dq_bufs.index(slot))
            tma.store_wait(0)
            mbarrier.arrive(dq_empty.index(slot), count=1)
            publish(tickets_ptr + tile, before + 1)
            mbarrier.arrive(gone.index(total % 2), count=1)
            total += 1
        turn += 1
        item = _next_item(told, turn, 1)


# ---- the warps that multiply


@gluon.jit
def _make_finite(buf, layout: gl.constexpr):
    """A tile of K or V without NaN, inf, and numbers whose products are inf: where a key is hidden, -inf + inf is NaN,
    as is 0 times them. Those that are left are large, so that a score of -inf stays one without weight. (A query that
    sees NaN has it in lse or delta already.) In bfloat16 numbers past 2^100 count as 2^100, seen or not."""
    buf.store(clamp(buf.load(layout)))


@gluon.jit
def _hide(s, after_n, at_left, at_right, LEFT: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr):
    """S^T, -inf where a query does not see a key."""
    n = gl.arange(0, s.shape[0], gl.SliceLayout(1, layout))
    exists = n < opaque(after_n)
    m = gl.expand_dims(gl.arange(0, s.shape[1], gl.SliceLayout(0, layout)), 0)
    if RIGHT:  # what there is to compute is computed a row, and compared with a constant
        s = gl.where(gl.expand_dims(gl.where(exists, n + at_right, 1 << 30), 1) <= m, s, float("-inf"))
    if LEFT:
        s = gl.where(gl.expand_dims(gl.where(exists, n + at_left, -(1 << 30)), 1) >= m, s, float("-inf"))
    return s


@gluon.jit
def _hand_on(dq, total, dq_parts, BLOCK_D: gl.constexpr, DQ_STAGES: gl.constexpr):
    """dQ to the warp that stores, in the order of the registers: 16 contiguous bytes a thread at a time."""
    dq_bufs, dq_empty = dq_parts
    # (warpgroup, 8 columns, warp, row, 2 columns, upper or lower 8 rows, column): _finish_kernel undoes it
    if BLOCK_D == 128:
        x = gl.permute(gl.reshape(dq, [4, 2, 8, 2, 8, 4, 2]), [3, 4, 0, 2, 5, 1, 6])
    else:
        x = gl.permute(gl.reshape(dq, [2, 4, 2, 8, 8, 4, 2]), [0, 4, 1, 3, 5, 2, 6])
    slot = total % DQ_STAGES
    mbarrier.wait(dq_empty.index(slot), (total // DQ_STAGES & 1) ^ 1)
    dq_bufs.index(slot).store(gl.reshape(x, [64, 128]))
    fence_async_shared()
    arrive_at(DQ_FULL + slot, THREADS)


@gluon.jit
def _multiply(
    keys, queries, ds_bufs, dq_parts, scale_2, told, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, DQ_STAGES: gl.constexpr,
):
    k_buf, v_buf, k_full, v_full, finished = keys
    q_bufs, do_bufs, stats_bufs, q_full, do_full = queries
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    BANDED: gl.constexpr = LEFT or RIGHT
    dtype: gl.constexpr = q_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_D, 16])
    dq_warps: gl.constexpr = [4, 2] if BLOCK_D == 128 else [8, 1]
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=dq_warps, instr_shape=[16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, k_width=2)
    query_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    k = k_buf.reshape([KEYS, BLOCK_D])
    v = v_buf.reshape([KEYS, BLOCK_D])
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    dq_zeros = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, dq_layout)
    for place in gl.static_range(STAGES):
        arrive_at(FREE + place, THREADS)
    turn = gl.to_tensor(0)
    total = gl.to_tensor(0)
    item = _next_item(told, turn, 8)
    while item >= 0:
        tile_n, head, up, first, count = _walk(item, work, LEFT, RIGHT, BLOCK_M)
        start_n = tile_n * KEYS
        by, first_m, end_m = BLOCK_M, uniform(first * BLOCK_M), uniform((first + count) * BLOCK_M)
        if RIGHT and not LEFT:
            by = uniform(gl.where(up, -BLOCK_M, BLOCK_M))
            first_m, end_m = gl.where(up, end_m - BLOCK_M, first_m), gl.where(up, first_m - BLOCK_M, end_m)
        steps = uniform(GROUP * count)
        after_n, at_left, at_right = uniform(N - start_n), uniform(start_n - left), uniform(start_n - right)
        start_m = first_m
        dk = gl.zeros([KEYS, BLOCK_D], gl.float32, d_layout)
        dv = gl.zeros([KEYS, BLOCK_D], gl.float32, d_layout)
        mbarrier.wait(k_full, turn & 1)
        mbarrier.wait(v_full, turn & 1)
        if BANDED:
            row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [8, 1], [1, 0])
            _make_finite(k, row_layout)
            _make_finite(v, row_layout)
            fence_async_shared()
        k_left = k
        if BLOCK_D == 64 and not BANDED and ROOM:
            k_left = k.load(gl.DotOperandLayout(0, s_layout, k_width=2))
        mbarrier.wait(q_full.index(total % STAGES), total // STAGES & 1, pred=steps > 0)
        barrier()
        for step in range(steps):
            total = opaque(total)  # addresses are computed from it here, not carried in registers
            slot = total % STAGES
            q = q_bufs.index(slot).reshape([BLOCK_M, BLOCK_D])
            do = do_bufs.index(slot).reshape([BLOCK_M, BLOCK_D])
            stats = stats_bufs.index(slot).reshape([2 * BLOCK_M])
            mbarrier.wait(do_full.index(slot), total // STAGES & 1)
            delta = gl.expand_dims(stats.slice(BLOCK_M, BLOCK_M).load(query_layout), 0)
            delta, _ = gl.broadcast(delta, zeros)
            if BANDED:
                edge = after_n < KEYS
                if RIGHT:
                    edge = edge | (at_right + (KEYS - 1) > start_m)
                if LEFT:
                    edge = edge | (at_left < start_m + (BLOCK_M - 1))
                hidden = zeros
                if edge:
                    hidden = _hide(zeros, after_n, at_left - start_m, at_right - start_m, LEFT, RIGHT, s_layout)
                start_m += by
                start_m = gl.where(start_m == end_m, first_m, start_m)
                s_token = warpgroup_mma(k_left, q.permute((1, 0)), hidden, use_acc=edge, is_async=True)
            else:
                s_token = warpgroup_mma(k_left, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(v, do.permute((1, 0)), delta, is_async=True)
            lse = stats.slice(0, BLOCK_M).load(query_layout)
            s = warpgroup_mma_wait(1, [s_token])
            p = gl.exp2(s * scale_2 - gl.expand_dims(lse, 0))
            p_16 = gl.convert_layout(p.to(dtype), p_layout)
            # here: it keeps the wait for dP below the exponentials
            mbarrier.wait(q_full.index((total + 1) % STAGES), (total + 1) // STAGES & 1, pred=step + 1 < steps)
            dp = warpgroup_mma_wait(0, [dp_token])
            ds = (p * dp).to(dtype)
            ds_buf = ds_bufs.index(total % 2)
            ds_buf.store(ds)
            dv_token = warpgroup_mma(p_16, do, dv, is_async=True)
            fence_async_shared()
            dq_token = warpgroup_mma(ds_buf.permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True)
            if not WAITS_MEET:  # here, as all are anyway: Triton wants one before dS is stored again and Q waited for
                barrier()
            dk_token = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
            dq = warpgroup_mma_wait(1, [dq_token])
            _hand_on(dq, total, dq_parts, BLOCK_D, DQ_STAGES)
            dk, dv = warpgroup_mma_wait(0, [dk_token, dv_token])
            arrive_at(FREE + slot, THREADS)
            total += 1

        barrier()  # all have read K
        v.store(dv.to(dtype))
        k.store((dk * (scale_2 * LN2)).to(dtype))
        fence_async_shared()
        mbarrier.arrive(finished, count=1)
        turn += 1
        item = _next_item(told, turn, 8)


@gluon.jit(do_not_specialize=[
    "scale_2", "tiles", "heads", "section", "Hk", "GROUP", "row_tiles", "N", "left", "right"
])
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, sum_desc, dk_desc, dv_desc, tickets_ptr, counter_ptr, scale_2,
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, DQ_STAGES: gl.constexpr, REST: gl.constexpr,
):
    gl.static_assert(2 <= STAGES and STAGES <= DQ_FULL - FREE and DQ_STAGES <= 16 - DQ_FULL)
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_buf = gl.allocate_shared_memory(dtype, [1, 1, KEYS, BLOCK_D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [1, 1, KEYS, BLOCK_D], v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    stats_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * BLOCK_M], stats_desc.layout)
    ds_bufs = gl.allocate_shared_memory(dtype, [2, KEYS, BLOCK_M], ds_layout)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, 64, 128], sum_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    finished = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], mbarrier.MBarrierLayout())
    come = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    gone = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tickets = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    told_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    told_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(finished, count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(q_full.index(slot), count=1)
        mbarrier.init(do_full.index(slot), count=1)
    for slot in gl.static_range(DQ_STAGES):
        mbarrier.init(dq_empty.index(slot), count=1)
    for slot in gl.static_range(2):
        mbarrier.init(come.index(slot), count=1)
        mbarrier.init(gone.index(slot), count=1)
        mbarrier.init(told_full.index(slot), count=1)
        mbarrier.init(told_empty.index(slot), count=3)  # all but who fetches
    fence_async_shared()

    keys = (k_buf, v_buf, k_full, v_full, finished)
    queries = (q_bufs, do_bufs, stats_bufs, q_full, do_full)
    dq_parts = (dq_bufs, dq_empty)
    turns = (come, gone)
    descs = (q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc)
    told = (tickets, told_full, told_empty)
    work = (tiles, heads, section, Hk, GROUP, row_tiles, N, left, right)
    gl.warp_specialize([
        (_multiply, (keys, queries, ds_bufs, dq_parts, scale_2, told, work,
                     LEFT, RIGHT, BLOCK_M, BLOCK_D, STAGES, DQ_STAGES)),
        (_fetch, (descs, counter_ptr, keys, queries, told, work, LEFT, RIGHT, BLOCK_M, STAGES)),
        (_await_turns, (tickets_ptr, turns, told, work, LEFT, RIGHT, BLOCK_M)),
        (_store, (sum_desc, tickets_ptr, dq_parts, turns, told, work, LEFT, RIGHT, BLOCK_M, DQ_STAGES)),
    ], [1, 1, 1], [REST, REST, REST])


def refuses(
    do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right,
):
    """Why the kernel does not serve fused_backward_op with these arguments, or None."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    fewest = FEWEST * processors(q.device) * (0.25 if left is None and right is not None else 1)
    for what, given in (
        ("a mask", mask is not None), ("dropout", seed is not None), ("a softcap", softcap != 0.0),
        ("not 16 bits", q.element_size() != 2), ("a head dim above 128", not 0 < min(D, DV) <= max(D, DV) <= 128),
        ("a scale of 0", scale == 0.0),
        ("too little work to be worth the descriptors", 10 * B * H * M * N * D < max(SMALLEST, 1)),
        ("too few tiles to share the work well", B * Hk * triton.cdiv(N, KEYS.value) < fewest),
    ):
        if given:
            return what
    if D % 8 or DV % 8 or not all(readable(t) for t in (q, k, v)):
        return "rows that do not begin at 16 bytes"
    return None


def run(do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right):
    """(dQ, dK, dV, record), see fused_backward_op; for what is not refused."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    dq, dk, dv, record = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), lse.new_empty(*lse.shape, 4)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()  # which vmap may have expanded
    tile = tile_for("fused backward hopper", q.dtype, max(D, DV), right is not None, q.device)
    if left is None and right is None and (N % KEYS.value or M % tile.BLOCK_M):
        right = N  # nothing more is hidden, but what is past the last key; and 0 * inf past the last query is no NaN
    own_q, factor = (-q, -scale) if scale < 0.0 else (q, scale)  # the kernel knows positive ones
    do = do if readable(do) else do.clone(memory_format=torch.contiguous_format)
    stats, tickets = prepare(do, dlse, o, lse, record, tile.BLOCK_M)
    sums = lse.new_empty(64 * tickets.numel(), 128)
    tiles, section = triton.cdiv(N, KEYS.value), L2 // (H // Hk * M * 8 * tile.BLOCK_D)
    registers = (1 << 16) // (128 * 3) // 8 * 8  # of a thread, before they are dealt out
    launch(
        _backward_kernel, min(B * Hk * tiles, processors(q.device)),
        describe(own_q, tile.BLOCK_M, tile.BLOCK_D), describe(k, KEYS.value, tile.BLOCK_D),
        describe(v, KEYS.value, tile.BLOCK_D), describe(do, tile.BLOCK_M, tile.BLOCK_D),
        describe_rows(stats, 1), describe_rows(sums, 64),
        describe(dk, KEYS.value, tile.BLOCK_D), describe(dv, KEYS.value, tile.BLOCK_D), tickets, counter(q.device),
        factor * LOG2E.value,
        tiles, B * Hk, max(1, min(B * Hk, section)), Hk, H // Hk, triton.cdiv(M, tile.BLOCK_M), N,
        left or 0, right or 0,
        device=q.device, LEFT=left is not None, RIGHT=right is not None,
        BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_D, STAGES=tile.num_stages, DQ_STAGES=tile.SPAN,
        REST=registers * 3 - 2 * tile.registers, num_warps=tile.num_warps, maxnreg=registers,
    )
    finish(sums, dq, N, scale, left, right, tile.BLOCK_M)
    return dq, dk, dv, record
