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

from typing import NamedTuple

import torch

import triton
import triton.language as tl

from triton_attention.launch import launch, strided
from triton_attention.tiles import Matrix, dot, head, load_tile, split_program, store_tile


# the dtype of a part of float32; in the interpreter, which cannot multiply bfloat16, the first part is the whole number
PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)


@triton.jit
def split_float(x):
    """Three bfloat16 whose sum is the float32 x: its upper, middle and lower eight bits."""
    high = x.to(PART)
    rest = x - high.to(tl.float32)
    middle = rest.to(PART)
    return high, middle, (rest - middle.to(tl.float32)).to(PART)


class Rows(NamedTuple):
    """Rows of a matrix as product and rows_dot take them: a tile, or under "parts" the three parts of float32, and
    where they came from."""

    parts: tuple
    matrix: Matrix
    offs: tl.tensor


@triton.jit
def load_rows(
    matrix, rows, cols, PRECISION: tl.constexpr, CHECK_ROWS: tl.constexpr = True, CHECK_COLS: tl.constexpr = True
):
    """Rows of a matrix. Under "parts", those of float32 are side by side in memory, as split has written them, in tiles
    as wide as `cols`."""
    if PRECISION != "parts":
        return Rows((load_tile(*matrix, rows, cols, 0.0, CHECK_ROWS, CHECK_COLS),), matrix, rows)
    else:
        width: tl.constexpr = cols.shape[0]
        ptr, strides, shape = matrix
        high = load_tile(ptr, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        middle = load_tile(ptr + width, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        low = load_tile(ptr + 2 * width, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        return Rows((high, middle, low), matrix, rows)


@triton.jit
def split_finite(x):
    """split_float, but of NaN and of infinity the upper part only: the others would be NaN."""
    high, middle, low = split_float(x)
    finite = tl.abs(x) < float("inf")
    return high, tl.where(finite, middle, 0.0).to(PART), tl.where(finite, low, 0.0).to(PART)


@triton.jit
def whole(rows, PRECISION: tl.constexpr):
    """The numbers of load_rows."""
    if PRECISION == "parts":
        return rows.parts[0].to(tl.float32) + (rows.parts[1].to(tl.float32) + rows.parts[2].to(tl.float32))
    else:
        return rows.parts[0]


@triton.jit
def map_finite(rows, PRECISION: tl.constexpr):
    """Rows with large numbers for NaN and infinity: large, so that scores of -inf stay scores without weight."""
    high = rows.parts[0]
    LARGE: tl.constexpr = 65504.0 if high.dtype == tl.float16 else 2.0**100
    large = tl.where(high > 0.0, LARGE, -LARGE).to(high.dtype)
    high = tl.where(tl.abs(high) < float("inf"), high, large)
    if PRECISION == "parts":
        return Rows((high, rows.parts[1], rows.parts[2]), rows.matrix, rows.offs)
    else:
        return Rows((high,), rows.matrix, rows.offs)


@triton.jit
def signed(rows, SIGN: tl.constexpr):
    """Rows times a sign; never of float32, whose scale is applied to the scores."""
    return Rows(((rows.parts[0] * SIGN).to(rows.parts[0].dtype),), rows.matrix, rows.offs)


@triton.jit
def six_products(a, b, acc):
    """acc + a @ b of float32 in parts of bfloat16, on tensor cores, the smallest first; left out are three products,
    together below 2^-25 of |a| |b|."""
    small = tl.dot(a[1], b[1])
    small = tl.dot(a[0], b[2], small)
    small = tl.dot(a[2], b[0], small)
    small = tl.dot(a[0], b[1], small)
    small = tl.dot(a[1], b[0], small)
    small = tl.where(tl.abs(small) < float("inf"), small, 0.0)  # what infinity is comes from the upper parts
    return acc + tl.dot(a[0], b[0], small)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b of a tile just computed and of rows."""
    if PRECISION == "parts":
        return six_products(split_float(a), b.parts, acc)
    else:
        return dot(a.to(b.parts[0].dtype), b.parts[0], acc, PRECISION)


@triton.jit
def rows_dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b^T of rows.

    Under "bf16x6" and "ieee" float32 is loaded again, a slice of the head dim at a time: a wide tile that stays in
    registers would fill them with its parts, and a sum of slices is more exact than one of all, as PyTorch's is too.
    """
    if PRECISION == "parts":
        return six_products(a.parts, (tl.trans(b.parts[0]), tl.trans(b.parts[1]), tl.trans(b.parts[2])), acc)
    elif a.parts[0].dtype == tl.float32 and PRECISION != "tf32":
        SLICE: tl.constexpr = 16
        for start_d in range(0, a.parts[0].shape[1], SLICE):
            offs_d = start_d + tl.arange(0, SLICE)
            a_slice = load_tile(*a.matrix, a.offs, offs_d)
            b_slice = load_tile(*b.matrix, b.offs, offs_d)
            acc = dot(a_slice, tl.trans(b_slice), acc, PRECISION)
        return acc
    else:
        return dot(a.parts[0], tl.trans(b.parts[0]), acc, PRECISION)


@triton.jit(do_not_specialize=["H", "M"])
def _split_kernel(
    x_ptr, stride_xb, stride_xh, stride_xm, stride_xd, parts_ptr, H, M,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):
    tile, off_b, off_h = split_program(tl.program_id(0), tl.cdiv(M, BLOCK_M), H)
    offs_m, offs_d = tile * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    x_head = head(x_ptr, (stride_xb, stride_xh, stride_xm, stride_xd), (M, D), off_b, off_h)
    x = load_tile(*x_head, offs_m, offs_d)
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
    """The parts [B, H, M, 3 * W] of float32 x [B, H, M, D] for load_rows: W is the power of two >= 16 that holds D,
    with zeros between. What was expanded is written out."""
    (B, H, M, D), W = x.shape, max(16, triton.next_power_of_2(x.shape[3]))
    parts = x.new_empty(B, H, M, 3 * W, dtype=torch.float32 if PART.value == tl.float32 else torch.bfloat16)
    if parts.numel() == 0:
        return parts
    BLOCK_M = max(1, 4096 // W)
    launch(
        _split_kernel, B * H * triton.cdiv(M, BLOCK_M),
        *strided(x), parts, H, M, D=int(D), BLOCK_M=BLOCK_M, BLOCK_D=W, num_warps=4,
    )
    return parts
