"""O = P V on Hopper: a producer warp keeps the memory busy, two warpgroups multiply what has landed.

Each tile of queries reads all of V again, out of the L2 cache. The plain kernel (triton_attention_values.py) has tiles
of 128 queries, and so at D 128 reads as many bytes of V as of P: more than L2 delivers while P streams from memory.
Here a tile has 256 queries, half of them for each warpgroup, and V is read once for all:

    producer warp    P0 P0' V0   P1 P1' V1   ...    by TMA, into the stages of a pipeline
    warpgroup 0      O  += P0 V0    O  += P1 V1   ...
    warpgroup 1      O' += P0' V0   O' += P1' V1  ...

Persistent: a program per multiprocessor takes one tile after the other, and while the warpgroups store O the next P
is on its way. Causal tiles differ in length: the longest come first, in sections of heads whose V stays in L2, and
every second round is dealt out backwards, so that who had the longest tile has the shortest next.

The tensor cores read P in shared memory as it comes. Only tiles on the diagonal pass through registers, where what no
query sees becomes 0, whatever was there; and float32, which is multiplied in three parts of bfloat16 (float32.py):
those of V come from memory, those of P are made here.

What was measured: NOTES.md.
"""

from typing import NamedTuple

import torch

from triton_attention.device import TRITON, processors
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.float32 import split
from triton_attention.hopper.forward import section_of
from triton_attention.hopper.tma import addressable, load_async, store_async, tile_descriptor
from triton_attention.launch import empty_heads, launch
from triton_attention.nan_repair import repair
from triton_attention.tile_choice import dot_precision, tile_for

MIN_WORK = 1 << 26  # elements of P from which the GPU is busy for longer than the host with its descriptors
MAX_HEAD_DIM = {16: 128, 32: 128 if TRITON < (3, 9) else 64}  # by bits; wider float32 spills with that ptxas
MIN_WAVES = 2  # tiles of 256 queries a multiprocessor; fewer leave much of the GPU idle


class Pipeline(NamedTuple):
    """Number i is in stage i % STAGES, in phase i // STAGES of its barriers: P of either warpgroup, and V."""

    p: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor


class Work(NamedTuple):
    """The tiles of queries, and what they are multiplied with."""

    items: gl.tensor
    row_tiles: gl.tensor  # of a head
    heads: gl.tensor  # of all batches
    section: gl.tensor  # heads that are worked on together
    H: gl.tensor
    SHARE: gl.tensor
    M: gl.tensor
    N: gl.tensor
    diagonal: gl.tensor


@gluon.jit
def _place(step, CAUSAL: gl.constexpr):
    """Which of the tiles of a round is this program's."""
    if CAUSAL:
        return gl.where(step % 2 == 0, gl.program_id(0), gl.num_programs(0) - 1 - gl.program_id(0))
    else:
        return gl.program_id(0)


@gluon.jit
def _rounds(work, CAUSAL: gl.constexpr):
    """How many of them this program has a tile in."""
    full = work.items // gl.num_programs(0)
    return full + gl.where(_place(full, CAUSAL) < work.items % gl.num_programs(0), 1, 0)


@gluon.jit
def _query_tile(step, work, BLOCK_M: gl.constexpr, CAUSAL: gl.constexpr):
    """(off_b, off_h, start_m) of this program's tile in a round."""
    item = step * gl.num_programs(0) + _place(step, CAUSAL)
    if CAUSAL:
        first_head = item // (work.row_tiles * work.section) * work.section
        item_in_section = item - first_head * work.row_tiles
        heads = gl.minimum(work.section, work.heads - first_head)
        head, tile = first_head + item_in_section % heads, work.row_tiles - 1 - item_in_section // heads
    else:
        head, tile = item // work.row_tiles, item % work.row_tiles
    return head // work.H, head % work.H, tile * BLOCK_M


@gluon.jit
def _visible_end(start_m, SIZE: gl.constexpr, work, CAUSAL: gl.constexpr):
    """The end of the keys that some of SIZE queries sees."""
    if CAUSAL:
        return gl.minimum(gl.maximum(start_m + SIZE + work.diagonal, 0), work.N)
    else:
        return work.N


@gluon.jit
def _producer(p_desc, v_desc, pipe, work, CAUSAL: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr):
    ROWS: gl.constexpr = p_desc.block_type.shape[2]
    BLOCK_N: gl.constexpr = p_desc.block_type.shape[3]
    BLOCK_D: gl.constexpr = v_desc.block_type.shape[3]
    P_BYTES: gl.constexpr = p_desc.block_type.nbytes
    V_BYTES: gl.constexpr = PARTS * v_desc.block_type.nbytes
    count = gl.to_tensor(0)
    for step in range(_rounds(work, CAUSAL)):
        off_b, off_h, start_m = _query_tile(step, work, 2 * ROWS, CAUSAL)
        first_end = _visible_end(start_m, ROWS, work, CAUSAL)  # of the first warpgroup
        for start_n in range(0, _visible_end(start_m, 2 * ROWS, work, CAUSAL), BLOCK_N):
            stage = count % STAGES
            full, both = pipe.full.index(stage), start_n < first_end
            mbarrier.wait(pipe.empty.index(stage), count // STAGES & 1 ^ 1)  # mutate: acquire
            mbarrier.expect(full, 2 * P_BYTES + V_BYTES, pred=both)
            mbarrier.expect(full, P_BYTES + V_BYTES, pred=start_n >= first_end)
            load_async(p_desc, [off_b, off_h, start_m, start_n], full, pipe.p.index(2 * stage), pred=both)
            load_async(p_desc, [off_b, off_h, start_m + ROWS, start_n], full, pipe.p.index(2 * stage + 1))
            for i in gl.static_range(PARTS):
                at = [off_b, off_h // work.SHARE, start_n, i * BLOCK_D]
                load_async(v_desc, at, full, pipe.v.index(stage * PARTS + i))
            count += 1


@gluon.jit
def _tile_of(buf):
    """A tile in shared memory as a matrix."""
    return buf.reshape([buf.shape[2], buf.shape[3]])


@gluon.jit
def _multiply(
    p_buf, v_bufs, first, acc, small, zeros, last_n, layout: gl.constexpr, MASKED: gl.constexpr, PARTS: gl.constexpr
):
    """(acc, small) with P V of a stage added; of float32 the five small ones of the six products to `small`, and to acc
    the large one, by an addition that rounds: wgmma's truncate, which is too much for sums over all keys. MASKED, the
    first row sees the columns up to last_n."""
    high_v = _tile_of(v_bufs.index(first))
    p = _tile_of(p_buf)
    if MASKED or PARTS == 3:
        p_layout: gl.constexpr = gl.DotOperandLayout(0, layout, k_width=2)
        p = p.load(p_layout)
    if MASKED:
        m = gl.arange(0, p_buf.shape[2], gl.SliceLayout(1, p_layout))
        n = gl.arange(0, p_buf.shape[3], gl.SliceLayout(0, p_layout))
        p = gl.where(gl.expand_dims(n, 0) <= gl.expand_dims(m, 1) + last_n, p, 0.0)  # mutate: diagonal
    if PARTS == 1:
        return warpgroup_mma_wait(0, [warpgroup_mma(p, high_v, acc, is_async=True)]), small
    else:
        middle_v, low_v = _tile_of(v_bufs.index(first + 1)), _tile_of(v_bufs.index(first + 2))
        high = p.to(gl.bfloat16)
        rest = p - high.to(gl.float32)
        middle = rest.to(gl.bfloat16)
        low = (rest - middle.to(gl.float32)).to(gl.bfloat16)
        small = warpgroup_mma(middle, middle_v, small, is_async=True)
        small = warpgroup_mma(high, low_v, small, is_async=True)
        small = warpgroup_mma(low, high_v, small, is_async=True)  # mutate: parts
        small = warpgroup_mma(high, middle_v, small, is_async=True)
        small = warpgroup_mma(middle, high_v, small, is_async=True)
        large = warpgroup_mma(high, high_v, zeros, use_acc=False, is_async=True)
        large, small = warpgroup_mma_wait(0, [large, small])
        return acc + large, small


@gluon.jit
def _attend(
    acc, small, zeros, count, begin, end, last_n, pipe, layout: gl.constexpr, MASKED: gl.constexpr,
    STAGES: gl.constexpr, PARTS: gl.constexpr, WARPGROUP: gl.constexpr,
):
    """(acc, small, count) after the keys begin : end; the first query of the tile sees those up to last_n."""
    BLOCK_N: gl.constexpr = pipe.p.shape[4]
    for start_n in range(begin, end, BLOCK_N):
        stage = count % STAGES
        mbarrier.wait(pipe.full.index(stage), count // STAGES & 1)  # mutate: wait-full
        p_buf = pipe.p.index(2 * stage + WARPGROUP)
        acc, small = _multiply(
            p_buf, pipe.v, stage * PARTS, acc, small, zeros, last_n - start_n, layout, MASKED, PARTS
        )
        mbarrier.arrive(pipe.empty.index(stage), count=1)
        count += 1
    return acc, small, count


@gluon.jit
def _consumer(
    o_desc, o_bufs, nan_ptr, scale, pipe, work,
    CAUSAL: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, WARPGROUP: gl.constexpr,
):
    """One warpgroup: half of the queries of every tile."""
    ROWS: gl.constexpr = o_desc.block_type.shape[2]
    BLOCK_N: gl.constexpr = pipe.p.shape[4]
    BLOCK_D: gl.constexpr = o_desc.block_type.shape[3]
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_D, 16])
    zeros = gl.zeros([ROWS, BLOCK_D], gl.float32, layout)
    o_buf = o_bufs.index(WARPGROUP)
    count = gl.to_tensor(0)
    for step in range(_rounds(work, CAUSAL)):
        off_b, off_h, start_m = _query_tile(step, work, 2 * ROWS, CAUSAL)
        end = _visible_end(start_m, 2 * ROWS, work, CAUSAL)
        start_m += WARPGROUP * ROWS
        last_n = start_m + work.diagonal
        full_end = gl.minimum(gl.maximum(last_n + 1, 0) // BLOCK_N * BLOCK_N, end) if CAUSAL else end
        acc, small, count = _attend(
            zeros, zeros, zeros, count, 0, full_end, last_n, pipe, layout, False, STAGES, PARTS, WARPGROUP
        )
        if CAUSAL:
            acc, small, count = _attend(
                acc, small, zeros, count, full_end, end, last_n, pipe, layout, True, STAGES, PARTS, WARPGROUP
            )
        if PARTS == 3:
            acc += gl.where(gl.abs(small) < float("inf"), small, 0.0)  # what infinity is comes from the upper parts
        acc = acc * scale
        tile, tiles = start_m // ROWS, gl.cdiv(work.M, ROWS)
        if tile < tiles:
            nan = gl.max(gl.max((acc != acc).to(gl.int32), 1), 0)
            number = tiles - 1 - tile if CAUSAL else tile  # as _values_kernel counts
            gl.store(nan_ptr + (off_b * work.H + off_h) * tiles + number, nan.to(gl.int8))
        tma.store_wait(0)  # the previous tile has left o_buf  # mutate: wait-o
        o_buf.reshape([ROWS, BLOCK_D]).store(acc.to(o_desc.dtype))
        fence_async_shared()
        store_async(o_desc, [off_b, off_h, start_m, 0], o_buf)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "diagonal", "items", "heads", "section"])
def _values_hopper_kernel(
    p_desc, v_desc, o_desc, nan_ptr, scale, H, SHARE, M, N, diagonal, items, heads, section,
    CAUSAL: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
    PARTS: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):
    p_bufs = gl.allocate_shared_memory(p_desc.dtype, [2 * STAGES, 1, 1, ROWS, BLOCK_N], p_desc.layout)
    v_bufs = gl.allocate_shared_memory(v_desc.dtype, [PARTS * STAGES, 1, 1, BLOCK_N, BLOCK_D], v_desc.layout)
    o_bufs = gl.allocate_shared_memory(o_desc.dtype, [2, 1, 1, ROWS, BLOCK_D], o_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    pipe = Pipeline(p_bufs, v_bufs, full, empty)
    work = Work(items, gl.cdiv(M, 2 * ROWS), heads, section, H, SHARE, M, N, diagonal)
    gl.warp_specialize([
        (_consumer, (o_desc, o_bufs, nan_ptr, scale, pipe, work, CAUSAL, STAGES, PARTS, 0)),
        (_consumer, (o_desc, o_bufs, nan_ptr, scale, pipe, work, CAUSAL, STAGES, PARTS, 1)),
        (_producer, (p_desc, v_desc, pipe, work, CAUSAL, STAGES, PARTS)),
    ], [4, 1], [CONSUMER_REGISTERS, PRODUCER_REGISTERS])


def refuses(p, v, diagonal, heads, transposed, scale, dtype, block_m, block_n):
    """Why the kernel does not serve values_op with these arguments, or None."""
    (B, H, M, N), D, bits = p.shape, v.shape[3], 8 * p.element_size()
    if block_m is not None or block_n is not None:
        return "the tile is the caller's"
    if bits == 64 or bits == 32 and dot_precision(p.dtype, p.device) == "tf32" or not p.dtype == v.dtype == dtype:
        return "neither 16 bits nor float32 in full"
    if transposed or not 0 < D <= MAX_HEAD_DIM[bits]:
        return "transposed weights, or a wide head dim"
    if diagonal is not None and bits == 16 and D <= 64:
        return "causal weights with few columns of values: small tiles waste less of the diagonal"
    if B * H * M * N < MIN_WORK or B * H * triton.cdiv(M, 256) < MIN_WAVES * processors(p.device):
        return "too few weights to be worth the descriptors, or too few queries to fill the GPU"
    if D % (128 // bits) or not addressable(p) or bits == 16 and not addressable(v):
        return "rows that do not begin at 16 bytes"
    return None


def run(p, v, diagonal, heads, transposed, scale, dtype, block_m, block_n):
    """scale * P V, [B, H, M, Dv], see values_op; for what is not refused."""
    (B, H, M, N), (Hk, D) = p.shape, (v.shape[1], v.shape[3])
    o = empty_heads(v, B, H, M, D, dtype=dtype)
    causal, programs = diagonal is not None, processors(p.device)
    tile = tile_for("values hopper", p.dtype, D, causal, p.device)
    rows, block_d, parts, factor = tile.BLOCK_M // 2, tile.BLOCK_D, 1, v
    if p.dtype == torch.float32:
        factor, parts = split(v), 3
        block_d = factor.shape[3] // 3
    row_tiles = triton.cdiv(M, tile.BLOCK_M)
    items = B * H * row_tiles
    has_nan = torch.empty(B * H * triton.cdiv(M, rows), dtype=torch.int8, device=p.device)
    launch(
        _values_hopper_kernel, min(items, programs),
        tile_descriptor(p, rows, tile.BLOCK_N), tile_descriptor(factor, tile.BLOCK_N, block_d),
        tile_descriptor(o, rows, block_d), has_nan, scale, H, H // Hk, M, N, diagonal or 0,
        items, B * H, section_of(B * H, row_tiles, programs),
        device=p.device, CAUSAL=causal, ROWS=rows, BLOCK_N=tile.BLOCK_N, BLOCK_D=block_d, STAGES=tile.num_stages,
        PARTS=parts, CONSUMER_REGISTERS=tile.registers, PRODUCER_REGISTERS=3 * 168 - 2 * tile.registers,
        num_warps=tile.num_warps, maxnreg=168,
    )
    repair(
        has_nan, p, *p.stride(), v, *v.stride(), o, *o.stride(), has_nan, scale, H, H // Hk, M, N, diagonal or 0,
        D=D, SUMMED=1, CAUSAL=causal, TRANSPOSED=False, BLOCK_M=rows, BLOCK_D=block_d,
    )
    return o
