"""The mean of P = softmax(S) over the heads, [B, M, N], from the fused kernel's lse: no matrix of a head is stored.

                 K^T of head 0, 1, ...         a program owns a tile of the mean and walks over the heads:
                +------+------+------+
    Q of head   |      | tile |      |           tile += e^(scale q k^T - lse)
    0, 1, ...   +------+------+------+
       |   q  |  in registers, stored once     lse [B, H, M] has the maximum and the sum of each row in it, so that a
       +------+                                tile needs no other one of its row

Q K^T is multiplied twice, here and for O: 2 D operations more for an element of S, where storing S and P moves 8 bytes.
For inference: it has no derivative.
"""

import torch

import triton
import triton.language as tl

from triton_attention.device import processors
from triton_attention.float32 import in_parts, load_rows, rows_dot
from triton_attention.fused_probs import normalizer
from triton_attention.fused_common import fused_arguments
from triton_attention.launch import launch, strided
from triton_attention.logits import Options, exponential
from triton_attention.operators import define_op, matmul_flops
from triton_attention.tile_choice import compile_options, tile_for
from triton_attention.tiles import head, split_program, store_tile, visible


@triton.jit
def _mean_weights_kernel(
    q_ptr, stride_qb, stride_qh, stride_qm, stride_qd,
    k_ptr, stride_kb, stride_kh, stride_kn, stride_kd,
    lse_ptr, stats_ptr, mean_ptr, stride_wb, stride_wm, scale, H, GROUP, M, N, diagonal,
    D: tl.constexpr, CAUSAL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    OPTIONS: tl.constexpr = Options(
        D, D, 1, False, CAUSAL, False, False, 0.0, EXACT, False, EXACT, False, EXACT, PRECISION,
        BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_D,
    )
    col_tiles = tl.cdiv(N, BLOCK_N)
    tile, off_b, _ = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M) * col_tiles, 1)
    start_m, start_n = tile // col_tiles * BLOCK_M, tile % col_tiles * BLOCK_N
    ACC: tl.constexpr = lse_ptr.dtype.element_ty
    scale = tl.cast(scale, ACC)  # as float64 kernels compute

    offs_m, offs_n, offs_d = start_m + tl.arange(0, BLOCK_M), start_n + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    heads = H
    if CAUSAL:
        heads = tl.where(start_n < start_m + BLOCK_M + diagonal, H, 0)  # none: the whole tile is in the future
    for h in range(0, heads):
        off_h = off_b * 0 + h
        top, inverse = normalizer(lse_ptr, stats_ptr, (off_b.to(tl.int64) * H + off_h) * M, offs_m, M, EXACT)
        q_head = head(q_ptr, (stride_qb, stride_qh, stride_qm, stride_qd), (M, D), off_b, off_h)
        k_head = head(k_ptr, (stride_kb, stride_kh, stride_kn, stride_kd), (N, D), off_b, off_h // GROUP)
        qk = tl.zeros([BLOCK_M, BLOCK_N], ACC)
        for start_d in range(0, D, BLOCK_D):  # more than one only of heads wider than BLOCK_D
            q = load_rows(q_head, offs_m, start_d + offs_d, PRECISION, True, D % BLOCK_D != 0)
            k = load_rows(k_head, offs_n, start_d + offs_d, PRECISION, True, D % BLOCK_D != 0)
            qk = rows_dot(q, k, qk, PRECISION)
        p = exponential(qk, qk, top[:, None], scale, False, OPTIONS)
        if EXACT:
            p *= inverse[:, None]
        total += p
    if CAUSAL:  # what is hidden is 0, or NaN in a row that has one
        hidden = tl.zeros([BLOCK_M], ACC)
        for h in range(0, H):
            top, inverse = normalizer(lse_ptr, stats_ptr, (off_b.to(tl.int64) * H + h) * M, offs_m, M, EXACT)
            hidden += 0.0 * top
            if EXACT:
                hidden += 0.0 * inverse
        total = tl.where(visible(offs_m, offs_n, diagonal), total, hidden[:, None])
    mean_ptr += off_b.to(tl.int64) * stride_wb
    store_tile(mean_ptr, (stride_wm, 1), (M, N), offs_m, offs_n, total / H)


@define_op(
    "mean_weights", fake=lambda q, k, *_: q.new_empty(q.shape[0], q.shape[2], k.shape[2]),
    flops=lambda q, k, *_: matmul_flops(q, k[2], q[3]),
)
def mean_weights_op(
    q: torch.Tensor, k: torch.Tensor, lse: torch.Tensor, stats: torch.Tensor, scale: float, diagonal: int | None
) -> torch.Tensor:
    """The mean over the heads of e^(scale Q K^T - lse), [B, M, N] in the dtype of q [B, H, M, D] and k [B, Hk, N, D];
    lse and stats are those of fused_op for the same q, k, scale and causal bound (right = diagonal)."""
    (B, H, M, D), (Hk, N), dtype = q.shape, k.shape[1:3], q.dtype
    mean = q.new_empty(B, M, N)
    if mean.numel() == 0:
        return mean
    q, k, _, constants = fused_arguments(q, k, None, scale, 0.0, 0.0, None, diagonal)  # k: no factor in place of V's
    scale = 1.0 if dtype == torch.float64 else scale  # it is in q then
    tile = tile_for("mean weights", dtype, D, diagonal is not None, q.device)
    programs = B * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N)
    if 2 * M <= tile.BLOCK_M or programs < processors(q.device):  # a walk over the heads takes its time in any tile
        tile = tile_for("mean weights, few", dtype, D, diagonal is not None, q.device)
    block_d = constants["BLOCK_D"] if dtype == torch.float32 else min(tile.BLOCK_D, constants["BLOCK_D"])
    q, k = in_parts(constants["PRECISION"], q, k)
    launch(
        _mean_weights_kernel, B * triton.cdiv(M, tile.BLOCK_M) * triton.cdiv(N, tile.BLOCK_N),
        *strided(q, k), lse, stats, mean, mean.stride(0), mean.stride(1), scale, H, H // max(Hk, 1), M, N,
        diagonal or 0, D=constants["D"], CAUSAL=diagonal is not None, EXACT=constants["EXACT"],
        PRECISION=constants["PRECISION"], BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK_D=block_d,
        **compile_options(tile, q.device),
    )
    return mean
