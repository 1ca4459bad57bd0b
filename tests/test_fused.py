"""What the fused kernel alone has: lse, window, softcap, sinks, the split over keys; and dropout."""

import itertools
import math

import pytest
import torch

from tests.reference import (
    BF16, DEVICE, F16, F32, F64, INF, NAN, T, compare, fused, outputs_and_grads, randn, staged, torch_fused,
    torch_staged, torch_visible,
)
from triton_attention import fused_common, mask_map
from triton_attention.dropout import dropout
from triton_attention.device import INTERPRETED
from triton_attention.fused_bias import sum_scores
from triton_attention_fused import attend_under_two_masks, attention_fused, merge_attention
from triton_attention_layer import attention_staged

# window_size, softcap, with sinks, causal
FEATURES = [
    ((5, 3), None, False, False),
    ((0, 0), None, False, True),
    ((-1, 4), 2.0, False, False),
    ((20, -1), None, True, True),
    ((3, 200), 30.0, True, False),
    (None, 0.5, True, True),
]


@pytest.mark.parametrize("M,N", [(37, 53), (90, 40), (1, 70), (130, 140)])
@pytest.mark.parametrize("window,softcap,with_sinks,is_causal", FEATURES, ids=str)
def test_features(M, N, window, softcap, with_sinks, is_causal):
    dtype = (F32, F16, BF16, F64)[(M + len(str(window))) % 4]
    B = 8 if M == 1 else 1  # the largest error of few numbers says little
    q, k, v = (randn(B, 2, M, 24, dtype=dtype), *(randn(B, 1, N, 24, dtype=dtype) for _ in range(2)))
    options = {"window_size": window or (-1, -1), "softcap": softcap or 0.0, "is_causal": is_causal}
    for mask in (None, randn(1, 2, M, N, dtype=dtype), torch.rand(1, 1, 1, N, device=DEVICE) > 0.3):
        sinks = randn(2, dtype=dtype) if with_sinks else None
        compare(lambda *args: fused(*args[:4], sinks=args[4], **options),
                lambda *args: torch_fused(*args[:4], sinks=args[4], **options), q, k, v, mask, sinks)


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16)], ids=str)
@pytest.mark.parametrize("window", [(17, 0), (40, 9), (0, 31)], ids=str)
def test_window_tiles(window, tile):
    """Bands that begin and end within, at and next to the edges of tiles."""
    for M, N in ((100, 100), (33, 90), (90, 33)):
        q, k, v = randn(1, 1, M, 16), randn(1, 1, N, 16), randn(1, 1, N, 16)
        compare(lambda *a: fused(*a, window_size=window, block_m=tile[0], block_n=tile[1]),
                lambda *a: torch_fused(*a, window_size=window), q, k, v)


def test_lse():
    """Natural logarithm of the row sums, scale and bias included; differentiable by itself; -inf for no keys."""
    q, k, v, bias = randn(1, 2, 30, 16), randn(1, 2, 45, 16), randn(1, 2, 45, 8), randn(30, 45)
    for scale in (None, -0.7, 0.0):
        compare(lambda *a, c=scale: fused(*a[:2], v.to(a[0].dtype), a[2], scale=c)[1],
                lambda *a, c=scale: torch_fused(*a[:2], v.to(a[0].dtype), a[2], scale=c)[1], q, k, bias)
    o, lse = attention_fused(q, k, v, return_lse=True)
    assert torch.equal(attention_fused(q, k, v), o) and lse.dtype == F32
    assert attention_fused(q.half(), k.half(), v.half(), return_lse=True)[1].dtype == F32
    grads = torch.autograd.grad(lse.sum(), (q, k, v), allow_unused=True)
    assert (grads[2] == 0).all()
    sinks = torch.tensor([0.3, -INF], device=DEVICE)
    nothing = torch.zeros(30, 45, dtype=torch.bool, device=DEVICE)
    o, lse = attention_fused(q, k, v, nothing, sinks=sinks, return_lse=True)
    assert (o == 0).all() and (lse[:, 0] == sinks[0]).all() and (lse[:, 1] == -INF).all()


@pytest.mark.parametrize("dtype", (F16, F32, F64), ids=str)
def test_extreme_softcaps(dtype):
    """One past all scores changes nothing, one near 0 makes all of them equal."""
    q, k, v = (randn(1, 2, n, 16, dtype=dtype) for n in (20, 33, 33))
    mean = v.double().mean(2, keepdim=True).expand(1, 2, 20, 16)
    for softcap, other in ((1e300, 0.0), (1e39, 0.0), (3e38, 0.0), (1e30, 0.0), (1e18, 0.0), (1e-36, 1e-30)):
        compare(lambda *a, c=softcap: fused(*a, softcap=c), lambda *a, c=other: torch_fused(*a, softcap=c), q, k, v)
    for softcap in (1e-30, 1e-38, 1e-40, 1e-310):
        out, lse = fused(q, k, v, softcap=softcap)
        assert (out - mean).abs().max() < 2e-3 and (lse - math.log(33)).abs().max() < 1e-5
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_a_window_that_ends_before_the_keys():
    """One query, whose causal and sliding windows have no key in common: the sink has all of the weight."""
    q, k, v, sinks = (randn(1, 2, 1, 16), *(randn(1, 2, 70, 16) for _ in range(2)), randn(2))
    for s in (sinks, None):
        compare(lambda *a: fused(*a[:3], sinks=a[3], is_causal=True, window_size=(0, 20)),
                lambda *a: torch_fused(*a[:3], sinks=a[3], is_causal=True, window_size=(0, 20)), q, k, v, s)


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_scores_far_below_zero(dtype):
    """e^(0 - lse) overflows for lse below -88: keys past the end must not meet it, forward or backward."""
    q, k, v = (randn(1, 1, n, 16, dtype=dtype) for n in (21, 19, 19))
    bias = torch.full((21, 19), -500.0, device=DEVICE, dtype=dtype)
    compare(fused, torch_fused, q, k, v, bias)
    compare(fused, torch_fused, q, k, v, bias, is_causal=True)


@pytest.mark.parametrize("M,N,heads", [(1, 700, (8, 1)), (1, 130, (3, 3)), (3, 700, (2, 1)), (16, 600, (1, 1))])
def test_few_queries_split_the_keys(M, N, heads):
    H, Hk = heads
    dtype = {(1, 700): F32, (1, 130): F16}.get((M, N), BF16)
    B = 2 if dtype == F32 else 1  # an error of a single row of float32 is chance
    q, k, v = (randn(B, h, n, 40, dtype=dtype) for h, n in ((H, M), (Hk, N), (Hk, N)))
    hidden = torch.rand(1, 1, M, N, device=DEVICE) > 0.2
    hidden[..., : N // 2] = False  # whole splits see nothing
    compare(fused, torch_fused, q, k, v)
    sinks = randn(H, dtype=dtype)
    compare(lambda *a: fused(*a[:4], sinks=a[4]), lambda *a: torch_fused(*a[:4], sinks=a[4]), q, k, v, hidden, sinks)
    bias = randn(1, H, 1, N, dtype=dtype)
    compare(fused, torch_fused, q, k, v, bias, window_size=(N // 3, -1), is_causal=True)
    o, lse = fused(q, k, v, torch.zeros_like(hidden))
    assert (o == 0).all() and (lse == -INF).all()


@pytest.mark.parametrize("M", [5, 40])
def test_gradients_of_a_projection_are_columns_again(M):
    """In the memory order of what they are gradients of, so that the view of heads costs no copy on the way back."""
    projected = [randn(2, n, h * 16) for n, h in ((M, 4), (70, 2), (70, 2))]
    q, k, v = (t.unflatten(2, (-1, 16)).transpose(1, 2) for t in projected)
    grads = torch.autograd.grad(fused(q, k, v)[0].sum(), (q, k, v))
    assert all(grad.transpose(1, 2).is_contiguous() for grad in grads)
    grads = torch.autograd.grad(fused(*(t.contiguous() for t in (q, k, v)))[0].sum(), (q, k, v))
    assert all(grad.is_contiguous() for grad in grads)


@pytest.mark.parametrize("dropout_p", [0.2, 0.7, 1.0])
def test_dropout_is_that_of_the_stages(dropout_p):
    q, k, v, bias = (randn(2, 4, 50, 16), *(randn(2, 2, 70, 16) for _ in range(2)), randn(50, 70))
    sinks = randn(4)
    torch.manual_seed(3)
    out, probs = attention_staged(q, k, v, bias, dropout_p, True, enable_gqa=True)
    keep = (probs != 0) / (1 - dropout_p) if dropout_p < 1 else torch.zeros_like(probs)
    for tile in ({}, {"block_m": 16, "block_n": 64}, {"block_m": 64, "block_n": 16}):
        torch.manual_seed(3)
        once = attention_fused(q, k, v, bias, dropout_p, True, enable_gqa=True, **tile)
        assert (once - out).abs().max() < 1e-5
    def seeded(q, k, v, m, s):
        torch.manual_seed(3)
        return attention_fused(q, k, v, m, dropout_p, True, enable_gqa=True, sinks=s, return_lse=True)
    compare(seeded, lambda q, k, v, m, s: torch_fused(q, k, v, m, True, sinks=s, keep=keep.to(q.dtype)),
            q, k, v, bias, sinks)
    few = q[:, :, :1].detach()
    torch.manual_seed(3)
    out = attention_staged(few, k, v, dropout_p=dropout_p, enable_gqa=True)[0]
    torch.manual_seed(3)
    assert (attention_fused(few, k, v, dropout_p=dropout_p, enable_gqa=True) - out).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [F16, F32, BF16, F64], ids=str)
@pytest.mark.parametrize("M", [2, 71])
def test_dropout_beside_narrower_masks(M, dtype):
    """Triton lays P out for a mask's 8 or 32 bits, halved for the random bits: wrong products, or none (float64)."""
    q, k, v = randn(1, 4, M, 64, dtype=dtype), randn(1, 2, 40, 64, dtype=dtype), randn(1, 2, 40, 32, dtype=dtype)
    hidden = torch.rand(1, 1, M, 40, device=DEVICE) > 0.3
    masks = [hidden, torch.zeros(1, 4, M, 40, device=DEVICE).masked_fill(~hidden, -INF)] if dtype == F64 else [hidden]
    for mask, tile in itertools.product(masks, ({}, {"block_m": 16, "block_n": 16}, {"block_m": 16, "block_n": 32})):
        def seeded(q, k, v, mask=mask, tile=tile):
            torch.manual_seed(3)
            return attention_fused(q, k, v, mask, 0.5, enable_gqa=True, return_lse=True, **tile)
        torch.manual_seed(3)
        keep = dropout(torch.ones(1, 4, M, 40, device=DEVICE), 0.5).to(dtype)
        compare(seeded, lambda q, k, v, m=mask, keep=keep: torch_fused(q, k, v, m, keep=keep.to(q.dtype)), q, k, v)
        compare(fused, torch_fused, q, k, v, mask)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU all of float32 is in parts")
def test_float32_in_parts(monkeypatch):
    """The way of float32 on tensor cores, without the rounding of its parts: which tiles, where from, what of NaN."""
    monkeypatch.setattr(fused_common, "dot_precision", lambda dtype, device: "bf16x6")
    for window, softcap, with_sinks, is_causal in [(None, None, False, False), *FEATURES[2:5]]:
        q, k, v = randn(2, 4, 40, 24), randn(2, 2, 50, 24), randn(2, 2, 50, 40)
        options = {"window_size": window or (-1, -1), "softcap": softcap or 0.0, "is_causal": is_causal}
        sinks, bias = randn(4) if with_sinks else None, randn(1, 4, 40, 50)
        compare(lambda *a, o=options: fused(*a[:4], sinks=a[4], **o),
                lambda *a, o=options: torch_fused(*a[:4], sinks=a[4], **o), q, k, v, bias, sinks)
    q, k, v = (randn(1, 2, 40, 16, grad=False) for _ in range(3))
    expected = attention_fused(q, k[:, :, :30], v[:, :, :30])
    for poison in (NAN, INF):
        k[:, :, 35], v[:, :, 36] = poison, -poison
        hidden = torch.arange(40, device=DEVICE) < 30
        assert (attention_fused(q, k, v, hidden) - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", (F32, F16), ids=str)
@pytest.mark.parametrize("softcap", (0.0, 5.0))
def test_gradients_past_a_hidden_nan(softcap, dtype):
    """Keys and values that no query sees may hold NaN: gradients are those without them, zeros there."""
    q, k, v = (randn(1, 2, 20, 16, dtype=dtype) for _ in range(3))
    hidden = torch.arange(20, device=DEVICE) < 14
    do, dlse = torch.randn(1, 2, 20, 16, device=DEVICE, dtype=dtype), torch.randn(1, 2, 20, device=DEVICE)

    def grads(k, v):
        out = fused(q, k, v, hidden, softcap=softcap)
        return torch.autograd.grad(out, (q, k, v), (do, dlse))

    expected = grads(k, v)
    for poison in (NAN, INF):
        bad = [t.detach().clone() for t in (k, v)]
        for t in bad:
            t[:, :, 15] = poison
        for mine, right in zip(grads(*(t.requires_grad_() for t in bad)), expected, strict=True):
            assert (mine - right).abs().max() < 2e-3


def test_merge_attention():
    """Two halves of the keys are the whole, with their gradients; a half that sees nothing counts nothing."""
    q, k, v = randn(2, 2, 30, 16), randn(2, 2, 50, 16), randn(2, 2, 50, 16)

    def halves(q, k, v, mask=None):
        parts = [slice(0, 20), slice(20, 50)]
        results = [fused(q, k[:, :, p], v[:, :, p], None if mask is None else mask[:, p]) for p in parts]
        return merge_attention(*results[0], *results[1])

    compare(halves, torch_fused, q, k, v)
    mask = torch_visible(30, 50, 5)
    mask[:, 20:35] = False
    mask[3] = False
    compare(halves, torch_fused, q, k, v, mask)
    o, lse = merge_attention(T(1, 1, 2, 4) + NAN, T(1, 1, 2) - INF, T(1, 1, 2, 4), T(1, 1, 2) - INF)
    assert (o == 0).all() and (lse == -INF).all()
    with torch.no_grad():
        assert merge_attention(*(t.half() for t in fused(q, k, v)), *fused(q, k, v))[0].dtype == F16


PAIRS = [(40, 16)] if INTERPRETED else list(itertools.product((16, 32, 40, 64, 128), repeat=2))


@pytest.mark.parametrize("D,Dv", PAIRS)
def test_unaligned_rows(D, Dv):
    """Rows that no wide load can read, dO's too; PyTorch gets copies, its own kernels fault on such rows."""
    dtype = F16 if INTERPRETED or D < Dv or D == 64 else BF16

    def spaced(outs):
        before, after = (outs[0].new_zeros(*outs[0].shape[:3], n) for n in (1, 2))
        return torch.cat([before, outs[0], after], 3), *outs[1:]

    def against(ours, theirs, **options):
        compare(lambda *a: spaced(ours(*a, **options)),
                lambda *a: spaced(theirs(*(t.contiguous() for t in a), **options)), q, k, v)

    for M, N in ((33, 40),) if INTERPRETED else ((63, 63), (130, 140)):
        q, k, v = (randn(2, 3, n, d, dtype=dtype, layout="sliced") for n, d in ((M, D), (N, D), (N, Dv)))
        for options in ({}, {"is_causal": True}):
            against(fused, torch_fused, **options)
            against(staged, torch_staged, **options)
        against(fused, torch_fused, window_size=(7, 3))


def test_wide_heads():
    for D, Dv in ((256, 256), (130, 7), (7, 200)):
        q, k, v = randn(1, 1, 20, D, dtype=F16), randn(1, 1, 33, D, dtype=F16), randn(1, 1, 33, Dv, dtype=F16)
        compare(fused, torch_fused, q, k, v, is_causal=True)


def test_a_poisoned_query_reaches_its_row_and_the_keys_it_sees():
    q, k, v = (randn(1, 1, 40, 16, grad=False) for _ in range(3))
    q[0, 0, 7] = NAN
    results = outputs_and_grads(
        lambda q, k, v: fused(q, k, v, is_causal=True), [t.requires_grad_() for t in (q, k, v)], {},
        [torch.ones(1, 1, 40, 16, device=DEVICE), torch.ones(1, 1, 40, device=DEVICE)],
    )
    for name, seen in (("output 0", slice(7, 8)), ("gradient of argument 0", slice(7, 8))):
        bad = results[name].isnan().any(-1)[0, 0]
        assert bad[seen].all() and bad.sum() == 1, name


@pytest.mark.parametrize("M,N,H,Hk", [(70, 90, 4, 2), (1, 200, 4, 1), (150, 133, 2, 2)])
@pytest.mark.parametrize("floating", (False, True))
def test_two_masks(M, N, H, Hk, floating):
    """A mask and one of keys that are not combined, of the same dtype or not; rows without a key; its gradient."""
    for i, sizes in enumerate(((1, 1), (2, H))):
        dtype = (F32, F16, BF16)[(M + i) % 3]
        q, k, v = randn(2, H, M, 24, dtype=dtype), randn(2, Hk, N, 24, dtype=dtype), randn(2, Hk, N, 16, dtype=dtype)
        mask = torch.rand(*sizes, M, N, device=DEVICE) > 0.4
        mask[..., M // 2, :], keys = False, (torch.arange(N, device=DEVICE) % 60 > 17).repeat(2, 1)
        keys[1, N // 3 :] = False
        both = mask & keys[:, None, None]
        if floating:
            mask = randn(*mask.shape, dtype=dtype).detach().masked_fill(~mask, -INF).requires_grad_()
            keys = torch.randn(2, N, device=DEVICE).masked_fill(~keys, -INF)

        def two(q, k, v, mask, keys=keys):
            return attend_under_two_masks(q, k, v, mask, keys, 0.0)

        def one(q, k, v, mask, keys=keys, both=both):
            return torch_fused(q, k, v, mask + keys[:, None, None].to(mask.dtype) if floating else both)[0]

        compare(two, one, q, k, v, mask)


@pytest.mark.parametrize("left, right", ((None, None), (None, -3), (-40, 70)))
@pytest.mark.parametrize("shape", ((1, 1), (1, 3), (2, 1), (2, 3)))
def test_sum_scores(shape, left, right):
    """dS in memory, where nothing was written in tiles that a mask hides, nor past the last query."""
    (B, H), M, N = (2, 3), 150, 211
    ds, seen = torch.randn(B, H, M, N, device=DEVICE), torch.rand(*shape, M, N, device=DEVICE) > 0.4
    seen[..., 64:128, :64], seen[..., :64, 160:], seen[:1, :1, 32:, 128:192] = False, False, False
    m, n = torch.arange(M, device=DEVICE)[:, None], torch.arange(N, device=DEVICE)
    near = (n >= m - (M if left is None else -left)) & (n <= m + (N if right is None else right))
    ds = ds.masked_fill(~(seen & near), 0.0)
    tiles = (torch.nn.functional.pad(t.expand(B, H, M, N).double(), (0, 256 - N, 0, 192 - M)) for t in (seen, near))
    some = [torch.nn.functional.max_pool2d(t, 64) > 0 for t in tiles]
    visited = (some[0] & some[1]).repeat_interleave(64, 2).repeat_interleave(64, 3)[..., :M, :N]
    stored = torch.full((B, H, N, 160), torch.nan, device=DEVICE)
    stored[..., :M] = ds.masked_fill(~visited, torch.nan).mT
    bias = torch.zeros(*shape, M, N, device=DEVICE).masked_fill(~seen, -INF)
    dbias = torch.empty_like(bias)
    sum_scores(dbias, stored, mask_map.units_of(bias.expand(B, H, M, N), always=True), left, right)
    assert torch.allclose(dbias, ds.sum_to_size(dbias.shape), atol=1e-5)


@pytest.mark.parametrize("lists_from", (0, 1 << 60))
def test_row_that_has_seen_nothing_and_a_tile_of_infinite_scores(lists_from, monkeypatch):
    """In 16 bits beside a floating mask, where log2(e) times the lowest maximum would be -inf; and where a tile is read
    with its mask, so that a large number stands for an infinite one of K."""
    monkeypatch.setattr(mask_map, "LISTS_FROM", lists_from)
    for dtype in (F16, BF16, F32):
        q, k, v = randn(1, 1, 64, 32, dtype=dtype).detach().abs(), *randn(2, 1, 1, 256, 32, dtype=dtype).detach()
        k[:, :, 128:, 0] = -INF
        bias = torch.zeros(1, 1, 64, 256, dtype=dtype, device=DEVICE)
        bias[..., 5, :128] = -INF
        first, others = q[..., :1], q[..., 1:].clone().requires_grad_()  # dQ of the first is 0 * inf: no value
        whole = lambda others, first=first: torch.cat((first.to(others.dtype), others), -1)  # noqa: E731
        compare(lambda q, v, k=k, m=bias, whole=whole: fused(whole(q), k.to(q.dtype), v, m.to(q.dtype)),
                lambda q, v, k=k, m=bias, whole=whole: torch_fused(whole(q), k.to(q.dtype), v, m.to(q.dtype)),
                others, v.requires_grad_())
