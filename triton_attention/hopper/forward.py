"""The fused forward pass on Hopper: a producer warp, two or three consumer warpgroups, softmax under products.

The plain kernel (triton_attention_fused.py) computes scores, then their softmax, then P V: tensor cores wait for the
exponentials, and those for tensor cores. Here the scores of the next keys are in flight before P V of these:

    producer warp         K4   K3 V4   K2 V3   K1 V2   ...       by TMA, into the stages of a pipeline
    consumer warpgroup 0  S4   S3   P4 V4   S2   P3 V3   S1 ...     tensor cores, asynchronous
                             softmax 4 |  softmax 3 |  softmax 2    the other units, overlapped
    consumer warpgroup 1  the same for the next 64 queries, K and V shared

Persistent: a program per multiprocessor takes one work item after the other, a tile of queries each; the next Q and
first K are prefetched during the epilogue. Causal tiles differ in length: the longest come first, and the producer is
the tile scheduler, which draws the next item from a counter in memory, four tiles of keys before it is needed.

Invariants
    keys are visited from the last to the first: the diagonal is at the end, and only there a tile pays for a mask;
    each warpgroup has bounds of its own, and releases stages unread that none of its queries sees;
    a stage is released at a named barrier, where a warp arrives without waiting for its warpgroup;
    maxima start with the least finite number, so that no tile needs a test for rows that have seen no key yet;
    O is rescaled only where the exponentials of a row have outgrown its maximum by a factor of 256;
    the counter is left at zero for the next launch, and NaN in hidden values is repaired within (nan_repair.py).

What was measured, and what gained nothing: NOTES.md. Shah et al., "FlashAttention-3", 2024, for warp specialisation and
the order of the two products; FlashAttention-4 for rescaling rarely. Gluon (triton.experimental.gluon) is Triton's
lower-level language: layouts, barriers and copies are explicit.
"""

import functools
from typing import NamedTuple

import torch

from triton_attention.device import TRITON, counter, processors
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.mask import (
    ROWS, MaskMap, add_key_mask, halves_first_tile, key_tiles, mask_scores, masks_inner_tiles, tile_words,
    visible_bits, words_of_head,
)
from triton_attention.hopper.nan_repair import RepairBuffers, append_tile, finish_log, init_log, repair
from triton_attention.hopper.ptx import (
    atomic_increment, ctaid, inline_asm, mark_nan, named_barrier_arrive, named_barrier_sync, opaque, rescale,
    store_wait_complete, uniform,
)
from triton_attention.hopper.softmax import (
    LOWEST, broadcast_rows, exponentials, join_columns, partial_sums, running_max, split_columns,
)
from triton_attention.hopper.tma import addressable, load_async, store_async, tile_descriptor
from triton_attention.launch import empty_heads, launch
from triton_attention.logits import LN2, LOG2E
from triton_attention.mask_map import bits_of, map_of, once, units_of
from triton_attention.tile_choice import tile_for

K_EMPTY, V_EMPTY = gl.constexpr(8), gl.constexpr(12)  # the first of four named barriers; those below are Triton's
MIN_WORK = 1 << 31  # floating-point operations from which the kernel is worth its descriptors
MIN_WAVES = 0.48  # tiles of 128 queries a multiprocessor; with fewer, the plain kernel splits the keys
MAX_HEAD_DIM = 256 if TRITON < (3, 9) else 128  # wider ones with a mask spill with the ptxas of Triton 3.9
MAX_TWO = 128 if TRITON < (3, 9) else 64  # the same beside two floating masks
LONG = 2048  # queries and keys from which D up to 64 takes tiles of three warpgroups; twice as many, if causal
LONG_WAVES = 2  # of those tiles a multiprocessor; with fewer, the longest of them leave most of the GPU idle at the end


class Options(NamedTuple):
    """What a build is compiled for. INNER_MASK, HALF_FIRST: see masks_inner_tiles() and halves_first_tile()."""

    LEFT: bool
    RIGHT: bool
    LISTED: bool  # whether there is a mask, whose tiles of keys are listed
    BIASED: bool  # whether it is a floating one
    KEYED: bool  # beside a second one of keys
    INNER_MASK: bool
    HALF_FIRST: bool
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    STAGES: int  # of K and V
    Q_STAGES: int  # of Q; 1: O is stored from the buffers of Q
    WARPGROUPS: int  # of consumers


class Work(NamedTuple):
    """The work items, a tile of queries each, and what there is to attend to."""

    items: gl.tensor
    row_tiles: gl.tensor  # of a head
    heads: gl.tensor  # of all batches
    section: gl.tensor  # heads that are worked on together
    H: gl.tensor
    GROUP: gl.tensor
    M: gl.tensor
    N: gl.tensor
    left: gl.tensor
    right: gl.tensor
    map: MaskMap


class QueryTile(NamedTuple):
    off_b: gl.tensor
    off_h: gl.tensor
    start_m: gl.tensor  # -1 after the last
    partials: gl.tensor  # of the tiles of keys that are listed, those that are partly visible, and come first
    listed: gl.tensor  # one at least
    first_n: gl.tensor  # the first of them


class Stages(NamedTuple):
    """Buffers that TMA fills, and an mbarrier for each."""

    bufs: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor


class Pipeline(NamedTuple):
    """From the producer to the consumers. Number i of a tensor is in stage i % STAGES, in phase i // STAGES of its
    barriers; of Q, a stage has a buffer for each warpgroup, and the coordinates of its tile."""

    q: Stages
    q_empty: gl.shared_memory_descriptor
    coordinates: gl.shared_memory_descriptor
    k: Stages
    v: Stages
    start_n: gl.shared_memory_descriptor  # of each stage of K, where tiles are listed


class Bias(NamedTuple):
    """A floating mask: tiles of it arrive with those of K, in each of its stages one for each warpgroup."""

    desc: tma.tensor_descriptor
    bufs: gl.shared_memory_descriptor


class Output(NamedTuple):
    desc: tma.tensor_descriptor
    bufs: gl.shared_memory_descriptor
    lse_ptr: gl.tensor
    stats_ptr: gl.tensor  # beside a floating mask: the maximum of each row, and its sum
    log_ptr: gl.tensor  # see nan_repair.py


# ---- which tile of queries


@gluon.jit
def _query_tile(item, work, OPTIONS: gl.constexpr):
    """The tile of a work item. With a mask the last, often the longest, come first, over a section of heads at a time.
    """
    partials, listed, first_n = gl.to_tensor(0), gl.to_tensor(1), gl.to_tensor(0)
    if OPTIONS.LEFT or OPTIONS.RIGHT or OPTIONS.LISTED:
        first_head = item // (work.row_tiles * work.section) * work.section
        item_in_section = item - first_head * work.row_tiles
        heads = gl.maximum(gl.minimum(work.section, work.heads - first_head), 1)  # 1: past the end of the list
        head, tile = first_head + item_in_section % heads, work.row_tiles - 1 - item_in_section // heads
    else:
        head, tile = item // work.row_tiles, item % work.row_tiles
    off_b, off_h = head // work.H, head % work.H
    if OPTIONS.LISTED:
        number = _list_number(off_b, off_h, tile, work)
        counts_ptr = work.map.counts_ptr + 2 * number
        list_ptr = work.map.lists_ptr + number.to(gl.int64) * work.map.capacity
        exists = item < work.items  # all at once: these loads take their time
        plains, partials = gl.load(counts_ptr, mask=exists, other=0), gl.load(counts_ptr + 1, mask=exists, other=0)
        front = gl.load(list_ptr, mask=exists, other=0)
        back = gl.load(list_ptr + (work.map.capacity - 1), mask=exists, other=0)
        listed, first_n = plains + partials, gl.where(partials > 0, back, front)
    return QueryTile(off_b, off_h, tile * OPTIONS.BLOCK_M, partials, listed, first_n)


@gluon.jit
def _list_number(off_b, off_h, tile, work):
    return off_b * work.map.list_b + off_h * work.map.list_h + tile * work.map.list_row


@gluon.jit
def _listed_tile(list_ptr, step, tile, work):
    """Which tile of keys is visited in a step: partly visible ones, from the back of the list, then those from the
    front."""
    place = gl.where(step < tile.partials, work.map.capacity - 1 - step, step - tile.partials)
    return gl.load(list_ptr + place, mask=step < tile.listed, other=0)


# ---- the pipeline of K and V: a stage is full at an mbarrier, and empty at a named barrier of the hardware, where the
# warpgroups arrive without waiting for each other


@gluon.jit
def _stage(count, STAGES: gl.constexpr):
    """count % STAGES, without the instructions for negative ones."""
    return (gl.to_tensor(count).to(gl.uint32) % STAGES).to(gl.int32)


@gluon.jit
def _producer_load(desc, off_b, off_h, start_n, stages, count, EMPTY: gl.constexpr, OPTIONS: gl.constexpr):
    stage = _stage(count, OPTIONS.STAGES)
    named_barrier_sync(EMPTY + stage, 128 * OPTIONS.WARPGROUPS + 32)  # mutate: acquire
    mbarrier.expect(stages.full.index(stage), desc.block_type.nbytes)
    load_async(desc, [off_b, off_h, start_n, 0], stages.full.index(stage), stages.bufs.index(stage))


@gluon.jit
def _producer_load_listed(desc, bias, tile, step, start_n, pipe, count, work, OPTIONS: gl.constexpr):
    """A listed tile of K; with it the consumers get start_n, and a floating mask's tiles if it is partly visible."""
    stage = _stage(count, OPTIONS.STAGES)
    full = pipe.k.full.index(stage)
    named_barrier_sync(K_EMPTY + stage, 128 * OPTIONS.WARPGROUPS + 32)  # mutate: acquire-listed
    pipe.start_n.index(stage).store(gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0])) + start_n)
    inline_asm("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
    if OPTIONS.BIASED:
        if step < tile.partials:
            mbarrier.expect(full, desc.block_type.nbytes + OPTIONS.WARPGROUPS * bias.desc.block_type.nbytes)
            off_b, off_h = tile.off_b * work.map.word_b, tile.off_h * work.map.word_h
            for w in gl.static_range(OPTIONS.WARPGROUPS):
                at = [off_b, off_h, (tile.start_m + ROWS * w) * work.map.word_m, start_n]
                load_async(bias.desc, at, full, bias.bufs.index(stage * OPTIONS.WARPGROUPS + w))
        else:
            mbarrier.expect(full, desc.block_type.nbytes)
    else:
        mbarrier.expect(full, desc.block_type.nbytes)
    load_async(desc, [tile.off_b, tile.off_h // work.GROUP, start_n, 0], full, pipe.k.bufs.index(stage))


@gluon.jit
def _consumer_wait(stages, count, OPTIONS: gl.constexpr, pred=True):
    phase = (count.to(gl.uint32) // OPTIONS.STAGES & 1).to(gl.int32)
    mbarrier.wait(stages.full.index(_stage(count, OPTIONS.STAGES)), phase, pred=pred)


@gluon.jit
def _consumer_tile(stages, count, OPTIONS: gl.constexpr):
    return stages.bufs.index(_stage(count, OPTIONS.STAGES)).reshape([OPTIONS.BLOCK_N, OPTIONS.BLOCK_D])


@gluon.jit
def _consumer_release(count, EMPTY: gl.constexpr, OPTIONS: gl.constexpr, NOW: gl.constexpr = True):
    if NOW:
        named_barrier_arrive(EMPTY + _stage(count, OPTIONS.STAGES), 128 * OPTIONS.WARPGROUPS + 32)


@gluon.jit
def _consumer_skip(tiles, pipe, count, OPTIONS: gl.constexpr):
    """Release K and V of some tiles unread."""
    for _ in range(tiles):
        _consumer_wait(pipe.k, count, OPTIONS)
        _consumer_release(count, K_EMPTY, OPTIONS)
        _consumer_wait(pipe.v, count, OPTIONS)
        _consumer_release(count, V_EMPTY, OPTIONS)
        count += 1
    return count


# ---- the producer warp


@gluon.jit
def _producer_schedule(q_desc, tile, more, pipe, tile_count, OPTIONS: gl.constexpr):
    """Pass the next tile of queries to the consumers, or that there is none if not `more`, once they have released its
    stage; and load its Q."""
    stage = tile_count % OPTIONS.Q_STAGES
    for w in gl.static_range(OPTIONS.WARPGROUPS):
        i = stage * OPTIONS.WARPGROUPS + w
        mbarrier.wait(pipe.q_empty.index(i), (tile_count // OPTIONS.Q_STAGES & 1) ^ 1)  # mutate: wait-q-empty
    zero = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    pipe.coordinates.index(stage * 5).store(zero + tile.off_b)
    pipe.coordinates.index(stage * 5 + 1).store(zero + tile.off_h)
    pipe.coordinates.index(stage * 5 + 2).store(zero + gl.where(more, tile.start_m, -1))
    if OPTIONS.LISTED:
        pipe.coordinates.index(stage * 5 + 3).store(zero + tile.partials)
        pipe.coordinates.index(stage * 5 + 4).store(zero + tile.listed)
    inline_asm("bar.warp.sync 0xffffffff; mov.u32 $0, 0;", 0)
    for w in gl.static_range(OPTIONS.WARPGROUPS):
        i = stage * OPTIONS.WARPGROUPS + w
        if more:
            mbarrier.expect(pipe.q.full.index(i), q_desc.block_type.nbytes)
            at = [tile.off_b, tile.off_h, tile.start_m + ROWS * w, 0]
            load_async(q_desc, at, pipe.q.full.index(i), pipe.q.bufs.index(i))
        else:
            mbarrier.arrive(pipe.q.full.index(i), count=1)  # mutate: end


@gluon.jit
def _producer(q_desc, k_desc, v_desc, bias, counter_ptr, log_ptr, pipe, work, OPTIONS: gl.constexpr):
    LISTED: gl.constexpr = OPTIONS.LISTED
    BANDED: gl.constexpr = OPTIONS.LEFT or OPTIONS.RIGHT or LISTED
    BLOCK_N: gl.constexpr = OPTIONS.BLOCK_N
    PREFETCH_Q: gl.constexpr = OPTIONS.Q_STAGES == 2 and not BANDED  # before the last V: no counter to wait for
    kv_count = gl.to_tensor(0)
    tile_count = gl.to_tensor(0)
    item = gl.program_id(0)
    previous = gl.to_tensor(-1)
    if BANDED:
        init_log(log_ptr, work.items + item)
    tile = _query_tile(item, work, OPTIONS)
    _producer_schedule(q_desc, tile, item < work.items, pipe, tile_count, OPTIONS)
    while item < work.items:
        next_item = item + gl.num_programs(0)
        if BANDED:
            drawn = gl.to_tensor(0)
            # before the first K, behind which the consumers may mark NaN
            number = (tile.off_b * work.H + tile.off_h) * work.row_tiles + tile.start_m // OPTIONS.BLOCK_M
            previous = append_tile(log_ptr, number, previous, OPTIONS.WARPGROUPS)
        first, last = key_tiles(tile.start_m, OPTIONS.BLOCK_M, work, OPTIONS)
        off_b, off_hk = tile.off_b, tile.off_h // work.GROUP
        steps = last - first + 1
        list_ptr, listed_n = work.map.lists_ptr, gl.to_tensor(0)
        if LISTED:
            steps = tile.listed
            number = _list_number(tile.off_b, tile.off_h, tile.start_m // OPTIONS.BLOCK_M, work)  # mutate: list
            list_ptr += number.to(gl.int64) * work.map.capacity
            listed_n = tile.first_n
        start_n = last * BLOCK_N
        for step in range(steps):
            previous_n = start_n
            start_n = (last - step) * BLOCK_N
            if LISTED:  # loaded a step ahead
                start_n = listed_n * BLOCK_N
                listed_n = _listed_tile(list_ptr, gl.to_tensor(step + 1), tile, work)
            if BANDED:  # dynamic: the first program to get here draws the next item; the answer takes its time
                if step == gl.maximum(steps - 4, 0):
                    drawn = atomic_increment(counter_ptr)
            if LISTED:
                _producer_load_listed(k_desc, bias, tile, step, start_n, pipe, kv_count, work, OPTIONS)
            else:
                _producer_load(k_desc, off_b, off_hk, start_n, pipe.k, kv_count, K_EMPTY, OPTIONS)
            if step > 0:
                if not LISTED:
                    previous_n = start_n + BLOCK_N
                _producer_load(v_desc, off_b, off_hk, previous_n, pipe.v, kv_count - 1, V_EMPTY, OPTIONS)
            kv_count += 1
        if not LISTED:
            start_n = first * BLOCK_N
        if not PREFETCH_Q:
            _producer_load(v_desc, off_b, off_hk, start_n, pipe.v, kv_count - 1, V_EMPTY, OPTIONS)
        if BANDED:
            drawn = uniform(drawn)  # mutate: uniform
            # the last one resets it
            gl.store(counter_ptr, 0, mask=drawn == work.items - 1)  # mutate: reset
            next_item = gl.num_programs(0) + drawn
        next_tile = _query_tile(next_item, work, OPTIONS)
        tile_count += 1
        _producer_schedule(q_desc, next_tile, next_item < work.items, pipe, tile_count, OPTIONS)
        if PREFETCH_Q:
            _producer_load(v_desc, off_b, off_hk, start_n, pipe.v, kv_count - 1, V_EMPTY, OPTIONS)
        item, tile = next_item, next_tile
    if BANDED:
        finish_log(log_ptr, work.items + gl.program_id(0), previous)


# ---- the consumer warpgroups


@gluon.jit
def _next_tile(pipe, tile_count, OPTIONS: gl.constexpr, WARPGROUP: gl.constexpr):
    """The next tile of queries, when its Q has landed."""
    stage = tile_count % OPTIONS.Q_STAGES
    i = stage * OPTIONS.WARPGROUPS + WARPGROUP
    mbarrier.wait(pipe.q.full.index(i), tile_count // OPTIONS.Q_STAGES & 1)  # mutate: wait-q-full
    partials, listed = gl.to_tensor(0), gl.to_tensor(1)
    if OPTIONS.LISTED:
        partials = _load_scalar(pipe.coordinates.index(stage * 5 + 3))
        listed = _load_scalar(pipe.coordinates.index(stage * 5 + 4))
    return QueryTile(
        _load_scalar(pipe.coordinates.index(stage * 5)), _load_scalar(pipe.coordinates.index(stage * 5 + 1)),
        _load_scalar(pipe.coordinates.index(stage * 5 + 2)), partials, listed, gl.to_tensor(0),
    )


@gluon.jit
def _load_scalar(buf):
    return uniform(gl.max(buf.load(gl.BlockedLayout([1], [32], [4], [0])), 0))


@gluon.jit
def _add_bias(s, bias_buf, scale, off_b, start_m, start_n, work, OPTIONS: gl.constexpr, layout: gl.constexpr):
    """The logits of a partly visible tile of scores."""
    x = bias_buf.reshape([ROWS, OPTIONS.BLOCK_N]).load(layout).to(gl.float32)
    if OPTIONS.KEYED:
        x = add_key_mask(x, off_b, start_n, work, 1, layout)  # mutate: keys
    s = gl.where(x == float("-inf"), x, gl.fma(s, scale, x))  # a hidden key may hold NaN
    edge = start_n + OPTIONS.BLOCK_N > work.N
    if OPTIONS.RIGHT:
        edge = edge | (start_n + (OPTIONS.BLOCK_N - 1) > start_m + work.right)
    if OPTIONS.LEFT:
        edge = edge | (start_n < start_m + (ROWS - 1) + work.left)
    if edge:
        s = mask_scores(s, start_m, start_n, work, OPTIONS.LEFT, OPTIONS.RIGHT, layout)
    return s


@gluon.jit
def _first_key_tile(
    q, k, scale, off_b, start_m, start_n, masked, words, bias_buf, kv_count, work, OPTIONS: gl.constexpr,
    s_layout: gl.constexpr,
):
    """(weights of the first tile of keys, 0 in its second half if k is no more than the first, maxima)."""
    KEYS: gl.constexpr = k.shape[0]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, KEYS, 16])
    zeros = gl.zeros([ROWS, KEYS], gl.float32, layout)
    s = warpgroup_mma_wait(0, [warpgroup_mma(q, k.permute((1, 0)), zeros, use_acc=False, is_async=True)])
    m_i = gl.full([ROWS], LOWEST, gl.float32, gl.SliceLayout(1, layout))  # mutate: lowest
    if OPTIONS.BIASED:
        if masked:
            s = _add_bias(s, bias_buf, scale, off_b, start_m, start_n, work, OPTIONS, layout)
        else:
            s = s * scale
        _consumer_release(kv_count, K_EMPTY, OPTIONS)
        _, m_i = running_max(s, m_i, 1.0, OPTIONS.WARPGROUPS, layout, LOG2E)
        p = exponentials(s - broadcast_rows(m_i, s), m_i * 0.0, LOG2E)
    else:
        _consumer_release(kv_count, K_EMPTY, OPTIONS)
        if masked:
            if OPTIONS.LISTED:
                s = gl.where(visible_bits(words, zeros, layout), s, float("-inf"))
            else:
                s = mask_scores(s, start_m, start_n, work, OPTIONS.LEFT, OPTIONS.RIGHT, layout)
        _, m_i = running_max(s, m_i, scale, OPTIONS.WARPGROUPS, layout)
        p = exponentials(s, m_i, scale)
    if KEYS < OPTIONS.BLOCK_N:
        p = gl.convert_layout(join_columns(p, gl.zeros_like(p)), s_layout)
    return p, gl.convert_layout(m_i, gl.SliceLayout(1, s_layout))


@gluon.jit
def _consumer(output, bias, scale, pipe, work, OPTIONS: gl.constexpr, WARPGROUP: gl.constexpr):
    """One warpgroup: 64 queries of every tile.

    Without a floating mask, scale has log2(e) in it, and maxima are of base 2. With one, logits and maxima are those of
    base e: a row of -1e9 has the difference to its maximum exactly, as the backward pass will have it.
    """
    BIASED: gl.constexpr = OPTIONS.BIASED
    BASE: gl.constexpr = LOG2E if BIASED else 1.0
    LEFT: gl.constexpr = OPTIONS.LEFT
    RIGHT: gl.constexpr = OPTIONS.RIGHT
    LISTED: gl.constexpr = OPTIONS.LISTED
    BANDED: gl.constexpr = LEFT or RIGHT or LISTED
    BLOCK_N: gl.constexpr = OPTIONS.BLOCK_N
    BLOCK_D: gl.constexpr = OPTIONS.BLOCK_D
    # the next tile is read before the last V is released, and a tile of keys that is not seen here: stages suffice
    PREFETCH_TILE: gl.constexpr = BANDED and OPTIONS.Q_STAGES == 2  # mutate: prefetch
    gl.static_assert(not PREFETCH_TILE or OPTIONS.STAGES >= 2 and BLOCK_N >= OPTIONS.BLOCK_M - ROWS)
    dtype: gl.constexpr = pipe.q.bufs.dtype
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, k_width=2)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, s_layout)
    o_buf = output.bufs.index(WARPGROUP)
    for i in gl.static_range(OPTIONS.STAGES):
        _consumer_release(i, K_EMPTY, OPTIONS)
        _consumer_release(i, V_EMPTY, OPTIONS)  # mutate: init-v
    kv_count = gl.to_tensor(0)
    tile_count = gl.to_tensor(0)
    tile = _next_tile(pipe, tile_count, OPTIONS, WARPGROUP)
    while tile.start_m >= 0:
        q_stage = tile_count % OPTIONS.Q_STAGES * OPTIONS.WARPGROUPS + WARPGROUP
        q = pipe.q.bufs.index(q_stage).reshape([ROWS, BLOCK_D])
        start_m = tile.start_m + ROWS * WARPGROUP
        first, last = key_tiles(tile.start_m, OPTIONS.BLOCK_M, work, OPTIONS)
        own_first, own_last = first, last
        words_ptr = work.map.words_ptr
        if LISTED:  # all warpgroups visit what is listed
            first, last = gl.to_tensor(0), tile.listed - 1
            own_first, own_last = first, last
            if not BIASED:
                words_ptr = words_of_head(tile.off_b, tile.off_h, work)
        elif BANDED:
            own_first, own_last = key_tiles(start_m, ROWS, work, OPTIONS)
            own_first, own_last = gl.maximum(own_first, first), gl.maximum(own_last, first)
            kv_count = _consumer_skip(last - own_last, pipe, kv_count, OPTIONS)  # mutate: skip

        _consumer_wait(pipe.k, kv_count, OPTIONS)
        k = _consumer_tile(pipe.k, kv_count, OPTIONS)
        if OPTIONS.HALF_FIRST and WARPGROUP == 0:  # mutate: half
            k = k.slice(0, ROWS, dim=0)
        masked = BANDED or (own_last + 1) * BLOCK_N > work.N
        start_n = own_last * BLOCK_N
        words = gl.to_tensor(0)
        bias_buf = bias.bufs.index(0)
        if LISTED:
            masked = tile.partials > 0
            start_n = _load_scalar(pipe.start_n.index(_stage(kv_count, OPTIONS.STAGES)))
            if BIASED:
                bias_buf = bias.bufs.index(_stage(kv_count, OPTIONS.STAGES) * OPTIONS.WARPGROUPS + WARPGROUP)
            else:
                words = tile_words(words_ptr, start_m, start_n, masked, zeros, work, LEFT, RIGHT)
        p, m_i = _first_key_tile(
            q, k, scale, tile.off_b, start_m, start_n, masked, words, bias_buf, kv_count, work, OPTIONS, s_layout
        )
        l_i = partial_sums(p)
        p_16 = gl.convert_layout(p.to(dtype), p_layout)
        acc = gl.zeros([ROWS, BLOCK_D], gl.float32, o_layout)
        kv_count += 1
        _consumer_wait(pipe.k, kv_count, OPTIONS, own_first < own_last)

        for step in range(1, own_last - own_first + 1):
            k_t = _consumer_tile(pipe.k, kv_count, OPTIONS).permute((1, 0))
            s_token = warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)
            start_n = (own_last - step) * BLOCK_N
            if LISTED:
                start_n = _load_scalar(pipe.start_n.index(_stage(kv_count, OPTIONS.STAGES)))
                if OPTIONS.WARPGROUPS == 2 and not BIASED:
                    words = tile_words(words_ptr, start_m, start_n, step < tile.partials, zeros, work, LEFT, RIGHT)
            _consumer_wait(pipe.v, kv_count - 1, OPTIONS)  # mutate: wait-v
            o_token = warpgroup_mma(p_16, _consumer_tile(pipe.v, kv_count - 1, OPTIONS), acc, is_async=True)
            s = warpgroup_mma_wait(1, [s_token])
            _consumer_release(kv_count, K_EMPTY, OPTIONS, NOW=not BIASED)  # mutate: release-k
            partial, factor = step < tile.partials, scale  # mutate: partials
            if BIASED:
                if partial:
                    bias_buf = bias.bufs.index(_stage(kv_count, OPTIONS.STAGES) * OPTIONS.WARPGROUPS + WARPGROUP)
                    s = _add_bias(s, bias_buf, scale, tile.off_b, start_m, start_n, work, OPTIONS, s_layout)
                _consumer_release(kv_count, K_EMPTY, OPTIONS)  # mutate: release-bias
                factor = gl.where(partial, 1.0, scale)
            elif LISTED:
                if partial:
                    if OPTIONS.WARPGROUPS == 3:  # here, for want of registers
                        words = tile_words(words_ptr, start_m, start_n, True, zeros, work, LEFT, RIGHT)
                    s = gl.where(visible_bits(words, zeros, s_layout), s, float("-inf"))
            elif OPTIONS.INNER_MASK or BLOCK_D > 64:
                # without a mask never true, but ptxas cannot know
                edge = gl.to_tensor(False) if OPTIONS.INNER_MASK else start_n + BLOCK_N > work.N
                if OPTIONS.INNER_MASK and RIGHT:
                    edge = edge | (start_n + (BLOCK_N - 1) > start_m + work.right)
                if OPTIONS.INNER_MASK and LEFT:
                    edge = edge | (start_n < start_m + (ROWS - 1) + work.left)
                if edge:
                    s = mask_scores(
                        s, start_m, start_n, work, OPTIONS.INNER_MASK and LEFT, OPTIONS.INNER_MASK and RIGHT, s_layout
                    )
            alpha, m_i = running_max(s, m_i, factor, OPTIONS.WARPGROUPS, s_layout, BASE)
            top = m_i
            if BIASED:
                if partial:
                    s = s - broadcast_rows(m_i, s)
                # finite, also where all scores so far are -inf
                factor, top = factor * LOG2E, gl.maximum(m_i, 0.69 * LOWEST) * gl.where(partial, 0.0, LOG2E)
            if OPTIONS.WARPGROUPS == 2:
                s_0, s_1 = split_columns(s)
                p_0 = exponentials(s_0, top, factor)
            else:
                p = exponentials(s, top, factor)
                l_i = l_i * broadcast_rows(alpha, l_i) + partial_sums(p)
            kv_count += 1
            # here: it keeps the wait for P V below the softmax
            _consumer_wait(pipe.k, kv_count, OPTIONS, step < own_last - own_first)  # mutate: wait-k
            acc = warpgroup_mma_wait(0, [o_token])
            _consumer_release(kv_count - 2, V_EMPTY, OPTIONS)  # mutate: release-v
            acc = rescale(acc, broadcast_rows(alpha, acc))
            if OPTIONS.WARPGROUPS == 2:
                p = gl.convert_layout(join_columns(p_0, exponentials(s_1, top, factor)), s_layout)  # mutate: join
                l_i = l_i * broadcast_rows(alpha, l_i) + partial_sums(p)
            p_16 = gl.convert_layout(p.to(dtype), p_layout)
        if OPTIONS.Q_STAGES == 2:
            mbarrier.arrive(pipe.q_empty.index(q_stage), count=1)

        _consumer_wait(pipe.v, kv_count - 1, OPTIONS)
        o_token = warpgroup_mma(p_16, _consumer_tile(pipe.v, kv_count - 1, OPTIONS), acc, is_async=True)
        offs_m = start_m + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, s_layout))
        lse = (m_i if BIASED else m_i * LN2) + gl.log(l_i)
        head = tile.off_b * work.H + tile.off_h
        gl.store(output.lse_ptr + head.to(gl.int64) * opaque(work.M) + offs_m, lse, mask=offs_m < work.M)
        if BIASED:
            stats_ptr = output.stats_ptr + 2 * (head.to(gl.int64) * opaque(work.M) + offs_m)
            gl.store(stats_ptr, m_i, mask=offs_m < work.M)
            gl.store(stats_ptr + 1, l_i, mask=offs_m < work.M)
        inverse = 1.0 / gl.where(l_i == 0.0, 1.0, l_i)
        tile_count += 1
        if PREFETCH_TILE:
            next_tile = _next_tile(pipe, tile_count, OPTIONS, WARPGROUP)
        acc = warpgroup_mma_wait(0, [o_token])
        _consumer_release(kv_count - 1, V_EMPTY, OPTIONS)  # mutate: release-last-v
        if BANDED:
            kv_count = _consumer_skip(own_first - first, pipe, kv_count, OPTIONS)

        acc = acc * broadcast_rows(inverse, acc)
        acc_16 = acc.to(dtype)
        # until the previous O has left the buffer
        tma.store_wait(0)  # mutate: wait-o
        o_buf.reshape([ROWS, BLOCK_D]).store(acc_16)
        fence_async_shared()
        store_async(output.desc, [tile.off_b, tile.off_h, start_m, 0], o_buf)
        if OPTIONS.Q_STAGES == 1:  # from the buffer of Q
            tma.store_wait(0)  # mutate: wait-o-in-q
            mbarrier.arrive(pipe.q_empty.index(q_stage), count=1)
        if BANDED:
            entry_ptr = output.log_ptr + ((head * work.row_tiles + tile.start_m // OPTIONS.BLOCK_M) * 4 + WARPGROUP)
            mark_nan(acc_16, entry_ptr, output.log_ptr + 4 * (work.items + ctaid()))
        if not PREFETCH_TILE:
            next_tile = _next_tile(pipe, tile_count, OPTIONS, WARPGROUP)
        tile = next_tile
    store_wait_complete()


@gluon.jit(do_not_specialize=[
    "scale", "items", "row_tiles", "heads", "section", "H", "GROUP", "M", "N", "left", "right",
    "list_b", "list_h", "list_row", "capacity", "word_b", "word_h", "word_m", "word_n",
])
def _forward_kernel(
    q_desc, k_desc, v_desc, o_desc, bias_desc, lse_ptr, stats_ptr, counter_ptr, log_ptr, scale,
    items, row_tiles, heads, section, H, GROUP, M, N, left, right,
    lists_ptr, counts_ptr, list_b, list_h, list_row, capacity, words_ptr, word_b, word_h, word_m, word_n,
    LEFT: gl.constexpr, RIGHT: gl.constexpr, LISTED: gl.constexpr, BIASED: gl.constexpr, KEYED: gl.constexpr,
    INNER_MASK: gl.constexpr, HALF_FIRST: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, Q_STAGES: gl.constexpr, CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    WARPGROUPS: gl.constexpr = BLOCK_M // ROWS
    HIDES: gl.constexpr = LEFT or RIGHT or LISTED
    gl.static_assert(STAGES <= V_EMPTY - K_EMPTY)
    dtype: gl.constexpr = q_desc.dtype
    q_bufs = gl.allocate_shared_memory(dtype, [Q_STAGES * WARPGROUPS, 1, 1, ROWS, BLOCK_D], q_desc.layout)
    o_bufs = q_bufs
    if Q_STAGES == 2:
        o_bufs = gl.allocate_shared_memory(dtype, [WARPGROUPS, 1, 1, ROWS, BLOCK_D], o_desc.layout)
    k_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    v_bufs = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    bias_bufs = q_bufs
    if BIASED:
        bias_bufs = gl.allocate_shared_memory(dtype, [STAGES * WARPGROUPS, 1, 1, ROWS, BLOCK_N], bias_desc.layout)
    coordinates = gl.allocate_shared_memory(gl.int32, [10, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    start_n = gl.allocate_shared_memory(gl.int32, [STAGES, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    q_full = gl.allocate_shared_memory(gl.int64, [Q_STAGES * WARPGROUPS, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [Q_STAGES * WARPGROUPS, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    repair_full = k_full
    if HIDES:
        repair_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(repair_full, count=1)  # only if it is used: else its memory is another buffer's
    for i in gl.static_range(Q_STAGES * WARPGROUPS):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(q_empty.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
    fence_async_shared()

    OPTIONS: gl.constexpr = Options(
        LEFT, RIGHT, LISTED, BIASED, KEYED, INNER_MASK, HALF_FIRST, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, Q_STAGES,
        WARPGROUPS,
    )
    mask_map = MaskMap(
        lists_ptr, counts_ptr, list_b, list_h, list_row, capacity, words_ptr, word_b, word_h, word_m, word_n
    )
    work = Work(items, row_tiles, heads, section, H, GROUP, M, N, left, right, mask_map)
    pipe = Pipeline(
        Stages(q_bufs, q_full), q_empty, coordinates, Stages(k_bufs, k_full), Stages(v_bufs, v_full), start_n
    )
    bias = Bias(bias_desc, bias_bufs)
    output = Output(o_desc, o_bufs, lse_ptr, stats_ptr, log_ptr)
    if WARPGROUPS == 2:
        gl.warp_specialize([
            (_consumer, (output, bias, scale, pipe, work, OPTIONS, 0)),
            (_consumer, (output, bias, scale, pipe, work, OPTIONS, 1)),
            (_producer, (q_desc, k_desc, v_desc, bias, counter_ptr, log_ptr, pipe, work, OPTIONS)),
        ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    else:
        gl.warp_specialize([
            (_consumer, (output, bias, scale, pipe, work, OPTIONS, 0)),
            (_consumer, (output, bias, scale, pipe, work, OPTIONS, 1)),
            (_consumer, (output, bias, scale, pipe, work, OPTIONS, 2)),
            (_producer, (q_desc, k_desc, v_desc, bias, counter_ptr, log_ptr, pipe, work, OPTIONS)),
        ], [4, 4, 1], [CONSUMER_REGISTERS, CONSUMER_REGISTERS, PRODUCER_REGISTERS])
    if HIDES:
        o_buf = o_bufs.index(0) if Q_STAGES == 2 else q_bufs.index(1)
        bufs = RepairBuffers(q_bufs.index(0), k_bufs.index(0), v_bufs.index(0), o_buf, bias_bufs.index(0), repair_full)
        repair(q_desc, k_desc, v_desc, o_desc, bias_desc, lse_ptr, stats_ptr, log_ptr, scale, bufs, work, OPTIONS)


def refuses(q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, block_m, block_n, key_mask=None):
    """Why the kernel does not serve fused_op with these arguments, or None."""
    (B, H, M, D), (N, DV) = q.shape, v.shape[2:]
    for what, given in (
        ("sinks", sinks is not None), ("dropout", seed is not None),
        ("a softcap", softcap != 0.0), ("the tile is the caller's", block_m is not None or block_n is not None),
        ("not 16 bits", q.element_size() != 2),
        (f"a head dim above {MAX_HEAD_DIM}", not 0 < min(D, DV) <= max(D, DV) <= MAX_HEAD_DIM),
        ("a scale of 0", scale == 0.0), ("few queries", M <= 16),
        ("too little work to be worth the descriptors", 4 * B * H * M * N * D < max(MIN_WORK, 1)),
        ("too few tiles to fill half of the GPU", B * H * triton.cdiv(M, 128) < MIN_WAVES * processors(q.device)),
    ):
        if given:
            return what
    if DV % 8 or scale < 0.0 and D % 8 or not all(addressable(t) for t in (q, k, v)):
        return "rows that do not begin at 16 bytes"
    return None if mask is None or mask.dtype == torch.bool else refuses_bias(mask.expand(B, H, M, N), key_mask, q, v)


def refuses_bias(mask, key_mask, q, v):
    """Why a floating mask [B, H, M, N], expanded, and a second one or None are not served beside q and v, or None."""
    if mask.dtype != q.dtype or key_mask is not None and key_mask.dtype != q.dtype:
        return "a mask of another dtype"
    if max(q.shape[3], v.shape[3]) > (128 if key_mask is None else MAX_TWO):
        return "floating masks beside wide heads"
    if mask.shape[3] % 8 or not (mask.stride(2) == 0 and mask.stride(3) == 1 or addressable(once(mask))):
        return "rows of a mask that do not begin at 16 bytes"
    return None


def bias_of(mask, rows=ROWS.value):
    """A floating mask [B, H, M, N], expanded, as TMA can address it, with its dimensions of size 1 but for `rows` rows
    where all are alike; and for b, h and m whether a place there is one in it, or 0."""
    small = once(mask)
    if mask.stride(2) == 0:
        small = small.expand(-1, -1, rows, -1).contiguous()
    return small, tuple(int(stride != 0) for stride in mask.stride()[:3])


def keys_of(key_mask, mask):
    """A second floating mask [B, N], or any other memory, with rows of contiguous numbers, and the step to the next."""
    if key_mask is None:
        return mask, 0
    key_mask = key_mask if key_mask.stride(1) == 1 else key_mask.contiguous()
    return key_mask, key_mask.stride(0)


@functools.lru_cache
def section_of(heads, row_tiles, processors):
    """How many heads are worked on together: two tiles of queries a multiprocessor, whose keys and values stay in L2;
    up to twice as many, where the last section would be a small one that leaves most of the GPU idle."""
    few = min(heads, triton.cdiv(2 * processors, row_tiles))
    return max(range(few, min(2 * few, heads) + 1), key=lambda size: min((heads - 1) % size + 1, 0.75 * size) / size)


def run(q, k, v, mask, sinks, seed, scale, softcap, dropout_p, left, right, block_m, block_n, key_mask=None):
    """(O, lse, no stats), see fused_op; for what is not refused."""
    (B, H, M, D), (Hk, N, DV) = q.shape, v.shape[1:]
    o, lse = empty_heads(q, B, H, M, DV), q.new_empty(B, H, M, dtype=torch.float32)
    multiprocessors = processors(q.device)
    if scale < 0.0:  # the maximum of scores is sought before they are scaled
        q, scale = -q, -scale
    banded = left is not None or right is not None or mask is not None
    long = left is None and min(M, N) >= (2 * LONG if banded else LONG)
    long = long and B * H * triton.cdiv(M, 3 * ROWS.value) >= LONG_WAVES * multiprocessors
    biased = mask is not None and mask.dtype != torch.bool
    op = "fused hopper, biased" if biased else "fused hopper, long" if long else "fused hopper"
    tile = tile_for(op, q.dtype, max(D, DV), banded, q.device)
    row_tiles, warpgroups = triton.cdiv(M, tile.BLOCK_M), tile.BLOCK_M // ROWS.value
    items = B * H * row_tiles
    registers = (1 << 16) // (128 * (warpgroups + 1)) // 8 * 8  # of a thread, before warp specialisation
    log = lse.new_empty(4 * (items + multiprocessors) if banded else 1, dtype=torch.int32)
    lists, words, word_steps, bias = [log, log, 0, 0, 0, 0], log, (0, 0, 0, 0), None
    stats = lse.new_empty(B, H, M, 2 if biased else 0)
    if mask is not None:
        mask = mask.expand(B, H, M, N)
        if biased:
            units, (bias, steps) = units_of(mask, key_mask, always=True), bias_of(mask)
            words, step = keys_of(key_mask, mask)
            word_steps = (*steps, step)
        else:
            units, words, word_steps = bits_of(mask, key_mask)
        lists, _ = map_of(mask, units, tile, M, N, left, right, nonempty=True)
    launch(
        _forward_kernel, min(items, multiprocessors),
        tile_descriptor(q, ROWS.value, tile.BLOCK_D), tile_descriptor(k, tile.BLOCK_N, tile.BLOCK_D),
        tile_descriptor(v, tile.BLOCK_N, tile.BLOCK_D), tile_descriptor(o, ROWS.value, tile.BLOCK_D),
        tile_descriptor(bias if biased else o, ROWS.value, tile.BLOCK_N if biased else tile.BLOCK_D),
        lse, stats if biased else log, counter(q.device) if banded else log, log,
        scale * (1.0 if biased else LOG2E.value),
        items, row_tiles, B * H, section_of(B * H, row_tiles, multiprocessors) if banded else 1, H, H // Hk, M, N,
        left or 0, right or 0, *lists, words, *word_steps,
        device=q.device, LEFT=left is not None, RIGHT=right is not None, LISTED=mask is not None, BIASED=biased,
        KEYED=biased and key_mask is not None, INNER_MASK=mask is None and masks_inner_tiles(left, right),
        HALF_FIRST=mask is None and tile.BLOCK_M == tile.BLOCK_N and halves_first_tile(left, right, M, N),
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D,
        STAGES=tile.num_stages, Q_STAGES=2 if tile.BLOCK_D <= (64 if biased else 128) else 1,  # more do not fit
        CONSUMER_REGISTERS=tile.registers,
        PRODUCER_REGISTERS=registers * (warpgroups + 1) - tile.registers * warpgroups,
        num_warps=4, maxnreg=registers,
    )
    return o, lse, stats
