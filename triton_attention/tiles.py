"""Tiles: the only file that builds a pointer grid or a boundary mask; and the dot of two of them.

    columns   0 ...... N         a matrix is P = (ptr, strides, shape), a tile the pair of its row and column
    rows 0  +----+----+--+       offsets, p = load_tile(*P, rows, cols); what lies outside `shape` reads the neutral
         .  |    |tile|//|       element of the caller's reduction (0 for a dot, -inf for a softmax) and is never
         M  +----+----+--+       written
"""

import math
from typing import NamedTuple

import torch

import triton
import triton.language as tl

LOG2E, LN2 = tl.constexpr(math.log2(math.e)), tl.constexpr(math.log(2.0))
# whether a product is one of NVIDIA's
NVIDIA = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)


class Matrix(NamedTuple):
    """A matrix in memory: load_tile(*matrix, rows, cols) and store_tile(*matrix, rows, cols, tile)."""

    ptr: tl.tensor
    strides: tuple
    shape: tuple


@triton.jit
def load_tile(
    ptr, strides, shape, rows, cols, other=0.0, CHECK_ROWS: tl.constexpr = True, CHECK_COLS: tl.constexpr = True
):
    """Tile [rows, cols] of a strided matrix; elements outside `shape` read `other`. A check may be left out where
    nothing is outside."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[0] + cols.to(tl.int64)[None, :] * strides[1]
    if CHECK_ROWS and CHECK_COLS:
        return tl.load(ptrs, mask=(rows[:, None] < shape[0]) & (cols[None, :] < shape[1]), other=other)
    elif CHECK_ROWS:
        return tl.load(ptrs, mask=rows[:, None] < shape[0], other=other)
    elif CHECK_COLS:
        return tl.load(ptrs, mask=cols[None, :] < shape[1], other=other)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(ptr, strides, shape, rows, cols, tile):
    """Inverse of load_tile; rounds to the dtype of `ptr`."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[0] + cols.to(tl.int64)[None, :] * strides[1]
    tl.store(ptrs, tile.to(ptr.dtype.element_ty), mask=(rows[:, None] < shape[0]) & (cols[None, :] < shape[1]))


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b; PRECISION says how float32 is multiplied, see dot_precision in tile_choice.py."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@tl.core.extern
def _bits_as_float(x, _semantic=None):
    """The float of as many bits, by a function of NVIDIA's libdevice that Triton takes for one with side effects."""
    functions = {
        (tl.int32,): ("__nv_int_as_float", tl.float32), (tl.int64,): ("__nv_longlong_as_double", tl.float64),
    }
    return tl.core.extern_elementwise("", "", [x], functions, is_pure=False, _semantic=_semantic)


@triton.jit
def hide_loads(x, OPTIONS: tl.constexpr):
    """x, a float32 or float64 tile computed beside a mask or random bits, as an operand of a product.

    For mma.sync, Triton lays an operand out for the narrowest load among its elementwise ancestors, 8 bits of a bool
    mask, and halves that where bits are joined. Float64 then does not compile, and a product over fewer columns than
    the layout has is wrong (Triton 3.6 to 3.9). A function with side effects, here one that does nothing, ends the
    search. Operands of Blackwell's tcgen05 lie in shared memory, and Triton's pipeline for it refuses such a function.
    """
    if OPTIONS.TCGEN05 and x.shape[0] % 64 == 0:
        return x
    if OPTIONS.HAS_MASK or OPTIONS.DROPOUT or (OPTIONS.HAS_BIAS and x.dtype == tl.float64):
        if NVIDIA:
            x = _bits_as_float(x.to(tl.int64 if x.dtype == tl.float64 else tl.int32, bitcast=True))
    return x


@triton.jit
def exp(x):
    """e^x; of float32 with 0 for results below 2^-126, which costs half the instructions of tl.exp."""
    if x.dtype == tl.float64:
        return tl.exp(x)
    else:
        return tl.exp2(x * LOG2E)


@triton.jit
def inverse_sum(l_i):
    """1 / l_i in full precision (float32's own / may be two units off), and 1 for the sum 0 of a row without keys."""
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    if l_i.dtype == tl.float64:
        return 1.0 / l_i
    else:
        return tl.div_rn(1.0, l_i)


@triton.jit
def finite(m):
    """The maximum of a row as something to subtract: 0 where every key is masked, as -inf - -inf is NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
def head_ptr(ptr, stride_b, stride_h, off_b, off_h):
    """First element of one head of a [B, H, rows, cols] tensor."""
    return ptr + off_b.to(tl.int64) * stride_b + off_h.to(tl.int64) * stride_h


class Heads(NamedTuple):
    """A tensor [B, H, rows, cols] in memory, of whose matrices head(*heads, off_b, off_h) is one."""

    ptr: tl.tensor
    strides: tuple
    shape: tuple  # of a matrix


@triton.jit
def head(ptr, strides, shape, off_b, off_h):
    """The Matrix of one head, given the four strides of the tensor."""
    return Matrix(head_ptr(ptr, strides[0], strides[1], off_b, off_h), (strides[2], strides[3]), shape)


@triton.jit
def split_program(pid, tiles, H):
    """Program number -> (tile, off_b, off_h): tiles of one head are neighbours, so that they share it in L2.

    One grid dimension: the others end at 65535 programs.
    """
    off_bh = pid // tiles
    return pid % tiles, off_bh // H, off_bh % H


@triton.jit
def visible(rows, cols, diagonal, TRANSPOSED: tl.constexpr = False):
    """Causal rule for a tile: query m sees the keys n <= m + diagonal; the rows are keys if TRANSPOSED."""
    if TRANSPOSED:
        return tl.trans(rows[None, :] <= cols[:, None] + diagonal)
    return cols[None, :] <= rows[:, None] + diagonal


@triton.jit
def visible_end(start_m, N, diagonal, BLOCK_M: tl.constexpr):
    """The end of the keys that some of the queries start_m : start_m + BLOCK_M sees, rounded up to 16 where that is
    below N: a mask that is constant over 16 elements leaves loads and stores as wide as they are without one."""
    return tl.minimum(tl.cdiv(tl.maximum(start_m + BLOCK_M + diagonal, 0), 16) * 16, N)


@triton.jit
def load_visible(ptr, strides, shape, rows, cols, diagonal, other=0.0):
    """load_tile of what a causal query sees, rounded up to 16 keys as in visible_end."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[0] + cols.to(tl.int64)[None, :] * strides[1]
    inside = (rows[:, None] < shape[0]) & (cols[None, :] < shape[1])
    return tl.load(ptrs, mask=inside & visible(rows, cols // 16 * 16, diagonal), other=other)


class DropoutMask(NamedTuple):
    """Of one head: a weight is dropped with probability p, else multiplied by `factor`."""

    p: tl.tensor
    factor: tl.tensor
    seed: tl.tensor
    off_b: tl.tensor
    off_h: tl.tensor


@triton.jit
def keep_mask(dropout, rows, start_n, BLOCK_N: tl.constexpr):
    """Which elements of the tile [rows, start_n : start_n + BLOCK_N] are not dropped.

    Philox (Salmon et al., SC 2011) with seven rounds, keyed by the seed and counted by (n // 4, m, h, b): its four
    words are the four columns of a group, so an element's fate depends on (seed, b, h, m, n) and on nothing else.
    """
    p, _, seed, off_b, off_h = dropout
    groups = (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = (rows * 0).to(tl.uint32)[:, None] + groups * 0
    c1, c2, c3 = zero + rows.to(tl.uint32)[:, None], zero + off_h.to(tl.uint32), zero + off_b.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, zero + groups, c1, c2, c3, n_rounds=7)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(rows.shape[0], BLOCK_N)
    return tl.uint_to_uniform_float(bits) >= p


@triton.jit
def load_scores(ptr, strides, shape, offs_m, offs_n, diagonal, other, CAUSAL: tl.constexpr):
    """Tile of S, P, dP or a mask, `other` where it lies outside or no query may see it."""
    if not CAUSAL:
        return load_tile(ptr, strides, shape, offs_m, offs_n, other)
    tile = load_visible(ptr, strides, shape, offs_m, offs_n, diagonal, other)
    return tl.where(visible(offs_m, offs_n, diagonal), tile, other)


@triton.jit
def load_logits(
    scores, mask, offs_m, offs_n, diagonal,
    ACC: tl.constexpr, CAUSAL: tl.constexpr, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr,
):
    """Tile of S + mask, of two matrices; where the mask forbids a key it is -inf, whatever S holds there."""
    s = load_scores(*scores, offs_m, offs_n, diagonal, float("-inf"), CAUSAL).to(ACC)
    if HAS_MASK:
        allowed = load_scores(*mask, offs_m, offs_n, diagonal, False, CAUSAL)
        s = tl.where(allowed.to(tl.int1), s, float("-inf"))  # of a bool tensor, or one of bytes
    if HAS_BIAS:
        bias = load_scores(*mask, offs_m, offs_n, diagonal, float("-inf"), CAUSAL).to(ACC)
        s = tl.where(bias == float("-inf"), float("-inf"), s + bias)
    return s
