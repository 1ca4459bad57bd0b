r"""Device side of the fused kernels: which keys a query sees, and what a tile of scores is before the softmax.

    keys   0    begin   full_begin      full_end     end    N
           |      |  masked  |   no mask   |  masked  |     |      the tiles that a block of queries visits:
           | skip |   ///    |             |   \\\    | skip|      only the edges of the visible band pay for a mask

A query m sees the keys from m + left to m + right, each side only where its flag LEFT or RIGHT says so: causal is
right = 0, a sliding window has both sides. A mask or bias tensor forbids more, key by key.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention.tiles import LN2, LOG2E, Matrix, exp  # noqa: F401  LN2 is for others


class Options(NamedTuple):
    """What a build of the fused kernels is compiled for: the constants that all of them take."""

    D: int
    DV: int
    SIGN: int  # of the scale
    LEFT: bool  # whether the band ends on this side
    RIGHT: bool
    HAS_MASK: bool
    HAS_BIAS: bool
    SOFTCAP: float  # 0: none
    SCALED: bool  # whether logits are scaled before the maximum is taken of them
    DROPOUT: bool
    PAIRED: bool  # whether P comes from the maximum and the sum of a row, not from lse
    TCGEN05: bool  # whether products of 16 bits are those of Blackwell, in tiles of 64 rows
    EXACT: bool  # whether P and dS are as exact as float32
    PRECISION: str  # of float32 products, see dot_precision in tile_choice.py
    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    BLOCK_DV: int
    ONE_ROW: bool = False  # whether the mask is the same for all queries
    ALIGNED: bool = False  # whether its rows are contiguous, and as long as a multiple of 16
    LISTED: bool = False  # whether the tiles to visit are listed in memory, see mask_map.py
    NARROW: int = 0  # of tiles that are partly visible: so many columns at a time
    HAS_KEYS: bool = False  # whether there is a second mask, of keys


class Band(NamedTuple):
    """The keys that query m of a head sees: from m + left to m + right, those that the mask [M, N] allows, and a
    second one of the keys of each batch element: (pointer, its two strides, the batch element)."""

    left: tl.tensor
    right: tl.tensor
    mask: Matrix
    keys: tuple


@triton.jit
def key_range(start_m, first_n, last_n, band, OPTIONS: tl.constexpr):
    """(begin, full_begin, full_end, end): a block of BLOCK_M queries visits key tiles begin ... end of first_n ...
    last_n; of those from full_begin to full_end every query sees every key. All but end are first_n + k * BLOCK_N.
    With a mask or a bias no tile is known to be full: then full_begin = full_end = end."""
    BLOCK_M: tl.constexpr = OPTIONS.BLOCK_M
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    begin, full_begin, full_end, end = first_n, first_n, last_n, last_n
    if OPTIONS.RIGHT:
        end = tl.maximum(tl.minimum(start_m + BLOCK_M + band.right, last_n), first_n)
        full_end = tl.maximum(tl.minimum(start_m + 1 + band.right, last_n), first_n)
    if OPTIONS.LEFT:
        begin = first_n + tl.maximum(tl.minimum(start_m + band.left, last_n) - first_n, 0) // BLOCK_N * BLOCK_N
        seen = tl.maximum(tl.minimum(start_m + BLOCK_M - 1 + band.left, last_n), first_n)
        full_begin = first_n + tl.cdiv(seen - first_n, BLOCK_N) * BLOCK_N
    full_end = tl.maximum(first_n + (full_end - first_n) // BLOCK_N * BLOCK_N, full_begin)
    if OPTIONS.HAS_MASK or OPTIONS.HAS_BIAS:
        full_begin, full_end = end, end
    return begin, full_begin, full_end, end


@triton.jit
def query_range(start_n, M, band, OPTIONS: tl.constexpr):
    """key_range seen from the keys: the query tiles that a block of BLOCK_N keys visits."""
    BLOCK_M: tl.constexpr = OPTIONS.BLOCK_M
    BLOCK_N: tl.constexpr = OPTIONS.BLOCK_N
    begin, full_begin, full_end, end = 0, 0, M, M
    if OPTIONS.RIGHT:
        begin = tl.maximum(tl.minimum(start_n - band.right, M), 0) // BLOCK_M * BLOCK_M
        full_begin = tl.cdiv(tl.maximum(tl.minimum(start_n + BLOCK_N - 1 - band.right, M), 0), BLOCK_M) * BLOCK_M
    if OPTIONS.LEFT:
        end = tl.maximum(tl.minimum(start_n + BLOCK_N - band.left, M), 0)
        full_end = tl.maximum(tl.minimum(start_n + 1 - band.left, M), 0)
    full_end = tl.maximum(full_end // BLOCK_M * BLOCK_M, full_begin)
    if OPTIONS.HAS_MASK or OPTIONS.HAS_BIAS:
        full_begin, full_end = end, end
    return begin, full_begin, full_end, end


@triton.jit
def trimmed(first_n, last_n, offs_m, band, OPTIONS: tl.constexpr):
    """(first_n, last_n) without the tiles at either end that the mask hides from all of a few queries: padding is at an
    end, and to look at the mask once more, as wide as it comes, is sooner done than lists of tiles are."""
    WIDTH: tl.constexpr = 1024 if OPTIONS.ONE_ROW else 256 if OPTIONS.BLOCK_M <= 16 else 32
    first, last = last_n, first_n
    for start_n in range(first_n, last_n, WIDTH):
        offs_n = start_n + tl.arange(0, WIDTH)
        mask = load_mask(band, offs_m, offs_n, 0, True, OPTIONS)
        seen = mask.to(tl.int1) if OPTIONS.HAS_MASK else mask != float("-inf")
        seen = seen & (offs_n < last_n)[None, :]
        if not OPTIONS.ONE_ROW:
            seen = seen & (offs_m < band.mask.shape[0])[:, None]
        first = tl.minimum(first, tl.min(tl.min(tl.where(seen, offs_n[None, :], last_n), 0), 0))
        last = tl.maximum(last, tl.max(tl.max(tl.where(seen, offs_n[None, :] + 1, first_n), 0), 0))
    first = first_n + (first - first_n) // OPTIONS.BLOCK_N * OPTIONS.BLOCK_N
    return first, tl.maximum(first, last)


class Visits(NamedTuple):
    """The tiles that a block visits: those within `bounds` (see key_range), or if LISTED those of its list: `plains` of
    them from the front, where everything is visible, `partials` from the back."""

    bounds: tuple
    list_ptr: tl.tensor
    capacity: tl.tensor
    plains: tl.tensor
    partials: tl.tensor


@triton.jit
def listed(bounds, lists_ptr, counts_ptr, strides, capacity, off_b, off_h, row, split, OPTIONS: tl.constexpr):
    """The Visits of a row of tiles; see map_of in mask_map.py."""
    if OPTIONS.LISTED:
        at = off_b * strides[0] + off_h * strides[1] + row * strides[2] + split
        plains, partials = tl.load(counts_ptr + 2 * at), tl.load(counts_ptr + 2 * at + 1)
        return Visits(bounds, lists_ptr + at.to(tl.int64) * capacity, capacity, plains, partials)
    else:
        return Visits(bounds, 0, 0, 0, 0)


@triton.jit
def steps(visits, SIZE: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """(first, last, gap) of a loop over tiles: those where everything is visible, or if MASKED the others. Those lie on
    both sides of a gap, and one loop over either side would be code twice: start_of() has the gap in it."""
    bounds = visits.bounds
    if OPTIONS.LISTED:
        return 0, (visits.partials if MASKED else visits.plains) * SIZE, 0
    elif MASKED:
        return bounds[0], bounds[3] - (bounds[2] - bounds[1]), bounds[2] - bounds[1]
    else:
        return bounds[1], bounds[2], 0


@triton.jit
def listed_tile(visits, at, SIZE: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """The tile of SIZE on the list for such a loop at `at`.

    A loop loads it a step ahead and carries it along. Loaded in the step where it is used, Triton's pipeline would
    fetch the list in one stage and keys in the next, and have them no sooner than they are needed.
    """
    if OPTIONS.LISTED:
        number = at // SIZE
        count = visits.partials if MASKED else visits.plains
        place = visits.capacity - 1 - number if MASKED else number
        return tl.load(visits.list_ptr + place, mask=number < count, other=0)
    else:
        return 0


@triton.jit
def start_of(visits, at, gap, tile, SIZE: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """Where the tile begins that such a loop is at; tile is what listed_tile() returned for it."""
    if OPTIONS.LISTED:
        return tl.multiple_of(tile * SIZE + at % SIZE, 16)
    elif MASKED:
        return at + tl.where(at < visits.bounds[1], 0, gap)
    else:
        return at


@triton.jit
def hyperbolic_tangent(x):
    """tanh by a quotient of exponentials, by what it lacks of 1 away from 0, and by its series near 0."""
    SMALL: tl.constexpr = 0.05 if x.dtype == tl.float64 else 0.3
    e = tl.exp(-2.0 * tl.abs(x))
    quotient = tl.where(e > 0.4, 1.0 - e, 2.0 * e) / (1.0 + e)
    large = tl.where(e > 0.4, quotient, 1.0 - quotient)
    y = x * x
    series = 1.0 - y * (1.0 / 3 - y * (2.0 / 15 - y * (17.0 / 315 - y * (62.0 / 2835 - y * 1382.0 / 155925))))
    series *= tl.abs(x)
    return tl.where(tl.abs(x) < SMALL, series, large) * tl.where(x < 0, -1.0, 1.0)


@triton.jit
def load_keys(ptr, stride_b, stride_n, off_b, offs_n, N):
    """Of a second mask [B, N] the places of some keys; 0 past the last."""
    return tl.load(ptr + off_b.to(tl.int64) * stride_b + offs_n.to(tl.int64) * stride_n, mask=offs_n < N, other=0)


@triton.jit
def add_keys(tile, keys):
    """The sum of two floating masks, which does not overflow in 16 bits."""
    WIDE: tl.constexpr = tl.float64 if tile.dtype == tl.float64 else tl.float32
    return tile.to(WIDE) + keys.to(WIDE)


@triton.jit
def load_mask(band, offs_m, offs_n, M_AXIS: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """The tile of the mask for logits(), with its queries along M_AXIS; one row (or column) of it if all are the same.

    To be called before the product of Q and K: of two layouts that meet in the scores, Triton gives the sums of rows
    that of the later one in the program. After it, the softmax would be computed twice, once in the layout of the load.
    """
    if MASKED and (OPTIONS.HAS_MASK or OPTIONS.HAS_BIAS):
        ptr, strides, shape = band.mask
        if OPTIONS.ONE_ROW:
            keys = tl.load(ptr + offs_n.to(tl.int64) * strides[1], mask=offs_n < shape[1], other=0)
            tile = tl.expand_dims(keys, M_AXIS)
        else:
            inside = offs_n < shape[1]
            if OPTIONS.ALIGNED:  # the same, but for Triton too the same for 16 keys, so that a thread loads several
                inside = offs_n // 16 * 16 < shape[1]
            columns = offs_n if OPTIONS.ALIGNED else offs_n.to(tl.int64)  # a large mask may be transposed
            ptrs = ptr + offs_m.to(tl.int64)[:, None] * strides[0] + columns[None, :] * strides[1]
            tile = tl.load(ptrs, mask=(offs_m < shape[0])[:, None] & inside[None, :], other=0)
            if M_AXIS == 1:
                tile = tl.trans(tile)
        if OPTIONS.HAS_KEYS:
            keys_ptr, stride_b, stride_n, off_b = band.keys
            keys = tl.expand_dims(load_keys(keys_ptr, stride_b, stride_n, off_b, offs_n, shape[1]), M_AXIS)
            tile = tile.to(tl.int1) & keys.to(tl.int1) if OPTIONS.HAS_MASK else add_keys(tile, keys)
        return tile
    else:
        return band.left


@triton.jit
def logits(qk, m, n, band, mask, scale, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """(x, raw): the logits x of a tile of Q K^T, -inf where m may not see n; without the scale if not SCALED. raw is
    what was multiplied last: by the softcap, tanh of the scaled product; else by the scale, the product.

    m and n index the tile and broadcast against it, either way round; mask is what load_mask() returned.
    """
    x, raw = qk, qk
    if OPTIONS.SOFTCAP > 0.0:
        raw = hyperbolic_tangent(qk * scale * (1.0 / OPTIONS.SOFTCAP))
        x = raw * OPTIONS.SOFTCAP
    elif OPTIONS.SCALED:
        x = qk * scale
    if MASKED:
        summed: tl.constexpr = m.shape[0] == 1  # along the queries, of which those past the last must not count
        keep = m < band.mask.shape[0] if summed else m >= 0
        if OPTIONS.HAS_MASK:  # False outside of it
            visible = mask.to(tl.int1)  # of a bool tensor, or one of bytes
            keep = visible & keep if OPTIONS.ONE_ROW else visible
        else:
            keep = keep & (n < band.mask.shape[1])
        if OPTIONS.HAS_BIAS:
            bias = mask.to(qk.dtype)
            keep = keep & (bias != float("-inf"))
            x = x + bias if OPTIONS.SOFTCAP > 0.0 else tl.fma(qk, tl.cast(scale, qk.dtype), bias)
        if OPTIONS.RIGHT:
            keep = keep & (n <= m + band.right)
        if OPTIONS.LEFT:
            keep = keep & (n >= m + band.left)
        x = tl.where(keep, x, float("-inf"))
    return x, raw


@triton.jit
def exponential(x, raw, top, scale, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """e^(logit - top) of what logits() returned.

    SCALED, the difference is rounded once, and the same way in every kernel and every tile: a compiler that fuses a
    product and a subtraction here and not there would give P of the backward pass other sums than 1. Else the scale,
    log2(e) and the subtraction are one multiply-add: enough for what 16 bits will hold.
    """
    if not OPTIONS.SCALED:
        return tl.exp2(x * (scale * LOG2E) - top * LOG2E)
    elif OPTIONS.HAS_BIAS and OPTIONS.EXACT:
        return tl.exp(x - top)
    elif OPTIONS.HAS_BIAS:  # a row with a tile of zeros in its mask has no maximum of -1e9 that needs the difference;
        # but the lowest of all, if its scores are -inf, of which log2(e) times as much would be -inf too
        return exp(x - top) if MASKED else tl.exp2(x * LOG2E - tl.maximum(top, -2.3e38) * LOG2E)
    else:
        factor = tl.full(raw.shape, OPTIONS.SOFTCAP, raw.dtype) if OPTIONS.SOFTCAP > 0.0 else scale
        p = tl.exp(tl.fma(raw, factor, -top))
        return tl.where(x == float("-inf"), 0.0, p) if MASKED else p


@triton.jit
def lowest(BLOCK: tl.constexpr, dtype: tl.constexpr, SCALED: tl.constexpr):
    """The maximum of rows that have seen nothing yet: finite, also times log2(e) if not SCALED, so that -inf less it is
    no NaN. What follows of it is right: a sum of 0, and with its logarithm an lse of -inf."""
    LARGEST: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38
    return tl.full([BLOCK], -LARGEST if SCALED else -0.69 * LARGEST, dtype)


@triton.jit
def store_pair(ptr, rows, first, second, mask):
    """Two numbers a row, next to each other."""
    tl.store(ptr + 2 * rows, first, mask=mask)
    tl.store(ptr + 2 * rows + 1, second, mask=mask)


@triton.jit
def load_pair(ptr, rows, mask, other):
    """Inverse of store_pair; outside of the mask (other, 0)."""
    return tl.load(ptr + 2 * rows, mask=mask, other=other), tl.load(ptr + 2 * rows + 1, mask=mask, other=0.0)
