"""Which keys a tile of queries sees on Hopper, and a mask for the tiles at the edges."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.ptx import opaque

ROWS = gl.constexpr(64)  # queries of a warpgroup


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
