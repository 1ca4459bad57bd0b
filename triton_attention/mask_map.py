"""A map of a mask: which tiles a fused kernel need not visit, and in which of them it need not read the mask.

    mask, 32 x 32 elements a unit     tiles of a kernel, by rows      of each row a list of tiles
      2 2 1 0                           plain   partial                 0 1        plain from the front, partial
      2 2 1 0                                                                      from the back, hidden not at all
      2 2 0 1                           plain   partial                 0 1
      2 2 0 2

    0 hidden, no query sees a key; 2 plain, all see all (of a float mask: all zeros); 1 partial, anything else

The units are classified in one pass over the mask, with its dimensions of size 1 as they are. Lists are made of them
for the tiles of each kernel, where a causal bound or a window hides more. A causal mask that comes as a tensor costs
what is_causal costs, padding what the keys that are not padded cost, documents what their blocks cost.

Block-sparse masks: Dong et al., "FlexAttention", 2024, whose BlockMask has two lists too.
"""

import torch

import triton
import triton.language as tl

from triton_attention.device import INTERPRETED
from triton_attention.launch import launch
from triton_attention.tiles import head_ptr, load_tile, split_program

UNIT = 32  # elements of a unit in either direction


@triton.jit
def _classify_kernel(
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, units_ptr, H, M, N,
    IS_BOOL: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):
    """WIDTH units side by side."""
    row_units, column_units = tl.cdiv(M, UNIT), tl.cdiv(N, UNIT)
    spans = tl.cdiv(column_units, WIDTH)
    tile, off_b, off_h = split_program(tl.program_id(0), row_units * spans, H)
    row, first = tile // spans, tile % spans * WIDTH
    offs_m, offs_n = row * UNIT + tl.arange(0, UNIT), first * UNIT + tl.arange(0, WIDTH * UNIT)
    mask = head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h)
    # what does not count: rows past the last, and columns past the one that is for all keys
    outside = (offs_m[:, None] >= M) | ((offs_n[None, :] > 0) & (N == 1))
    if IS_BOOL:
        x = load_tile(mask, (stride_am, stride_an), (M, N), offs_m, offs_n, False).to(tl.int32)
        seen, plain = x != 0, (x != 0) | outside
    else:
        x = load_tile(mask, (stride_am, stride_an), (M, N), offs_m, offs_n, float("-inf"))
        seen, plain = x != float("-inf"), (x == 0.0) | outside
    any_seen = tl.max(tl.max(tl.reshape(seen.to(tl.int32), [UNIT, WIDTH, UNIT]), 2), 0)
    all_plain = tl.min(tl.min(tl.reshape(plain.to(tl.int32), [UNIT, WIDTH, UNIT]), 2), 0)
    units = first + tl.arange(0, WIDTH)
    at = ((off_b.to(tl.int64) * H + off_h) * row_units + row) * column_units + units
    tl.store(units_ptr + at, (any_seen + all_plain).to(tl.int8), mask=units < column_units)


@triton.jit(do_not_specialize=["HEADS", "left", "right", "chunk"])
def _list_kernel(
    units_ptr, stride_ub, stride_uh, stride_um, stride_un, lists_ptr, counts_ptr,
    HEADS, ROWS, M, N, left, right, chunk, CAPACITY,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):
    """The list of one row of tiles, of queries or if TRANSPOSED of keys, over `chunk` of what it walks over; of GROUP
    heads together."""
    LENGTH = M if TRANSPOSED else N
    SIZE: tl.constexpr = BLOCK_M if TRANSPOSED else BLOCK_N  # of what it walks over
    splits = tl.cdiv(LENGTH, chunk)
    program, off_b, off_h = split_program(tl.program_id(0), ROWS * splits, HEADS)
    row, first = program // splits, program % splits * chunk
    last_tile = tl.cdiv(tl.minimum(first + chunk, LENGTH), SIZE)
    row_units, column_units = tl.cdiv(M, UNIT), tl.cdiv(N, UNIT)
    base = tl.program_id(0).to(tl.int64) * CAPACITY
    plains, partials = 0, 0
    for first_tile in range(first // SIZE, last_tile, BLOCK):
        tiles = first_tile + tl.arange(0, BLOCK)
        start_m = (tiles if TRANSPOSED else tiles * 0 + row) * BLOCK_M
        start_n = (tiles * 0 + row if TRANSPOSED else tiles) * BLOCK_N
        seen, plain = tiles < 0, tiles < last_tile
        for g in range(0, GROUP):
            head = units_ptr + off_b.to(tl.int64) * stride_ub + (off_h * GROUP + g).to(tl.int64) * stride_uh
            for i in tl.static_range((BLOCK_M + UNIT - 1) // UNIT):
                for j in tl.static_range((BLOCK_N + UNIT - 1) // UNIT):
                    m, n = start_m // UNIT + i, start_n // UNIT + j
                    inside = (m < row_units) & (n < column_units) & (tiles < last_tile)
                    unit = tl.load(head + m * stride_um + n * stride_un, mask=inside, other=0)
                    seen = seen | (unit > 0)
                    plain = plain & ((unit == 2) | (m >= row_units))
        # loads of plain tiles are not checked
        plain = plain & (start_m + BLOCK_M <= M if TRANSPOSED else start_n + BLOCK_N <= N)
        if RIGHT:
            seen = seen & (start_n <= start_m + (BLOCK_M - 1) + right)
            plain = plain & (start_n + (BLOCK_N - 1) <= start_m + right)
        if LEFT:
            seen = seen & (start_n + (BLOCK_N - 1) >= start_m + left)
            plain = plain & (start_n >= start_m + (BLOCK_M - 1) + left)
        is_plain, is_partial = (seen & plain).to(tl.int32), (seen & (plain == 0)).to(tl.int32)
        front = plains + tl.cumsum(is_plain, 0) - 1
        back = CAPACITY - partials - tl.cumsum(is_partial, 0)
        tl.store(lists_ptr + base + front, tiles, mask=is_plain > 0)
        tl.store(lists_ptr + base + back, tiles, mask=is_partial > 0)
        plains += tl.sum(is_plain, 0)
        partials += tl.sum(is_partial, 0)
    tl.store(counts_ptr + 2 * tl.program_id(0), plains)
    tl.store(counts_ptr + 2 * tl.program_id(0) + 1, partials)


LISTS_FROM = 0 if INTERPRETED else 1 << 18  # queries times keys; with fewer, all of the mask is read sooner


def _once(mask):
    """A mask without what was expanded: a dimension of stride 0 has size 1."""
    return mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]


def units_of(mask):
    """The units [b, h, M / 32, N / 32], int8, of a mask [B, H, M, N], expanded; each size is 1 where the mask's is.
    None where there is no mask, or lists of its tiles are not worth making."""
    if mask is None or mask.shape[2] * mask.shape[3] < LISTS_FROM:
        return None
    mask = _once(mask)
    b, h, M, N = mask.shape
    units = torch.empty(b, h, triton.cdiv(M, UNIT), triton.cdiv(N, UNIT), dtype=torch.int8, device=mask.device)
    WIDTH = 8
    launch(
        _classify_kernel, b * h * units.shape[2] * triton.cdiv(units.shape[3], WIDTH),
        mask, *mask.stride(), units, h, M, N,
        IS_BOOL=mask.dtype == torch.bool, UNIT=UNIT, WIDTH=WIDTH, num_warps=4,
    )
    return units


def map_of(mask, units, tile, M, N, left, right, *, transposed=False, group=1, chunk=None):
    """What a fused kernel with this tile takes of a mask [B, H, M, N], expanded, or None, and of its units: the list of
    arguments (lists, counts, three strides, capacity), and its constants.

    The list of row tile r (and part s of the keys, of `chunk` each) of head (b, h) begins at capacity * (b * strides[0]
    + h * strides[1] + r * strides[2] + s), its two counts at twice that number. transposed: rows of tiles are keys, and
    a list is that of `group` heads.
    """
    width = tile.BLOCK_M if transposed else tile.BLOCK_N
    about = {"ONE_ROW": False, "ALIGNED": False, "LISTED": False, "NARROW": width}
    if mask is not None:
        about["NARROW"] = min(tile.narrow or width, width)
        about["ONE_ROW"] = mask.stride(2) == 0
        about["ALIGNED"] = N % 16 == 0 and mask.stride(3) == 1
    if units is None:
        return [None, None, 0, 0, 0, 0], about
    b, h, mask_rows = _once(mask).shape[:3]
    group = min(group, h)
    one_row = mask_rows == 1 and left is None and right is None and not transposed  # for all tiles of queries
    rows = 1 if one_row else triton.cdiv(N, tile.BLOCK_N) if transposed else triton.cdiv(M, tile.BLOCK_M)
    length = M if transposed else N
    chunk = length if chunk is None else chunk
    splits, capacity = triton.cdiv(length, chunk), triton.cdiv(chunk, width)
    heads = h // group
    lists = torch.empty(b * heads * rows * splits * capacity, dtype=torch.int32, device=mask.device)
    counts = torch.empty(b * heads * rows * splits * 2, dtype=torch.int32, device=mask.device)
    # one row of units, or one column of them, is for all
    strides = [stride if size > 1 else 0 for stride, size in zip(units.stride(), _once(mask).shape, strict=True)]
    launch(
        _list_kernel, b * heads * rows * splits,
        units, *strides, lists, counts, heads, rows, M, N, left or 0, right or 0, chunk, capacity,
        LEFT=left is not None, RIGHT=right is not None, TRANSPOSED=transposed, GROUP=group, UNIT=UNIT,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK=64, num_warps=1,
    )
    step = rows * splits
    where = [0 if b == 1 else heads * step, 0 if heads == 1 else step, 0 if rows == 1 else splits]
    return [lists, counts, *where, capacity], about | {"LISTED": True}
