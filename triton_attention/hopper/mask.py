"""Which keys a tile of queries sees on Hopper: bounds, a mask for the tiles at the edges, and masks that are tensors.

The latter come as a list of tiles to visit and as bits, 32 to a word (mask_map.py). Only in partly visible tiles are
words read, a few by each thread, while the product is under way that they hide a part of.
"""

from typing import NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.ptx import opaque

ROWS = gl.constexpr(64)  # queries of a warpgroup


class MaskMap(NamedTuple):
    """A mask's lists of tiles, see map_of in mask_map.py, and its bits, see words_of. Beside a floating one, the steps
    for b, h and m are those of its tiles, 0 or 1, and words_ptr is a second one of keys, with word_n to the next b."""

    lists_ptr: gl.tensor
    counts_ptr: gl.tensor
    list_b: gl.tensor
    list_h: gl.tensor
    list_row: gl.tensor
    capacity: gl.tensor
    words_ptr: gl.tensor
    word_b: gl.tensor
    word_h: gl.tensor
    word_m: gl.tensor
    word_n: gl.tensor


def masks_inner_tiles(left, right):
    """Whether tiles of keys after a warpgroup's first need a mask: not where the diagonal is at a multiple of 64, and
    no window. Then 64 rows all see all keys of the other tiles, if any."""
    return left is not None or (right or 0) % ROWS.value != 0


def halves_first_tile(left, right, M, N):
    """Whether the first 64 of every 128 queries see only the first half of the 128 keys that they begin with."""
    return left is None and right is not None and right % (2 * ROWS.value) == 0 and M + right <= N


@gluon.jit
def key_tiles(start_m, SIZE: gl.constexpr, work, OPTIONS: gl.constexpr):
    """(first, last) tile of keys that SIZE queries from start_m see: one at least."""
    first_n, last_n = gl.to_tensor(0), opaque(work.N) - 1
    if OPTIONS.RIGHT:
        last_n = gl.maximum(gl.minimum(last_n, opaque(start_m + (SIZE - 1)) + work.right), 0)
    if OPTIONS.LEFT:
        first_n = gl.maximum(gl.minimum(start_m + work.left, last_n), 0)
    return first_n // OPTIONS.BLOCK_N, last_n // OPTIONS.BLOCK_N


@gluon.jit
def word_places(tile):
    """The rows [R, 1, 1], words [1, W, 1] and bits [1, 1, 32] of a tile [R, 32 W], in the layout of its registers."""
    ROWS_: gl.constexpr = tile.shape[0]
    WORDS: gl.constexpr = tile.shape[1] // 32
    layout: gl.constexpr = gl.reshape(tile, [ROWS_, WORDS, 32]).type.layout
    rows = gl.arange(0, ROWS_, gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    words = gl.arange(0, WORDS, gl.SliceLayout(0, gl.SliceLayout(2, layout)))
    bits = gl.arange(0, 32, gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    return gl.expand_dims(rows, 1), gl.expand_dims(words, 0), gl.expand_dims(gl.expand_dims(bits, 0), 1)


@gluon.jit
def words_of_head(off_b, off_h, work):
    """Where the words of a head begin."""
    steps = off_b.to(gl.int64) * opaque(work.map.word_b) + off_h.to(gl.int64) * opaque(work.map.word_h)
    return work.map.words_ptr + steps


@gluon.jit
def tile_words(
    words_ptr, first_row, first_column, pred, tile, work, LEFT: gl.constexpr, RIGHT: gl.constexpr,
    TRANSPOSED: gl.constexpr = False,
):
    """The words [R, W] of a tile of queries and keys, or if TRANSPOSED of keys and queries, of the head whose words
    begin at words_ptr, in the threads that have their elements: 0 in rows past the last, and if not pred. Bits outside
    of the bounds are 0."""
    row_step, word_step, end = opaque(work.map.word_m), opaque(work.map.word_n), opaque(work.M)
    if TRANSPOSED:
        row_step, word_step, end = opaque(work.map.word_n), opaque(work.map.word_m), opaque(work.N)
    rows, numbers, _ = word_places(tile)
    rows += first_row
    inside = pred & (rows < end) & (numbers >= 0)
    words = gl.load(words_ptr + rows * row_step + (first_column // 32 + numbers) * word_step, mask=inside, other=0)
    at = rows - (first_column + numbers * 32)  # the bit on the diagonal
    if RIGHT:
        words &= _bits_from(at - opaque(work.right)) if TRANSPOSED else _bits_to(at + opaque(work.right))
    if LEFT:
        words &= _bits_to(at - opaque(work.left)) if TRANSPOSED else _bits_from(at + opaque(work.left))
    return words


@gluon.jit
def _bits_from(first):
    """Words with the bits from `first` on, which may be outside of them."""
    return gl.where(first > 31, 0, (first * 0 - 1) << gl.maximum(first, 0))


@gluon.jit
def _bits_to(last):
    """Words with the bits up to `last`, which may be outside of them."""
    return ~_bits_from(last + 1)


@gluon.jit
def visible_bits(words, tile, layout: gl.constexpr):
    """Whether the bit of each element of a tile is set."""
    _, _, bits = word_places(tile)
    # what differs from thread to thread is shifted once a word; the rest are constants
    keep = ((gl.expand_dims(words, 2) >> (bits & 6)) & (1 << (bits & ~6))) != 0
    return gl.convert_layout(gl.reshape(keep, tile.shape), layout)


@gluon.jit
def add_key_mask(x, off_b, start_n, work, AXIS: gl.constexpr, layout: gl.constexpr):
    """A tile of a floating mask plus the second one of its keys, which lie along AXIS."""
    n = start_n + gl.arange(0, x.shape[AXIS], gl.SliceLayout(1 - AXIS, layout))
    keys_ptr = work.map.words_ptr + off_b.to(gl.int64) * opaque(work.map.word_n)
    keys = gl.load(keys_ptr + n, mask=n < opaque(work.N), other=0.0).to(gl.float32)
    return x + gl.expand_dims(keys, 1 - AXIS)


@gluon.jit
def mask_scores(s, start_m, start_n, work, LEFT: gl.constexpr, RIGHT: gl.constexpr, layout: gl.constexpr):
    """Scores, -inf where a query does not see a key. Compared with constants, for want of registers (D 64 11 %)."""
    m = start_m + gl.arange(0, s.shape[0], gl.SliceLayout(1, layout))
    n = gl.expand_dims(gl.arange(0, s.shape[1], gl.SliceLayout(0, layout)), 0)
    thread_n, n = n & 6, n & ~6  # what differs from thread to thread, and what the compilers take for constants
    start_n = opaque(start_n)
    last_n = m * 0 + (opaque(work.N) - 1 - start_n)  # what there is to compute is computed for each row
    if RIGHT:
        last_n = gl.minimum(last_n, m + (work.right - start_n))
    keep = n <= gl.expand_dims(last_n, 1) - thread_n
    if LEFT:
        keep = keep & (n >= gl.expand_dims(m + (work.left - start_n), 1) - thread_n)
    return gl.where(keep, s, float("-inf"))
