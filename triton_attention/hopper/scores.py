"""S = scale * Q K^T on Hopper: the scores of two query tiles at once, so that one is stored while the other multiplies.

The plain kernel (triton_attention_scores.py) waits for its dot, then stores, then starts the next dot: tensor cores and
memory alternate. Here a program keeps one tile of keys in shared memory and two warpgroups share the queries:

    warpgroup 0    load q0   S0 = q0 K^T   store S0   S2 = q2 K^T   store S2   ...
    warpgroup 1    load q1       ...       S1 = q1 K^T   store S1   S3 = q3 K^T   ...

Nothing orders the two: each waits for the tensor cores or for its store while the other has them. The tensor memory
accelerator (TMA) moves whole tiles in and out, asynchronously, clips them at the edges and fills with zeros.

Causal, the first query tiles see none of these keys: nothing is loaded for them, and a tile of the fill is stored as
often as there are of them, or nothing, where the next stage does not read it (fill=None). float32 comes in three parts
of bfloat16 (float32.py): the six products of a tile take as long as to store it, and overlap that here.

What was measured: NOTES.md. Gluon (triton.experimental.gluon) is Triton's lower-level language: layouts, barriers and
copies are explicit.
"""

from typing import NamedTuple

import torch

import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait,
)

from triton_attention.float32 import split
from triton_attention.hopper.tma import addressable, load_async, store_async, tile_descriptor
from triton_attention.launch import launch
from triton_attention.tile_choice import dot_precision, tile_for

MIN_WORK = 1 << 26  # elements of S from which the GPU is busy for longer than the host with its descriptors


class Buffers(NamedTuple):
    """Shared memory: of Q a few stages a warpgroup, each with the mbarrier of its loads; of S one tile."""

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
def _load(desc, off_b, off_h, row, bufs, first, full, pred, PARTS: gl.constexpr):
    """A tile of Q or K; of float32 its parts, which lie side by side."""
    BLOCK_D: gl.constexpr = desc.block_type.shape[3]
    mbarrier.expect(full, PARTS * desc.block_type.nbytes, pred=pred)
    for i in gl.static_range(PARTS):
        load_async(desc, [off_b, off_h, row, i * BLOCK_D], full, bufs.index(first + i), pred=pred)


@gluon.jit
def _multiply(q_buf, k_buf, s, use_acc: gl.constexpr = True):
    """s + Q K^T of tiles in shared memory, in flight."""
    BLOCK_D: gl.constexpr = q_buf.shape[3]
    q, k = q_buf.reshape([q_buf.shape[2], BLOCK_D]), k_buf.reshape([k_buf.shape[2], BLOCK_D])
    return warpgroup_mma(q, k.permute((1, 0)), s, use_acc=use_acc, is_async=True)


@gluon.jit
def _product(q_bufs, first, k_bufs, zeros, PARTS: gl.constexpr):
    """Q K^T; of float32 as six_products in float32.py computes it, the smallest products first."""
    if PARTS == 1:
        s = _multiply(q_bufs.index(first), k_bufs.index(0), zeros, use_acc=False)
    else:
        high, middle, low = q_bufs.index(first), q_bufs.index(first + 1), q_bufs.index(first + 2)
        small = _multiply(middle, k_bufs.index(1), zeros, use_acc=False)
        small = _multiply(high, k_bufs.index(2), small)
        small = _multiply(low, k_bufs.index(0), small)  # mutate: parts
        small = _multiply(high, k_bufs.index(1), small)
        small = _multiply(middle, k_bufs.index(0), small)
        small = warpgroup_mma_wait(0, [small])
        small = gl.where(gl.abs(small) < float("inf"), small, 0.0)  # what infinity is comes from the upper parts
        s = _multiply(high, k_bufs.index(0), small)
    return warpgroup_mma_wait(0, [s])


@gluon.jit
def _warpgroup(
    q_desc, s_desc, bufs, scale, diagonal, work, FILLED: gl.constexpr, MINUS_INF: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr, PARTS: gl.constexpr, WARPGROUP: gl.constexpr,
):
    """Every second query tile, from the load over the dot to the store."""
    fill: gl.constexpr = float("-inf") if MINUS_INF else 0.0
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], warps_per_cta=[4, 1], instr_shape=[16, BLOCK_N, 16])
    zeros = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout)
    s_buf = bufs.s.index(WARPGROUP)
    for i in gl.static_range(STAGES):
        tile, stage = work.future + WARPGROUP + 2 * i, WARPGROUP * STAGES + i
        _load(
            q_desc, work.off_b, work.off_h, work.first_m + tile * BLOCK_M, bufs.q, stage * PARTS,
            bufs.q_full.index(stage), tile < work.tiles, PARTS,
        )
    if FILLED:
        hidden = gl.full([BLOCK_M, BLOCK_N], fill, gl.float32, layout)
        s_buf.reshape([BLOCK_M, BLOCK_N]).store(hidden.to(s_desc.dtype))
        fence_async_shared()
        for tile in range(WARPGROUP, work.future, 2):
            store_async(s_desc, [work.off_b, work.off_h, work.first_m + tile * BLOCK_M, work.start_n], s_buf)
    mbarrier.wait(bufs.k_full, 0, pred=work.future < work.tiles)  # mutate: wait-k
    step = 0
    for tile in range(work.future + WARPGROUP, work.tiles, 2):
        stage, start_m = WARPGROUP * STAGES + step % STAGES, work.first_m + tile * BLOCK_M
        mbarrier.wait(bufs.q_full.index(stage), step // STAGES & 1)  # mutate: wait-q
        s = _product(bufs.q, stage * PARTS, bufs.k, zeros, PARTS)
        next_tile = tile + 2 * STAGES
        _load(  # into the stage that has just been multiplied
            q_desc, work.off_b, work.off_h, work.first_m + next_tile * BLOCK_M, bufs.q, stage * PARTS,
            bufs.q_full.index(stage), next_tile < work.tiles, PARTS,
        )
        s = s * scale
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
    PARTS: gl.constexpr, WORKER_REGISTERS: gl.constexpr,
):
    columns, spans = gl.cdiv(N, BLOCK_N), gl.cdiv(M, BLOCK_M * SPAN)
    pid = gl.program_id(0)
    off_b, off_h = pid // (columns * spans) // H, pid // (columns * spans) % H
    tile = pid % (columns * spans)
    start_n, first_m = tile % columns * BLOCK_N, tile // columns * (BLOCK_M * SPAN)
    future, tiles = 0, gl.minimum(gl.cdiv(M - first_m, BLOCK_M), SPAN)
    if CAUSAL:
        future = gl.minimum(gl.maximum(start_n - diagonal - first_m, 0) // BLOCK_M, tiles)

    k_bufs = gl.allocate_shared_memory(k_desc.dtype, [PARTS, 1, 1, BLOCK_N, BLOCK_D], k_desc.layout)
    q_bufs = gl.allocate_shared_memory(q_desc.dtype, [2 * STAGES * PARTS, 1, 1, BLOCK_M, BLOCK_D], q_desc.layout)
    s_bufs = gl.allocate_shared_memory(s_desc.dtype, [2, 1, 1, BLOCK_M, BLOCK_N], s_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    q_full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    mbarrier.init(k_full, count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(q_full.index(i), count=1)
    fence_async_shared()

    _load(k_desc, off_b, off_h // GROUP, start_n, k_bufs, 0, k_full, future < tiles, PARTS)
    bufs = Buffers(q_bufs, k_bufs, s_bufs, q_full, k_full)
    work = Work(off_b, off_h, first_m, start_n, future, tiles)
    gl.warp_specialize([
        (_warpgroup, (
            q_desc, s_desc, bufs, scale, diagonal, work, FILLED, MINUS_INF, BLOCK_M, BLOCK_N, STAGES, PARTS, 0,
        )),
        (_warpgroup, (
            q_desc, s_desc, bufs, scale, diagonal, work, FILLED, MINUS_INF, BLOCK_M, BLOCK_N, STAGES, PARTS, 1,
        )),
    ], [4], [WORKER_REGISTERS])


def refuses(q, k, scale, diagonal, fill, block_m, block_n):
    """Why the kernel does not serve scores_op with these arguments, or None."""
    (B, H, M, D), N, bits = q.shape, k.shape[2], 8 * q.element_size()
    if block_m is not None or block_n is not None:
        return "the tile is the caller's"
    if bits == 64 or bits == 32 and dot_precision(q.dtype, q.device) == "tf32":
        return "neither 16 bits nor float32 in full"
    if not 0 < D <= (256 if bits == 16 else 128):
        return "a head dim for which shared memory is too small"
    if B * H * M * N < MIN_WORK:
        return "too few scores to be worth the descriptors"
    if N % (128 // bits) or bits == 16 and not (addressable(q) and addressable(k)):
        return "rows that do not begin at 16 bytes"
    return None


def run(q, k, scale, diagonal, fill, block_m, block_n):
    """S [B, H, M, N] of q [B, H, M, D] and k [B, Hk, N, D], see scores_op; for what is not refused."""
    (B, H, M, D), (Hk, N) = q.shape, k.shape[1:3]
    s, parts = q.new_empty(B, H, M, N), 1
    filled = diagonal is not None and fill is not None
    op = "scores hopper, filled" if filled else "scores hopper"
    tile = tile_for(op, q.dtype, D, diagonal is not None, q.device)
    block_d = tile.BLOCK_D
    if q.dtype == torch.float32:
        q, k, parts = split(q), split(k), 3
        block_d = q.shape[3] // 3
    programs = B * H * triton.cdiv(N, tile.BLOCK_N) * triton.cdiv(M, tile.BLOCK_M * tile.SPAN)
    launch(
        _scores_hopper_kernel, programs,
        tile_descriptor(q, tile.BLOCK_M, block_d), tile_descriptor(k, tile.BLOCK_N, block_d),
        tile_descriptor(s, tile.BLOCK_M, tile.BLOCK_N), scale, H, H // Hk, M, N, diagonal or 0,
        device=q.device, CAUSAL=diagonal is not None, FILLED=filled, MINUS_INF=bool(fill), BLOCK_M=tile.BLOCK_M,
        BLOCK_N=tile.BLOCK_N, BLOCK_D=block_d, SPAN=tile.SPAN, STAGES=tile.num_stages, PARTS=parts,
        WORKER_REGISTERS=tile.registers, num_warps=tile.num_warps, maxnreg=tile.registers,
    )
    return s
