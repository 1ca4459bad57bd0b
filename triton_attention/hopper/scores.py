"""S = scale * Q K^T on Hopper: the scores of two query tiles at once, so that one is stored while the other multiplies.

The plain kernel (triton_attention_scores.py) waits for its dot, then stores, then starts the next dot: tensor cores and
memory alternate. Here a program keeps one tile of keys in shared memory and two warpgroups share the queries:

    warpgroup 0    load q0   S0 = q0 K^T   store S0   S2 = q2 K^T   store S2   ...
    warpgroup 1    load q1       ...       S1 = q1 K^T   store S1   S3 = q3 K^T   ...

Nothing orders the two: each waits for the tensor cores or for its store while the other has them. The tensor memory
accelerator (TMA) moves whole tiles in and out, asynchronously, clips them at the edges and fills with zeros.

Causal, the first query tiles see none of these keys: nothing is loaded for them, and a tile of the fill is stored as
often as there are of them, or nothing, where the next stage does not read it (fill=None).

What was measured: NOTES.md. Gluon (triton.experimental.gluon) is Triton's lower-level language: layouts, barriers and
copies are explicit.
"""

from typing import NamedTuple

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.hopper.tma import addressable, load_async, store_async, tile_descriptor
from triton_attention.launch import launch
from triton_attention.tile_choice import tile_for

MIN_WORK = 1 << 26  # elements of S from which the GPU is busy for longer than the host with its descriptors


class Buffers(NamedTuple):
    """Shared memory: of Q a few stages a warpgroup, of S one, each with the mbarrier of its loads."""

    q: gl.shared_memory_descriptor
    k: gl.shared_memory_descriptor
    s: gl.shared_memory_descriptor
    q_full: gl.shared_memory_descriptor
    k_full: gl.shared_memory_descriptor


class Work(NamedTuple):
    """The tiles of S of a program, one below the other: those of the future, then those with a visible key."""

    off_b: gl.tensor
    off_h: gl.tensor
    first_m: gl.tensor
    start_n: gl.tensor
    future: gl.tensor
    tiles: gl.tensor


@gluon.jit
def _load_q(q_desc, bufs, stage, work, tile, BLOCK_M: gl.constexpr):
    at, pred = [work.off_b, work.off_h, work.first_m + tile * BLOCK_M, 0], tile < work.tiles
    mbarrier.expect(bufs.q_full.index(stage), q_desc.block_type.nbytes, pred=pred)
    load_async(q_desc, at, bufs.q_full.index(stage), bufs.q.index(stage), pred=pred)


@gluon.jit
def _warpgroup(
    q_desc, s_desc, bufs, scale, diagonal, work, FILLED: gl.constexpr, MINUS_INF: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr, WARPGROUP: gl.constexpr,
):
    """Every second query tile, from the load over the dot to the store."""
    fill: gl.constexpr = float("-inf") if MINUS_INF else 0.0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    s_buf = bufs.s.index(WARPGROUP)
    for i in gl.static_range(STAGES - 1):
        _load_q(q_desc, bufs, WARPGROUP * STAGES + i, work, work.future + WARPGROUP + 2 * i, BLOCK_M)
    if FILLED:
        hidden = gl.full([BLOCK_M, BLOCK_N], fill, gl.float32, layout)
        s_buf.reshape([BLOCK_M, BLOCK_N]).store(hidden.to(s_desc.dtype))
        fence_async_shared()
        for tile in range(WARPGROUP, work.future, 2):
            store_async(s_desc, [work.off_b, work.off_h, work.first_m + tile * BLOCK_M, work.start_n], s_buf)
    mbarrier.wait(bufs.k_full, 0, pred=work.future < work.tiles)  # mutate: wait-k
    k_t = bufs.k.reshape([BLOCK_N, BLOCK_D]).permute((1, 0))
    step = 0
    for tile in range(work.future + WARPGROUP, work.tiles, 2):
        prefetched = tile + 2 * (STAGES - 1)
        _load_q(q_desc, bufs, WARPGROUP * STAGES + (step + STAGES - 1) % STAGES, work, prefetched, BLOCK_M)

        stage = WARPGROUP * STAGES + step % STAGES
        mbarrier.wait(bufs.q_full.index(stage), step // STAGES & 1)  # mutate: wait-q
        q = bufs.q.index(stage).reshape([BLOCK_M, BLOCK_D])
        s = warpgroup_mma_wait(0, [warpgroup_mma(q, k_t, zeros, use_acc=False, is_async=True)])
        s, start_m = s * scale, work.first_m + tile * BLOCK_M
        if FILLED:
            if start_m + diagonal < work.start_n + BLOCK_N - 1:  # the first query does not see the last key
                m = start_m + gl.arange(0, BLOCK_M, gl.SliceLayout(1, layout))
                n = work.start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
                s = gl.where(gl.expand_dims(n, 0) <= gl.expand_dims(m, 1) + diagonal, s, fill)  # mutate: future

        tma.store_wait(0)  # the previous tile has left s_buf  # mutate: wait-s
        s_buf.reshape([BLOCK_M, BLOCK_N]).store(s.to(s_desc.dtype))
        fence_async_shared()
        store_async(s_desc, [work.off_b, work.off_h, start_m, work.start_n], s_buf)
        step += 1
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["scale", "diagonal"])
def _scores_hopper_kernel(
    q_desc, k_desc, s_desc, scale, H, GROUP, M, N, diagonal,
    CAUSAL: gl.constexpr, FILLED: gl.constexpr, MINUS_INF: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, SPAN: gl.constexpr, STAGES: gl.constexpr,
    WORKER_REGISTERS: gl.constexpr,
):
    columns, spans = gl.cdiv(N, BLOCK_N), gl.cdiv(M, BLOCK_M * SPAN)
    pid = gl.program_id(0)
    off_b, off_h = pid // (columns * spans) // H, pid // (columns * spans) % H
    tile = pid % (columns * spans)
    start_n, first_m = tile % columns * BLOCK_N, tile // columns * (BLOCK_M * SPAN)
    future, tiles = 0, gl.minimum(gl.cdiv(M - first_m, BLOCK_M), SPAN)
    if CAUSAL:
        future = gl.minimum(gl.maximum(start_n - diagonal - first_m, 0) // BLOCK_M, tiles)

    dtype: gl.constexpr = q_desc.dtype
    k_buf = gl.allocate_shared_memory(dtype, [1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    q_bufs = gl.allocate_shared_memory(dtype, [2 * STAGES, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    s_bufs = gl.allocate_shared_memory(dtype, [2, 1, 1, BLOCK_M, BLOCK_N], s_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(q_full.index(i), count=1)
    fence_async_shared()

    mbarrier.expect(k_full, k_desc.block_type.nbytes, pred=future < tiles)
    load_async(k_desc, [off_b, off_h // GROUP, start_n, 0], k_full, k_buf, pred=future < tiles)
    bufs = Buffers(q_bufs, k_buf, s_bufs, q_full, k_full)
    work = Work(off_b, off_h, first_m, start_n, future, tiles)
    gl.warp_specialize([
        (_warpgroup, (
            q_desc, s_desc, bufs, scale, diagonal, work, FILLED, MINUS_INF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 0,
        )),
        (_warpgroup, (
            q_desc, s_desc, bufs, scale, diagonal, work, FILLED, MINUS_INF, BLOCK_M, BLOCK_N, BLOCK_D, STAGES, 1,
        )),
    ], [4], [WORKER_REGISTERS])


def refuses(q, k, scale, diagonal, fill, block_m, block_n):
    """Why the kernel does not serve scores_op with these arguments, or None."""
    (B, H, M, D), N = q.shape, k.shape[2]
    if block_m is not None or block_n is not None:
        return "the tile is the caller's"
    if q.element_size() != 2:
        return "not 16 bits"
    if diagonal is not None or not 0 < D <= 128:  # run() takes both; whether it pays is not measured
        return "causal scores, or a head dim above 128"
    if B * H * M * N < MIN_WORK:
        return "too few scores to be worth the descriptors"
    if N % 8 or not (addressable(q) and addressable(k)):
        return "rows that do not begin at 16 bytes"
    return None


def run(q, k, scale, diagonal, fill, block_m, block_n):
    """S [B, H, M, N] of q [B, H, M, D] and k [B, Hk, N, D], see scores_op; for what is not refused."""
    (B, H, M, D), (Hk, N) = q.shape, k.shape[1:3]
    s = q.new_empty(B, H, M, N)
    tile = tile_for("scores hopper", q.dtype, D, diagonal is not None, q.device)
    programs = B * H * triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(M, tile.BLOCK_M * tile.SPAN)
    launch(
        _scores_hopper_kernel, programs,
        tile_descriptor(q, tile.BLOCK_M, tile.BLOCK_D), tile_descriptor(k, tile.BLOCK_N, tile.BLOCK_D),
        tile_descriptor(s, tile.BLOCK_M, tile.BLOCK_N), scale, H, H // Hk, M, N, diagonal or 0,
        device=q.device, CAUSAL=diagonal is not None, FILLED=diagonal is not None and fill is not None,
        MINUS_INF=bool(fill), BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=tile.BLOCK_D, SPAN=tile.SPAN,
        STAGES=tile.num_stages, WORKER_REGISTERS=tile.registers, num_warps=tile.num_warps, maxnreg=tile.registers,
    )
    return s
