"""P and dS of a tile, computed again in the backward pass from what is kept of each query: its Record.

    P  = e^(logits - top) * inverse       top is lse, and inverse is not used; for float32 and beside a floating mask
                                          they are the maximum and 1 / the sum of the row, free of the rounding of lse:
                                          of -1e9 + log 33 the log is lost
    dS = P * (dP - delta - rest)          delta = rowsum(dO * O) - dlse; rest is what rounding leaves of rowsum(dS)
"""

from typing import NamedTuple

import triton
import triton.language as tl

from triton_attention.logits import exponential, load_pair, logits, store_pair
from triton_attention.tiles import inverse_sum


@triton.jit
def normalizer(lse_ptr, stats_ptr, row, offs_m, M, PAIRED: tl.constexpr):
    """(top, inverse), with which P = e^(logits - top) * inverse. Of a query that sees nothing top is so large that P
    is 0 (but finite), also where K was inf and a large number stands for it (see map_finite)."""
    if PAIRED:
        top, l_i = load_pair(stats_ptr, row + offs_m, offs_m < M, float("-inf"))
        inverse = inverse_sum(l_i)
        blind = l_i == 0.0
    else:
        top = tl.load(lse_ptr + row + offs_m, mask=offs_m < M, other=float("-inf"))
        inverse = top
        blind = top == float("-inf")
    return tl.where(blind, 1e38, top), inverse


class Record(NamedTuple):
    """Of queries: P = e^(logits - top) * inverse, dS = P * (dP - delta - rest); rest is None before it is known."""

    top: tl.tensor
    inverse: tl.tensor
    delta: tl.tensor
    rest: tl.tensor


@triton.jit
def load_record(record_ptr, row, offs_m, M):
    """The Record of queries, where the top of one past the last is inf.

    In one piece: four loads of a number a query would each be made by all the threads that need one of them.
    """
    offs = (row + offs_m)[:, None] * 4 + tl.arange(0, 4)[None, :]
    record = tl.load(record_ptr + offs, mask=offs_m[:, None] < M, other=0.0)
    even, odd = tl.split(tl.reshape(record, [record.shape[0], 2, 2]))
    top, delta = tl.split(even)
    inverse, rest = tl.split(odd)
    return Record(tl.where(offs_m < M, top, float("inf")), inverse, delta, rest)


@triton.jit
def store_record(record_ptr, rows, record, mask):
    """Inverse of load_record."""
    store_pair(record_ptr, 2 * rows, record.top, record.inverse, mask)
    store_pair(record_ptr, 2 * rows + 1, record.delta, record.rest, mask)


@triton.jit
def probs(
    qk, record, offs_m, offs_n, band, mask, scale, M_AXIS: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr
):
    """(P before dropout, tanh where there is a softcap) of a tile with its queries along M_AXIS, 0 or 1."""
    m, n = tl.expand_dims(offs_m, 1 - M_AXIS), tl.expand_dims(offs_n, M_AXIS)
    x, raw = logits(qk, m, n, band, mask, scale, MASKED, OPTIONS)
    p = exponential(x, raw, tl.expand_dims(record.top, 1 - M_AXIS), scale, MASKED, OPTIONS)
    if OPTIONS.PAIRED:
        p *= tl.expand_dims(record.inverse, 1 - M_AXIS)
    return p, raw


@triton.jit
def dscores(p, dp, tanh, record, M_AXIS: tl.constexpr, MASKED: tl.constexpr, OPTIONS: tl.constexpr):
    """(d loss / d logit, d loss / d (scale Q K^T)) of a tile of P and dP."""
    ds = dp - tl.expand_dims(record.delta, 1 - M_AXIS)
    if OPTIONS.EXACT and record.rest is not None:
        ds -= tl.expand_dims(record.rest, 1 - M_AXIS)
    ds *= p
    ds_qk = ds
    if OPTIONS.SOFTCAP > 0.0:
        ds_qk = ds * (1.0 - tanh * tanh)
    if MASKED:  # a hidden key may hold NaN
        ds, ds_qk = tl.where(p == 0.0, 0.0, ds), tl.where(p == 0.0, 0.0, ds_qk)
    return ds, ds_qk
