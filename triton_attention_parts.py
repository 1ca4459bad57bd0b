"""float32 on tensor cores: each number as the sum of three bfloat16, written out once before the kernels read it often.

    float32   s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm      x = high + middle + low, 8 bits of the 24 each
              high ......--------                     a b = a.high b.high + (a.high b.middle + a.middle b.high)
              middle             --------                 + (a.high b.low + a.middle b.middle + a.low b.high) + ...
              low                        --------     what is left out is below 2^-25 of |a| |b|

Six products of bfloat16 at 16 times the rate of float32's own units leave time to spare; but to split a tile costs as
much as to multiply it, and every program would split the keys again. On an H100, [4, 16, 4096, 64], forward 16.8 -> 3.9
ms, backward 118 -> 14.5 ms. (Henry, Tang and Heinecke, "Leveraging the bfloat16 artificial intelligence datatype for
higher-precision computations", 2019.)
"""

import torch

import triton_attention_device  # noqa: F401  before triton: it chooses the mode
import triton
import triton.language as tl

from triton_attention_launch import launch
from triton_attention_tiles import PART, head_ptr, load_tile, split_finite, split_program, store_tile


@triton.jit(do_not_specialize=["H", "M"])
def _split_kernel(
    x_ptr, stride_xb, stride_xh, stride_xm, stride_xd, parts_ptr, H, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), H)
    offs_m, offs_d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    x = load_tile(
        head_ptr(x_ptr, stride_xb, stride_xh, off_b, off_h), (stride_xm, stride_xd), (M, D), offs_m, offs_d
    )
    high, middle, low = split_finite(x)
    parts_ptr += (off_b.to(tl.int64) * H + off_h) * M * (3 * BLOCK_D)
    strides, shape = (3 * BLOCK_D, 1), (M, BLOCK_D)
    store_tile(parts_ptr, strides, shape, offs_m, offs_d, high)
    store_tile(parts_ptr + BLOCK_D, strides, shape, offs_m, offs_d, middle)
    store_tile(parts_ptr + 2 * BLOCK_D, strides, shape, offs_m, offs_d, low)


def in_parts(precision, *tensors):
    """The tensors as a kernel of this PRECISION takes them."""
    return tuple(split(t) for t in tensors) if precision == "parts" else tensors


def split(x):
    """The parts [B, H, M, 3 * W] of float32 x [B, H, M, D] for load_parts: W is the power of two >= 16 that holds D,
    with zeros between. What was expanded is written out."""
    (B, H, M, D), W = x.shape, max(16, triton.next_power_of_2(x.shape[3]))
    parts = x.new_empty(B, H, M, 3 * W, dtype=torch.float32 if PART.value == tl.float32 else torch.bfloat16)
    if parts.numel() == 0:
        return parts
    BLOCK_M = max(1, 4096 // W)
    launch(
        _split_kernel, B * H * triton.cdiv(M, BLOCK_M),
        x, *x.stride(), parts, H, M, D=int(D), BLOCK_M=BLOCK_M, BLOCK_D=W, num_warps=4,
    )
    return parts
