"""The fused forward pass on Hopper: a producer warp, two or three consumer warpgroups, softmax under products.

The plain kernel (triton_attention_fused.py) computes scores, then their softmax, then P V: tensor cores wait for the
exponentials, and those for tensor cores. Here the scores of the next keys are in flight before P V of these:

    producer warp         K4   K3 V4   K2 V3   K1 V2   ...       by TMA, into the stages of a pipeline
    consumer warpgroup 0  S4   S3   P4 V4   S2   P3 V3   S1 ...     tensor cores, asynchronous
                             softmax 4 |  softmax 3 |  softmax 2    the other units, overlapped
    consumer warpgroup 1  the same for the next 64 queries, K and V shared

Persistent: a program per multiprocessor takes one tile of queries after the other, the next Q and first K prefetched
during the epilogue of the last. Causal tiles differ in length: the longest come first, and the producer draws the next
from a counter, four tiles of keys before it is needed.

Invariants
    keys are walked from the last to the first: the diagonal is at the end, and only there a tile pays for a mask;
    each warpgroup has bounds of its own, and releases stages unread that none of its queries sees;
    a stage is released at a named barrier, where a warp arrives and goes on;
    maxima start with the least finite number, so that no tile needs a test for rows that have seen no key yet;
    O is rescaled only where the exponentials of a row have outgrown its maximum by a factor of 256;
    the counter is left at zero for the next launch, and NaN in hidden values is repaired within (nan_repair.py).

What was measured, and what gained nothing: NOTES.md. Shah et al., "FlashAttention-3", 2024, for warp specialisation and
the order of the two products; FlashAttention-4 for rescaling rarely. Gluon (triton.experimental.gluon) is Triton's
lower-level language: layouts, barriers and copies are explicit.
"""

import functools

import torch

from triton_attention.device import TRITON, counter, processors
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.mask import ROWS, edges, half, hide, key_tiles
from triton_attention.hopper.nan_repair import close_log, open_log, repair, write_down
from triton_attention.hopper.ptx import (
    arrive_at, inline, mark_nan, meet_at, opaque, program, rescale, take_number, uniform, written,
)
from triton_attention.hopper.softmax import LOWEST, along, exponentials, halves, joined, maxima, row_sums
from triton_attention.hopper.tma import describe, load_async, readable, store_async
from triton_attention.launch import empty_heads, launch
from triton_attention.logits import LN2, LOG2E
from triton_attention.tile_choice import tile_for

K_FREE, V_FREE = gl.constexpr(8), gl.constexpr(12)  # the first of four named barriers; those below are Triton's
LONG = 2048  # queries and keys from which D up to 64 takes tiles of three warpgroups; twice as many, if causal
ENOUGH = 2  # of those tiles a multiprocessor; with fewer, the longest of them leave most of the GPU idle at the end
SMALLEST = 1 << 31  # floating-point operations from which the kernel is worth its descriptors
WIDEST = 256 if TRITON < (3, 9) else 128  # head dim; wider ones with a mask spill with the ptxas of Triton 3.9
FEWEST = 0.48  # tiles of 128 queries a multiprocessor; with fewer, the plain kernel splits the keys


# ---- which tile of queries


@gluon.jit
def _place(item, row_tiles, heads, section, H, BANDED: gl.constexpr, BLOCK_M: gl.constexpr):
    """(off_b, off_h, start_m) of an item of the list. BANDED: the longest first, over a section of heads at a time."""
    if BANDED:
        whole = item // (row_tiles * section) * section
        rest = item - whole * row_tiles
        wide = gl.maximum(gl.minimum(section, heads - whole), 1)  # 1: past the end of the list
        head, tile = whole + rest % wide, row_tiles - 1 - rest // wide
    else:
        head, tile = item // row_tiles, item % row_tiles
    return head // H, head % H, tile * BLOCK_M


# ---- rings: slot `count % STAGES` of shared memory; its barrier `full`, in the phase of count // STAGES; and a named
# barrier of the hardware, at which the warpgroups say that it is free, without waiting for each other


@gluon.jit
def _slot(count, STAGES: gl.constexpr):
    """count % STAGES, without the instructions for negative ones."""
    return (gl.to_tensor(count).to(gl.uint32) % STAGES).to(gl.int32)


@gluon.jit
def _put(
    desc, off_b, off_h, start, bufs, full, count, FREE: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr
):
    slot = _slot(count, STAGES)
    meet_at(FREE + slot, 128 * WARPGROUPS + 32)
    mbarrier.expect(full.index(slot), desc.block_type.nbytes)
    load_async(desc, [off_b, off_h, start, 0], full.index(slot), bufs.index(slot))


@gluon.jit
def _await(full, count, STAGES: gl.constexpr, wanted=True):
    phase = (count.to(gl.uint32) // STAGES & 1).to(gl.int32)
    mbarrier.wait(full.index(_slot(count, STAGES)), phase, pred=wanted)


@gluon.jit
def _release(count, FREE: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr):
    arrive_at(FREE + _slot(count, STAGES), 128 * WARPGROUPS + 32)


@gluon.jit
def _skip(tiles, count, k_full, v_full, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr):
    """Release K and V of some tiles unread."""
    for _ in range(tiles):
        _await(k_full, count, STAGES)
        _release(count, K_FREE, STAGES, WARPGROUPS)
        _await(v_full, count, STAGES)
        _release(count, V_FREE, STAGES, WARPGROUPS)
        count += 1
    return count


# ---- the warp that fetches


@gluon.jit
def _offer(
    q_desc, off_b, off_h, start_m, more, q_bufs, q_full, q_empty, tickets, turn,
    Q_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
):
    """Write which tile of queries is next, or that there is none if not `more`, where the warpgroups find it, once they
    have left the place; and fetch its Q."""
    place = turn % Q_STAGES
    for w in gl.static_range(WARPGROUPS):
        mbarrier.wait(q_empty.index(place * WARPGROUPS + w), (turn // Q_STAGES & 1) ^ 1)
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    tickets.index(place * 3).store(zero + off_b)
    tickets.index(place * 3 + 1).store(zero + off_h)
    tickets.index(place * 3 + 2).store(zero + gl.where(more, start_m, -1))
    inline("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
    for w in gl.static_range(WARPGROUPS):
        slot = place * WARPGROUPS + w
        if more:
            mbarrier.expect(q_full.index(slot), q_desc.block_type.nbytes)
            load_async(q_desc, [off_b, off_h, start_m + ROWS * w, 0], q_full.index(slot), q_bufs.index(slot))
        else:
            mbarrier.arrive(q_full.index(slot), count=1)


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, counter_ptr, log_ptr, rings, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
    Q_STAGES: gl.constexpr,
):
    q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, v_full, tickets = rings
    items, row_tiles, heads, section, H, GROUP, M, N, left, right = work
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    AHEAD: gl.constexpr = Q_STAGES == 2 and not (LEFT or RIGHT)  # next Q before the last V: no number to wait for
    count = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    item = gl.program_id(0)
    before = gl.to_tensor(-1)
    if LEFT or RIGHT:
        open_log(log_ptr, items + item)
    off_b, off_h, start_m = _place(item, row_tiles, heads, section, H, LEFT or RIGHT, BLOCK_M)
    _offer(q_desc, off_b, off_h, start_m, item < items, q_bufs, q_full, q_empty, tickets, turn, Q_STAGES, WARPGROUPS)
    while item < items:
        following = item + gl.num_programs(0)
        if LEFT or RIGHT:
            taken = gl.to_tensor(0)
            # before the first K: who waits for that may then write marks
            before = write_down(log_ptr, (off_b * H + off_h) * row_tiles + start_m // BLOCK_M, before, WARPGROUPS)
        first, last = key_tiles(start_m, N, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        off_hk = off_h // GROUP
        steps = last - first + 1
        for step in range(steps):
            start_n = (last - step) * BLOCK_N
            if LEFT or RIGHT:  # whoever is done first takes the next number; the answer takes its time
                if step == gl.maximum(steps - 4, 0):
                    taken = take_number(counter_ptr)
            _put(k_desc, off_b, off_hk, start_n, k_bufs, k_full, count, K_FREE, STAGES, WARPGROUPS)
            if step > 0:
                _put(v_desc, off_b, off_hk, start_n + BLOCK_N, v_bufs, v_full, count - 1, V_FREE, STAGES, WARPGROUPS)
            count += 1
        if not AHEAD:
            _put(v_desc, off_b, off_hk, first * BLOCK_N, v_bufs, v_full, count - 1, V_FREE, STAGES, WARPGROUPS)
        if LEFT or RIGHT:
            taken = uniform(taken)
            gl.store(counter_ptr, 0, mask=taken == items - 1)  # the last one leaves it as it was
            following = gl.num_programs(0) + taken
        next_b, next_h, next_m = _place(following, row_tiles, heads, section, H, LEFT or RIGHT, BLOCK_M)
        turn += 1
        _offer(
            q_desc, next_b, next_h, next_m, following < items, q_bufs, q_full, q_empty, tickets, turn,
            Q_STAGES, WARPGROUPS,
        )
        if AHEAD:
            _put(v_desc, off_b, off_hk, first * BLOCK_N, v_bufs, v_full, count - 1, V_FREE, STAGES, WARPGROUPS)
        item, off_b, off_h, start_m = following, next_b, next_h, next_m
    if LEFT or RIGHT:
        close_log(log_ptr, items + gl.program_id(0), before)


# ---- the warpgroups that multiply


@gluon.jit
def _next_tile(
    tickets, q_full, turn, Q_STAGES: gl.constexpr, WARPGROUPS: gl.constexpr, WARPGROUP: gl.constexpr
):
    """(off_b, off_h, start_m) of the next tile of queries, when its Q is there; start_m is -1 after the last."""
    place = turn % Q_STAGES
    mbarrier.wait(q_full.index(place * WARPGROUPS + WARPGROUP), turn // Q_STAGES & 1)
    return _read(tickets.index(place * 3)), _read(tickets.index(place * 3 + 1)), _read(tickets.index(place * 3 + 2))


@gluon.jit
def _read(ticket):
    return uniform(gl.max(ticket.load(gl.BlockedLayout([1], [32], [4], [0])), 0))


@gluon.jit
def _first_tile(
    q, k, scale, row, start_n, N, left, right, masked, count,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, WARPGROUPS: gl.constexpr,
    s_layout: gl.constexpr,
):
    """(weights of the first tile of keys, 0 in its second half if k is no more than the first, maxima)."""
    KEYS: gl.constexpr = k.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    zeros = gl.zeros([ROWS, KEYS], gl.float32, layout)
    s = warpgroup_mma_wait(0, [warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)])
    _release(count, K_FREE, STAGES, WARPGROUPS)
    if masked:
        s = hide(s, row, start_n, N, left, right, LEFT, RIGHT, layout)
    m_i = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, layout))
    _, m_i = maxima(s, m_i, scale, WARPGROUPS, layout)
    p = exponentials(s, m_i, scale)
    if KEYS < BLOCK_N:
        p = gl.convert_layout(joined(p, gl.zeros_like(p)), s_layout)
    return p, gl.convert_layout(m_i, gl.SliceLayout(1, s_layout))


@gluon.jit
def _attend(
    out, rings, work,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, EDGES: gl.constexpr, HALF: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, WARPGROUP: gl.constexpr,
):
    """One warpgroup: 64 queries of every tile. EDGES, HALF: see edges() and half()."""
    o_desc, o_bufs, lse_ptr, log_ptr, scale = out
    q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, v_full, tickets = rings
    items, row_tiles, heads, section, H, GROUP, M, N, left, right = work
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    BANDED: gl.constexpr = LEFT or RIGHT
    # the next tile is read before the last V is released, and a tile of keys that is not seen here: rings have room
    EARLY: gl.constexpr = BANDED and Q_STAGES == 2
    gl.static_assert(not EARLY or STAGES >= 2 and BLOCK_N >= BLOCK_M - ROWS)
    dtype: gl.constexpr = q_bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    o_buf = o_bufs.index(WARPGROUP)
    for slot in gl.static_range(STAGES):
        _release(slot, K_FREE, STAGES, WARPGROUPS)
        _release(slot, V_FREE, STAGES, WARPGROUPS)
    count = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    off_b, off_h, start_m = _next_tile(tickets, q_full, turn, Q_STAGES, WARPGROUPS, WARPGROUP)
    while start_m >= 0:
        q_place = turn % Q_STAGES * WARPGROUPS + WARPGROUP
        q = q_bufs.index(q_place).reshape([ROWS, BLOCK_D])
        row = start_m + ROWS * WARPGROUP
        first, last = key_tiles(start_m, N, left, right, LEFT, RIGHT, BLOCK_M, BLOCK_N)
        own_first, own_last = first, last
        if BANDED:
            own_first, own_last = key_tiles(row, N, left, right, LEFT, RIGHT, ROWS, BLOCK_N)
            own_first, own_last = gl.maximum(own_first, first), gl.maximum(own_last, first)
            count = _skip(last - own_last, count, k_full, v_full, STAGES, WARPGROUPS)

        _await(k_full, count, STAGES)
        k = k_bufs.index(_slot(count, STAGES)).reshape([BLOCK_N, BLOCK_D])
        if HALF and WARPGROUP == 0:
            k = k.slice(0, ROWS, dim=0)
        p, m_i = _first_tile(
            q, k, scale, row, own_last * BLOCK_N, N, left, right, BANDED or (own_last + 1) * BLOCK_N > N, count,
            LEFT, RIGHT, BLOCK_N, STAGES, WARPGROUPS, s_layout,
        )
        l_i = row_sums(p)
        p_16 = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        count += 1
        _await(k_full, count, STAGES, own_first < own_last)

        for step in range(1, own_last - own_first + 1):
            k_t = k_bufs.index(_slot(count, STAGES)).reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
            s_token = warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)
            _await(v_full, count - 1, STAGES)
            v = v_bufs.index(_slot(count - 1, STAGES)).reshape([BLOCK_N, BLOCK_D])
            o_token = warpgroup_mma(p_16, v, acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_token])
            _release(count, K_FREE, STAGES, WARPGROUPS)
            if EDGES or BLOCK_D > 64:
                start_n = (own_last - step) * BLOCK_N
                edge = gl.to_tensor(False) if EDGES else start_n + BLOCK_N > N  # never, but ptxas cannot know
                if EDGES and RIGHT:
                    edge = edge | (start_n + (BLOCK_N - 1) > row + right)
                if EDGES and LEFT:
                    edge = edge | (start_n < row + (ROWS - 1) + left)
                if edge:
                    s = hide(s, row, start_n, N, left, right, EDGES and LEFT, EDGES and RIGHT, s_layout)
            alpha, m_i = maxima(s, m_i, scale, WARPGROUPS, s_layout)
            if WARPGROUPS == 2:
                s_0, s_1 = halves(s)
                p_0 = exponentials(s_0, m_i, scale)
            else:
                weights = exponentials(s, m_i, scale)
                l_i = l_i * along(alpha, l_i) + row_sums(weights)
            count += 1
            _await(k_full, count, STAGES, step < own_last - own_first)  # here: it keeps the next wait below the softmax
            acc = warpgroup_mma_wait(0, [o_token])
            _release(count - 2, V_FREE, STAGES, WARPGROUPS)
            acc = rescale(acc, along(alpha, acc))
            if WARPGROUPS == 2:
                weights = gl.convert_layout(joined(p_0, exponentials(s_1, m_i, scale)), s_layout)
                l_i = l_i * along(alpha, l_i) + row_sums(weights)
            p_16 = gl.convert_layout(weights.to(dtype), p_layout)
        if Q_STAGES == 2:
            mbarrier.arrive(q_empty.index(q_place), count=1)

        _await(v_full, count - 1, STAGES)
        v = v_bufs.index(_slot(count - 1, STAGES)).reshape([BLOCK_N, BLOCK_D])
        o_token = warpgroup_mma(p_16, v, acc, is_async=True)
        rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
        lse = m_i * LN2 + gl.log(l_i)
        gl.store(lse_ptr + (off_b * H + off_h).to(gl.int64) * opaque(M) + rows, lse, mask=rows < M)
        inverse = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
        turn += 1
        if EARLY:
            next_b, next_h, next_m = _next_tile(tickets, q_full, turn, Q_STAGES, WARPGROUPS, WARPGROUP)
        acc = warpgroup_mma_wait(0, [o_token])
        _release(count - 1, V_FREE, STAGES, WARPGROUPS)
        if BANDED:
            count = _skip(own_first - first, count, k_full, v_full, STAGES, WARPGROUPS)

        acc = acc * along(inverse, acc)
        acc_16 = acc.to(dtype)
        tma.store_wait(0)  # the tile before has left o_buf
        o_buf.reshape([ROWS, BLOCK_D]).store(acc_16)
        fence_async_shared()
        store_async(o_desc, [off_b, off_h, row, 0], o_buf)
        if Q_STAGES == 1:  # O leaves from the place of Q
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(q_place), count=1)
        if BANDED:
            tile = (off_b * H + off_h) * row_tiles + start_m // BLOCK_M
            mark_nan(acc_16, log_ptr + (tile * 4 + WARPGROUP), log_ptr + 4 * (items + program()))
        if not EARLY:
            next_b, next_h, next_m = _next_tile(tickets, q_full, turn, Q_STAGES, WARPGROUPS, WARPGROUP)
        off_b, off_h, start_m = next_b, next_h, next_m
    written()


@gluon.jit(do_not_specialize=[
    "scale", "items", "row_tiles", "heads", "section", "H", "GROUP", "M", "N", "left", "right"
])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, lse_ptr, counter_ptr, log_ptr, scale,
    items, row_tiles, heads, section, H, GROUP, M, N, left, right,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, EDGES: gl.constexpr, HALF: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr,
    REGISTERS: gl.constexpr, REST: gl.constexpr,
):
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    gl.static_assert(STAGES <= V_FREE - K_FREE)
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * WARPGROUPS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    o_bufs = q_bufs
    if Q_STAGES == 2:
        o_bufs = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, BLOCK_D], o_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    tickets = gl.allocate_shared_memory(gl.int32, [6, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * WARPGROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * WARPGROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    again_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(again_full, count=1)
    for w in gl.static_range(Q_STAGES * WARPGROUPS):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_empty.index(w), count=1)
    for slot in gl.static_range(STAGES):
        mbarrier.init(k_full.index(slot), count=1)
        mbarrier.init(v_full.index(slot), count=1)
    fence_async_shared()

    rings = (q_bufs, k_bufs, v_bufs, q_full, q_empty, k_full, v_full, tickets)
    out = (o_desc, o_bufs, lse_ptr, log_ptr, scale)
    work = (items, row_tiles, heads, section, H, GROUP, M, N, left, right)
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_attend, (out, rings, work, LEFT, RIGHT, EDGES, HALF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES, 0)),
            (_attend, (out, rings, work, LEFT, RIGHT, EDGES, HALF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES, 1)),
            (_fetch, (q_desc, k_desc, v_desc, counter_ptr, log_ptr, rings, work,
                      LEFT, RIGHT, BLOCK_M, BLOCK_N, STAGES, Q_STAGES)),
        ], [4, 1], [REGISTERS, REST])
    else:
        gl.warp_specialize([
            (_attend, (out, rings, work, LEFT, RIGHT, EDGES, HALF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES, 0)),
            (_attend, (out, rings, work, LEFT, RIGHT, EDGES, HALF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES, 1)),
            (_attend, (out, rings, work, LEFT, RIGHT, EDGES, HALF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES, 2)),
            (_fetch, (q_desc, k_desc, v_desc, counter_ptr, log_ptr, rings, work,
                      LEFT, RIGHT, BLOCK_M, BLOCK_N, STAGES, Q_STAGES)),
        ], [4, 4, 1], [REGISTERS, REGISTERS, REST])
    if LEFT or RIGHT:
        o_buf = o_bufs.index(0) if Q_STAGES == 2 else k_bufs.index(1)
        bufs = (q_bufs.index(0), k_bufs.index(0), v_bufs.index(0), o_buf, again_full)
        repair(
            q_desc, k_desc, v_desc, o_desc, lse_ptr, log_ptr, scale, bufs, work,
            LEFT, RIGHT, BLOCK_M, BLOCK_N, BLOCK_D,
        )


def refuses(q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, block_m, block_n):
    """Why the kernel does not serve fused_op with these arguments, or None."""
    (B, H, M, D), (N, DV) = q.shape, v.shape[2:]
    for what, given in (
        ("a mask", mask is not None), ("sinks", sinks is not None), ("dropout", seed is not None),
        ("a softcap", softcap != 0.0), ("the tile is the caller's", block_m is not None or block_n is not None),
        ("not 16 bits", q.element_size() != 2),
        (f"a head dim above {WIDEST}", not 0 < min(D, DV) <= max(D, DV) <= WIDEST),
        ("a scale of 0", scale == 0.0), ("few queries", M <= 16),
        ("too little work to be worth the descriptors", 4 * B * H * M * N * D < max(SMALLEST, 1)),
        ("too few tiles to fill half of the GPU", B * H * triton.cdiv(M, 128) < FEWEST * processors(q.device)),
    ):
        if given:
            return what
    if DV % 8 or scale < 0.0 and D % 8 or not all(readable(t) for t in (q, k, v)):
        return "rows that do not begin at 16 bytes"
    return None


@functools.lru_cache
def section_of(heads, row_tiles, processors):
    """How many heads are worked on together: two tiles of queries a multiprocessor, whose keys and values stay in L2;
    up to twice as many, where the last section would be a small one that leaves most of the GPU idle."""
    few = min(heads, triton.cdiv(2 * processors, row_tiles))
    return max(range(few, min(2 * few, heads) + 1), key=lambda size: min((heads - 1) % size + 1, 0.75 * size) / size)


def run(q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, block_m, block_n):
    """(O, lse, no stats), see fused_op; for what is not refused."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    o, lse = empty_heads(q, B, H, M, DV), q.new_empty(B, H, M, dtype=torch.float32)
    multiprocessors = processors(q.device)
    if scale < 0.0:  # the maximum of scores is sought before they are scaled
        q, scale = -q, -scale
    banded = left is not None or right is not None
    long = left is None and min(M, N) >= (2 * LONG if banded else LONG)
    long = long and B * H * triton.cdiv(M, 3 * ROWS.value) >= ENOUGH * multiprocessors
    tile = tile_for("fused hopper, long" if long else "fused hopper", q.dtype, max(D, DV), banded, q.device)
    row_tiles, warpgroups = triton.cdiv(M, tile.BLOCK_M), tile.BLOCK_M // ROWS.value
    items = B * H * row_tiles
    registers = (1 << 16) // (128 * (warpgroups + 1)) // 8 * 8  # of a thread, before they are dealt out
    log = lse.new_empty(4 * (items + multiprocessors) if banded else 1, dtype=torch.int32)
    launch(
        _forward_kernel, min(items, multiprocessors),
        describe(q, ROWS.value, tile.BLOCK_D), describe(k, tile.BLOCK_N, tile.BLOCK_D),
        describe(v, tile.BLOCK_N, tile.BLOCK_D), describe(o, ROWS.value, tile.BLOCK_D),
        lse, counter(q.device) if banded else log, log, scale * LOG2E.value,
        items, row_tiles, B * H, section_of(B * H, row_tiles, multiprocessors) if banded else 1, H, H // Hk, M, N,
        left or 0, right or 0,
        device=q.device, LEFT=left is not None, RIGHT=right is not None,
        EDGES=edges(left, right), HALF=tile.BLOCK_M == tile.BLOCK_N and half(left, right, M, N),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D,
        STAGES=tile.num_stages, Q_STAGES=2 if tile.BLOCK_D <= 128 else 1,  # more do not fit
        REGISTERS=tile.registers, REST=registers * (warpgroups + 1) - tile.registers * warpgroups,
        num_warps=4, maxnreg=registers,
    )
    return o, lse, lse.new_empty(B, H, M, 0)
