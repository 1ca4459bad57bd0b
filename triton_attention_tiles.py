"""Tiles: the only file that builds a pointer grid, a boundary mask or a dot.

    columns   0 ...... N         a matrix is (ptr, strides, shape), a tile the pair of its row and column
    rows 0  +----+----+--+       offsets; what lies outside `shape` reads the neutral element of the caller's
         .  |    |tile|//|       reduction (0 for a dot, -inf for a softmax) and is never written
         M  +----+----+--+
"""

import torch

import triton_attention_device  # noqa: F401  before triton: it chooses the mode
import triton
import triton.language as tl

# the dtype of a part of float32; in the interpreter, which cannot multiply bfloat16, the first part is the whole number
PART = tl.constexpr(tl.float32 if triton.knobs.runtime.interpret else tl.bfloat16)
# whether a product is one of NVIDIA's; Inductor compiles where no driver can be asked
NVIDIA = tl.constexpr(torch.version.cuda is not None and not triton.knobs.runtime.interpret)


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
    """acc + a @ b; PRECISION says how float32 is multiplied, see dot_precision in triton_attention_launch.py."""
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def hide_loads(x, HAS_MASK: tl.constexpr, HAS_BIAS: tl.constexpr, DROPOUT: tl.constexpr):
    """x, a float32 or float64 tile computed beside a mask or random bits, as an operand of a product.

    For mma.sync, Triton lays an operand out for the narrowest load among its elementwise ancestors, 8 bits of a bool
    mask, and halves that where bits are joined. Float64 then does not compile, and a product over fewer columns than
    the layout has is wrong (Triton 3.6 to 3.9). An instruction it knows nothing of, here an empty one, ends the search.
    """
    if HAS_MASK or DROPOUT or (HAS_BIAS and x.dtype == tl.float64):
        if NVIDIA:
            CONSTRAINTS: tl.constexpr = "=d,0" if x.dtype == tl.float64 else "=f,0"
            x = tl.inline_asm_elementwise("", CONSTRAINTS, [x], dtype=x.dtype, is_pure=False, pack=1)
    return x


@triton.jit
def split_float(x):
    """Three bfloat16 whose sum is the float32 x: its upper, middle and lower eight bits."""
    high = x.to(PART)
    rest = x - high.to(tl.float32)
    middle = rest.to(PART)
    return high, middle, (rest - middle.to(tl.float32)).to(PART)


@triton.jit
def load_parts(
    ptr, strides, shape, rows, cols, PRECISION: tl.constexpr,
    CHECK_ROWS: tl.constexpr = True, CHECK_COLS: tl.constexpr = True,
):
    """A tile as product and rows_dot take it, a tuple: of the tile, or under "parts" of the three parts of float32.

    Those are side by side in memory, as triton_attention_parts.py has written them, in tiles as wide as `cols`.
    """
    if PRECISION != "parts":
        return (load_tile(ptr, strides, shape, rows, cols, 0.0, CHECK_ROWS, CHECK_COLS),)
    else:
        width: tl.constexpr = cols.shape[0]
        high = load_tile(ptr, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        middle = load_tile(ptr + width, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        low = load_tile(ptr + 2 * width, strides, shape, rows, cols, 0.0, CHECK_ROWS, False)
        return high, middle, low


@triton.jit
def split_finite(x):
    """split_float, but of NaN and of infinity the upper part only: the others would be NaN."""
    high, middle, low = split_float(x)
    finite = tl.abs(x) < float("inf")
    return high, tl.where(finite, middle, 0.0).to(PART), tl.where(finite, low, 0.0).to(PART)


@triton.jit
def whole(parts, PRECISION: tl.constexpr):
    """The numbers of load_parts again."""
    if PRECISION == "parts":
        return parts[0].to(tl.float32) + (parts[1].to(tl.float32) + parts[2].to(tl.float32))
    else:
        return parts[0]


@triton.jit
def map_finite(parts, PRECISION: tl.constexpr):
    """load_parts with large numbers for NaN and infinity: large, so that scores of -inf stay scores without weight."""
    LARGE: tl.constexpr = 65504.0 if parts[0].dtype == tl.float16 else 2.0**100
    large = tl.where(parts[0] > 0.0, LARGE, -LARGE).to(parts[0].dtype)
    high = tl.where(tl.abs(parts[0]) < float("inf"), parts[0], large)
    if PRECISION == "parts":
        return high, parts[1], parts[2]
    else:
        return (high,)


@triton.jit
def signed(parts, SIGN: tl.constexpr):
    """load_parts times a sign; never of float32, whose scale is applied to the scores."""
    return ((parts[0] * SIGN).to(parts[0].dtype),)


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
    """acc + a @ b of a tile just computed and one from load_parts."""
    if PRECISION == "parts":
        return six_products(split_float(a), b, acc)
    else:
        return dot(a.to(b[0].dtype), b[0], acc, PRECISION)


@triton.jit
def rows_dot(a, a_at, b, b_at, acc, D: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a @ b^T of tiles of rows from load_parts; a_at and b_at, (ptr, stride of a row, of a column, rows of the
    matrix, offsets of these rows), say where they came from.

    Under "bf16x6" and "ieee" float32 is loaded again, a slice of the head dim at a time: a wide tile that stays in
    registers would fill them with its parts, and a sum of slices is more exact than one of all, as PyTorch's is too.
    """
    if PRECISION == "parts":
        return six_products(a, (tl.trans(b[0]), tl.trans(b[1]), tl.trans(b[2])), acc)
    elif a[0].dtype == tl.float32 and PRECISION != "tf32":
        SLICE: tl.constexpr = 16
        for start_d in range(0, a[0].shape[1], SLICE):
            offs_d = start_d + tl.arange(0, SLICE)
            a_slice = load_tile(a_at[0], (a_at[1], a_at[2]), (a_at[3], D), a_at[4], offs_d)
            b_slice = load_tile(b_at[0], (b_at[1], b_at[2]), (b_at[3], D), b_at[4], offs_d)
            acc = dot(a_slice, tl.trans(b_slice), acc, PRECISION)
        return acc
    else:
        return dot(a[0], tl.trans(b[0]), acc, PRECISION)


@triton.jit
def inverse_sum(l_i):
    """1 / l_i in full precision (float32's own / may be two units off), and 1 for the sum 0 of a row without keys."""
    l_i = tl.where(l_i == 0.0, 1.0, l_i)
    if l_i.dtype == tl.float64:
        return 1.0 / l_i
    else:
        return tl.div_rn(1.0, l_i)


@triton.jit
def head_ptr(ptr, stride_b, stride_h, off_b, off_h):
    """First element of one head of a [B, H, rows, cols] tensor."""
    return ptr + off_b.to(tl.int64) * stride_b + off_h.to(tl.int64) * stride_h


@triton.jit
def split_program(pid, tiles, H):
    """Program number -> (tile, off_b, off_h): tiles of one head are neighbours, so that they share it in L2.

    One grid dimension: the others end at 65535 programs.
    """
    off_bh = pid // tiles
    return pid % tiles, off_bh // H, off_bh % H


@triton.jit
def visible(rows, cols, diagonal):
    """Causal rule for a tile: query m sees the keys n <= m + diagonal."""
    return cols[None, :] <= rows[:, None] + diagonal


@triton.jit
def load_visible(ptr, strides, shape, rows, cols, diagonal, other=0.0):
    """load_tile of what a causal query sees, rounded up to 16 keys: a mask that is constant over 16 elements
    leaves the loads as wide as they were."""
    ptrs = ptr + rows.to(tl.int64)[:, None] * strides[0] + cols.to(tl.int64)[None, :] * strides[1]
    inside = (rows[:, None] < shape[0]) & (cols[None, :] < shape[1])
    return tl.load(ptrs, mask=inside & visible(rows, cols // 16 * 16, diagonal), other=other)


@triton.jit
def keep_mask(seed, off_b, off_h, rows, start_n, dropout_p, BLOCK_N: tl.constexpr):
    """Dropout: which elements of the tile [rows, start_n : start_n + BLOCK_N] stay, each with 1 - dropout_p.

    Philox (Salmon et al., SC 2011) with seven rounds, keyed by the seed and counted by (n // 4, m, h, b): its four
    words are the four columns of a group, so an element's fate depends on (seed, b, h, m, n) and on nothing else.
    """
    groups = (start_n // 4 + tl.arange(0, BLOCK_N // 4)).to(tl.uint32)[None, :]
    zero = (rows * 0).to(tl.uint32)[:, None] + groups * 0
    c1, c2, c3 = zero + rows.to(tl.uint32)[:, None], zero + off_h.to(tl.uint32), zero + off_b.to(tl.uint32)
    r0, r1, r2, r3 = tl.philox(seed, zero + groups, c1, c2, c3, n_rounds=7)
    bits = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(rows.shape[0], BLOCK_N)
    return tl.uint_to_uniform_float(bits) >= dropout_p
