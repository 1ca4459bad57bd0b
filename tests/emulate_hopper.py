"""Run the Hopper kernels' source on an emulated GPU (emulate_gluon.py): every kind of edge, and planted bugs.

A bug is planted in a line that a comment in the kernel marks, `# mutate: release-k`.

    python3 -m tests.emulate_hopper      a minute; says how each planted bug shows
"""

import argparse
import os
import re
import sys
from pathlib import Path

if __name__ == "__main__":
    argparse.ArgumentParser("python3 -m tests.emulate_hopper", description=__doc__.split("\n")[0]).parse_args()
    os.environ["TRITON_INTERPRET"] = "1"  # for the kernels before and after

import torch  # noqa: E402

from tests.emulate_gluon import Barrier, Descriptor, Pointer, current, load, run_threads  # noqa: E402
from tests.reference import torch_fused  # noqa: E402
from triton_attention.hopper import backward as kernels, forward as forward_kernels  # noqa: E402
from triton_attention.logits import LOG2E  # noqa: E402
from triton_attention.mask_map import bits_of, map_of, orders_of, units_of  # noqa: E402
from triton_attention.tuned import Tile  # noqa: E402

HOPPER = Path(forward_kernels.__file__).parent
FORWARD, BACKWARD, SCORES, VALUES = (HOPPER / f"{name}.py" for name in ("forward", "backward", "scores", "values"))
MASK = HOPPER / "mask.py"
SHARED = [HOPPER / f"{name}.py" for name in ("mask", "nan_repair", "softmax")]


def forward(
    q, k, v, scale, left=None, right=None, block_m=128, block_d=64, stages=2, programs=2, section=2, mask=None,
    key_mask=None, source=None,
):
    """(O, lse, its log) of the kernel; q [B, H, M, D], k and v [B, Hk, N, D], D up to block_d, scale > 0, mask or None
    [B, H, M, N], expanded."""
    kernel = load("".join(path.read_text() for path in SHARED) + (source or FORWARD.read_text()))
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    row_tiles, block_n, q_stages = -(-M // block_m), *((64, 1) if block_d == 256 else (128, 2))
    o, lse = torch.full_like(q, torch.nan), torch.full((B * H * M,), torch.nan)
    counter, items = torch.zeros(1, dtype=torch.int32), B * H * row_tiles
    log = torch.full((4 * (items + programs),), 1 << 30, dtype=torch.int32)
    lists, words, word_steps, bias = [log, log, 0, 0, 0, 0], log, (0, 0, 0, 0), None
    stats, biased = torch.full((B * H * M, 2), torch.nan), mask is not None and mask.dtype != torch.bool
    if mask is not None:
        if biased:
            units, (bias, steps) = units_of(mask, key_mask, always=True), forward_kernels.bias_of(mask)
            words, step = forward_kernels.keys_of(key_mask, mask)
            word_steps = (*steps, step)
            q_stages = 1 if block_d > 64 else q_stages
        else:
            units, words, word_steps = bits_of(mask, key_mask)
        lists, _ = map_of(mask, units, Tile(block_m, block_n, block_d, 4, 2), M, N, left, right, nonempty=True)
    arguments = (
        Descriptor(q, 64, block_d), Descriptor(k, block_n, block_d), Descriptor(v, block_n, block_d),
        Descriptor(o, 64, block_d),
        Descriptor(bias, 64, block_n) if biased else None,
        Pointer(lse), Pointer(stats.view(-1)), Pointer(counter), Pointer(log), scale * (1.0 if biased else LOG2E.value),
        items, row_tiles, B * H, section, H, H // Hk, M, N, left or 0, right or 0,
        Pointer(lists[0]), Pointer(lists[1]), *lists[2:], Pointer(words.flatten()), *word_steps,
        left is not None, right is not None, mask is not None, biased, biased and key_mask is not None,
        mask is None and forward_kernels.masks_inner_tiles(left, right),
        mask is None and block_m == block_n and forward_kernels.halves_first_tile(left, right, M, N),
        block_m, block_n, block_d, stages, q_stages, 0, 0,
    )
    current.size, current.first = programs, 128
    run_threads([(number, kernel._forward_kernel, arguments) for number in range(programs)])
    assert counter == 0, "the counter is not reset"
    return o, lse.view(B, H, M), log.view(-1, 4)


def backward(
    q, k, v, do, dlse, scale, left=None, right=None, block_m=128, section=1, dq_stages=1, stages=2, programs=3,
    mask=None, key_mask=None, dbias=None, source=None,
):
    """(O, lse, dQ, dK, dV), the first two by PyTorch; block_m 128: D up to 64, 64: up to 128. Fills dbias [b, h, M, N]
    with the gradient of a floating mask."""
    kernel = load(MASK.read_text() + (source or BACKWARD.read_text()))
    (B, H, M), (Hk, N), head_dim = q.shape[:3], k.shape[1:3], 8192 // block_m
    both = combined(mask, key_mask)
    o, lse = exact(q, *(t.where(t.abs() < 1e30, 0.0) for t in (k, v)), scale, left, right, both)
    biased, pairs = mask is not None and mask.dtype != torch.bool, None
    if biased:  # as the forward pass has them
        s = (q @ k.repeat_interleave(H // Hk, 1).mT * scale + both).masked_fill(~visible(M, N, left, right), -torch.inf)
        top = s.nan_to_num(-torch.inf).amax(-1).clamp_min(-3e38)
        pairs = torch.stack([top, (s - top[..., None]).exp().nan_to_num().sum(-1)], -1)
    stats, semaphores = kernels.preprocess(do, dlse, o, lse, pairs, torch.empty(B, H, M, 4), block_m)
    dq_accum = torch.full((64 * len(semaphores), 128), torch.nan)
    dq, dk, dv = (torch.full_like(t, torch.nan) for t in (q, k, v))
    column_tiles, outer = -(-N // 128), N if mask is None and left is None and right is None else right
    lists, words, word_steps, orders = [semaphores, semaphores, 0, 0, 0, 0], semaphores, (0, 0, 0, 0), semaphores
    totals, total_steps, bias = None, (0, 0), None
    if mask is not None:
        if biased:
            units, (bias, steps) = units_of(mask, key_mask, always=True), forward_kernels.bias_of(mask, block_m)
            words, step = forward_kernels.keys_of(key_mask, mask)
            word_steps = (*steps, step)
        else:
            units, words, word_steps = bits_of(mask, key_mask, transposed=True)
        tile, group = Tile(block_m, 128, head_dim, 8, 2), H // Hk
        lists, _ = map_of(mask, units, tile, M, N, left, right, transposed=True, ordered=True, group=group)
        orders, totals, total_steps = orders_of(units, tile, M, N, left, right, group)
    counter, ds = torch.zeros(1, dtype=torch.int32), torch.full((B, H, N, -(-M // 16) * 16), torch.nan)
    arguments = (
        Descriptor(q, block_m, head_dim), Descriptor(k, 128, head_dim), Descriptor(v, 128, head_dim),
        Descriptor(do, block_m, head_dim), Descriptor(stats, 1, stats.shape[1]), Descriptor(dq_accum, 64, 128),
        Descriptor(dk, 128, head_dim), Descriptor(dv, 128, head_dim),
        Descriptor(bias, block_m, 128) if biased else Descriptor(k, 128, head_dim), Descriptor(ds, 128, block_m),
        Pointer(semaphores), Pointer(counter), scale * (1.0 if biased else LOG2E.value),
        column_tiles, B * Hk, section, Hk, H // Hk, -(-M // block_m), N, M, left or 0, outer or 0,
        Pointer(lists[0]), Pointer(lists[1]), *lists[2:], Pointer(words.flatten()), *word_steps,
        Pointer(orders.flatten()), left is not None, outer is not None, mask is not None, biased,
        biased and key_mask is not None, dbias is not None, block_m, head_dim, stages, dq_stages, 0,
    )
    current.size, current.first = programs, 256
    run_threads([(number, kernel._backward_kernel, arguments) for number in range(programs)])
    assert counter == 0, "the counter is not reset"
    kernels.postprocess(dq_accum, dq, N, scale, left, right, block_m, totals, total_steps, H // Hk)
    if dbias is not None:
        kernels.sum_scores(dbias, ds, units, left, right)
    return o, lse, dq, dk, dv


def scores(q, k, scale, right=None, fill=None, block_n=128, stages=2, span=2, parts=1, source=None):
    """S of the kernel; q [B, H, M, D], k [B, Hk, N, D], D up to 64; what is not written is NaN."""
    kernel = load(source or SCORES.read_text())
    (B, H, M), (Hk, N) = q.shape[:3], k.shape[1:3]
    if parts == 3:
        q, k = split(q), split(k)
    s = torch.full((B, H, M, N), torch.nan)
    arguments = (
        Descriptor(q, 64, 64), Descriptor(k, block_n, 64), Descriptor(s, 64, block_n), scale, H, H // Hk, M, N,
        right or 0, right is not None, right is not None and fill is not None, bool(fill), 64, block_n, 64, span,
        stages, parts, 0,
    )
    programs = B * H * -(-N // block_n) * -(-M // (64 * span))
    run_threads([(number, kernel._scores_hopper_kernel, arguments) for number in range(programs)])
    return s


def split(x):
    """The three parts of float32 side by side, each in 64 columns."""
    high = x.bfloat16().float()
    middle = (x - high).bfloat16().float()
    parts = high, middle, x - high - middle
    return torch.cat([torch.nn.functional.pad(part, (0, 64 - x.shape[3])) for part in parts], 3)


def check_scores(source=None, keys=420, right=None, fill=None, **options):
    """As check: whether the scores are right, and nothing is written that should not be."""
    torch.manual_seed(0)
    q, k = torch.randn(1, 2, 300, 40), torch.randn(1, 1, keys, 40)
    found, expected = scores(q, k, -0.2, right, fill, source=source, **options), -0.2 * q @ k.mT
    if right is not None:
        m, n = torch.arange(300)[:, None], torch.arange(keys)
        future = n > m + right if fill is not None else n // 128 * 128 > m // 64 * 64 + 63 + right  # whole tiles
        expected = expected.masked_fill(future, torch.nan if fill is None else fill)
    return torch.allclose(found, expected, atol=1e-5 if options.get("parts") else 1e-4, equal_nan=True)


def values(p, v, scale, right=None, block_m=128, stages=2, programs=2, section=1, parts=1, source=None):
    """(O, whether it has a NaN for each half of a tile) of the kernel; p [B, H, M, N], v [B, Hk, N, D], D up to 64."""
    kernel = load(source or VALUES.read_text())
    (B, H, M, N), Hk, rows = p.shape, v.shape[1], block_m // 2
    o, has_nan = torch.full((B, H, M, v.shape[3]), torch.nan), torch.full((B * H * -(-M // rows),), 9, dtype=torch.int8)
    arguments = (
        Descriptor(p, rows, 64), Descriptor(split(v) if parts == 3 else v, 64, 64), Descriptor(o, rows, 64),
        Pointer(has_nan), scale, H, H // Hk, M, N, right or 0, B * H * -(-M // block_m), B * H, section,
        right is not None, rows, 64, 64, stages, parts, 0, 0,
    )
    current.size, current.first = programs, 128
    run_threads([(number, kernel._values_hopper_kernel, arguments) for number in range(programs)])
    return o, has_nan


def check_values(source=None, keys=420, right=None, **options):
    """As check: whether the values are right, and where they are NaN is known; the future of P is NaN."""
    torch.manual_seed(0)
    p, v = torch.randn(1, 3, 300, keys), torch.randn(1, 1, keys, 40)
    p[0, 1, 70, 3] = torch.nan
    seen = p if right is None else p.tril(right)
    future = torch.zeros_like(p) if right is None else torch.ones_like(p).triu(right + 1)
    o, has_nan = values(p.masked_fill(future > 0, torch.nan), v, -0.2, right, source=source, **options)
    near = torch.allclose(o, -0.2 * seen @ v, atol=1e-5 if options.get("parts") else 1e-4, equal_nan=True)
    order = slice(None) if right is None else slice(None, None, -1)
    nans = [t.isnan().any() for head in o[0] for t in head.split(options.get("block_m", 128) // 2)[order]]
    return near and has_nan.tolist() == nans


def visible(M, N, left, right):
    return torch.ones(M, N).tril(N if right is None else right).triu(-M if left is None else left) > 0


def exact(q, k, v, scale, left=None, right=None, mask=None):
    """(O, lse) by PyTorch."""
    sees = visible(q.shape[2], k.shape[2], left, right)
    if mask is not None:
        sees = sees & mask if mask.dtype == torch.bool else mask.masked_fill(~sees, -torch.inf)
    return torch_fused(q, k, v, sees, scale=scale)


def combined(mask, key_mask):
    """Two masks as one, as the kernels do not have it in memory."""
    if key_mask is None:
        return mask
    key_mask = key_mask[:, None, None]
    return mask & key_mask if mask.dtype == torch.bool else mask + key_mask


def drawn_mask(kind, M, N, biased=False):
    """A mask [1, 4, M, N] with hidden, plain and partly visible tiles, some rows that see nothing, in each head others;
    or one with dimensions of size 1."""
    m, n = torch.arange(M)[:, None], torch.arange(N)
    if kind == "keys":
        mask = (n < 130)[None, None, None]
    elif kind == "queries":
        mask = (m % 100 < 70)[None, None]
    else:
        heads = [n <= m, (n // 50 == m // 50) | (n == 7), torch.rand(M, N) > 0.5, (n >= 256) & (m < 128)]
        mask = torch.stack(heads)[None, : 1 if kind == "causal" else 4]
    if biased:  # of -inf, some zeros, some numbers, and a row of large ones
        tiles = sum(x // 64 for x, size in zip((m, n), mask.shape[2:], strict=True) if size > 1)
        values = torch.randn(mask.shape) * (tiles % 3 == 0)
        mask = values.masked_fill(~mask, -torch.inf)
        mask[:, :, mask.shape[2] // 2] -= 1e9
    return mask


def check(source=None, only=None, **case):
    """Whether an emulated kernel is right on a case; raises what it raises."""
    return {"scores": check_scores, "values": check_values, None: check_attention}[only](source, **case)


def check_attention(
    source=None, back=False, keys=420, hidden=None, infinite=False, kind=None, biased=False, keyed=False, shift=0.0,
    learned=False, **options,
):
    """Of a case with every kind of edge. learned: the floating mask has a gradient; hidden: what stands in keys and
    values that no query sees; infinite: the last keys, which come first, score -inf; shift: what is added to all
    scores, if so there is a value of NaN too."""
    torch.manual_seed(0)
    D = 72 if back and options.get("block_m") == 64 else 40
    q, k, v = (torch.randn(1, *shape, D, requires_grad=back) for shape in ((4, 300), (2, keys), (2, keys)))
    bounds = {name: options.get(name) for name in ("left", "right")}
    if kind is not None:
        leaf = drawn_mask(kind, 300, keys, biased).requires_grad_(learned)
        bounds["mask"] = leaf.expand(1, 4, 300, keys)
        options["mask"] = bounds["mask"].detach()
        if keyed:
            padding = torch.arange(keys)[None] % 150 > 30
            padding = torch.randn(1, keys).masked_fill(~padding, -torch.inf) if biased else padding
            options["key_mask"], bounds["mask"] = padding, combined(bounds["mask"], padding)
    if infinite:
        q[..., 0], k[:, :, 200:, 0] = q[..., 0].abs() + 0.5, -torch.inf
    if shift:
        q[..., 0], k[..., 0] = 5 * shift, 1.0
    expected = exact(q, k, v, 0.2, **bounds)
    if shift:
        v[:, :, 70] = torch.nan
        sees = bounds["mask"][..., 70:71] > -torch.inf
        expected = expected[0].masked_fill(sees, torch.nan), expected[1]
    if hidden is not None:
        n, left, right = torch.arange(keys), bounds["left"], bounds["right"]
        unseen = (n < (left or 0)) | (n > (keys if right is None else 299 + right)) | (kind == "keys") & (n >= 130)
        hide = lambda t: t.detach().masked_fill(unseen[:, None], hidden)  # noqa: E731
    else:
        hide = torch.Tensor.detach
    if not back:
        *results, log = forward(q, hide(k), hide(v), 0.2, source=source, **options)
        banded, programs = any(bound is not None for bound in bounds.values()), options.get("programs", 2)
        # but 0 * inf in rows past the last query
        needless = banded and not (infinite or shift) and hidden is None and (log[-programs:, 0] > 0).any()
        assert not needless, "a needless repair"
    else:
        do, dlse = torch.randn(1, 4, 300, D), torch.randn(1, 4, 300).masked_fill(expected[1] == -torch.inf, 0.0)
        poisoned = dlse.masked_fill(expected[1] == -torch.inf, torch.nan)  # which must not matter
        leaves, dbias = (q, k, v), None
        if learned:
            leaves, dbias = (q, k, v, leaf), torch.full(leaf.shape, torch.nan)
        results = backward(q.detach(), hide(k), hide(v), do, poisoned, 0.2, dbias=dbias, source=source, **options)
        results += (dbias,) if learned else ()
        lse = expected[1].masked_fill(expected[1] == -torch.inf, 0.0)
        expected += torch.autograd.grad((expected[0], lse), leaves, (do, dlse))
    near = {"atol": 1e-4, "equal_nan": bool(shift)}
    return all(torch.allclose(a, b, **near) for a, b in zip(results, expected, strict=True))


MASKED = [
    {"kind": "heads"}, {"kind": "heads", "block_m": 192}, {"kind": "heads", "right": 0}, {"kind": "keys", "stages": 3},
    {"kind": "heads", "left": -60, "right": 10, "programs": 1}, {"kind": "queries", "block_m": 192}, {"kind": "causal"},
    {"kind": "keys", "right": 40}, {"kind": "heads", "block_d": 256, "infinite": True},
    {"kind": "heads", "keyed": True}, {"kind": "causal", "keyed": True, "biased": True},
    {"kind": "heads", "keyed": True, "biased": True, "right": 0, "hidden": torch.nan},
    {"back": True, "kind": "causal", "keyed": True, "right": 40}, {"back": True, "kind": "heads", "keyed": True},
    {"back": True, "kind": "heads", "keyed": True, "biased": True, "block_m": 64, "right": 0},
    {"kind": "causal", "biased": True, "shift": 150.0}, {"kind": "causal", "biased": True, "shift": -150.0},
    {"kind": "heads", "biased": True, "infinite": True}, {"kind": "causal", "biased": True, "infinite": True},
    {"kind": "heads", "biased": True}, {"kind": "keys", "biased": True, "right": 0}, {"kind": "causal", "biased": True},
    {"kind": "heads", "biased": True, "left": -60, "right": 10, "block_d": 128, "keys": 416},
    {"kind": "heads", "biased": True, "hidden": torch.nan, "right": -70, "programs": 1},
    {"back": True, "kind": "heads"}, {"back": True, "kind": "heads", "block_m": 64, "programs": 8, "section": 2},
    {"back": True, "kind": "heads", "biased": True}, {"back": True, "kind": "keys", "biased": True, "right": 0},
    {"back": True, "kind": "heads", "biased": True, "block_m": 64, "left": -60, "right": 10, "section": 2},
    {"back": True, "kind": "causal", "biased": True, "block_m": 64, "programs": 8},
    {"back": True, "kind": "keys", "biased": True, "hidden": torch.nan},
    {"back": True, "kind": "heads", "biased": True, "learned": True, "right": 40},
    {"back": True, "kind": "heads", "biased": True, "learned": True, "block_m": 64, "keyed": True, "programs": 8},
    {"back": True, "kind": "causal", "biased": True, "learned": True, "block_m": 64, "left": -60, "right": 10},
    {"back": True, "kind": "keys", "stages": 3}, {"back": True, "kind": "causal", "block_m": 64},
    {"back": True, "kind": "queries", "right": 0}, {"back": True, "kind": "heads", "left": -60, "right": 10},
    {"back": True, "kind": "keys", "block_m": 64, "hidden": torch.nan}, {"kind": "keys", "hidden": torch.nan},
]
CASES = [
    *MASKED, {}, {"right": 0}, {"right": 0, "block_m": 192}, {"right": 100}, {"right": -70, "stages": 3},
    {"left": -60, "right": 10, "block_m": 192}, {"left": 30}, {"right": -200, "stages": 3},
    {"block_m": 192, "programs": 1}, {"left": 90, "right": 20}, {"block_d": 256}, {"block_d": 256, "right": 0},
    {"left": 125}, {"right": 64}, {"right": -64, "block_m": 192}, {"right": -128}, {"right": 128, "block_m": 192},
    {"right": 128, "keys": 500}, {"right": 256, "keys": 500}, {"right": 0, "hidden": 2e38}, {"infinite": True},
    {"infinite": True, "right": 0}, {"infinite": True, "block_m": 192}, {"infinite": True, "left": -60, "right": 10},
    {"back": True}, {"back": True, "right": 0}, {"back": True, "right": 100, "stages": 3, "dq_stages": 2},
    {"back": True, "left": -60, "right": 10, "block_m": 64}, {"back": True, "left": 30},
    {"back": True, "right": -200, "section": 2}, {"back": True, "block_m": 64},
    {"back": True, "left": 90, "right": 20, "block_m": 64, "stages": 3, "programs": 8},
    {"back": True, "right": 0, "hidden": 2e38}, {"back": True, "left": 30, "right": 80, "block_m": 64, "hidden": -2e38},
    {"back": True, "right": -70, "hidden": torch.inf}, {"back": True, "left": 200, "hidden": torch.nan},
    {"only": "scores"}, {"only": "scores", "right": 0}, {"only": "scores", "right": 0, "fill": -torch.inf},
    {"only": "scores", "right": 70, "fill": 0.0, "span": 3}, {"only": "scores", "right": -150, "stages": 3},
    {"only": "scores", "right": -150, "fill": -torch.inf, "span": 5}, {"only": "scores", "right": 420},
    {"only": "scores", "right": 64, "fill": 0.0, "span": 5, "stages": 1},
    {"only": "values"}, {"only": "values", "block_m": 256, "programs": 1, "stages": 3}, {"only": "values", "parts": 3},
    {"only": "values", "right": 0, "section": 2}, {"only": "values", "right": 130, "programs": 4, "parts": 3},
    {"only": "values", "right": -150, "programs": 3}, {"only": "values", "right": 420, "section": 3, "stages": 3},
    {"only": "scores", "parts": 3, "stages": 1}, {"only": "scores", "parts": 3, "right": 0, "fill": -torch.inf},
]
_SCORES, _VALUES = {"only": "scores", "span": 5}, {"only": "values"}
_BACK = {"back": True, "block_m": 64, "right": 300}
_BANDED, _FULL = {"left": -60, "right": 10, "block_m": 192}, {"programs": 1}
_SHORT = {"right": -200, "stages": 3, "programs": 1}  # a tile of keys for each of queries
_LISTED, _BIASED = {"kind": "heads", "programs": 1}, {"kind": "heads", "biased": True, "programs": 1}
_BIASED_BACK = {"back": True, "kind": "heads", "biased": True, "block_m": 64, "programs": 8}
_LEARNED = {**_BIASED_BACK, "learned": True}
DROP, EARLIER = (r"\S.*", "pass"), None
BUGS = {  # name: (mark of a line in the kernel, what is done to it (see plant), a case that shows it)
    "K released before it was read": ("release-k", EARLIER, _FULL),
    "V released while P V is in flight": ("release-v", EARLIER, _FULL),
    "V not waited for": ("wait-v", DROP, _FULL),
    "K not waited for": ("wait-k", DROP, _FULL),
    "tiles that no query sees not released": ("skip", DROP, _BANDED),
    "O overwritten while it is stored": ("wait-o", DROP, _FULL),
    "the next Q loaded too early": ("wait-q-empty", DROP, _SHORT),
    "the phase of every second Q": ("wait-q-full", (r" // OPTIONS\.Q_STAGES", ""), _FULL),
    "the end not scheduled": ("end", DROP, _FULL),
    "K and V overwritten": ("acquire", DROP, _FULL),
    "V not released at the start": ("init-v", DROP, _FULL),
    "the last V not released": ("release-last-v", DROP, _FULL),
    "Q loaded over O that is being stored": ("wait-o-in-q", DROP, {"block_d": 256, "programs": 1}),
    "the counter not reset": ("reset", (r"ptr, 0", "ptr, 1"), _BANDED),
    "a number that only the first lane has": ("uniform", DROP, _BANDED),
    "rows that have seen no key not told apart": ("lowest", (r"LOWEST", 'float("-inf")'), {"left": 125}),
    "keys that come first and score -inf": ("lowest", (r"LOWEST", 'float("-inf")'), {"infinite": True}),
    "half a tile for all warpgroups": ("half", (r" and WARPGROUP == 0", ""), {"right": 0}),
    "halves of the weights exchanged": ("join", (r"\(p_0, (exponentials\(.*?\))\)", r"(\1, p_0)"), {"right": 0}),
    "the next tile awaited before O has left": (
        "prefetch", (r" and OPTIONS\.Q_STAGES == 2", ""), {"block_d": 256, "right": 0},
    ),
    "K of a listed tile overwritten": ("acquire-listed", DROP, _LISTED),
    "K and its bias never released": ("release-bias", DROP, _BIASED),
    "the list of the other heads": ("list", (r"tile\.off_h", "0"), _LISTED),
    "partly visible tiles last": ("partials", (r"step < tile\.", "step >= tile.listed - tile."), _LISTED),
    "the order of parts of a dQ from the wrong end": ("order", (r"0xFFFF, order >> 16", "0xFFFF, order & 0xFFFF"), {
        **_BIASED_BACK, "programs": 1,
    }),
    "a bias overwritten": ("acquire-bias", DROP, _BIASED_BACK),
    "a bias not waited for": ("wait-bias", DROP, _BIASED_BACK),
    "a second mask forgotten": ("keys", DROP, {**_BIASED, "keyed": True}),
    "a second mask of the backward forgotten": ("keys", DROP, {**_BIASED_BACK, "keyed": True}),
    "a bias of the backward never released": ("release-dbias", DROP, _BIASED_BACK),
    "dS of another step": ("store-ds", (r"index\(step_count", "index((step_count + 1)"), _LEARNED),
    "dS overwritten while it is stored": ("wait-ds", DROP, {**_LEARNED, "block_m": 128, "programs": 8}),
    "last queries first forgotten": ("stride", DROP, _BACK),
    "Q released while dK is in flight": ("release-q", EARLIER, _BACK),
    "dO not waited for": ("wait-do", DROP, _BACK),
    "the next Q not waited for": ("wait-q", DROP, _BACK),
    "Q overwritten": ("acquire-q", DROP, _BACK),
    "dQ overwritten while it is added": ("wait-dq-empty", DROP, {**_BACK, "programs": 8}),
    "dQ added before it is computed": ("wait-dq-full", DROP, _BACK),
    "dQ added before its predecessors": ("wait-ready", DROP, {**_BACK, "programs": 8}),
    "predecessors counted from the wrong end": ("predecessors", (r"gl\.where.*", "last - keys.tile_n"), _BACK),
    "the semaphore not released": ("release-semaphore", DROP, _BACK),
    "K loaded over dK that is being stored": ("wait-dk", DROP, _BACK),
    "the end of the backward not scheduled": ("end", DROP, _BACK),
    "the counter of the backward not reset": ("reset", (r"ptr, 0", "ptr, 1"), _BACK),
    "huge keys that no query sees": (
        "clamp", (r"clamp\((.*)\)\)", r"gl.where(gl.abs(\1) < 3e38, \1, 0.0))"), {**_BACK, "right": 0, "hidden": 2e38},
    ),
    "dK stored before it is computed": ("wait-grads", DROP, _BACK),
    "Q of the scores not waited for": ("wait-q", DROP, _SCORES),
    "keys of the scores not waited for": ("wait-k", DROP, {**_SCORES, "span": 1}),
    "the phase of every second Q of the scores": ("wait-q", (r" // STAGES", ""), _SCORES),
    "scores overwritten while they are stored": ("wait-s", DROP, {**_SCORES, "right": 0, "fill": 0.0, "span": 5}),
    "a part of the queries twice": ("parts", (r"low, ", "middle, "), {**_SCORES, "parts": 3}),
    "P and V not waited for": ("wait-full", DROP, _VALUES),
    "P and V overwritten": ("acquire", DROP, _VALUES),
    "weights of the future": ("diagonal", (r"<=", "<"), {**_VALUES, "right": 0}),
    "O of values overwritten while it is stored": ("wait-o", DROP, _VALUES),
    "a part of the weights twice": ("parts", (r"low, ", "middle, "), {**_VALUES, "parts": 3}),
    "scores of the future left as they are": ("future", (r"<=", "<"), {**_SCORES, "right": 0, "fill": 0.0}),
}


def plant(source, mark, change):
    """The source with a change in the line whose comment is `mutate: mark`: a regular expression and what replaces the
    first match, or None, which moves the line before the one above it."""
    lines = source.splitlines(keepends=True)
    marked = [i for i, line in enumerate(lines) if line.endswith(f"# mutate: {mark}\n")]
    if len(marked) != 1:
        raise ValueError(f"{len(marked)} lines are marked {mark}")
    at, = marked
    if change is None:
        lines[at - 1 : at + 1] = lines[at], lines[at - 1]
    else:
        lines[at] = re.sub(*change, lines[at], count=1)
    if "".join(lines) == source:
        raise ValueError(f"{mark}: nothing to change")
    return "".join(lines)


def source_of(case):
    return {"scores": SCORES, "values": VALUES, None: BACKWARD if case.get("back") else FORWARD}[case.get("only")]


def notices(bug):
    """How the emulation shows a planted bug: None if it does not, with delays that are long for a busy machine too."""
    mark, change, case = BUGS[bug]
    source = plant(source_of(case).read_text(), mark, change)
    usual = Barrier.timeout, Descriptor.delays
    try:
        for delay in (5e-2, 0.2, 0.8):
            Barrier.timeout, Descriptor.delays = 20 * delay, (0, 1e-3, delay)
            if not check(source, **case):
                return "a wrong result"
        return None
    except AssertionError as error:
        return str(error)
    finally:
        Barrier.timeout, Descriptor.delays = usual


if __name__ == "__main__":
    failures = 0
    for case in CASES:
        good = check(**case)
        failures += not good
        print(f"{case}: {'right' if good else 'WRONG'}", flush=True)
    for bug in BUGS:
        found = notices(bug)
        failures += found is None
        print(f"{bug}: {found or 'NOT NOTICED'}", flush=True)
    sys.exit(failures > 0)
