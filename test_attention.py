"""Attention against PyTorch.

    python3 test_attention.py             this file and every other test, with pytest's options (-k, -x, ...)
    python3 test_attention.py --quick     some of every function, in a minute and a half on two cores

Without a GPU the kernels run in Triton's interpreter, made strict; with one, the same cases run on it.
"""

import itertools
import math
import os
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import triton_attention_softmax
from tests.reference import (
    ATTENTION, BF16, DEVICE, F16, F32, F64, HERE, INF, LAYOUTS, NAN, SHAPES, T, assert_close, compare, double, fused,
    randn, staged, torch_fused, torch_scores, torch_softmax, torch_staged, torch_values, torch_visible,
)
from triton_attention import softmax_backward
from triton_attention.device import describe_device
from triton_attention_fused import MAX_HEAD_DIM, attention_fused, merge_attention
from triton_attention_layer import attention_staged
from triton_attention_scores import attention_scores
from triton_attention_softmax import attention_softmax
from triton_attention_values import attention_values


# ---- the stages


@pytest.mark.parametrize("dtype", (F32, F16, BF16, F64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stages(shape, dtype):
    B, H, Hk, M, N, D, Dv = shape
    if DEVICE.type == "cuda" and dtype == F64 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no float64 dot")
    layouts = itertools.cycle(LAYOUTS)
    for is_causal in (False, True) if dtype in (F32, BF16) else (sum(shape) % 2 == 0,):
        q, k, v = (randn(*s, dtype=dtype, layout=next(layouts)) for s in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, Dv)))
        s = randn(B, H, M, N, dtype=dtype, layout=next(layouts))
        p = randn(B, H, M, N, dtype=dtype, layout=next(layouts)).detach().softmax(-1).requires_grad_()
        compare(attention_scores, torch_scores, q, k, is_causal=is_causal)
        compare(attention_softmax, torch_softmax, s, is_causal=is_causal)
        compare(attention_values, torch_values, p, v, is_causal=is_causal)
        compare(staged, torch_staged, q, k, v, is_causal=is_causal)
        compare(fused, torch_fused, q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    q, k, v = randn(2, 4, 37, 40, layout=layout), randn(2, 2, 53, 40, layout=layout), randn(2, 2, 53, 24, layout=layout)
    s = randn(2, 4, 37, 53, layout=layout)
    compare(attention_scores, torch_scores, q, k)
    compare(attention_softmax, torch_softmax, s)
    compare(attention_values, torch_values, s.detach().softmax(-1).requires_grad_(), v)
    for ours, theirs in ((staged, torch_staged), (fused, torch_fused)):
        compare(ours, theirs, q, k, v, is_causal=True)
        out = ours(q, k, v)[0]
        grad = torch.autograd.grad(out.sum(), v)[0]  # sum() hands back an expanded gradient, strides 0
        exact = torch_staged(*(double(t) for t in (q, k, v)))[0]
        exact_grad = torch.autograd.grad(torch_staged(*(double(t) for t in (q, k)), w := double(v))[0].sum(), w)[0]
        assert (out - exact).abs().max() < 1e-5 and (grad - exact_grad).abs().max() < 1e-5


def test_negative_views():
    """The imaginary part of a conjugate is a float tensor whose memory holds the opposite sign."""
    q = torch.randn(1, 1, 5, 8, dtype=torch.complex64, device=DEVICE).conj().imag
    assert q.is_neg() and (attention_scores(q, q.clone()) - torch_scores(q, q.clone())).abs().max() < 1e-5
    assert (attention_softmax(q) - q.softmax(-1)).abs().max() < 1e-6


def test_every_length():
    """Every N from 1 past three tiles, M alike: the ragged tile of each size."""
    for n in range(1, 50):
        q, k, v = (randn(1, 1, rows, 16, grad=False) for rows in (18 - n // 3, n, n))
        s = attention_scores(q, k, is_causal=n % 2 == 0, block_m=16, block_n=16)
        p = attention_softmax(s, is_causal=n % 2 == 0, block_m=16, block_n=16)
        o = attention_values(p, v, is_causal=n % 2 == 0, block_m=16, block_n=16)
        exact = torch_staged(q.double(), k.double(), v.double(), is_causal=n % 2 == 0)
        assert (o - exact[0]).abs().max() < 2e-6 and (p - exact[1]).abs().max() < 2e-6
        o = attention_fused(q, k, v, is_causal=n % 2 == 0, block_m=16, block_n=16)
        assert (o - exact[0]).abs().max() < 2e-6


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (32, 128), (128, 32)], ids=str)
def test_tiles_do_not_change_the_result(tile):
    block = {"block_m": tile[0], "block_n": tile[1]}
    q, k, v = randn(1, 2, 77, 40), randn(1, 1, 150, 40), randn(1, 1, 150, 24)
    for is_causal in (False, True):
        compare(lambda q, k, c=is_causal: attention_scores(q, k, is_causal=c, **block),
                lambda q, k, c=is_causal: torch_scores(q, k, is_causal=c), q, k)
        s = randn(1, 2, 70, 150)
        compare(lambda s, c=is_causal: attention_softmax(s, is_causal=c, **block),
                lambda s, c=is_causal: torch_softmax(s, is_causal=c), s)
        p = s.detach().softmax(-1).requires_grad_()
        compare(lambda p, v, c=is_causal: attention_values(p, v, is_causal=c, **block),
                lambda p, v, c=is_causal: torch_values(p, v, is_causal=c), p, v)
        compare(lambda *a, c=is_causal: fused(*a, is_causal=c, **block),
                lambda *a, c=is_causal: torch_fused(*a, is_causal=c), q, k, v)


@pytest.mark.parametrize("scale", [-2, 0, 1e-4, 30.0])
def test_scale(scale):
    q, k, v = (randn(1, 2, 40, 24) for _ in range(3))
    compare(attention_scores, torch_scores, q, k, scale=scale)
    compare(staged, torch_staged, q, k, v, scale=scale)
    compare(fused, torch_fused, q, k, v, scale=scale)


@pytest.mark.parametrize("D", [1, 3, 16, 24, 31, 40, 64, 72, 96, 128, 160, 300])
def test_head_dims(D):
    q, k = randn(1, 2, 40, D, layout="guarded"), randn(1, 1, 33, D, layout="guarded")
    v = randn(1, 1, 33, 2 * D, layout="guarded")
    compare(attention_scores, torch_scores, q, k)
    compare(staged, torch_staged, q, k, v)
    if 2 * D <= MAX_HEAD_DIM:
        compare(fused, torch_fused, q, k, v)


# ---- masks


def masks(B, H, M, N, dtype):
    """Every kind of mask, some of whose rows forbid everything."""
    keep = torch.rand(B, H, M, N, device=DEVICE) > 0.3
    keep[:, :, M // 2] = False
    bias = randn(B, H, M, N, dtype=dtype, grad=False)
    for shape in ((B, H, M, N), (1, 1, M, N), (B, 1, 1, N), (1, H, M, 1), (1, 1, 1, 1)):
        index = tuple(slice(0, s) for s in shape)
        yield keep[index]
        yield bias[index].clone().requires_grad_(shape[3] == N)  # along the keys a constant changes nothing
    yield keep[0, 0]  # [M, N]
    yield keep[0, 0, 0]  # [N]
    yield bias[0].masked_fill(~keep[0], -INF)  # [H, M, N]
    yield bias[0, 0].masked_fill(~keep[0, 0], -INF).requires_grad_()
    yield bias.transpose(2, 3).contiguous().transpose(2, 3).requires_grad_()


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_masks(dtype):
    B, H, M, N = (1, 2, 60, 90) if dtype == BF16 else (2, 1, 60, 90)
    q, k, v = (randn(B, H, n, 24, dtype=dtype) for n in (M, N, N))
    s = randn(B, H, M, N, dtype=dtype)
    for i, mask in enumerate(masks(B, H, M, N, dtype)):
        is_causal = (i // 2 % 2 == 0) == (dtype == F32)
        compare(lambda s, m, c=is_causal: attention_softmax(s, m, is_causal=c),
                lambda s, m, c=is_causal: torch_softmax(s, m, c), s, mask)
        compare(staged, torch_staged, q, k, v, mask, is_causal=is_causal)
        compare(fused, torch_fused, q, k, v, mask, is_causal=is_causal)


def test_mask_in_another_dtype():
    s = randn(1, 2, 20, 30, dtype=F16)
    bias = randn(20, 30)
    assert_close(attention_softmax(s, bias), torch_softmax(s, bias.half()), torch_softmax(s.double(), bias.double()))
    assert torch.autograd.grad(attention_softmax(s, bias).square().sum(), bias)[0].dtype == F32


@pytest.mark.parametrize("M,N", [(37, 53), (53, 37), (40, 40), (1, 20), (20, 1), (200, 150)])
def test_causal_bias(M, N):
    q, k, v, s = randn(1, 2, M, 16), randn(1, 2, N, 16), randn(1, 2, N, 16), randn(1, 2, M, N)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its own M > N gives NaN
        biases = ((causal_upper_left(M, N), 0), (causal_lower_right(M, N), N - M))
    for bias, diagonal in biases:
        keep = torch_visible(M, N, diagonal)
        compare(lambda q, k, v, b=bias: staged(q, k, v, b), lambda q, k, v, m=keep: torch_staged(q, k, v, m), q, k, v)
        compare(lambda q, k, v, b=bias: fused(q, k, v, b), lambda q, k, v, m=keep: torch_fused(q, k, v, m), q, k, v)
        compare(lambda s, b=bias: attention_softmax(s, b), lambda s, m=keep: torch_softmax(s, m), s)
        keep = keep & torch_visible(M, N)
        compare(lambda q, k, v, b=bias: staged(q, k, v, b, is_causal=True),
                lambda q, k, v, m=keep: torch_staged(q, k, v, m), q, k, v)


@pytest.mark.parametrize("name", ATTENTION)
def test_against_sdpa(name):
    """Where torch's own fused attention says something, the stages say the same."""
    q, k, v = randn(2, 4, 33, 24, grad=False), randn(2, 2, 47, 24, grad=False), randn(2, 2, 47, 24, grad=False)
    bias = randn(2, 1, 33, 47, grad=False)
    for kwargs in ({}, {"is_causal": True}, {"attn_mask": bias}, {"attn_mask": bias > 0}, {"scale": -0.3}):
        theirs = F.scaled_dot_product_attention(q, k, v, **kwargs, enable_gqa=True)
        mask = {"mask" if key == "attn_mask" else key: value for key, value in kwargs.items()}
        assert (ATTENTION[name][0](q, k, v, **mask)[0] - theirs).abs().max() < 2e-6


def test_rows_that_see_nothing():
    """Zeros, with zero gradients, whatever the scores; the finite stand-ins for -inf that give mean(V) show here."""
    q, k, v = (randn(2, 2, 30, 16) for _ in range(3))
    for mask in (torch.zeros(30, 30, dtype=torch.bool, device=DEVICE), torch.full((30, 30), -INF, device=DEVICE)):
        out, probs = staged(q, k, v, mask)
        grads = torch.autograd.grad(out.sum() + probs.square().sum(), (q, k, v))
        assert all((t == 0).all() for t in (out, probs, *grads))
        out, lse = fused(q, k, v, mask)
        assert (lse == -INF).all() and all((t == 0).all() for t in (out, *torch.autograd.grad(out.sum(), (q, k, v))))
    padding = torch.ones(2, 1, 1, 30, dtype=torch.bool, device=DEVICE)
    padding[1] = False  # one whole batch
    for ours in (staged, fused):
        out, _ = ours(q * 1e4 - 2e6, k, v, padding)
        assert (out[1] == 0).all() and (out[0] != 0).all()


# ---- numbers


def test_softmax_of_extreme_rows():
    lowest = torch.finfo(F32).min
    rows = torch.stack([
        torch.full((70,), lowest), torch.full((70,), -500.0), torch.linspace(-1e4, 1e4, 70), torch.full((70,), 3e38),
        torch.full((70,), -2e6), torch.linspace(-88, -600, 70), torch.full((70,), -INF), torch.zeros(70),
    ]).to(DEVICE)[None, None]  # fmt: skip
    for block_n in (None, 16):
        p = attention_softmax(rows.requires_grad_(), block_n=block_n)
        assert_close(p, torch._safe_softmax(rows, -1), torch._safe_softmax(rows.double(), -1))
        assert torch.autograd.grad(p.square().sum(), rows)[0].isfinite().all()


@pytest.mark.parametrize("dtype", (F16, BF16, F32), ids=str)
@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
def test_rows_of_one_large_negative_constant(ours, dtype):
    """-1e9 or finfo.min, stand-ins for -inf in masks, over a whole row: all keys have one weight, in both passes."""
    sinks = randn(2, dtype=dtype)
    for M in (20, 1):
        q, k, v = (randn(2, 2, n, 16, dtype=dtype) for n in (M, 133, 133))
        mask = randn(M, 133, grad=False)
        mask[M // 2] = -1e9
        if M > 1:
            mask[3], mask[5], mask[7, 20:], mask[9, 30:] = torch.finfo(F32).min, -1e5, -INF, -1e9
        q.data[:, :, (mask < -1e4).all(1)] = 0.0  # whose scores float32 would lose beside the constant, float64 not
        for with_sinks in (False, True)[: 2 if ours is fused else 1]:
            kwargs = {"sinks": sinks} if with_sinks else {}
            do, inputs = torch.randn(2, 2, M, 16, device=DEVICE, dtype=dtype), (q, k, v, *kwargs.values())
            grads = torch.autograd.grad(ours(q, k, v, mask, **kwargs)[0], inputs, do)
            exact = [double(t) for t in inputs]
            exact_kwargs = {"sinks": exact[3]} if with_sinks else {}
            out = (torch_fused if with_sinks else torch_staged)(*exact[:3], mask.double(), **exact_kwargs)[0]
            for mine, right in zip(grads, torch.autograd.grad(out, exact, do.double()), strict=True):
                assert (mine - right).abs().max() <= 4 * torch.finfo(dtype).eps * max(right.abs().max(), 1.0)


def test_large_gradients_beside_a_floating_mask():
    """P has its divisor before dS is rounded to float16, which holds dP no better than that."""
    q, k, v = (randn(1, 1, n, 16, dtype=F16) for n in (20, 300, 300))
    do, mask = (torch.randn(1, 1, 20, 16, device=DEVICE) * 2e4).clamp(-6e4, 6e4).to(F16), T(20, 300, dtype=F16)
    grads = (torch.autograd.grad(fused(q, k, v, m)[0], (q, k, v), do) for m in (mask, None))
    for beside, without in zip(*grads, strict=True):
        assert without.isfinite().all() and (beside - without).abs().max() <= 2e-2 * without.abs().max()


@pytest.mark.parametrize("dtype", (F16, BF16, F32, F64), ids=str)
@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
def test_keys_that_score_minus_infinity(ours, dtype):
    """An infinite coordinate takes the weight of its keys, whatever tiles they fill; a row with no others gives 0."""
    q, k, v = (randn(1, 2, n, 16, dtype=dtype, grad=False) for n in (230, 230, 230))
    q[..., 0], k[:, :, :140, 0] = q[..., 0].abs() + 0.5, -INF
    q = q * 0.3  # two keys of a causal row with large scores show each rounding
    for is_causal in (False, True):
        lower, exact = (torch_staged(*tensors, is_causal=is_causal) for tensors in ((q, k, v), map(double, (q, k, v))))
        out, second = ours(q, k, v, is_causal=is_causal)
        assert_close(out, lower[0], exact[0])
        rows = slice(140 if is_causal else 0, None)
        assert second[:, :, rows].isfinite().all() and (not is_causal or (out[:, :, :140] == 0).all())
        v.requires_grad_()
        assert (torch.autograd.grad(ours(q, k, v, is_causal=is_causal)[0].sum(), v)[0][:, :, :140] == 0).all()
        v.requires_grad_(False)


@pytest.mark.parametrize("N", [1, 2, 1000, 16384, 16385, 100_000])
def test_softmax_of_long_rows(N):
    s = randn(1, 1, 3, N)
    compare(attention_softmax, torch_softmax, s)
    assert (attention_softmax(s).sum(-1) - 1).abs().max() < 1e-5
    assert (attention_softmax(s + 64) - attention_softmax(s)).abs().max() < 1e-4  # shift invariance


def test_a_nan_stays_in_its_row():
    q, k, v = (randn(1, 2, 40, 24, grad=False) for _ in range(3))
    q[0, 1, 7] = NAN
    out, probs = staged(q, k, v)
    bad = torch.zeros(1, 2, 40, dtype=torch.bool, device=DEVICE)
    bad[0, 1, 7] = True
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(probs.isnan().any(-1), bad)
    out, lse = fused(q, k, v)
    assert torch.equal(out.isnan().all(-1), bad) and torch.equal(out.isnan().any(-1), bad)
    assert torch.equal(lse.isnan(), bad)
    s = randn(1, 1, 4, 40, grad=False)
    s[0, 0, 1, 3], s[0, 0, 2, 5], s[0, 0, 3, 5] = NAN, INF, -INF
    for block_n in (None, 16):
        rows = attention_softmax(s, block_n=block_n).isnan().any(-1)[0, 0]
        assert rows.tolist() == [False, True, True, False]


@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
@pytest.mark.parametrize(
    "poison,dtype", [(NAN, F32), (NAN, F16), (INF, F32), (-INF, BF16), (2e38, F32), (2e38, BF16), (6e4, F16)], ids=str
)
def test_masked_keys_do_not_leak(poison, dtype, ours):
    """NaN and inf in keys and values that no query may see change nothing, forward and backward."""
    q, k, v = (randn(2, 1, 20, 24, dtype=dtype, grad=False) for _ in range(3))
    keep = torch.ones(2, 1, 1, 20, dtype=torch.bool, device=DEVICE)
    keep[:, ..., 15:] = False
    keep[1, ..., 7] = False
    bad = ~keep[:, 0, 0, :, None].expand(2, 20, 24)[:, None]
    float_mask = torch.zeros(2, 1, 1, 20, device=DEVICE, dtype=dtype).masked_fill(~keep, -INF)
    for mask in (keep, float_mask):
        results = []
        for fill in (0.0, poison):
            inputs = [q.clone().requires_grad_(), *(t.masked_fill(bad, fill).requires_grad_() for t in (k, v))]
            out, second = ours(*inputs, mask)
            results.append((out, second, *torch.autograd.grad(out.sum(), inputs)))
        for clean, poisoned in zip(*results, strict=True):
            assert (clean - poisoned).abs().max() <= 16 * torch.finfo(dtype).eps * clean.abs().max()


@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
def test_the_future_does_not_leak(ours):
    q, k, v = (randn(1, 1, 50, 24, grad=False) for _ in range(3))
    before = ours(q, k, v, is_causal=True)
    for poison in (1e3, NAN, INF):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 20:], v2[:, :, 20:] = poison, poison
        after = ours(q, k2, v2, is_causal=True)
        assert all((a - b)[:, :, :20].abs().max() < 1e-6 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
def test_a_mask_of_the_future_is_not_read(ours):
    q, k, v = (randn(1, 2, n, 16, grad=False) for n in (30, 40, 40))
    bias = randn(30, 40, grad=False)
    expected = ours(q, k, v, bias, is_causal=True)
    for value in (NAN, INF, -INF):
        future = torch.ones_like(bias).triu(1).bool()
        for a, b in zip(ours(q, k, v, bias.masked_fill(future, value), is_causal=True), expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dropout_p", (0.0, 0.5))
@pytest.mark.parametrize("dtype", (F16, F32), ids=str)
@pytest.mark.parametrize("M,N", [(9, 9), (9, 150), (20, 9)])
def test_staged_attention_without_weights(M, N, dtype, dropout_p, monkeypatch):
    """The zeros above the diagonal are not written (memory holds NaN here): results and gradients are the same bits."""
    for module in (triton_attention_softmax, softmax_backward):  # a row a program, as on a GPU
        row_tile = module.row_tile
        monkeypatch.setattr(module, "row_tile", lambda *args, row_tile=row_tile: {**row_tile(*args), "BLOCK_M": 1})
    inputs = [randn(2, h, n, d, dtype=dtype) for h, n, d in ((2, M, 16), (1, N, 16), (1, N, 24))]
    padding = torch.arange(N, device=DEVICE) < torch.tensor([[[[N - 5]]], [[[N // 2]]]], device=DEVICE)
    bias = randn(1, 2, M, N, dtype=dtype)
    for mask, create_graph in ((padding, False), (bias, True)):
        results = []
        for need_weights in (True, False):
            torch.manual_seed(0)
            out, weights = attention_staged(
                *inputs, mask, dropout_p, is_causal=True, enable_gqa=True, need_weights=need_weights
            )
            assert (weights is not None) == need_weights
            wanted = [*inputs, bias] if mask is bias else inputs
            grads = torch.autograd.grad(out.float().square().sum(), wanted, create_graph=create_graph)
            results.append([out, *grads])
            if create_graph:
                results[-1] += torch.autograd.grad(sum(g.float().square().sum() for g in grads), wanted)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert all(t.isfinite().all() for t in results[1])


def test_an_unmasked_inf_in_the_values_counts():
    p, v = randn(1, 1, 20, 30, grad=False).softmax(-1), randn(1, 1, 30, 8, grad=False)
    v[0, 0, 3, 2], v[0, 0, 4, 5] = INF, NAN
    q, k = randn(1, 1, 20, 8, grad=False), randn(1, 1, 30, 8, grad=False)
    for out in (attention_values(p, v), attention_fused(q, k, v), attention_fused(q, k, v, q.new_zeros(20, 30))):
        assert (out[..., 2] == INF).all() and out[..., 5].isnan().all() and out.isfinite().sum() == 20 * 6


# ---- dropout


def test_dropout():
    s = randn(2, 3, 64, 100)
    torch.manual_seed(1)
    dropped = attention_softmax(s, dropout_p=0.3)
    kept = dropped != 0
    rate, sigma = kept.float().mean().item(), math.sqrt(0.3 * 0.7 / kept.numel())
    assert abs(rate - 0.7) < 3 * sigma
    for size in (0, 1, 2, 3):  # no dimension repeats the pattern of another
        assert not torch.equal(kept.select(size, 0), kept.select(size, 1))
    exact = torch_softmax(double(s)) * kept / 0.7
    assert (dropped - exact).abs().max() < 1e-6
    grad = torch.autograd.grad(dropped.square().sum(), s)[0]
    s64 = double(s)
    exact_grad = torch.autograd.grad((torch_softmax(s64) * kept / 0.7).square().sum(), s64)[0]
    assert (grad - exact_grad).abs().max() < 1e-6  # the backward drops what the forward dropped
    for block in (16, 64):
        torch.manual_seed(1)
        assert torch.equal(attention_softmax(s, dropout_p=0.3, block_m=16, block_n=block) != 0, kept)
    assert not torch.equal(attention_softmax(s, dropout_p=0.3) != 0, kept)
    torch.manual_seed(1)  # (b, h, m, n) alone decide: a part of the tensor gets its part of the pattern
    assert torch.equal(attention_softmax(s[:1, :2, :30, :50], dropout_p=0.3) != 0, kept[:1, :2, :30, :50])


@pytest.mark.parametrize("dropout_p", [0.0, 0.5, 1.0])
def test_dropout_in_attention(dropout_p):
    q, k, v = (randn(1, 2, 40, 16) for _ in range(3))
    out, probs = attention_staged(q, k, v, dropout_p=dropout_p, is_causal=True)
    assert (out - probs @ v).abs().max() < 1e-5
    factor = (probs != 0) / (1 - dropout_p) if dropout_p < 1 else torch.zeros_like(probs)
    exact_in = [double(t) for t in (q, k, v)]
    exact = (torch_staged(*exact_in, is_causal=True)[1] * factor) @ exact_in[2]
    assert (out - exact).abs().max() < 1e-5
    grads, exact_grads = torch.autograd.grad(out.sum(), (q, k, v)), torch.autograd.grad(exact.sum(), exact_in)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(grads, exact_grads, strict=True))


# ---- shapes, memory and arguments at the edge


def test_empty_tensors():
    for zero in range(6):
        B, H, M, N, D, Dv = (0 if i == zero else n for i, n in enumerate((2, 2, 5, 7, 8, 4)))
        q, k, v = randn(B, H, M, D), randn(B, H, N, D), randn(B, H, N, Dv)
        theirs = F.scaled_dot_product_attention(q.detach(), k.detach(), v.detach(), scale=1.0)
        for is_causal in (False, True):
            out, probs = staged(q, k, v, is_causal=is_causal)
            assert out.shape == theirs.shape == (B, H, M, Dv) and probs.shape == (B, H, M, N)
            if not is_causal:
                assert (out - theirs).abs().sum() < 1e-5
            grads = torch.autograd.grad(out.sum() + probs.sum(), (q, k, v))
            assert all(g.isfinite().all() and g.shape == t.shape for g, t in zip(grads, (q, k, v), strict=True))
            once, lse = fused(q, k, v, is_causal=is_causal)
            assert lse.shape == (B, H, M) and torch.allclose(once, out, atol=1e-6)
            assert all(map(torch.allclose, torch.autograd.grad(once.sum(), (q, k, v)), grads))
            scores = attention_scores(q, k, is_causal=is_causal)
            assert torch.equal(scores.isinf(), torch_scores(q, k, 1.0, is_causal).isinf())


def far_rows(rows, columns, dtype=F16):
    """[1, 1, rows, columns] whose rows lie 2^20 elements apart, over memory that is committed only where written."""
    torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        x = torch.empty(((rows - 1) << 20) + columns, dtype=dtype, device=DEVICE)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True
    x = x.as_strided((1, 1, rows, columns), (0, 0, 1 << 20, 1))
    return x.copy_(torch.randn(rows, columns, device=DEVICE))


def test_offsets_beyond_2_to_the_31():
    """An int32 offset wraps at row 2048 of a stride of 2^20."""
    rows, few = 2200, slice(2100, 2200)
    q = far_rows(rows, 16)
    k = randn(1, 1, 16, 16, dtype=F16, grad=False)
    exact = q.double() @ k.double().mT
    assert (attention_scores(q, k, scale=1.0) - exact).abs().max() < 0.02
    assert (attention_scores(k, q, scale=1.0) - exact.mT).abs().max() < 0.02
    assert (attention_softmax(q)[:, :, few] - q[:, :, few].double().softmax(-1)).abs().max() < 1e-3
    assert (attention_softmax(exact.half(), q)[:, :, few] - (exact + q).softmax(-1)[:, :, few]).abs().max() < 2e-3
    assert (attention_values(q, k) - q.double() @ k.double()).abs().max() < 0.02
    exact = torch_staged(*(t.double() for t in (q, k, k)))[0]
    assert (attention_fused(q, k, k) - exact)[:, :, few].abs().max() < 0.01
    p = torch.zeros(1, 1, 3, rows, dtype=F16, device=DEVICE)
    p[..., 2150] = 1.0
    assert torch.equal(attention_values(p, q)[0, 0, 0], q[0, 0, 2150])


def refused(error, match, function, *args, **kwargs):
    return pytest.param(error, match, function, args, kwargs, id=f"{getattr(function, '__name__', 'call')}: {match}")


X = T(2, 4, 5, 8)
REFUSED = [
    refused(TypeError, "q must be a torch.Tensor, got list", attention_scores, [1.0], X),
    refused(TypeError, "k must be a torch.Tensor, got NoneType", attention_scores, X, None),
    refused(TypeError, "q must be float16.*got torch.int64", attention_scores, X.long(), X.long()),
    refused(TypeError, "k must have the dtype of q", attention_scores, X, X.half()),
    refused(ValueError, "q must be 4-D", attention_scores, X[0], X),
    refused(ValueError, r"k must be \[B, Hk, N, D\] = \[2, Hk, N, 8\], got \(2, 4, 5", attention_scores, X, X[..., 1:]),
    refused(ValueError, "k must be .* got", attention_scores, X, X[:1]),
    refused(ValueError, "divides the 4 query heads, got 3", attention_scores, X, X[:, :3]),
    refused(ValueError, "divides the 4 query heads, got 0", attention_scores, X, X[:, :0]),
    refused(TypeError, "scale must be a number", attention_scores, X, X, scale="a"),
    refused(TypeError, "scale must be a number", attention_scores, X, X, scale=True),
    refused(TypeError, "is_causal must be True or False, got int", attention_scores, X, X, is_causal=1),
    refused(ValueError, "block_m must be a power of two from 16, got 8", attention_scores, X, X, block_m=8),
    refused(ValueError, "block_n must be a power of two from 16, got 48", attention_softmax, X, block_n=48),
    refused(TypeError, "block_n must be an int", attention_values, X[..., :5], X, block_n=16.0),
    refused(ValueError, "does not fit: it needs", attention_scores, X, X, block_m=2048, block_n=2048),
    refused(TypeError, "scores must be a torch.Tensor", attention_softmax, None),
    refused(ValueError, r"broadcast to \[B, H, M, N\] = \[2, 4, 5, 8\], got \(5, 7\)", attention_softmax, X, T(5, 7)),
    refused(ValueError, "broadcast", attention_softmax, X, T(1, 1, 1, 5, 8)),
    refused(TypeError, "attn_mask must be bool .* got torch.int64", attention_softmax, X, T(5, 8).long()),
    refused(TypeError, "attn_mask must be a torch.Tensor", attention_softmax, X, [True]),
    refused(ValueError, "CausalBias, must be for", attention_softmax, X, causal_lower_right(5, 9)),
    refused(ValueError, "dropout_p must be between 0 and 1, got 1.5", attention_softmax, X, dropout_p=1.5),
    refused(ValueError, "dropout_p must be between 0 and 1, got -0.1", attention_softmax, X, dropout_p=-0.1),
    refused(ValueError, "dropout_p must be between 0 and 1, got nan", attention_softmax, X, dropout_p=NAN),
    refused(TypeError, "dropout_p must be a number", attention_softmax, X, dropout_p="0.1"),
    refused(ValueError, r"v must be \[B, Hk, N, Dv\]", attention_values, X, X),
    refused(TypeError, "v must have the dtype of probs", attention_values, X[..., :5], X.double()),
    *(case for function in (attention_staged, attention_fused) for case in (
        refused(ValueError, "pass enable_gqa=True", function, X, X[:, :2], X[:, :2]),
        refused(ValueError, "v must be", function, X, X[:, :2], X, enable_gqa=True),
        refused(TypeError, "enable_gqa must be True or False", function, X, X, X, enable_gqa=None),
        refused(ValueError, "v must be", function, X, X, X[:, :, :4]),
        refused(ValueError, "dropout_p must be between 0 and 1", function, X, X, X, dropout_p=2.0),
        refused(ValueError, r"attn_mask must broadcast .* got \(5, 4\)", function, X, X, X, attn_mask=T(5, 4)),
        refused(TypeError, "q must be a torch.Tensor", function, None, X, X),
    )),
    refused(TypeError, "dense strided", attention_scores, X.to_sparse(), X),
    refused(TypeError, "attn_mask must be a dense strided", attention_softmax, X, T(5, 8).to_sparse()),
    refused(ValueError, "scale must be a number that float can hold", attention_scores, X, X, scale=10**400),
    refused(TypeError, "need_weights must be True or False", attention_staged, X, X, X, need_weights=0),
    refused(TypeError, "return_lse must be True or False", attention_fused, X, X, X, return_lse=1),
    refused(ValueError, "head dim of at most 256, got 300", attention_fused, *(T(1, 1, 2, 300),) * 3),
    refused(TypeError, r"window_size must be a pair \(left, right\)", attention_fused, X, X, X, window_size=4),
    refused(TypeError, "window_size must be a pair of ints", attention_fused, X, X, X, window_size=(1.0, 2)),
    refused(ValueError, "window_size must have sizes from 0", attention_fused, X, X, X, window_size=(-2, 0)),
    refused(TypeError, "softcap must be a number", attention_fused, X, X, X, softcap="a"),
    refused(ValueError, "softcap must be positive", attention_fused, X, X, X, softcap=-1.0),
    refused(TypeError, "sinks must be a torch.Tensor", attention_fused, X, X, X, sinks=[0.0] * 4),
    refused(ValueError, r"sinks must be \[H\] = \[4\], got \(3,\)", attention_fused, X, X, X, sinks=T(3)),
    refused(TypeError, "sinks must be float16", attention_fused, X, X, X, sinks=T(4).long()),
    refused(ValueError, "does not fit: it needs", attention_fused, X, X, X, block_m=2048, block_n=2048),
    refused(ValueError, "softcap must be positive and finite", attention_fused, X, X, X, softcap=10**400),
    refused(TypeError, "lse1 must be a torch.Tensor", merge_attention, X, 0.0, X, X[..., 0]),
    refused(TypeError, "o1 must be a dense floating tensor", merge_attention, X.long(), X[..., 0], X, X[..., 0]),
    refused(ValueError, r"lse2 must be \[2, 4, 5\]", merge_attention, X, X[..., 0], X, X[..., :1]),
    refused(ValueError, r"o2 must be \[2, 4, 5, 8\]", merge_attention, X, X[..., 0], X[:1], X[..., 0]),
]


@pytest.mark.parametrize("error,match,function,args,kwargs", REFUSED)
def test_bad_input(error, match, function, args, kwargs):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


if __name__ == "__main__":
    print(describe_device())
    if {"-h", "--help"} & {*sys.argv}:
        print(__doc__)
    workers = ["-n", str(min(os.cpu_count() or 1, 12))]  # each a process: the interpreter has one thread
    files = [__file__, *sorted(str(path) for path in (HERE / "tests").glob("test_*.py"))]
    raise SystemExit(pytest.main([*files, "-q", *workers, "--durations=5", *sys.argv[1:]]))
