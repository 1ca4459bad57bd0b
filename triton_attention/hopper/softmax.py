"""The softmax of a tile of scores on Hopper, in the registers of wgmma: what overlaps the exponentials.

A thread has two rows of a tile [64, keys], in each of them two columns of every eight:

    running_max     of a row over its quarter of the columns, then over the four threads that share it
    exponentials    2^(scale s - maximum), of all columns or of one half after the other
    partial_sums    of a thread's own columns: added over the four threads when all tiles are done

The exponentials take the longest, eight cycles a warp and instruction; all else is to overlap them, which is in the
hands of ptxas. What it made of which order: NOTES.md.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from triton_attention.hopper.ptx import computed_together

LOWEST = gl.constexpr(-3.4028234663852886e38)  # the running maximum before the first key: the least finite number


@gluon.jit
def running_max(s, m_i, scale, WARPGROUPS: gl.constexpr, layout: gl.constexpr, BASE: gl.constexpr = 1.0):
    """(alpha, new maximum), base 2, or another of which BASE is the logarithm. The maximum stays as it is until it has
    grown by 8, a factor of 256 at least, so that alpha is 1 but for a few tiles. It begins with LOWEST, not -inf, and
    so can always be subtracted from scores."""
    x = s
    if WARPGROUPS == 3:  # whose registers are few: no long chain of instructions that wait for each other
        for _ in gl.static_range(4):
            x = gl.max(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), 1)
    m_new = gl.maximum(m_i, gl.convert_layout(gl.max(x, 1), gl.SliceLayout(1, layout)) * scale)
    if WARPGROUPS == 3:
        m_new = computed_together(m_new)
    m_new = gl.where(m_new > m_i + 8.0, m_new, m_i)
    return gl.exp2((m_i - m_new) * BASE), m_new


@gluon.jit
def exponentials(s, m_i, scale):
    return gl.exp2(s * scale - broadcast_rows(m_i, s))


@gluon.jit
def split_columns(x):
    """The first half of the columns, and the second; a thread has some of each."""
    return gl.split(gl.permute(gl.reshape(x, [x.shape[0], 2, x.shape[1] // 2]), (0, 2, 1)))


@gluon.jit
def join_columns(x, y):
    """The inverse of split_columns."""
    return gl.reshape(gl.permute(gl.join(x, y), (0, 2, 1)), [x.shape[0], 2 * x.shape[1]])


@gluon.jit
def partial_sums(p):
    """A row's sum over the columns of each of the four threads that share it: added at the end."""
    return gl.sum(gl.sum(gl.reshape(p, [p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def broadcast_rows(x, tile):
    """x, a number for each row, in the threads that have these rows of a tile; broadcasts against it."""
    return gl.expand_dims(gl.convert_layout(x, gl.SliceLayout(1, tile.type.layout)), 1)
