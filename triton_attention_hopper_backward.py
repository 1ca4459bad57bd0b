"""dQ, dK, dV on Hopper in one walk over the scores: five products a tile instead of the plain kernels' seven.

The plain kernels (triton_attention_fused_backward.py) compute S and dP twice, once for dQ and once for dK and dV, so
that every sum belongs to one program. Here a program owns 128 keys, walks over the queries that see them, and computes
all three. dK and dV stay in its registers; dQ goes from program to program, each of which adds its part:

    fetching warp   Q1 dO1              Q2 dO2              ...            by TMA, into rings of shared memory
    eight warps     S0   dP0     dV  dQ0  dK | S1   dP1     dV  dQ1  dK    tensor cores, asynchronous
                         P0  dS0             |      P1  dS1                 the other units, P beneath dP
    waiting warp    until dQ0 has what the keys after these add to it, until dQ1 ...
    storing warp                          dQ0 added to memory, by TMA; the next program may add its part    ...

S^T = K Q^T and dP^T = V dO^T come transposed out of the tensor cores, the way dV += P^T dO and dK += dS^T Q take them
in, straight from registers. Only dS goes through shared memory too, for dQ = dS K is a sum over the keys of all warps.

The parts of a dQ are added in a fixed order, the last keys first: results are bitwise repeatable. A ticket in memory
for each tile of queries says whose turn it is. A program waits only for programs with lower numbers, which the GPU
starts before it: no deadlock, however many it has room for. Programs that work on the same queries lag by a step each,
so that hardly any waits. What dQ costs is its traffic, 4 bytes an element and a tile of keys.

Where the speed is from. At D 128 three stages of Q and dO hide that traffic (two: 7 % slower). -delta is what the
product dP^T starts from, which saves registers and 1 to 3 %. So is -inf what S starts from where a key is hidden: a
mask on P would spill. The wait for the next Q is between the exponentials and the wait for dP, without which ptxas
moves the latter up. Eight warps in one partition are as fast as two warpgroups that meet at dS; those spill with ptxas
13 and need barriers of their own. What gained nothing: dP^T from zero, so that it is issued right behind S (ptxas then
moves half of the exponentials below its wait). Not tried again: wgmma in flight across the end of a step, which ptxas
serialises or spills.

On an H100, bfloat16, [4, 16, 4096, 128]: 389 -> 546 to 565 TFLOP/s, causal 360 -> 474 to 480.

Shah et al., "FlashAttention-3", 2024, for one walk with warp specialisation; the order of the additions is what
FlashAttention-2 does in its deterministic mode.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention_launch import launch, tile_for
from triton_attention_logits import store_pair
from triton_attention_ptx import arrive_at, barrier, meet_at, opaque, uniform
from triton_attention_tiles import head_ptr, load_tile, store_tile
from triton_attention_tma import add_async, describe, describe_rows, load_async, readable, store_async

LOG2E, LN2 = 1.4426950408889634, gl.constexpr(0.6931471805599453)
KEYS = gl.constexpr(128)  # of a program
FREE, DQ_FULL = gl.constexpr(8), gl.constexpr(12)  # the first of four named barriers; those below are Triton's
THREADS = gl.constexpr(288)  # that use one: the eight warps which multiply, and another
SMALLEST = 1 << 34  # floating-point operations from which the GPU is busy for longer than the host
FEWEST = 1  # programs a multiprocessor; with fewer, the plain kernels take more and smaller tiles
L2 = 32 << 20  # bytes: heads whose queries, and what belongs to them, fit there are worked on together


# ---- which keys, which queries, whose turn


@gluon.jit
def _place(work):
    """(tile of keys, head of keys) of a program: a section of heads at a time, in it the last keys first."""
    tiles, heads, section = work[:3]
    program = gl.program_id(0)
    whole = program // (tiles * section) * section
    rest = program - whole * tiles
    wide = gl.minimum(section, heads - whole)
    return tiles - 1 - rest // wide, whole + rest % wide


@gluon.jit
def _query_tiles(tile_n, work, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """(first, how many) of the tiles of queries that may see a tile of keys."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    first, end = gl.to_tensor(0), row_tiles
    if RIGHT:
        first = gl.maximum(tile_n * KEYS - right, 0) // BLOCK_M
    if LEFT:
        end = gl.minimum(end, gl.maximum(tile_n * KEYS + (KEYS - 1 + BLOCK_M) - left, 0) // BLOCK_M)
    return first, gl.maximum(end - first, 0)


@gluon.jit
def _turn(tile_n, tile_m, work, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """How many programs add to a tile of queries before this one: the keys after these that it may see."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    last = tiles - 1
    if RIGHT:
        last = gl.minimum(last, (tile_m * BLOCK_M + (BLOCK_M - 1) + right) // KEYS)
    return last - tile_n


@gluon.jit
def _step(step, first, count, head, work):
    """(tile of queries, its number among those of all heads): one head of the group after the other."""
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    tile_m = first + step % count
    return tile_m, (head * GROUP + step // count) * row_tiles + tile_m


# ---- the warps that fetch, wait and store


@gluon.jit
def _fetch(
    descs, keys, queries, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, STAGES: gl.constexpr,
):
    q_desc, k_desc, v_desc, do_desc, stats_desc = descs
    k_buf, v_buf, k_full, v_full, finished = keys
    q_bufs, do_bufs, stats_bufs, q_full, do_full = queries
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    tile_n, head = _place(work)
    first, count = _query_tiles(tile_n, work, LEFT, RIGHT, BLOCK_M)
    off_b, off_hk = head // Hk, head % Hk
    mbarrier.expect(k_full, k_desc.block_type.nbytes)
    load_async(k_desc, [off_b, off_hk, tile_n * KEYS, 0], k_full, k_buf)
    for step in range(GROUP * count):
        slot = step % STAGES
        tile_m, tile = _step(step, first, count, head, work)
        off_h = off_hk * GROUP + step // count
        meet_at(FREE + slot, THREADS)
        mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes + stats_desc.block_type.nbytes)
        load_async(q_desc, [off_b, off_h, tile_m * BLOCK_M, 0], q_full.index(slot), q_bufs.index(slot))
        load_async(stats_desc, [tile, 0], q_full.index(slot), stats_bufs.index(slot))
        if step == 0:
            mbarrier.expect(v_full, v_desc.block_type.nbytes)
            load_async(v_desc, [off_b, off_hk, tile_n * KEYS, 0], v_full, v_buf)
        mbarrier.expect(do_full.index(slot), do_desc.block_type.nbytes)
        load_async(do_desc, [off_b, off_h, tile_m * BLOCK_M, 0], do_full.index(slot), do_bufs.index(slot))


@gluon.jit
def _spin_until(ptr, value):
    """Wait until another program has written `value`, and see what it wrote before that."""
    gl.inline_asm_elementwise(
        "{\n\t.reg .pred p;\n\t.reg .b32 r;\n\tSPIN:\n\tld.acquire.gpu.global.b32 r, [$1];\n\t"
        "setp.ne.s32 p, r, $2;\n\t@p bra SPIN;\n\tfence.proxy.async.global;\n\tmov.b32 $0, r;\n\t}",
        "=r,l,r", [ptr.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def _publish(ptr, value):
    """Write `value` for other programs to see, once what this warp copied by TMA is in memory."""
    gl.inline_asm_elementwise(
        "cp.async.bulk.wait_group 0;\n\tbar.warp.sync 0xffffffff;\n\tst.release.gpu.global.b32 [$1], $2;\n\t"
        "mov.b32 $0, 0;", "=r,l,r", [ptr.to(gl.int64), value], dtype=gl.int32, is_pure=False, pack=1,
    )


@gluon.jit
def _await_turns(tickets_ptr, turns, work, LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr):
    """Say when it is this program's turn, up to two steps ahead."""
    come, gone = turns
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    tile_n, head = _place(work)
    first, count = _query_tiles(tile_n, work, LEFT, RIGHT, BLOCK_M)
    for step in range(GROUP * count):
        tile_m, tile = _step(step, first, count, head, work)
        mbarrier.wait(gone.index(step % 2), (step // 2 & 1) ^ 1)
        _spin_until(tickets_ptr + tile, _turn(tile_n, tile_m, work, RIGHT, BLOCK_M))
        mbarrier.arrive(come.index(step % 2), count=1)


@gluon.jit
def _store(
    sum_desc, dk_desc, dv_desc, tickets_ptr, keys, dq_parts, turns, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, DQ_STAGES: gl.constexpr,
):
    """dQ of every step, when it is its turn; at the end dK and dV, from the places of K and V."""
    k_buf, v_buf, k_full, v_full, finished = keys
    dq_bufs, dq_empty = dq_parts
    come, gone = turns
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right = work
    tile_n, head = _place(work)
    first, count = _query_tiles(tile_n, work, LEFT, RIGHT, BLOCK_M)
    for step in range(GROUP * count):
        tile_m, tile = _step(step, first, count, head, work)
        turn = _turn(tile_n, tile_m, work, RIGHT, BLOCK_M)
        slot = step % DQ_STAGES
        mbarrier.wait(come.index(step % 2), step // 2 & 1)
        meet_at(DQ_FULL + slot, THREADS)
        if turn == 0:
            store_async(sum_desc, [tile * 64, 0], dq_bufs.index(slot))
        else:
            add_async(sum_desc, [tile * 64, 0], dq_bufs.index(slot))
        tma.store_wait(0)
        mbarrier.arrive(dq_empty.index(slot), count=1)
        _publish(tickets_ptr + tile, turn + 1)
        mbarrier.arrive(gone.index(step % 2), count=1)
    off_b, off_hk = head // Hk, head % Hk
    mbarrier.wait(finished, 0)
    store_async(dv_desc, [off_b, off_hk, tile_n * KEYS, 0], v_buf)
    store_async(dk_desc, [off_b, off_hk, tile_n * KEYS, 0], k_buf)
    tma.store_wait(0)


# ---- the warps that multiply


@gluon.jit
def _make_finite(buf, layout: gl.constexpr):
    """0 for NaN and inf: of a hidden key they would meet a dS of 0. (Who sees NaN has it in lse or delta already.)"""
    x = buf.load(layout)
    buf.store(gl.where(gl.abs(x.to(gl.float32)) < float("inf"), x, gl.zeros_like(x)))


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
def _hand_on(dq, step, dq_parts, BLOCK_D: gl.constexpr, DQ_STAGES: gl.constexpr):
    """dQ to the warp that stores, in the order of the registers: 16 contiguous bytes a thread at a time."""
    dq_bufs, dq_empty = dq_parts
    # (warpgroup, 8 columns, warp, row, 2 columns, upper or lower 8 rows, column): _finish_kernel undoes it
    if BLOCK_D == 128:
        x = gl.permute(gl.reshape(dq, [4, 2, 8, 2, 8, 4, 2]), [3, 4, 0, 2, 5, 1, 6])
    else:
        x = gl.permute(gl.reshape(dq, [2, 4, 2, 8, 8, 4, 2]), [0, 4, 1, 3, 5, 2, 6])
    slot = step % DQ_STAGES
    mbarrier.wait(dq_empty.index(slot), (step // DQ_STAGES & 1) ^ 1)
    dq_bufs.index(slot).store(gl.reshape(x, [64, 128]))
    fence_async_shared()
    arrive_at(DQ_FULL + slot, THREADS)


@gluon.jit
def _multiply(
    keys, queries, ds_bufs, dq_parts, scale_2, work,
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
    tile_n, head = _place(work)
    first, count = _query_tiles(tile_n, work, LEFT, RIGHT, BLOCK_M)
    start_n = tile_n * KEYS
    first_m, end_m = uniform(first * BLOCK_M), uniform((first + count) * BLOCK_M)
    steps = uniform(GROUP * count)
    after_n, at_left, at_right = uniform(N - start_n), uniform(start_n - left), uniform(start_n - right)
    start_m = first_m
    k = k_buf.reshape([KEYS, BLOCK_D])
    v = v_buf.reshape([KEYS, BLOCK_D])
    dk = gl.zeros([KEYS, BLOCK_D], gl.float32, d_layout)
    dv = gl.zeros([KEYS, BLOCK_D], gl.float32, d_layout)
    zeros = gl.zeros([KEYS, BLOCK_M], gl.float32, s_layout)
    dq_zeros = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, dq_layout)
    for place in gl.static_range(STAGES):
        arrive_at(FREE + place, THREADS)
    mbarrier.wait(k_full, 0)
    mbarrier.wait(v_full, 0, pred=steps > 0)
    if BANDED:
        row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [8, 1], [1, 0])
        _make_finite(k, row_layout)
        _make_finite(v, row_layout)
        fence_async_shared()
    k_left = k
    if BLOCK_D == 64 and not LEFT:  # there are registers for it
        k_left = k.load(gl.DotOperandLayout(0, s_layout, k_width=2))
    mbarrier.wait(q_full.index(0), 0, pred=steps > 0)
    barrier()
    for step in range(steps):
        slot = step % STAGES
        q = q_bufs.index(slot).reshape([BLOCK_M, BLOCK_D])
        do = do_bufs.index(slot).reshape([BLOCK_M, BLOCK_D])
        stats = stats_bufs.index(slot).reshape([2 * BLOCK_M])
        mbarrier.wait(do_full.index(slot), step // STAGES & 1)
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
            start_m += BLOCK_M
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
        mbarrier.wait(q_full.index((step + 1) % STAGES), (step + 1) // STAGES & 1, pred=step + 1 < steps)
        dp = warpgroup_mma_wait(0, [dp_token])
        ds = (p * dp).to(dtype)
        ds_buf = ds_bufs.index(step % 2)
        ds_buf.store(ds)
        dv_token = warpgroup_mma(p_16, do, dv, is_async=True)
        fence_async_shared()
        dq_token = warpgroup_mma(ds_buf.permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True)
        barrier()  # here, where all are anyway: Triton wants one before dS is stored again, and before the wait for Q
        dk_token = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
        dq = warpgroup_mma_wait(1, [dq_token])
        _hand_on(dq, step, dq_parts, BLOCK_D, DQ_STAGES)
        dk, dv = warpgroup_mma_wait(0, [dk_token, dv_token])
        arrive_at(FREE + slot, THREADS)

    barrier()  # all have read K
    v.store(dv.to(dtype))
    k.store((dk * (scale_2 * LN2)).to(dtype))
    fence_async_shared()
    mbarrier.arrive(finished, count=1)


@gluon.jit(do_not_specialize=[
    "scale_2", "tiles", "heads", "section", "Hk", "GROUP", "row_tiles", "N", "left", "right"
])
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, sum_desc, dk_desc, dv_desc, tickets_ptr, scale_2,
    tiles, heads, section, Hk, GROUP, row_tiles, N, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, DQ_STAGES: gl.constexpr, REST: gl.constexpr,
):
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
    fence_async_shared()

    keys = (k_buf, v_buf, k_full, v_full, finished)
    queries = (q_bufs, do_bufs, stats_bufs, q_full, do_full)
    dq_parts = (dq_bufs, dq_empty)
    turns = (come, gone)
    descs = (q_desc, k_desc, v_desc, do_desc, stats_desc)
    work = (tiles, heads, section, Hk, GROUP, row_tiles, N, left, right)
    gl.warp_specialize([
        (_multiply, (keys, queries, ds_bufs, dq_parts, scale_2, work,
                     LEFT, RIGHT, BLOCK_M, BLOCK_D, STAGES, DQ_STAGES)),
        (_fetch, (descs, keys, queries, work, LEFT, RIGHT, BLOCK_M, STAGES)),
        (_await_turns, (tickets_ptr, turns, work, LEFT, RIGHT, BLOCK_M)),
        (_store, (sum_desc, dk_desc, dv_desc, tickets_ptr, keys, dq_parts, turns, work,
                  LEFT, RIGHT, BLOCK_M, DQ_STAGES)),
    ], [1, 1, 1], [REST, REST, REST])


# ---- before and after


@triton.jit(do_not_specialize=["H", "M", "row_tiles"])
def _prepare_kernel(
    do_ptr, stride_gb, stride_gh, stride_gm, stride_gd, o_ptr, stride_ob, stride_oh, stride_om, stride_od,
    lse_ptr, dlse_ptr, record_ptr, stats_ptr, tickets_ptr, H, M, row_tiles,
    DV: tl.constexpr, HAS_DLSE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """For each tile of queries: lse of base 2, +inf where no key is seen (P = 0 there), and -delta; its ticket, 0; and
    the record, see load_record, in which the gradient of sinks finds delta."""
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
    stats_ptr += tile.to(tl.int64) * 2 * BLOCK_M + tl.arange(0, BLOCK_M)
    blind = lse == float("-inf")
    tl.store(stats_ptr, tl.where(blind, float("inf"), lse * 1.4426950408889634))
    tl.store(stats_ptr + BLOCK_M, tl.where(blind, 0.0, -delta))
    top = tl.where(blind, 0.0, lse)
    store_pair(record_ptr, 2 * (row + offs_m), top, top, offs_m < M)
    store_pair(record_ptr, 2 * (row + offs_m) + 1, delta, tl.zeros_like(delta), offs_m < M)
    tl.store(tickets_ptr + tile, 0)


@triton.jit(do_not_specialize=["scale", "H", "M", "N", "row_tiles", "left", "right"])
def _finish_kernel(
    sum_ptr, dq_ptr, stride_rb, stride_rh, stride_rm, stride_rd, scale, H, M, N, row_tiles, left, right,
    D: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, BLOCK_M: tl.constexpr,
):
    """dQ = scale * the sum, from the order of registers to rows; 0 where a tile of queries sees no keys."""
    tile = tl.program_id(0)
    head, start_m = tile // row_tiles, tile % row_tiles * BLOCK_M
    dq_ptr = head_ptr(dq_ptr, stride_rb, stride_rh, head // H, head % H)
    first_n, last_n = 0, N - 1
    if RIGHT:
        last_n = tl.minimum(last_n, start_m + (BLOCK_M - 1) + right)
    if LEFT:
        first_n = tl.maximum(start_m + left, 0)
    seen = (last_n >= 0) & (first_n // 128 <= last_n // 128)
    for w in tl.static_range(2):
        offs = tile.to(tl.int64) * 8192 + w * 4096 + tl.arange(0, 4096)
        mask = tl.where(seen, offs >= 0, offs < 0)  # all or none: Triton 3.9's interpreter takes no & with a number
        x = tl.load(sum_ptr + offs, mask=mask, other=0.0) * scale
        x = tl.reshape(tl.permute(tl.reshape(x, [8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5]), [64, 64])
        rows, columns = (0, w * 64) if BLOCK_M == 64 else (w * 64, 0)
        offs_m, offs_d = start_m + rows + tl.arange(0, 64), columns + tl.arange(0, 64)
        store_tile(dq_ptr, (stride_rm, stride_rd), (M, D), offs_m, offs_d, x)


def applies(q, k, v, scale, processors):
    """Whether the kernel takes these inputs, is worth its descriptors and fills the GPU; else the plain kernels run."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    return (
        q.element_size() == 2 and 0 < D <= 128 and 0 < DV <= 128 and D % 8 == 0 and DV % 8 == 0 and scale != 0.0
        and 10 * B * H * M * N * D >= SMALLEST and B * Hk * triton.cdiv(N, KEYS.value) >= FEWEST * processors
        and all(readable(t) for t in (q, k, v))
    )


def prepare(do, dlse, o, lse, record, block_m):
    """(stats, tickets) of the queries, a row for each tile of them; fills record."""
    B, H, M, DV = o.shape
    row_tiles = triton.cdiv(M, block_m)
    stats = lse.new_empty(B * H * row_tiles, 2 * block_m)
    tickets = lse.new_empty(B * H * row_tiles, dtype=torch.int32)
    launch(
        _prepare_kernel, B * H * row_tiles,
        do, *do.stride(), o, *o.stride(), lse, dlse, record, stats, tickets, H, M, row_tiles, device=o.device,
        DV=int(DV), HAS_DLSE=dlse is not None, BLOCK_M=block_m, BLOCK_DV=max(16, triton.next_power_of_2(DV)),
        num_warps=4,
    )
    return stats, tickets


def finish(sums, dq, N, scale, left, right, block_m):
    """Fill dq from the sums of its parts."""
    B, H, M, D = dq.shape
    row_tiles = triton.cdiv(M, block_m)
    launch(
        _finish_kernel, B * H * row_tiles, sums, dq, *dq.stride(), scale, H, M, N, row_tiles, left or 0, right or 0,
        device=dq.device, D=int(D), LEFT=left is not None, RIGHT=right is not None, BLOCK_M=block_m, num_warps=4,
    )


def backward(do, dlse, q, k, v, o, lse, record, dq, dk, dv, scale, left, right):
    """Fill dq, dk, dv and record, see fused_backward_op in triton_attention_fused_backward.py; for what applies()."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    if left is None and right is None and N % KEYS.value:
        right = N  # nothing more is hidden, but what is past the last key
    own_q, factor = (-q, -scale) if scale < 0.0 else (q, scale)  # the kernel knows positive ones
    do = do if readable(do) else do.clone(memory_format=torch.contiguous_format)
    tile = tile_for("fused backward hopper", q.dtype, max(D, DV), right is not None)
    stats, tickets = prepare(do, dlse, o, lse, record, tile.BLOCK_M)
    sums = lse.new_empty(64 * tickets.numel(), 128)
    tiles, section = triton.cdiv(N, KEYS.value), L2 // (H // Hk * M * 8 * tile.BLOCK_D)
    registers = (1 << 16) // (128 * 3) // 8 * 8  # of a thread, before they are dealt out
    launch(
        _backward_kernel, B * Hk * tiles,
        describe(own_q, tile.BLOCK_M, tile.BLOCK_D), describe(k, KEYS.value, tile.BLOCK_D),
        describe(v, KEYS.value, tile.BLOCK_D), describe(do, tile.BLOCK_M, tile.BLOCK_D),
        describe_rows(stats, 1), describe_rows(sums, 64),
        describe(dk, KEYS.value, tile.BLOCK_D), describe(dv, KEYS.value, tile.BLOCK_D), tickets, factor * LOG2E,
        tiles, B * Hk, max(1, min(B * Hk, section)), Hk, H // Hk, triton.cdiv(M, tile.BLOCK_M), N,
        left or 0, right or 0,
        device=q.device, LEFT=left is not None, RIGHT=right is not None,
        BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_D, STAGES=tile.num_stages, DQ_STAGES=tile.SPAN,
        REST=registers * 3 - 2 * tile.registers, num_warps=tile.num_warps, maxnreg=registers,
    )
    finish(sums, dq, N, scale, left, right, tile.BLOCK_M)
