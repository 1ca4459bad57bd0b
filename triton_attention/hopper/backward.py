"""dQ, dK, dV on Hopper in one pass over the scores: five products a tile instead of the plain kernels' seven.

The plain kernels (fused_backward.py) compute S and dP twice, once for dQ and once for dK and dV, so that every sum
belongs to one program. Here a program takes 128 keys, visits the queries that see them, and computes all three. dK and
dV stay in its registers; dQ is accumulated in memory, to which each tile of keys adds its part:

    producer warp        Q1 dO1              Q2 dO2              ...            by TMA, into the stages of a pipeline
    eight consumer warps S0   dP0     dV  dQ0  dK | S1   dP1     dV  dQ1  dK    tensor cores, asynchronous
                              P0  dS0             |      P1  dS1                 the other units, P overlaps dP
    semaphore warp       waits until dQ0 has the parts of its predecessors, until dQ1 ...
    dQ warp                                   dQ0 added to memory, by TMA; the semaphore released to the next part

S^T = K Q^T and dP^T = V dO^T come transposed out of the tensor cores, the way dV += P^T dO and dK += dS^T Q take them
in, straight from registers. Only dS goes through shared memory too, for dQ = dS K is a sum over the keys of all warps.

Where a floating mask has a gradient too, the dQ warp also stores each dS, transposed as it is; sum_scores() adds up
what belongs to one element of the mask.

Invariants
    the parts of a dQ are added in a fixed order, by a semaphore in memory for each tile of queries: bitwise repeatable;
    a tile waits only for those with lower numbers, which are under way already: no deadlock, however few programs run;
    the last keys come first, so that causal programs lag by a step each and hardly wait; in the last section of the
    list the first keys come first, and all programs end together;
    persistent: the producer draws tiles of keys from a counter in memory; the first queries of the next are prefetched
    during the epilogue, in which the producer stores dK and dV;
    consumer warps share one barrier a step, between dS and dQ = dS K, and one before dK and dV overwrite K and V;
    hidden scores start from -inf, and K and V are clamped to finite numbers: 0 * inf would be NaN.

What was measured, and what gained nothing: NOTES.md. Shah et al., "FlashAttention-3", 2024, for one pass with warp
specialisation; FlashAttention-2, for sums in a fixed order.
"""

from typing import NamedTuple

import torch

from triton_attention.device import TRITON, counter, processors
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.fused_bias import bias_gradient, sum_scores
from triton_attention.hopper.backward_ends import postprocess, preprocess
from triton_attention.hopper.forward import bias_of, keys_of, refuses_bias
from triton_attention.hopper.mask import MaskMap, add_key_mask, tile_words, visible_bits, words_of_head
from triton_attention.hopper.ptx import (
    atomic_increment, barrier, clamp, inline_asm, named_barrier_arrive, named_barrier_sync, opaque, semaphore_release,
    semaphore_wait, uniform,
)
from triton_attention.hopper.tma import add_async, addressable, load_async, row_descriptor, store_async, tile_descriptor
from triton_attention.launch import empty_heads, launch
from triton_attention.logits import LN2, LOG2E
from triton_attention.mask_map import bits_of, map_of, orders_of, units_of
from triton_attention.tile_choice import tile_for

BLOCK_N = gl.constexpr(128)
Q_EMPTY, DQ_FULL = gl.constexpr(8), gl.constexpr(12)  # the first of four named barriers; those below are Triton's
BIAS_EMPTY = gl.constexpr(10)  # of those for Q, of which there are two then
BARRIER_THREADS = gl.constexpr(288)  # of one: the eight consumer warps and another
WAITS_SYNC = gl.constexpr(TRITON >= (3, 9))  # Triton 3.9 puts a barrier of all warps behind each wait for products
K_REGISTERS = gl.constexpr(TRITON != (3, 8))  # K in registers at D 64 without a mask; the ptxas of Triton 3.8 spills
MIN_WORK = 1 << 34  # floating-point operations from which the GPU is busy for longer than the host
MIN_WAVES = 1  # tiles of keys a multiprocessor (a quarter, if causal); with fewer, the plain kernels balance better
MOST_DS = 1 << 32  # bytes of it in memory for the gradient of a mask; past that, it is computed again
L2 = 32 << 20  # bytes: heads whose queries, and what belongs to them, fit there are worked on together


class Options(NamedTuple):
    """What a build is compiled for."""

    LEFT: bool
    RIGHT: bool
    LISTED: bool  # whether there is a mask, whose tiles of queries are listed
    BIASED: bool  # whether it is a floating one
    KEYED: bool  # beside a second one of keys
    STORES_DS: bool
    BLOCK_M: int
    BLOCK_D: int
    STAGES: int  # of Q, dO, lse and delta
    DQ_STAGES: int


class Work(NamedTuple):
    """The work items, a tile of keys each, and the queries that may see them."""

    column_tiles: gl.tensor  # of a head
    heads: gl.tensor  # of keys, of all batches
    section: gl.tensor  # heads that are worked on together
    Hk: gl.tensor
    GROUP: gl.tensor
    row_tiles: gl.tensor  # of a head of queries
    N: gl.tensor
    M: gl.tensor
    left: gl.tensor
    right: gl.tensor
    map: MaskMap
    orders_ptr: gl.tensor  # see orders_of in mask_map.py


class KeyTile(NamedTuple):
    tile_n: gl.tensor
    head: gl.tensor
    ascending: gl.tensor  # whether its section takes the first keys first, and the last queries first
    first_m: gl.tensor  # the first tile of queries that may see it, and their number, of one head
    count: gl.tensor
    list: gl.tensor  # the number of its list of tiles of queries


class QueryTile(NamedTuple):
    tile_m: gl.tensor
    number: gl.tensor  # among those of all heads
    off_h: gl.tensor
    partial: gl.tensor  # whether a mask hides some of it


class Descriptors(NamedTuple):
    q: tma.tensor_descriptor
    k: tma.tensor_descriptor
    v: tma.tensor_descriptor
    do: tma.tensor_descriptor
    stats: tma.tensor_descriptor
    dk: tma.tensor_descriptor
    dv: tma.tensor_descriptor


class Scheduler(NamedTuple):
    """Two work items in shared memory, from the producer to all other warps."""

    items: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class KeyBuffers(NamedTuple):
    """K and V of one item, and then dK and dV in their place."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor
    v_full: gl.shared_memory_descriptor
    grads_full: gl.shared_memory_descriptor


class QueryStages(NamedTuple):
    """From the producer to the consumers; lse and delta arrive with Q."""

    q: gl.shared_memory_descriptor
    do: gl.shared_memory_descriptor
    stats: gl.shared_memory_descriptor
    tiles: gl.shared_memory_descriptor  # of each stage, where tiles are listed: which it is, partial or not; b; h
    q_full: gl.shared_memory_descriptor
    do_full: gl.shared_memory_descriptor


class Bias(NamedTuple):
    """Tiles of a floating mask, one at a time, from the producer to the consumers."""

    desc: tma.tensor_descriptor
    buf: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


class DqStages(NamedTuple):
    """From the consumers to the dQ warp: parts of dQ, and dS, which is released with the part of its step."""

    bufs: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    ds: gl.shared_memory_descriptor


class SemaphoreStages(NamedTuple):
    """mbarriers of two steps each: from the semaphore warp to the dQ warp, and back."""

    ready: gl.shared_memory_descriptor
    done: gl.shared_memory_descriptor


# ---- which keys, which queries, in which order


@gluon.jit
def _key_tile(item, work, OPTIONS: gl.constexpr):
    """The tile of keys of a work item: a section of heads at a time, last keys first; in the last section, if there is
    only a right bound, or a mask, ascending: the items with the most steps come first, so that all programs end
    together."""
    first_head = item // (work.column_tiles * work.section) * work.section
    item_in_section = item - first_head * work.column_tiles
    heads = gl.minimum(work.section, work.heads - first_head)
    tile_n, ascending = work.column_tiles - 1 - item_in_section // heads, gl.to_tensor(False)
    if OPTIONS.RIGHT and not OPTIONS.LEFT or OPTIONS.LISTED:
        ascending = first_head + work.section >= work.heads
        tile_n = gl.where(ascending, item_in_section // heads, tile_n)
    head = first_head + item_in_section % heads
    first, end = gl.to_tensor(0), work.row_tiles
    if OPTIONS.RIGHT:
        first = gl.maximum(tile_n * BLOCK_N - work.right, 0) // OPTIONS.BLOCK_M
    if OPTIONS.LEFT:
        seen = gl.maximum(tile_n * BLOCK_N + (BLOCK_N - 1 + OPTIONS.BLOCK_M) - work.left, 0) // OPTIONS.BLOCK_M
        end = gl.minimum(end, seen)
    count, number = gl.maximum(end - first, 0), gl.to_tensor(0)
    if OPTIONS.LISTED:
        number = head // work.Hk * work.map.list_b + head % work.Hk * work.map.list_h + tile_n * work.map.list_row
        count = gl.load(work.map.counts_ptr + 2 * number)
    return KeyTile(tile_n, head, ascending, first, count, number)


@gluon.jit
def _query_tile(step, keys, work, OPTIONS: gl.constexpr):
    """The QueryTile of a step: head after head; ascending keys: last queries first."""
    place = gl.where(keys.ascending, keys.count - 1 - step % keys.count, step % keys.count)
    tile_m, partial = keys.first_m + place, gl.to_tensor(0)
    if OPTIONS.LISTED:
        entry = gl.load(work.map.lists_ptr + keys.list.to(gl.int64) * work.map.capacity + place)
        tile_m, partial = entry // 2, entry % 2
    head = keys.head * work.GROUP + step // keys.count
    off_h = keys.head % work.Hk * work.GROUP + step // keys.count
    return QueryTile(tile_m, head * work.row_tiles + tile_m, off_h, partial)


@gluon.jit
def _predecessors(tile_m, keys, work, OPTIONS: gl.constexpr):
    """How many tiles of keys add to a tile of queries before this: those seen after it; if ascending, all before it."""
    if OPTIONS.LISTED:
        order = gl.load(work.orders_ptr + keys.list.to(gl.int64) * work.row_tiles + tile_m)
        return gl.where(keys.ascending, order & 0xFFFF, order >> 16)  # mutate: order
    last = work.column_tiles - 1
    if OPTIONS.RIGHT:
        last = gl.minimum(last, (tile_m * OPTIONS.BLOCK_M + (OPTIONS.BLOCK_M - 1) + work.right) // BLOCK_N)
    return gl.where(keys.ascending, keys.tile_n, last - keys.tile_n)  # mutate: predecessors


# ---- the tile scheduler


@gluon.jit
def _schedule(item, scheduler, item_count):
    """Pass the next item to the other warps, once they have released its stage."""
    stage = item_count % 2
    mbarrier.wait(scheduler.empty.index(stage), (item_count // 2 & 1) ^ 1)
    scheduler.items.index(stage).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + item)
    inline_asm("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
    mbarrier.arrive(scheduler.full.index(stage), count=1)


@gluon.jit
def _next_item(scheduler, item_count, WARPS: gl.constexpr):
    """The next item; -1 after the last."""
    stage = item_count % 2
    mbarrier.wait(scheduler.full.index(stage), item_count // 2 & 1)
    item = gl.max(scheduler.items.index(stage).load(gl.BlockedLayout([1], [32], [WARPS], [0])), 0)
    mbarrier.arrive(scheduler.empty.index(stage), count=1)
    return uniform(item)


@gluon.jit
def _load_scalar(buf):
    """A number in shared memory, for the eight consumer warps."""
    return uniform(gl.max(buf.load(gl.BlockedLayout([1], [32], [8], [0])), 0))


# ---- the producer warp


@gluon.jit
def _store_dk_dv(descs, buffers, off_b, off_hk, start_n, item_count):
    """The epilogue of an item: store dK and dV, and wait until K and V may be loaded in their place."""
    mbarrier.wait(buffers.grads_full, item_count & 1)  # mutate: wait-grads
    store_async(descs.dv, [off_b, off_hk, start_n, 0], buffers.v)
    store_async(descs.dk, [off_b, off_hk, start_n, 0], buffers.k)
    tma.store_wait(0)  # mutate: wait-dk


@gluon.jit
def _producer(descs, counter_ptr, buffers, stages, bias, scheduler, work, OPTIONS: gl.constexpr):
    items = work.column_tiles * work.heads
    item = uniform(atomic_increment(counter_ptr))  # the first too: no program waits for one that has not started
    item_count = gl.to_tensor(0)
    step_count = gl.to_tensor(0)  # of all items so far
    previous_b, previous_hk, previous_n = gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0)
    while item < items:
        _schedule(item, scheduler, item_count)
        keys = _key_tile(item, work, OPTIONS)
        off_b, off_hk, start_n = keys.head // work.Hk, keys.head % work.Hk, keys.tile_n * BLOCK_N
        steps = work.GROUP * keys.count
        # a step at least, for K and V
        nonempty = KeyTile(keys.tile_n, keys.head, keys.ascending, keys.first_m, gl.maximum(keys.count, 1), keys.list)
        query = QueryTile(gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0), gl.to_tensor(0))
        for step in range(gl.maximum(steps, 1)):
            stage = step_count % OPTIONS.STAGES
            if steps > 0:
                query = _query_tile(step, nonempty, work, OPTIONS)
                at = [off_b, query.off_h, query.tile_m * OPTIONS.BLOCK_M, 0]
                named_barrier_sync(Q_EMPTY + stage, BARRIER_THREADS)  # mutate: acquire-q
                if OPTIONS.LISTED:
                    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
                    stages.tiles.index(3 * stage).store(zero + query.tile_m * 2 + query.partial)
                    stages.tiles.index(3 * stage + 1).store(zero + off_b)
                    stages.tiles.index(3 * stage + 2).store(zero + query.off_h)
                    inline_asm("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
                mbarrier.expect(stages.q_full.index(stage), descs.q.block_type.nbytes + descs.stats.block_type.nbytes)
                load_async(descs.q, at, stages.q_full.index(stage), stages.q.index(stage))
                load_async(descs.stats, [query.number, 0], stages.q_full.index(stage), stages.stats.index(stage))
                mbarrier.expect(stages.do_full.index(stage), descs.do.block_type.nbytes)
                load_async(descs.do, at, stages.do_full.index(stage), stages.do.index(stage))
                step_count += 1
            if step == 0:
                if item_count > 0:
                    _store_dk_dv(descs, buffers, previous_b, previous_hk, previous_n, item_count - 1)
                mbarrier.expect(buffers.k_full, descs.k.block_type.nbytes)
                load_async(descs.k, [off_b, off_hk, start_n, 0], buffers.k_full, buffers.k)
                mbarrier.expect(buffers.v_full, descs.v.block_type.nbytes)
                load_async(descs.v, [off_b, off_hk, start_n, 0], buffers.v_full, buffers.v)
            if OPTIONS.BIASED and steps > 0:
                if query.partial > 0:
                    named_barrier_sync(BIAS_EMPTY, BARRIER_THREADS)  # mutate: acquire-bias
                    row = query.tile_m * OPTIONS.BLOCK_M * work.map.word_m
                    mbarrier.expect(bias.full, bias.desc.block_type.nbytes)
                    load_async(
                        bias.desc, [off_b * work.map.word_b, query.off_h * work.map.word_h, row, start_n], bias.full,
                        bias.buf,
                    )
        item = uniform(atomic_increment(counter_ptr))
        previous_b, previous_hk, previous_n = off_b, off_hk, start_n
        item_count += 1
    # the last one resets it
    gl.store(counter_ptr, 0, mask=item == items + gl.num_programs(0) - 1)  # mutate: reset
    _schedule(-1, scheduler, item_count)  # mutate: end
    if item_count > 0:
        _store_dk_dv(descs, buffers, previous_b, previous_hk, previous_n, item_count - 1)


# ---- the semaphore warp and the dQ warp, which do something in each step


@gluon.jit
def _each_step(body: gl.constexpr, arguments, scheduler, work, OPTIONS: gl.constexpr):
    """Run body(arguments, step_count, query, keys, work, OPTIONS) for each step of all items."""
    item_count = gl.to_tensor(0)
    step_count = gl.to_tensor(0)
    item = _next_item(scheduler, item_count, 1)
    while item >= 0:
        keys = _key_tile(item, work, OPTIONS)
        for step in range(work.GROUP * keys.count):
            body(arguments, step_count, _query_tile(step, keys, work, OPTIONS), keys, work, OPTIONS)
            step_count += 1
        item_count += 1
        item = _next_item(scheduler, item_count, 1)


@gluon.jit
def _semaphore_step(arguments, step_count, query, keys, work, OPTIONS: gl.constexpr):
    semaphores_ptr, semaphore = arguments
    mbarrier.wait(semaphore.done.index(step_count % 2), (step_count // 2 & 1) ^ 1)
    semaphore_wait(semaphores_ptr + query.number, _predecessors(query.tile_m, keys, work, OPTIONS))
    mbarrier.arrive(semaphore.ready.index(step_count % 2), count=1)


@gluon.jit
def _dq_step(arguments, step_count, query, keys, work, OPTIONS: gl.constexpr):
    dq_desc, ds_desc, semaphores_ptr, dq, semaphore = arguments
    predecessors = _predecessors(query.tile_m, keys, work, OPTIONS)
    stage = step_count % OPTIONS.DQ_STAGES
    mbarrier.wait(semaphore.ready.index(step_count % 2), step_count // 2 & 1)  # mutate: wait-ready
    named_barrier_sync(DQ_FULL + stage, BARRIER_THREADS)  # mutate: wait-dq-full
    if predecessors == 0:
        store_async(dq_desc, [query.number * 64, 0], dq.bufs.index(stage))
    else:
        add_async(dq_desc, [query.number * 64, 0], dq.bufs.index(stage))
    if OPTIONS.STORES_DS:
        at = [keys.head // work.Hk, query.off_h, keys.tile_n * BLOCK_N, query.tile_m * OPTIONS.BLOCK_M]
        store_async(ds_desc, at, dq.ds.index(step_count % dq.ds.shape[0]))  # mutate: store-ds
    tma.store_wait(0)
    mbarrier.arrive(dq.empty.index(stage), count=1)
    PENDING: gl.constexpr = 1 if OPTIONS.STORES_DS else 0  # dS is nobody's predecessor
    semaphore_release(semaphores_ptr + query.number, predecessors + 1, PENDING)  # mutate: release-semaphore
    mbarrier.arrive(semaphore.done.index(step_count % 2), count=1)


@gluon.jit
def _semaphore_warp(semaphores_ptr, semaphore, scheduler, work, OPTIONS: gl.constexpr):
    """Wait until the predecessors of a part of dQ are there, up to two steps ahead of the dQ warp."""
    _each_step(_semaphore_step, (semaphores_ptr, semaphore), scheduler, work, OPTIONS)


@gluon.jit
def _dq_warp(dq_desc, ds_desc, semaphores_ptr, dq, semaphore, scheduler, work, OPTIONS: gl.constexpr):
    """Store or add the part of dQ of each step."""
    _each_step(_dq_step, (dq_desc, ds_desc, semaphores_ptr, dq, semaphore), scheduler, work, OPTIONS)


# ---- the consumer warps


@gluon.jit
def _clamp_tile(buf, layout: gl.constexpr):
    """A tile of K or V without NaN, inf, and numbers whose products are inf: where a key is hidden, -inf + inf is NaN,
    as is 0 times them. Those that are left are large, so that a score of -inf stays one without weight. (A query that
    sees NaN has it in lse or delta already.) In bfloat16 numbers past 2^100 count as 2^100, seen or not."""
    buf.store(clamp(buf.load(layout)))  # mutate: clamp


@gluon.jit
def _mask_scores(s, after_n, at_left, at_right, LEFT: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr):
    """S^T, -inf where a query does not see a key."""
    n = gl.arange(0, s.shape[0], gl.SliceLayout(1, layout))
    exists = n < opaque(after_n)
    m = gl.expand_dims(gl.arange(0, s.shape[1], gl.SliceLayout(0, layout)), 0)
    if RIGHT:  # what there is to compute is computed for each row, and compared with a constant
        s = gl.where(gl.expand_dims(gl.where(exists, n + at_right, 1 << 30), 1) <= m, s, float("-inf"))
    if LEFT:
        s = gl.where(gl.expand_dims(gl.where(exists, n + at_left, -(1 << 30)), 1) >= m, s, float("-inf"))
    return s


@gluon.jit
def _add_bias(
    s, bias, scale, after_n, at_left, at_right, start_m, off_b, work, OPTIONS: gl.constexpr, layout: gl.constexpr
):
    """The logits of a partly visible tile of S^T."""
    x = bias.buf.reshape([OPTIONS.BLOCK_M, BLOCK_N]).permute((1, 0)).load(layout).to(gl.float32)
    if OPTIONS.KEYED:
        x = add_key_mask(x, off_b, work.N - after_n, work, 0, layout)  # mutate: keys
    s = gl.where(x == float("-inf"), x, gl.fma(s, scale, x))  # a hidden key may hold NaN
    edge = after_n < BLOCK_N
    if OPTIONS.RIGHT:
        edge = edge | (at_right + (BLOCK_N - 1) > start_m)
    if OPTIONS.LEFT:
        edge = edge | (at_left < start_m + (OPTIONS.BLOCK_M - 1))
    if edge:
        n = gl.arange(0, BLOCK_N, gl.SliceLayout(1, layout))
        s = gl.where(gl.expand_dims(n < opaque(after_n), 1), s, float("-inf"))
        s = _mask_scores(s, after_n, at_left - start_m, at_right - start_m, OPTIONS.LEFT, OPTIONS.RIGHT, layout)
    return s


@gluon.jit
def _pass_dq(x, dq, step_count, OPTIONS: gl.constexpr):
    """A part of dQ to the dQ warp, in the order of the registers: 16 contiguous bytes a thread at a time."""
    # (warpgroup, 8 columns, warp, row, 2 columns, upper or lower 8 rows, column): _postprocess_kernel undoes it
    if OPTIONS.BLOCK_D == 128:
        x = gl.permute(gl.reshape(x, [4, 2, 8, 2, 8, 4, 2]), [3, 4, 0, 2, 5, 1, 6])
    else:
        x = gl.permute(gl.reshape(x, [2, 4, 2, 8, 8, 4, 2]), [0, 4, 1, 3, 5, 2, 6])
    stage = step_count % OPTIONS.DQ_STAGES
    mbarrier.wait(dq.empty.index(stage), (step_count // OPTIONS.DQ_STAGES & 1) ^ 1)  # mutate: wait-dq-empty
    dq.bufs.index(stage).store(gl.reshape(x, [64, 128]))
    fence_async_shared()
    named_barrier_arrive(DQ_FULL + stage, BARRIER_THREADS)


@gluon.jit
def _consumer(buffers, stages, bias, dq_stages, scale_2, scheduler, work, OPTIONS: gl.constexpr):
    """scale_2 has log2(e) in it; not beside a floating mask, where logits and their maxima are those of base e."""
    BIASED: gl.constexpr = OPTIONS.BIASED
    LEFT: gl.constexpr = OPTIONS.LEFT
    RIGHT: gl.constexpr = OPTIONS.RIGHT
    LISTED: gl.constexpr = OPTIONS.LISTED
    BANDED: gl.constexpr = (LEFT or RIGHT) and not LISTED
    BLOCK_M: gl.constexpr = OPTIONS.BLOCK_M
    BLOCK_D: gl.constexpr = OPTIONS.BLOCK_D
    STAGES: gl.constexpr = OPTIONS.STAGES
    dtype: gl.constexpr = stages.q.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_M, 16])
    d_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[8, 1], instr_shape=[16, BLOCK_D, 16])
    dq_warps: gl.constexpr = [4, 2] if BLOCK_D == 128 else [8, 1]
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=dq_warps, instr_shape=[16, 64, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, d_layout, k_width=2)
    query_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    k = buffers.k.reshape([BLOCK_N, BLOCK_D])
    v = buffers.v.reshape([BLOCK_N, BLOCK_D])
    zeros = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, s_layout)
    dq_zeros = gl.zeros([BLOCK_M, BLOCK_D], gl.float32, dq_layout)
    for i in gl.static_range(STAGES):
        named_barrier_arrive(Q_EMPTY + i, BARRIER_THREADS)
    bias_count = gl.to_tensor(0)
    if BIASED:
        named_barrier_arrive(BIAS_EMPTY, BARRIER_THREADS)
    item_count = gl.to_tensor(0)
    step_count = gl.to_tensor(0)
    item = _next_item(scheduler, item_count, 8)
    while item >= 0:
        keys = _key_tile(item, work, OPTIONS)
        start_n = keys.tile_n * BLOCK_N
        stride_m = BLOCK_M
        first_m, end_m = uniform(keys.first_m * BLOCK_M), uniform((keys.first_m + keys.count) * BLOCK_M)
        if RIGHT and not LEFT:
            stride_m = uniform(gl.where(keys.ascending, -BLOCK_M, BLOCK_M))  # mutate: stride
            first_m, end_m = (
                gl.where(keys.ascending, end_m - BLOCK_M, first_m), gl.where(keys.ascending, first_m - BLOCK_M, end_m)
            )
        steps = uniform(work.GROUP * keys.count)
        after_n, at_left, at_right = (
            uniform(work.N - start_n), uniform(start_n - work.left), uniform(start_n - work.right)
        )
        start_m = first_m
        dk = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, d_layout)
        dv = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, d_layout)
        mbarrier.wait(buffers.k_full, item_count & 1)
        mbarrier.wait(buffers.v_full, item_count & 1)
        if BANDED or LISTED:
            row_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // BLOCK_D, BLOCK_D // 8], [8, 1], [1, 0])
            _clamp_tile(k, row_layout)
            _clamp_tile(v, row_layout)
            fence_async_shared()
        k_operand = k
        if BLOCK_D == 64 and not BANDED and not LISTED and K_REGISTERS:
            k_operand = k.load(gl.DotOperandLayout(0, s_layout, k_width=2))
        mbarrier.wait(stages.q_full.index(step_count % STAGES), step_count // STAGES & 1, pred=steps > 0)
        barrier()
        for step in range(steps):
            step_count = opaque(step_count)  # addresses are computed from it here, not carried in registers
            stage = step_count % STAGES
            q = stages.q.index(stage).reshape([BLOCK_M, BLOCK_D])
            do = stages.do.index(stage).reshape([BLOCK_M, BLOCK_D])
            stats = stages.stats.index(stage).reshape([(4 if BIASED else 2) * BLOCK_M])
            mbarrier.wait(stages.do_full.index(stage), step_count // STAGES & 1)  # mutate: wait-do
            delta = gl.expand_dims(stats.slice(BLOCK_M, BLOCK_M).load(query_layout), 0)
            delta, _ = gl.broadcast(delta, zeros)
            if BANDED:
                edge = after_n < BLOCK_N
                if RIGHT:
                    edge = edge | (at_right + (BLOCK_N - 1) > start_m)
                if LEFT:
                    edge = edge | (at_left < start_m + (BLOCK_M - 1))
                initial = zeros
                if edge:
                    initial = _mask_scores(zeros, after_n, at_left - start_m, at_right - start_m, LEFT, RIGHT, s_layout)
                start_m += stride_m
                start_m = gl.where(start_m == end_m, first_m, start_m)
                s_token = warpgroup_mma(k_operand, q.permute((1, 0)), initial, use_acc=edge, is_async=True)
            else:
                s_token = warpgroup_mma(k_operand, q.permute((1, 0)), zeros, use_acc=False, is_async=True)
            dp_token = warpgroup_mma(v, do.permute((1, 0)), delta, is_async=True)
            if LISTED:
                entry = _load_scalar(stages.tiles.index(3 * stage))
            if LISTED and not BIASED:
                off_b = _load_scalar(stages.tiles.index(3 * stage + 1))
                off_h = _load_scalar(stages.tiles.index(3 * stage + 2))
                words = tile_words(
                    words_of_head(off_b, off_h, work), start_n, entry // 2 * BLOCK_M, entry % 2 > 0, zeros, work,
                    LEFT, RIGHT, TRANSPOSED=True,
                )
            if not LISTED:
                lse = stats.slice(0, BLOCK_M).load(query_layout)
            s = warpgroup_mma_wait(1, [s_token])
            if BIASED:
                if entry % 2 > 0:
                    mbarrier.wait(bias.full, bias_count & 1)  # mutate: wait-bias
                    s = _add_bias(
                        s, bias, scale_2, after_n, at_left, at_right, entry // 2 * BLOCK_M, keys.head // work.Hk, work,
                        OPTIONS, s_layout,
                    )
                    named_barrier_arrive(BIAS_EMPTY, BARRIER_THREADS)  # mutate: release-dbias
                    bias_count += 1
                else:
                    s = s * scale_2
                s = s - gl.expand_dims(stats.slice(0, BLOCK_M).load(query_layout), 0)  # exact, if it is -1e9
                lse = stats.slice(2 * BLOCK_M, BLOCK_M).load(query_layout)
            elif LISTED:  # lse after the words, for want of registers
                if entry % 2 > 0:
                    s = gl.where(visible_bits(words, zeros, s_layout), s, float("-inf"))
                lse = stats.slice(0, BLOCK_M).load(query_layout)
            p = gl.exp2(s * (LOG2E if BIASED else scale_2) - gl.expand_dims(lse, 0))
            p_16 = gl.convert_layout(p.to(dtype), p_layout)
            # here: it keeps the wait for dP below the exponentials
            q_full = stages.q_full.index((step_count + 1) % STAGES)
            mbarrier.wait(q_full, (step_count + 1) // STAGES & 1, pred=step + 1 < steps)  # mutate: wait-q
            if OPTIONS.STORES_DS and dq_stages.ds.shape[0] == 1:  # of two, _pass_dq has waited for the last but one
                mbarrier.wait(dq_stages.empty.index(0), (step_count & 1) ^ 1)  # mutate: wait-ds
            dp = warpgroup_mma_wait(0, [dp_token])
            ds = (p * dp).to(dtype)
            ds_buf = dq_stages.ds.index(step_count % dq_stages.ds.shape[0]).reshape([BLOCK_N, BLOCK_M])
            if dq_stages.ds.shape[0] == 1:
                barrier()  # all have read the last dS
            ds_buf.store(ds)
            dv_token = warpgroup_mma(p_16, do, dv, is_async=True)
            fence_async_shared()
            dq_token = warpgroup_mma(ds_buf.permute((1, 0)), k, dq_zeros, use_acc=False, is_async=True)
            if not WAITS_SYNC:  # here, as all are anyway: Triton wants one before dS is stored again and Q waited for
                barrier()
            dk_token = warpgroup_mma(gl.convert_layout(ds, p_layout), q, dk, is_async=True)
            dq = warpgroup_mma_wait(1, [dq_token])
            _pass_dq(dq, dq_stages, step_count, OPTIONS)
            dk, dv = warpgroup_mma_wait(0, [dk_token, dv_token])
            named_barrier_arrive(Q_EMPTY + stage, BARRIER_THREADS)  # mutate: release-q
            step_count += 1

        barrier()  # all have read K
        v.store(dv.to(dtype))
        k.store((dk * (scale_2 if BIASED else scale_2 * LN2)).to(dtype))
        fence_async_shared()
        mbarrier.arrive(buffers.grads_full, count=1)
        item_count += 1
        item = _next_item(scheduler, item_count, 8)


@gluon.jit(do_not_specialize=[
    "scale_2", "column_tiles", "heads", "section", "Hk", "GROUP", "row_tiles", "N", "M", "left", "right",
    "list_b", "list_h", "list_row", "capacity", "word_b", "word_h", "word_m", "word_n",
])
def _backward_kernel(
    q_desc, k_desc, v_desc, do_desc, stats_desc, dq_desc, dk_desc, dv_desc, bias_desc, ds_desc, semaphores_ptr,
    counter_ptr, scale_2,
    column_tiles, heads, section, Hk, GROUP, row_tiles, N, M, left, right,
    lists_ptr, counts_ptr, list_b, list_h, list_row, capacity, words_ptr, word_b, word_h, word_m, word_n, orders_ptr,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LISTED: gl.constexpr, BIASED: gl.constexpr, KEYED: gl.constexpr,
    STORES_DS: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    DQ_STAGES: gl.constexpr, WORKER_REGISTERS: gl.constexpr,
):
    gl.static_assert(not BIASED or STAGES == 2)
    gl.static_assert(not STORES_DS or DQ_STAGES == 1)
    gl.static_assert(2 <= STAGES and STAGES <= DQ_FULL - Q_EMPTY and DQ_STAGES <= 16 - DQ_FULL)
    dtype: gl.constexpr = q_desc.dtype
    ds_layout: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)
    k_buf = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_buf = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    do_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_M, BLOCK_D], do_desc.layout)
    STATS: gl.constexpr = 4 if BIASED else 2
    stats_bufs = gl.allocate_shared_memory(gl.float32, [STAGES, 1, STATS * BLOCK_M], stats_desc.layout)
    tiles = gl.allocate_shared_memory(gl.int32, [3 * STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    DS_BUFFERS: gl.constexpr = 1 if BIASED and BLOCK_M == 128 else 2  # two do not fit beside a tile of the bias
    ds_bufs = gl.allocate_shared_memory(dtype, [DS_BUFFERS, 1, 1, BLOCK_N, BLOCK_M], ds_layout)
    dq_bufs = gl.allocate_shared_memory(gl.float32, [DQ_STAGES, 64, 128], dq_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    grads_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    bias_buf, bias_full = k_buf, k_full
    if BIASED:
        bias_buf = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_M, BLOCK_N], bias_desc.layout)
        bias_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(bias_full, count=1)  # only if it is used: else its memory is another buffer's
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    do_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    dq_empty = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], mbarrier.MBarrierLayout())
    semaphore_ready = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    semaphore_done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    items = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    items_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    items_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    mbarrier.init(v_full, count=1)
    mbarrier.init(grads_full, count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(do_full.index(i), count=1)
    for i in gl.static_range(DQ_STAGES):
        mbarrier.init(dq_empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(semaphore_ready.index(i), count=1)
        mbarrier.init(semaphore_done.index(i), count=1)
        mbarrier.init(items_full.index(i), count=1)
        mbarrier.init(items_empty.index(i), count=3)  # all partitions but the producer
    fence_async_shared()

    OPTIONS: gl.constexpr = Options(
        LEFT, RIGHT, LISTED, BIASED, KEYED, STORES_DS, BLOCK_M, BLOCK_D, STAGES, DQ_STAGES
    )
    mask_map = MaskMap(
        lists_ptr, counts_ptr, list_b, list_h, list_row, capacity, words_ptr, word_b, word_h, word_m, word_n
    )
    work = Work(column_tiles, heads, section, Hk, GROUP, row_tiles, N, M, left, right, mask_map, orders_ptr)
    descs = Descriptors(q_desc, k_desc, v_desc, do_desc, stats_desc, dk_desc, dv_desc)
    scheduler = Scheduler(items, items_full, items_empty)
    buffers = KeyBuffers(k_buf, v_buf, k_full, v_full, grads_full)
    stages = QueryStages(q_bufs, do_bufs, stats_bufs, tiles, q_full, do_full)
    dq = DqStages(dq_bufs, dq_empty, ds_bufs)
    bias = Bias(bias_desc, bias_buf, bias_full)
    semaphore = SemaphoreStages(semaphore_ready, semaphore_done)
    gl.warp_specialize([
        (_consumer, (buffers, stages, bias, dq, scale_2, scheduler, work, OPTIONS)),
        (_producer, (descs, counter_ptr, buffers, stages, bias, scheduler, work, OPTIONS)),
        (_semaphore_warp, (semaphores_ptr, semaphore, scheduler, work, OPTIONS)),
        (_dq_warp, (dq_desc, ds_desc, semaphores_ptr, dq, semaphore, scheduler, work, OPTIONS)),
    ], [1, 1, 1], [WORKER_REGISTERS, WORKER_REGISTERS, WORKER_REGISTERS])


def refuses(
    do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right, key_mask=None,
    dbias_shape=None,
):
    """Why the kernel does not serve fused_backward_op with these arguments, or None."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    min_tiles = MIN_WAVES * processors(q.device) * (0.25 if left is None and right is not None else 1)
    for what, given in (
        ("dropout", seed is not None), ("a softcap", softcap != 0.0),
        ("not 16 bits", q.element_size() != 2), ("a head dim above 128", not 0 < min(D, DV) <= max(D, DV) <= 128),
        ("a scale of 0", scale == 0.0),
        ("too little work to be worth the descriptors", 10 * B * H * M * N * D < max(MIN_WORK, 1)),
        ("too few tiles to share the work well", B * Hk * triton.cdiv(N, BLOCK_N.value) < min_tiles),
        ("more tiles of keys than 16 bits count", mask is not None and N > BLOCK_N.value << 15),
    ):
        if given:
            return what
    if D % 8 or DV % 8 or not all(addressable(t) for t in (q, k, v)):
        return "rows that do not begin at 16 bytes"
    return None if mask is None or mask.dtype == torch.bool else refuses_bias(mask.expand(B, H, M, N), key_mask, q, v)


def run(
    do, dlse, q, k, v, mask, sinks, seed, o, lse, stats, scale, softcap, dropout_p, left, right, key_mask=None,
    dbias_shape=None,
):
    """(dQ, dK, dV, record, dbias), see fused_backward_op; for what is not refused."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    dq, dk, dv, record = *(empty_heads(t, *t.shape) for t in (q, k, v)), lse.new_empty(*lse.shape, 4)
    lse, dlse = lse.contiguous(), None if dlse is None else dlse.contiguous()  # which vmap may have expanded
    biased = mask is not None and mask.dtype != torch.bool
    op = "fused backward hopper, biased" if biased else "fused backward hopper"
    tile = tile_for(op, q.dtype, max(D, DV), right is not None, q.device)
    if mask is None and left is None and right is None and (N % BLOCK_N.value or M % tile.BLOCK_M):
        right = N  # nothing more is hidden, but what is past the last key; and 0 * inf past the last query is no NaN
    own_q, factor = (-q, -scale) if scale < 0.0 else (q, scale)  # the kernel knows positive ones
    given, dbias = (do, q, k, v), (q if mask is None else mask).new_empty(dbias_shape or 0)
    do = do if addressable(do) else do.clone(memory_format=torch.contiguous_format)
    stats, semaphores = preprocess(do, dlse, o, lse, stats.contiguous() if biased else None, record, tile.BLOCK_M)
    dq_accum = lse.new_empty(64 * semaphores.numel(), 128)
    lists, words, word_steps, orders = [semaphores, semaphores, 0, 0, 0, 0], semaphores, (0, 0, 0, 0), semaphores
    totals, total_steps, bias = None, (0, 0), None
    if mask is not None:
        mask = mask.expand(B, H, M, N)
        if biased:
            units, (bias, steps) = units_of(mask, key_mask, always=True), bias_of(mask, tile.BLOCK_M)
            words, step = keys_of(key_mask, mask)
            word_steps = (*steps, step)
        else:
            units, words, word_steps = bits_of(mask, key_mask, transposed=True)
        group = H // Hk
        lists, _ = map_of(mask, units, tile, M, N, left, right, transposed=True, ordered=True, group=group)
        orders, totals, total_steps = orders_of(units, tile, M, N, left, right, group)
    stores_ds = biased and dbias_shape is not None and tuple(dbias_shape[2:]) == (M, N)
    row = triton.cdiv(M, 16) * 16  # so that sum_scores() loads 16 bytes a thread
    stores_ds = stores_ds and B * H * N * row * q.element_size() <= MOST_DS
    ds = q.new_empty(B, H, N, row) if stores_ds else None
    column_tiles, section = triton.cdiv(N, BLOCK_N.value), L2 // (H // Hk * M * 8 * tile.BLOCK_D)
    registers = (1 << 16) // (128 * 3) // 8 * 8  # of a thread, before warp specialisation
    launch(
        _backward_kernel, min(B * Hk * column_tiles, processors(q.device)),
        tile_descriptor(own_q, tile.BLOCK_M, tile.BLOCK_D), tile_descriptor(k, BLOCK_N.value, tile.BLOCK_D),
        tile_descriptor(v, BLOCK_N.value, tile.BLOCK_D), tile_descriptor(do, tile.BLOCK_M, tile.BLOCK_D),
        row_descriptor(stats, 1), row_descriptor(dq_accum, 64),
        tile_descriptor(dk, BLOCK_N.value, tile.BLOCK_D), tile_descriptor(dv, BLOCK_N.value, tile.BLOCK_D),
        tile_descriptor(bias if biased else k, tile.BLOCK_M, BLOCK_N.value if biased else tile.BLOCK_D),
        tile_descriptor(ds, BLOCK_N.value, tile.BLOCK_M) if stores_ds else None,
        semaphores, counter(q.device), factor * (1.0 if biased else LOG2E.value),
        column_tiles, B * Hk, max(1, min(B * Hk, section)), Hk, H // Hk, triton.cdiv(M, tile.BLOCK_M), N, M,
        left or 0, right or 0, *lists, words, *word_steps, orders,
        device=q.device, LEFT=left is not None, RIGHT=right is not None, LISTED=mask is not None, BIASED=biased,
        KEYED=biased and key_mask is not None, STORES_DS=stores_ds, BLOCK_M=tile.BLOCK_M, BLOCK_D=tile.BLOCK_D,
        STAGES=tile.num_stages, DQ_STAGES=tile.SPAN,
        WORKER_REGISTERS=registers * 3 - 2 * tile.registers, num_warps=tile.num_warps, maxnreg=registers,
    )
    postprocess(dq_accum, dq, N, scale, left, right, tile.BLOCK_M, totals, total_steps, H // Hk)
    if stores_ds:
        sum_scores(dbias, ds, units, left, right)
    elif dbias_shape is not None:
        bias_gradient(dbias, *given, mask, key_mask, None, record, scale, softcap, dropout_p, left, right)
    return dq, dk, dv, record, dbias
