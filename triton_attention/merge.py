"""Attention over parts of the keys, merged by their log-sum-exp: each part counts by its share of the exponentials.

    keys    0 ........ N/3 ........ 2N/3 ........ N        m = max m_i,   l = sum of e^(m_i - m) l_i
            m_1 l_1 acc_1   m_2 l_2 acc_2   m_3 l_3 acc_3  O = sum of e^(m_i - m) acc_i / l

So few queries and many keys (decoding) keep a GPU busy: programs share the keys of a query tile ("Flash-Decoding", Dao
et al., 2023); and a caller can put together what was computed apart, on two devices or two caches.
"""

import math

import torch

from triton_attention.device import processors
import triton
import triton.language as tl

from triton_attention.launch import launch, strided
from triton_attention.logits import load_pair, store_pair
from triton_attention.tiles import inverse_sum, load_tile

MOST_SPLITS = 128


@triton.jit(do_not_specialize=["H", "M", "splits", "rows"])
def _merge_kernel(
    part_ptr, part_stats_ptr, o_ptr, stride_ob, stride_oh, stride_om, stride_od, lse_ptr, stats_ptr,
    H, M, splits, rows, PAIRED: tl.constexpr, DV: tl.constexpr, MOST: tl.constexpr, BLOCK_DV: tl.constexpr,
):
    """One row of O from its splits, MOST at most: one more step of the online softmax, all of them at once."""
    row = tl.program_id(0).to(tl.int64)
    offs_s, offs_e = tl.arange(0, MOST), tl.arange(0, BLOCK_DV)
    m_s, l_s = load_pair(part_stats_ptr, offs_s * rows + row, offs_s < splits, float("-inf"))
    m = tl.max(m_s, 0)
    l = tl.sum(tl.exp(m_s - m) * l_s, 0)  # noqa: E741
    o = tl.zeros([BLOCK_DV], m.dtype)
    for start_s in range(0, splits, 16):
        offs_t = start_s + tl.arange(0, 16)
        m_t, _ = load_pair(part_stats_ptr, offs_t * rows + row, offs_t < splits, float("-inf"))
        alpha = tl.exp(m_t - m)[:, None]
        parts = load_tile(part_ptr + row * DV, (rows * DV, 1), (splits, DV), offs_t, offs_e)
        o += tl.sum(tl.where(alpha == 0.0, 0.0, alpha * parts), 0)
    o *= inverse_sum(l)
    o_ptr += row // (H * M) * stride_ob + row // M % H * stride_oh + row % M * stride_om
    tl.store(o_ptr + offs_e * stride_od, o.to(o_ptr.dtype.element_ty), mask=offs_e < DV)
    tl.store(lse_ptr + row, m + tl.log(l))
    if PAIRED:
        store_pair(stats_ptr, row, m, l, row >= 0)


def count_splits(programs, N, block_n, device):
    """Into how many parts the keys are split: enough programs for the GPU, each with at least four tiles of keys."""
    return max(1, min(2 * processors(device) // programs, triton.cdiv(N, 4 * block_n), MOST_SPLITS))


def merge_splits(part, part_stats, o, lse, stats, PAIRED, DV, BLOCK_DV):
    """Fill o, lse and stats (see fused_op) from the splits [splits, B, H, M, ...]."""
    (B, H, M), splits = o.shape[:3], part.shape[0]
    launch(
        _merge_kernel, B * H * M,
        part, part_stats, *strided(o), lse, stats, H, M, splits, B * H * M,
        PAIRED=PAIRED, DV=DV, BLOCK_DV=BLOCK_DV, MOST=MOST_SPLITS, num_warps=4,
    )


def merge_attention(
    o1: torch.Tensor, lse1: torch.Tensor, o2: torch.Tensor, lse2: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over two sets of keys from the attention over each: (o, lse).

    Each result counts by its share of the exponentials, e^lse1 / (e^lse1 + e^lse2).

    Args:
        o1, o2: [B, H, M, Dv], from attention_fused with the same queries and different keys.
        lse1, lse2: [B, H, M], their natural log-sum-exp, from return_lse=True; -inf where nothing was seen.

    Returns:
        (o like o1, lse like lse1), computed in float32 (float64 for float64); differentiable.

    Raises:
        TypeError: not a dense floating tensor. ValueError: shapes that do not belong together.
    """
    for name, t in (("o1", o1), ("lse1", lse1), ("o2", o2), ("lse2", lse2)):
        if not isinstance(t, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(t).__name__}")
        if not t.is_floating_point() or t.layout != torch.strided:
            raise TypeError(f"{name} must be a dense floating tensor, got {t.dtype}, {t.layout}")
        shape = o1.shape if name == "o2" else o1.shape[:-1]
        if name != "o1" and t.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, as o1 is {list(o1.shape)}, got {tuple(t.shape)}")
    top = torch.maximum(lse1, lse2).detach()
    top = top.masked_fill(top == -math.inf, 0.0)
    w1, w2 = torch.exp(lse1 - top)[..., None], torch.exp(lse2 - top)[..., None]
    total = w1 + w2
    nothing = total == 0
    total = total.masked_fill(nothing, 1.0)
    o = (w1 * o1.masked_fill(w1 == 0, 0.0) + w2 * o2.masked_fill(w2 == 0, 0.0)) / total
    return o.to(o1.dtype), (top + total.squeeze(-1).log()).masked_fill(nothing.squeeze(-1), -math.inf)
