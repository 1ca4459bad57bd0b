"""A map of a mask: which tiles a fused kernel need not visit, and in which of them it need not read the mask.

    mask, 32 x 32 elements a unit     tiles of a kernel, by rows      of each row a list of tiles
      2 2 1 0                           plain   partial                 0 1        plain from the front, partial
      2 2 1 0                                                                      from the back, hidden not at all
      2 2 0 1                           plain   partial                 0 1
      2 2 0 2

    0 hidden, no query sees a key; 2 plain, all see all (of a float mask: all zeros); 1 partial, anything else

The units are classified in one pass over the mask, with its dimensions of size 1 as they are. Lists are made of them
for the tiles of each kernel, where a causal bound or a window hides more. A causal mask that comes as a tensor costs
what is_causal costs, padding what the keys that are not padded cost, documents what their blocks cost. A second mask,
[B, N] of keys alone, has its part in units and bits: the one of all queries is not made for every batch element.

Block-sparse masks: Dong et al., "FlexAttention", 2024, whose BlockMask has two lists too.
"""

import torch

import triton
import triton.language as tl

from triton_attention.device import INTERPRETED
from triton_attention.launch import launch, strided
from triton_attention.logits import add_keys, load_keys
from triton_attention.tiles import head_ptr, load_tile, split_program

UNIT = 32  # elements of a unit in either direction
WIDTH = 8  # units that a program looks at, side by side
SAMPLE = 1  # rows of them that it looks at first: enough of a bias, in which no unit is plain or hidden


@triton.jit
def _seen_and_plain(
    mask, strides, M, N, offs_m, offs_n, keys_ptr, stride_yb, stride_yn, off_b,
    IS_BOOL: tl.constexpr, HAS_KEYS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):
    """(whether a query sees a key, whether all see all), 0 or 1, of WIDTH units side by side, or some rows of them."""
    # what does not count: rows past the last, and columns past the one that is for all keys
    outside = (offs_m[:, None] >= M) | ((offs_n[None, :] > 0) & (N == 1))
    if IS_BOOL:
        x = load_tile(mask, strides, (M, N), offs_m, offs_n, False).to(tl.int32) != 0
        if HAS_KEYS:
            x = x & (load_keys(keys_ptr, stride_yb, stride_yn, off_b, offs_n, N) != 0)[None, :]
        seen, plain = x, x | outside
    else:
        x = load_tile(mask, strides, (M, N), offs_m, offs_n, float("-inf"))
        if HAS_KEYS:
            x = add_keys(x, load_keys(keys_ptr, stride_yb, stride_yn, off_b, offs_n, N)[None, :])
        seen, plain = x != float("-inf"), (x == 0.0) | outside
    any_seen = tl.max(tl.max(tl.reshape(seen.to(tl.int32), [offs_m.shape[0], WIDTH, UNIT]), 2), 0)
    all_plain = tl.min(tl.min(tl.reshape(plain.to(tl.int32), [offs_m.shape[0], WIDTH, UNIT]), 2), 0)
    return any_seen, all_plain


@triton.jit
def _classify_kernel(
    mask_ptr, stride_ab, stride_ah, stride_am, stride_an, keys_ptr, stride_yb, stride_yn, units_ptr, H, M, N,
    IS_BOOL: tl.constexpr, HAS_KEYS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr, SAMPLE: tl.constexpr,
):
    """WIDTH units side by side. They are read to their end only if their first rows leave one of them undecided."""
    row_units, column_units = tl.cdiv(M, UNIT), tl.cdiv(N, UNIT)
    spans = tl.cdiv(column_units, WIDTH)
    tile, off_b, off_h = split_program(tl.program_id(0), row_units * spans, H)
    row, first = tile // spans, tile % spans * WIDTH
    offs_m, offs_n = row * UNIT + tl.arange(0, UNIT), first * UNIT + tl.arange(0, WIDTH * UNIT)
    mask = head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h)
    sampled = row * UNIT + tl.arange(0, SAMPLE)
    any_seen, all_plain = _seen_and_plain(
        mask, (stride_am, stride_an), M, N, sampled, offs_n, keys_ptr, stride_yb, stride_yn, off_b,
        IS_BOOL, HAS_KEYS, UNIT, WIDTH,
    )
    units = first + tl.arange(0, WIDTH)
    partial = (any_seen > all_plain) | (units >= column_units)
    if (row * UNIT + SAMPLE < M) & (tl.min(partial.to(tl.int32), 0) == 0):
        any_seen, all_plain = _seen_and_plain(
            mask, (stride_am, stride_an), M, N, offs_m, offs_n, keys_ptr, stride_yb, stride_yn, off_b,
            IS_BOOL, HAS_KEYS, UNIT, WIDTH,
        )
    at = ((off_b.to(tl.int64) * H + off_h) * row_units + row) * column_units + units
    tl.store(units_ptr + at, (any_seen + all_plain).to(tl.int8), mask=units < column_units)


@triton.jit
def _ones(x):
    """Four bytes, each 1 where it was not 0."""
    return (((x & 0x7F7F7F7F) + 0x7F7F7F7F | x) >> 7) & 0x01010101


@triton.jit
def _bits_kernel(
    mask_ptr, stride_ab, stride_ah, stride_am, keys_ptr, stride_yb, units_ptr, words_ptr, H, M, N, WORDS,
    TRANSPOSED: tl.constexpr, HAS_KEYS: tl.constexpr, UNIT: tl.constexpr, WIDTH: tl.constexpr,
):
    """Units as _classify_kernel, and their bits, of a mask of which an element is four bytes: a word for 32 keys of a
    query, or if TRANSPOSED for 32 queries of a key. N counts bytes, strides elements."""
    row_units, column_units = tl.cdiv(M, UNIT), tl.cdiv(N, UNIT)
    spans = tl.cdiv(column_units, WIDTH)
    tile, off_b, off_h = split_program(tl.program_id(0), row_units * spans, H)
    row, first = tile // spans, tile % spans * WIDTH
    offs_m, quads = row * UNIT + tl.arange(0, UNIT), first * (UNIT // 4) + tl.arange(0, WIDTH * UNIT // 4)
    mask = head_ptr(mask_ptr, stride_ab, stride_ah, off_b, off_h)
    x = load_tile(mask, (stride_am, 1), (M, N // 4), offs_m, quads, 0)
    x = _ones(x)
    if HAS_KEYS:
        x &= _ones(load_keys(keys_ptr, stride_yb, 1, off_b, quads, N // 4))[None, :]
    head, units = off_b.to(tl.int64) * H + off_h, first + tl.arange(0, WIDTH)
    parts = tl.reshape(x, [UNIT, WIDTH, UNIT // 4])
    outside = (offs_m >= M)[:, None, None]
    seen, plain = parts != 0, (parts == 0x01010101) | outside
    any_seen, all_plain = tl.max(tl.max(seen.to(tl.int32), 2), 0), tl.min(tl.min(plain.to(tl.int32), 2), 0)
    at = (head * row_units + row) * column_units + units
    tl.store(units_ptr + at, (any_seen + all_plain).to(tl.int8), mask=units < column_units)
    if TRANSPOSED:  # a byte holds eight queries, then a word four bytes
        bits = tl.reshape(x << (tl.arange(0, UNIT) % 8)[:, None], [UNIT // 8, 8, WIDTH * UNIT // 4])
        octets, places = tl.sum(bits, 1), 8 * tl.arange(0, UNIT // 8)[:, None]
        for i in tl.static_range(4):
            words, columns = tl.sum(((octets >> 8 * i) & 0xFF) << places, 0), 4 * quads + i
            tl.store(words_ptr + (head * WORDS + row) * N + columns, words.to(tl.int32), mask=columns < N)
    else:  # four bytes become four bits: the products of 2^0, 2^8, 2^16 and 2^24 meet above 2^24
        nibbles = ((parts * 0x01020408) >> 24) & 0xF
        words = tl.sum(nibbles << 4 * tl.arange(0, UNIT // 4)[None, None, :], 2)
        ptrs = words_ptr + (head * WORDS + units[None, :]) * M + offs_m[:, None]
        tl.store(ptrs, words.to(tl.int32), mask=(units[None, :] < WORDS) & (offs_m[:, None] < M))


@triton.jit
def _look(
    tiles, inside, start_m, start_n, batch_ptr, first_h, strides, M, N, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """(seen, plain) of some tiles: whether a query of GROUP heads sees a key, and whether all of them see all."""
    row_units, column_units = tl.cdiv(M, UNIT), tl.cdiv(N, UNIT)
    seen, plain = tiles < 0, inside
    for g in range(0, GROUP):
        for i in tl.static_range((BLOCK_M + UNIT - 1) // UNIT):
            for j in tl.static_range((BLOCK_N + UNIT - 1) // UNIT):
                m, n = start_m // UNIT + i, start_n // UNIT + j
                exists = (m < row_units) & (n < column_units) & inside
                ptrs = batch_ptr + (first_h + g).to(tl.int64) * strides[0] + m * strides[1] + n * strides[2]
                unit = tl.load(ptrs, mask=exists, other=0)
                seen = seen | (unit > 0)
                plain = plain & ((unit == 2) | (m >= row_units))
    if RIGHT:
        seen = seen & (start_n <= start_m + (BLOCK_M - 1) + right)
        plain = plain & (start_n + (BLOCK_N - 1) <= start_m + right)
    if LEFT:
        seen = seen & (start_n + (BLOCK_N - 1) >= start_m + left)
        plain = plain & (start_n >= start_m + (BLOCK_M - 1) + left)
    return seen, plain


@triton.jit(do_not_specialize=["HEADS", "left", "right", "chunk"])
def _list_kernel(
    units_ptr, stride_ub, stride_uh, stride_um, stride_un, lists_ptr, counts_ptr,
    HEADS, ROWS, M, N, left, right, chunk, CAPACITY,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, NONEMPTY: tl.constexpr, ORDERED: tl.constexpr,
    GROUP: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):
    """The list of one row of tiles, of queries or if TRANSPOSED of keys, over `chunk` of what it walks over; of GROUP
    heads together. ORDERED: all of them from the front, as twice their number, plus one if partial."""
    LENGTH = M if TRANSPOSED else N
    SIZE: tl.constexpr = BLOCK_M if TRANSPOSED else BLOCK_N  # of what it walks over
    splits = tl.cdiv(LENGTH, chunk)
    program, off_b, off_h = split_program(tl.program_id(0), ROWS * splits, HEADS)
    row, first = program // splits, program % splits * chunk
    last_tile = tl.cdiv(tl.minimum(first + chunk, LENGTH), SIZE)
    base = tl.program_id(0).to(tl.int64) * CAPACITY
    batch = units_ptr + off_b.to(tl.int64) * stride_ub
    plains, partials = 0, 0
    for first_tile in range(first // SIZE, last_tile, BLOCK):
        tiles = first_tile + tl.arange(0, BLOCK)
        start_m = (tiles if TRANSPOSED else tiles * 0 + row) * BLOCK_M
        start_n = (tiles * 0 + row if TRANSPOSED else tiles) * BLOCK_N
        seen, plain = _look(
            tiles, tiles < last_tile, start_m, start_n, batch, off_h * GROUP, (stride_uh, stride_um, stride_un),
            M, N, left, right, LEFT, RIGHT, GROUP, UNIT, BLOCK_M, BLOCK_N,
        )
        # loads of plain tiles are not checked
        plain = plain & (start_m + BLOCK_M <= M if TRANSPOSED else start_n + BLOCK_N <= N)
        if ORDERED:
            place = plains + tl.cumsum(seen.to(tl.int32), 0) - 1
            plain = plain & (start_n + BLOCK_N <= N)  # as bits past the last key are 0
            tl.store(lists_ptr + base + place, tiles * 2 + (plain == 0).to(tl.int32), mask=seen)
            plains += tl.sum(seen.to(tl.int32), 0)
        else:
            is_plain, is_partial = (seen & plain).to(tl.int32), (seen & (plain == 0)).to(tl.int32)
            front = plains + tl.cumsum(is_plain, 0) - 1
            back = CAPACITY - partials - tl.cumsum(is_partial, 0)
            tl.store(lists_ptr + base + front, tiles, mask=is_plain > 0)
            tl.store(lists_ptr + base + back, tiles, mask=is_partial > 0)
            plains += tl.sum(is_plain, 0)
            partials += tl.sum(is_partial, 0)
    if NONEMPTY:
        tl.store(lists_ptr + base + CAPACITY - 1, first // SIZE, mask=plains + partials == 0)
        partials = tl.where(plains + partials == 0, 1, partials)
    tl.store(counts_ptr + 2 * tl.program_id(0), plains)
    tl.store(counts_ptr + 2 * tl.program_id(0) + 1, partials)


@triton.jit(do_not_specialize=["HEADS", "left", "right"])
def _order_kernel(
    units_ptr, stride_ub, stride_uh, stride_um, stride_un, orders_ptr, totals_ptr, HEADS, ROWS, M, N, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, GROUP: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK: tl.constexpr,
):
    """For one tile of queries: how many tiles of keys it sees, and for each of them how many before and after it."""
    row, off_b, off_h = split_program(tl.program_id(0), ROWS, HEADS)
    columns = tl.cdiv(N, BLOCK_N)
    batch = units_ptr + off_b.to(tl.int64) * stride_ub
    orders = orders_ptr + (off_b.to(tl.int64) * HEADS + off_h) * columns * ROWS + row
    total = 0
    for second in tl.static_range(2):
        before = 0
        for first_tile in range(0, columns, BLOCK):
            tiles = first_tile + tl.arange(0, BLOCK)
            seen, _ = _look(
                tiles, tiles < columns, tiles * 0 + row * BLOCK_M, tiles * BLOCK_N, batch, off_h * GROUP,
                (stride_uh, stride_um, stride_un), M, N, left, right, LEFT, RIGHT, GROUP, UNIT, BLOCK_M, BLOCK_N,
            )
            count = seen.to(tl.int32)
            if second == 1:
                place = before + tl.cumsum(count, 0) - 1
                tl.store(orders + tiles * ROWS, place + (total - 1 - place) * 65536, mask=seen)
            before += tl.sum(count, 0)
        total = before
    tl.store(totals_ptr + tl.program_id(0), total)


LISTS_FROM = 0 if INTERPRETED else 1 << 18  # queries times keys; with fewer, all of the mask is read sooner


def once(mask):
    """A mask without what was expanded: a dimension of stride 0 has size 1."""
    return mask[tuple(slice(None) if stride else slice(1) for stride in mask.stride())]


def _beside(mask, keys):
    """A mask as once() gives it, with a batch of its own for each of a second mask [B, N], and its keys."""
    return once(mask) if keys is None else once(mask).expand(keys.shape[0], -1, -1, keys.shape[1])


def units_of(mask, keys=None, *, always=False):
    """The units [b, h, M / 32, N / 32], int8, of a mask [B, H, M, N], expanded, and a second one [B, N] of keys; each
    size is 1 where it is that of both. None where there is no mask, or unless always, lists of its tiles are not worth
    making."""
    if mask is None or not always and mask.shape[2] * mask.shape[3] < LISTS_FROM:
        return None
    mask = _beside(mask, keys)
    b, h, M, N = mask.shape
    units = torch.empty(b, h, triton.cdiv(M, UNIT), triton.cdiv(N, UNIT), dtype=torch.int8, device=mask.device)
    launch(
        _classify_kernel, b * h * units.shape[2] * triton.cdiv(units.shape[3], WIDTH),
        *strided(mask), *strided(keys, dims=2), units, h, M, N,
        IS_BOOL=mask.dtype == torch.bool, HAS_KEYS=keys is not None, UNIT=UNIT, WIDTH=WIDTH, SAMPLE=SAMPLE, num_warps=4,
    )
    return units


def bits_of(mask, keys=None, *, transposed=False):
    """(units, words, steps) of a bool mask [B, H, M, N], expanded, and a second one [B, N] of keys, in one pass: units
    as those of units_of; the bits of both in words of 32 (int32), the first in the lowest; and how many words it is to
    the next batch element, the next head, the next query and the next 32 keys: 0 where all are alike.

    A word is for 32 keys of a query: [b, h, N / 32, M], with zeros up to a multiple of 128 keys; transposed, for 32
    queries of a key: [b, h, M / 32, N], and the last steps are those to the next 32 queries and the next key.
    """
    N, one_row = mask.shape[3], mask.stride(2) == 0
    small = once(mask).shape[:2]
    mask = mask[: small[0], : small[1], : 1 if one_row else None]
    b, h = _beside(mask, keys).shape[:2]
    width = triton.cdiv(N, 4) * 4
    mask = _in_fours(mask, width).expand(b, -1, -1, -1)
    keys = None if keys is None else _in_fours(keys, width)
    if one_row and transposed:
        mask = mask.expand(b, h, UNIT, width)
    M = mask.shape[2]
    words = triton.cdiv(M if transposed else N, 128) * 4
    out = torch.empty(b, h, words, width if transposed else M, dtype=torch.int32, device=mask.device)
    units = torch.empty(b, h, triton.cdiv(M, UNIT), triton.cdiv(N, UNIT), dtype=torch.int8, device=mask.device)
    mask, keys = (None if t is None else t.view(torch.uint8).view(torch.int32) for t in (mask, keys))
    launch(
        _bits_kernel, b * h * units.shape[2] * triton.cdiv(units.shape[3], WIDTH),
        mask, *mask.stride()[:3], keys, 0 if keys is None else keys.stride(0), units, out, h, M, width, words,
        TRANSPOSED=transposed, HAS_KEYS=keys is not None, UNIT=UNIT, WIDTH=WIDTH, num_warps=4,
    )
    step_b, step_h, step_word, step = out.stride()
    step_m, step_n = (step_word, step) if transposed else (step, step_word)
    return units, out, (0 if b == 1 else step_b, 0 if h == 1 else step_h, 0 if one_row else step_m, step_n)


def _in_fours(mask, width):
    """A bool mask whose rows are `width` contiguous bytes, each from a multiple of four on; itself if they are."""
    fours = mask.stride(-1) == 1 and all(s % 4 == 0 for s in (mask.data_ptr(), mask.shape[-1], *mask.stride()[:-1]))
    return mask if fours else torch.nn.functional.pad(mask, (0, width - mask.shape[-1])).contiguous()


def unit_strides(units):
    """One row of units, or one column of them, is for all."""
    return [stride if size > 1 else 0 for stride, size in zip(units.stride(), units.shape, strict=True)]


def orders_of(units, tile, M, N, left, right, group):
    """In which order tiles of keys come to a tile of queries: (orders [b, h, N / BLOCK_N, M / BLOCK_M], of a visible
    tile how many there are before it, and how many after it times 2^16; totals [b, h, M / BLOCK_M], how many there are;
    the strides of totals for b and h, 0 where all are alike); heads in groups as in map_of."""
    b, h = units.shape[:2]
    group = min(group, h)
    heads, rows, columns = h // group, triton.cdiv(M, tile.BLOCK_M), triton.cdiv(N, tile.BLOCK_N)
    orders = torch.empty(b, heads, columns, rows, dtype=torch.int32, device=units.device)
    totals = torch.empty(b, heads, rows, dtype=torch.int32, device=units.device)
    launch(
        _order_kernel, b * heads * rows,
        units, *unit_strides(units), orders, totals, heads, rows, M, N, left or 0, right or 0,
        LEFT=left is not None, RIGHT=right is not None, GROUP=group, UNIT=UNIT,
        BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK=64, num_warps=1,
    )
    return orders, totals, (0 if b == 1 else heads * rows, 0 if heads == 1 else rows)


def map_of(
    mask, units, tile, M, N, left, right, *, transposed=False, nonempty=False, ordered=False, group=1, chunk=None,
):
    """What a fused kernel with this tile takes of a mask [B, H, M, N], expanded, or None, and of its units: the list of
    arguments (lists, counts, three strides, capacity), and its constants.

    The list of row tile r (and part s of the keys, of `chunk` each) of head (b, h) begins at capacity * (b * strides[0]
    + h * strides[1] + r * strides[2] + s), its two counts at twice that number. transposed: rows of tiles are keys, and
    a list is that of `group` heads. nonempty: a tile is on each list, if none is visible then a hidden one, as partial.
    ordered: all tiles from the front of a list, as twice their number, plus one if partial; their number is the first.
    """
    width = tile.BLOCK_M if transposed else tile.BLOCK_N
    about = {"ONE_ROW": False, "ALIGNED": False, "LISTED": False, "NARROW": width}
    if mask is not None:
        about["NARROW"] = min(tile.narrow or width, width)
        about["ONE_ROW"] = mask.stride(2) == 0 or mask.shape[2] == 1
        about["ALIGNED"] = N % 16 == 0 and mask.stride(3) == 1
    if units is None:
        return [None, None, 0, 0, 0, 0], about
    b, h, row_units = units.shape[:3]
    group = min(group, h)
    one_row = row_units == 1 and left is None and right is None and not transposed  # for all tiles of queries
    rows = 1 if one_row else triton.cdiv(N, tile.BLOCK_N) if transposed else triton.cdiv(M, tile.BLOCK_M)
    length = M if transposed else N
    chunk = length if chunk is None else chunk
    splits, capacity = triton.cdiv(length, chunk), triton.cdiv(chunk, width)
    heads = h // group
    lists = torch.empty(b * heads * rows * splits * capacity, dtype=torch.int32, device=mask.device)
    counts = torch.empty(b * heads * rows * splits * 2, dtype=torch.int32, device=mask.device)
    launch(
        _list_kernel, b * heads * rows * splits,
        units, *unit_strides(units), lists, counts, heads, rows, M, N, left or 0, right or 0, chunk, capacity,
        LEFT=left is not None, RIGHT=right is not None, TRANSPOSED=transposed, NONEMPTY=nonempty,
        ORDERED=ordered, GROUP=group, UNIT=UNIT, BLOCK_M=tile.BLOCK_M, BLOCK_N=tile.BLOCK_N, BLOCK=64, num_warps=1,
    )
    step = rows * splits
    where = [0 if b == 1 else heads * step, 0 if heads == 1 else step, 0 if rows == 1 else splits]
    return [lists, counts, *where, capacity], about | {"LISTED": True}
