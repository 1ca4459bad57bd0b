"""The Triton stages and the layer against PyTorch: python3 test_attention.py (any pytest argument may follow).

Without a GPU the kernels run in Triton's interpreter, made strict; with one, the same cases run on it. The reference is
PyTorch in float64, never our own code. A result is right if its error is at most twice that of PyTorch in the same
dtype, plus one rounding step. (A result in float64 may be 32 steps off: so many has the reference of its own.)
"""

import copy
import dataclasses
import io
import itertools
import json
import math
import os
import pickle
import runpy
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right, causal_upper_left

import benchmark_figures
import benchmark_results
import benchmark_tuning
import benchmarking
from benchmark_readme import readme
from triton_attention_backward import dscores_op
from triton_attention_dropout import dropout_op
from triton_attention_fused import attention_fused, merge_attention
from triton_attention_layer import TritonMultiheadAttention, attention_staged
from triton_attention_launch import DEVICE, INTERPRETED, describe_device, hopper
from triton_attention_scores import attention_scores, scores_op
from triton_attention_softmax import attention_softmax, mask_gradient_op, softmax_backward_op, softmax_op
from triton_attention_values import attention_values, values_op

if INTERPRETED:
    import strict_interpreter  # noqa: F401

HERE = Path(__file__).resolve().parent
GPU = pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
INF, NAN = float("inf"), float("nan")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

# B, H, Hk, M, N, D, Dv: one element, ragged, grouped, tile-sized, wide heads, long and short
SHAPES = [
    (1, 1, 1, 1, 1, 1, 1),
    (1, 3, 1, 37, 53, 24, 40),
    (1, 2, 1, 130, 67, 31, 31),
    (2, 2, 2, 33, 129, 72, 16),
    (1, 1, 1, 128, 128, 64, 64),
    (1, 1, 1, 5, 300, 160, 3),
    (1, 1, 1, 257, 33, 80, 200),
]


@pytest.fixture(autouse=True)
def _poisoned_and_seeded():
    """torch.empty returns NaN, so that an element which a kernel did not write shows."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def randn(*shape, dtype=F32, layout="plain", grad=True):
    """A random tensor [B, H, rows, columns] in one of the layouts that callers have."""
    if layout == "plain":
        x = torch.randn(shape, dtype=dtype, device=DEVICE)
    elif layout == "bnhd":  # heads next to columns, as a projection leaves them
        x = torch.randn(shape[0], shape[2], shape[1], shape[3], dtype=dtype, device=DEVICE).transpose(1, 2)
    elif layout == "columns":  # rows contiguous
        x = torch.randn(*shape[:2], shape[3], shape[2], dtype=dtype, device=DEVICE).mT
    elif layout == "guarded":  # inside a buffer of NaN
        x = torch.full([size + 3 for size in shape], NAN, dtype=dtype, device=DEVICE)
        x = x[1:-2, 1:-2, 1:-2, 2:-1]
        x.copy_(torch.randn(shape, dtype=dtype, device=DEVICE))
    elif layout == "every other":
        x = torch.randn(*shape[:3], 2 * shape[3], dtype=dtype, device=DEVICE)[..., ::2]
    elif layout == "expanded":
        x = torch.randn(shape[0], 1, *shape[2:], dtype=dtype, device=DEVICE).expand(shape)
    return x.detach().requires_grad_(grad)


LAYOUTS = ("plain", "bnhd", "columns", "guarded", "every other", "expanded")


# ---- the reference: PyTorch, in the dtype of its arguments


def heads_of(k, H):
    return k if k.shape[1] == H else k.repeat_interleave(H // k.shape[1], 1)


def torch_visible(M, N, diagonal=0):
    return torch.ones(M, N, dtype=torch.bool, device=DEVICE).tril(diagonal)


def torch_scores(q, k, scale=None, is_causal=False):
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    s = (q @ heads_of(k, q.shape[1]).mT) * scale
    return s.masked_fill(~torch_visible(*s.shape[2:]), -INF) if is_causal else s


def torch_softmax(s, mask=None, is_causal=False):
    if mask is not None:
        s = s.masked_fill(~mask, -INF) if mask.dtype == torch.bool else s + mask
    if is_causal:
        s = s.masked_fill(~torch_visible(*s.shape[2:]), -INF)
    return torch._safe_softmax(s, -1)


def torch_values(p, v, is_causal=False):
    p = p.tril() if is_causal else p
    return p @ heads_of(v, p.shape[1])


def torch_staged(q, k, v, mask=None, is_causal=False, scale=None):
    probs = torch_softmax(torch_scores(q, k, scale), mask, is_causal)
    return torch_values(probs, v), probs


def torch_fused(
    q, k, v, mask=None, is_causal=False, scale=None, window_size=(-1, -1), softcap=0.0, sinks=None, keep=None
):
    """(O, lse); keep is a dropout mask with its factor."""
    s, (M, N) = torch_scores(q, k, scale), (q.shape[2], k.shape[2])
    s = softcap * torch.tanh(s / softcap) if softcap else s
    s = s.masked_fill(~mask, -INF) if mask is not None and mask.dtype == torch.bool else s if mask is None else s + mask
    hidden = ~torch_visible(M, N) if is_causal else torch.zeros(M, N, dtype=torch.bool, device=s.device)
    left, right = window_size
    if left >= 0:
        hidden = hidden | torch_visible(M, N, N - M - left - 1)
    if right >= 0:
        hidden = hidden | ~torch_visible(M, N, N - M + right)
    s = s.masked_fill(hidden, -INF)
    if sinks is not None:
        s = torch.cat([s, sinks[None, :, None, None].expand(*s.shape[:3], 1)], -1)
    nothing = (s == -INF).all(-1)
    s = s.masked_fill(nothing[..., None], 0.0)  # logsumexp has no gradient at -inf
    probs = s.softmax(-1).masked_fill(nothing[..., None], 0.0)[..., :N]
    return torch_values(probs if keep is None else probs * keep, v), s.logsumexp(-1).masked_fill(nothing, -INF)


def double(x):
    if not isinstance(x, torch.Tensor) or not x.is_floating_point():
        return x
    return x.detach().double().requires_grad_(x.requires_grad)


def outputs_and_grads(function, args, kwargs, cotangents):
    """The outputs of a function and the gradients of its floating arguments, everything in one list."""
    outs = function(*args, **kwargs)
    outs = outs if isinstance(outs, tuple) else (outs,)
    wanted = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor) and a.requires_grad]
    results = {f"output {i}": out for i, out in enumerate(outs)}
    if wanted:
        pairs = [(o.masked_fill(o == -INF, 0.0) * c.to(o.dtype)).sum() for o, c in zip(outs, cotangents, strict=False)]
        grads = torch.autograd.grad(sum(pairs), wanted)
        results |= {f"gradient of argument {i}": grad for i, grad in enumerate(grads)}
    return results


def assert_close(ours, lower, exact, what=""):
    """|ours - exact| <= 2 |torch in the same dtype - exact| + one rounding step; NaN and inf where exact has them."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    ours64, lower64, exact = ours.detach().double(), lower.detach().double(), exact.detach()
    finite = exact.isfinite()
    assert torch.equal(ours64.isfinite(), finite), f"{what}: {(ours64.isfinite() != finite).sum()} misplaced NaN or inf"
    assert torch.equal(ours64[~finite].nan_to_num(), exact[~finite].nan_to_num()), f"{what}: other NaN or inf"
    if not finite.any():
        return
    step = torch.finfo(ours.dtype).eps * exact[finite].abs().max().item()
    allowed = 2 * (lower64 - exact)[finite].abs().max().item() + (32 * step if ours.dtype == F64 else step)
    error = (ours64 - exact)[finite].abs().max().item()
    assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e} ({ours.dtype})"


def compare(ours, theirs, *args, **kwargs):
    """ours(*args) against theirs: outputs, and the gradients of everything that requires one."""
    exact_args, exact_kwargs = [double(a) for a in args], {k: double(a) for k, a in kwargs.items()}
    with torch.no_grad():
        shapes = theirs(*exact_args, **exact_kwargs)
        shapes = shapes if isinstance(shapes, tuple) else (shapes,)
    cotangents = [torch.randn(o.shape, device=DEVICE, dtype=F64).to(args[0].dtype) for o in shapes]
    exact = outputs_and_grads(theirs, exact_args, exact_kwargs, cotangents)
    lower = outputs_and_grads(theirs, args, kwargs, cotangents)
    mine = outputs_and_grads(ours, args, kwargs, cotangents)
    for name in exact:
        assert_close(mine[name], lower[name], exact[name], name)


def staged(q, k, v, mask=None, is_causal=False, scale=None):
    return attention_staged(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=True)


def fused(q, k, v, mask=None, is_causal=False, scale=None, **kwargs):
    return attention_fused(q, k, v, mask, 0.0, is_causal, scale, enable_gqa=True, return_lse=True, **kwargs)


# a new implementation is one line: name -> (ours, PyTorch's)
ATTENTION = {
    "staged": (staged, torch_staged),
    "fused": (fused, torch_fused),
    "three functions": (
        lambda q, k, v, mask=None, is_causal=False, scale=None: (
            attention_values(
                attention_softmax(attention_scores(q, k, scale=scale, is_causal=is_causal), mask, is_causal=is_causal),
                v, is_causal=is_causal,
            ),
        ),
        lambda *args, **kwargs: (torch_staged(*args, **kwargs)[0],),
    ),
}

# ---- the stages


@pytest.mark.parametrize("dtype", (F32, F16, BF16, F64), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_stages(shape, dtype):
    B, H, Hk, M, N, D, Dv = shape
    if DEVICE.type == "cuda" and dtype == F64 and torch.cuda.get_device_capability()[0] < 8:
        pytest.skip("no float64 dot")
    layouts = itertools.cycle(LAYOUTS)
    for is_causal in (False, True):
        q, k, v = (randn(*s, dtype=dtype, layout=next(layouts)) for s in ((B, H, M, D), (B, Hk, N, D), (B, Hk, N, Dv)))
        s = randn(B, H, M, N, dtype=dtype, layout=next(layouts))
        p = randn(B, H, M, N, dtype=dtype, layout=next(layouts)).detach().softmax(-1).requires_grad_()
        compare(attention_scores, torch_scores, q, k, is_causal=is_causal)
        compare(attention_softmax, torch_softmax, s, is_causal=is_causal)
        compare(attention_values, torch_values, p, v, is_causal=is_causal)
        for ours, theirs in ATTENTION.values():
            compare(ours, theirs, q, k, v, is_causal=is_causal)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides(layout):
    q, k, v = randn(2, 4, 37, 40, layout=layout), randn(2, 2, 53, 40, layout=layout), randn(2, 2, 53, 24, layout=layout)
    s = randn(2, 4, 37, 53, layout=layout)
    compare(attention_scores, torch_scores, q, k)
    compare(attention_softmax, torch_softmax, s)
    compare(attention_values, torch_values, s.detach().softmax(-1).requires_grad_(), v)
    for ours, theirs in ATTENTION.values():
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


@pytest.mark.parametrize("tile", [(16, 16), (16, 64), (64, 16), (32, 128), (128, 32)], ids=str)
def test_tiles_do_not_change_the_result(tile):
    block = {"block_m": tile[0], "block_n": tile[1]}
    q, k, v = randn(1, 2, 70, 40), randn(1, 1, 150, 40), randn(1, 1, 150, 24)
    for is_causal in (False, True):
        compare(lambda q, k, c=is_causal: attention_scores(q, k, is_causal=c, **block),
                lambda q, k, c=is_causal: torch_scores(q, k, is_causal=c), q, k)
        s = randn(1, 2, 70, 150)
        compare(lambda s, c=is_causal: attention_softmax(s, is_causal=c, **block),
                lambda s, c=is_causal: torch_softmax(s, is_causal=c), s)
        p = s.detach().softmax(-1).requires_grad_()
        compare(lambda p, v, c=is_causal: attention_values(p, v, is_causal=c, **block),
                lambda p, v, c=is_causal: torch_values(p, v, is_causal=c), p, v)


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
    if D <= 128:
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


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_masks(dtype, is_causal):
    B, H, M, N = (1, 2, 60, 90) if dtype == BF16 else (2, 1, 60, 90)
    q, k, v = (randn(B, H, n, 24, dtype=dtype) for n in (M, N, N))
    s = randn(B, H, M, N, dtype=dtype)
    for mask in masks(B, H, M, N, dtype):
        compare(lambda s, m: attention_softmax(s, m, is_causal=is_causal),
                lambda s, m: torch_softmax(s, m, is_causal), s, mask)
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
    padding = torch.ones(2, 1, 1, 30, dtype=torch.bool, device=DEVICE)
    padding[1] = False  # one whole batch
    out, _ = staged(q * 1e4 - 2e6, k, v, padding)
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
    s = randn(1, 1, 4, 40, grad=False)
    s[0, 0, 1, 3], s[0, 0, 2, 5], s[0, 0, 3, 5] = NAN, INF, -INF
    for block_n in (None, 16):
        rows = attention_softmax(s, block_n=block_n).isnan().any(-1)[0, 0]
        assert rows.tolist() == [False, True, True, False]


@pytest.mark.parametrize("poison,dtype", [(NAN, F32), (NAN, F16), (NAN, BF16), (INF, F32), (-INF, F32)], ids=str)
def test_masked_keys_do_not_leak(poison, dtype):
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
            out, probs = staged(*inputs, mask)
            results.append((out, probs, *torch.autograd.grad(out.sum(), inputs)))
        for clean, poisoned in zip(*results, strict=True):
            assert (clean - poisoned).abs().max() <= 16 * torch.finfo(dtype).eps * clean.abs().max()


def test_the_future_does_not_leak():
    q, k, v = (randn(1, 1, 50, 24, grad=False) for _ in range(3))
    before = staged(q, k, v, is_causal=True)
    for poison in (1e3, NAN, INF):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, 20:], v2[:, :, 20:] = poison, poison
        after = staged(q, k2, v2, is_causal=True)
        assert all((a - b)[:, :, :20].abs().max() < 1e-6 for a, b in zip(before, after, strict=True))


def test_an_unmasked_inf_in_the_values_counts():
    p, v = randn(1, 1, 20, 30, grad=False).softmax(-1), randn(1, 1, 30, 8, grad=False)
    v[0, 0, 3, 2], v[0, 0, 4, 5] = INF, NAN
    out = attention_values(p, v)
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
    p = torch.zeros(1, 1, 3, rows, dtype=F16, device=DEVICE)
    p[..., 2150] = 1.0
    assert torch.equal(attention_values(p, q)[0, 0, 0], q[0, 0, 2150])


def refused(error, match, function, *args, **kwargs):
    return pytest.param(error, match, function, args, kwargs, id=f"{getattr(function, '__name__', 'call')}: {match}")


def T(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


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
    refused(ValueError, "pass enable_gqa=True", attention_staged, X, X[:, :2], X[:, :2]),
    refused(ValueError, "v must be", attention_staged, X, X[:, :2], X, enable_gqa=True),
    refused(TypeError, "enable_gqa must be True or False", attention_staged, X, X, X, enable_gqa=None),
    refused(ValueError, "v must be", attention_staged, X, X, X[:, :, :4]),
    refused(TypeError, "dense strided", attention_scores, X.to_sparse(), X),
    refused(TypeError, "attn_mask must be a dense strided", attention_softmax, X, T(5, 8).to_sparse()),
    refused(ValueError, "scale must be a number that float can hold", attention_scores, X, X, scale=10**400),
]


@pytest.mark.parametrize("error,match,function,args,kwargs", REFUSED)
def test_bad_input(error, match, function, args, kwargs):
    with pytest.raises(error, match=match):
        function(*args, **kwargs)


# ---- PyTorch around the functions


def test_gradcheck():
    """First and second derivatives by finite differences, in float64."""
    q, k, v = randn(1, 2, 3, 3, dtype=F64), randn(1, 1, 4, 3, dtype=F64), randn(1, 1, 4, 2, dtype=F64)
    bias = randn(1, 2, 1, 4, dtype=F64)
    s, p = randn(1, 2, 3, 4, dtype=F64), randn(1, 2, 3, 4, dtype=F64)
    functions = [
        (lambda q, k: attention_scores(q, k), (q, k)),
        (lambda s, m: attention_softmax(s, m), (s, bias)),
        (lambda s: attention_softmax(s, is_causal=True), (s,)),
        (lambda p, v: attention_values(p, v, is_causal=True), (p.tril().detach().requires_grad_(), v)),
        (lambda q, k, v, m: staged(q, k, v, m, is_causal=True), (q, k, v, bias)),
        (lambda q, k, v: staged(q, k, v)[0], (q, k, v)),
    ]
    for function, args in functions:
        assert torch.autograd.gradcheck(function, args, fast_mode=True)
        assert torch.autograd.gradgradcheck(function, args, fast_mode=True)


def test_gradients_of_one_output_alone():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    for index in (0, 1):
        compare(lambda *a, i=index: staged(*a)[i], lambda *a, i=index: torch_staged(*a)[i], q, k, v.detach())
    compare(lambda q: staged(q, k.detach(), v.detach())[0],
            lambda q: torch_staged(q, k.detach().to(q.dtype), v.detach().to(q.dtype))[0], q)


@pytest.mark.skipif(not INTERPRETED and DEVICE.type != "cuda", reason="CUDA or the interpreter")
def test_opcheck():
    q, k, s, seed = X, T(2, 2, 7, 8), T(2, 4, 5, 7), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool, device=DEVICE)
    cases = [
        (scores_op, (q, k, 0.5, None, None, None, None)), (scores_op, (q, k, 0.5, 0, -INF, 16, 16)),
        (softmax_op, (s, None, None, None, None)), (softmax_op, (s, mask, 0, None, None)),
        (softmax_backward_op, (s, s, None)), (mask_gradient_op, (s, [1, 4, 1, 7], F32)),
        (dropout_op, (s, seed, 0.5)), (values_op, (s, k, None, 4, False, 1.0, F32, None, None)),
        (values_op, (s, q, 0, 2, True, 1.0, F64, None, None)),
        (dscores_op, (q.half(), q, k.half(), s.half(), None)),
    ]
    for op, args in cases:
        torch.library.opcheck(op.op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


BACKEND = "aot_eager" if INTERPRETED else "inductor"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    q, k, v = (randn(2, 2, 40, 16) for _ in range(3))
    bias = randn(1, 1, 40, 40)
    options = {"fullgraph": True, "dynamic": dynamic, "backend": BACKEND}
    compiled = torch.compile(lambda q, k, v, m: staged(q, k, v, m, is_causal=True), **options)
    compare(compiled, lambda *a: torch_staged(*a, is_causal=True), q, k, v, bias)
    layer = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE).eval()
    x = torch.randn(2, 20, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, **options)
    for need_weights in (True, False):
        ours, eager = compiled(x, x, x, need_weights=need_weights), layer(x, x, x, need_weights=need_weights)
        assert (ours[0] - eager[0]).abs().max() < 1e-5
        grad, eager_grad = (torch.autograd.grad(o[0].square().sum(), x)[0] for o in (ours, eager))
        assert (grad - eager_grad).abs().max() < 1e-4
    torch._dynamo.reset()


def test_torch_func():
    q, k, v = (torch.randn(3, 1, 2, 9, 8, device=DEVICE) for _ in range(3))

    def loss(f, q, k, v):
        out, probs = f(q, k, v, is_causal=True)
        return out.square().sum() + probs.square().sum()

    grads = torch.func.vmap(torch.func.grad(lambda *a: loss(staged, *a), argnums=(0, 1, 2)))(q, k, v)
    exact = torch.func.vmap(torch.func.grad(lambda *a: loss(torch_staged, *a), argnums=(0, 1, 2)))(q, k, v)
    assert all((a - b).abs().max() < 1e-4 for a, b in zip(grads, exact, strict=True))
    layer = TritonMultiheadAttention(8, 2, device=DEVICE).eval()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: layer(x, x, x)[1])(q[:, 0])
    assert (mapped[1] - layer(q[1, 0], q[1, 0], q[1, 0])[1]).abs().max() < 1e-6
    shared = torch.func.vmap(lambda q: staged(q, k[0], v[0])[0], in_dims=0)(q)
    assert all((shared[i] - staged(q[i], k[0], v[0])[0]).abs().max() < 1e-6 for i in range(3))
    jacobian = torch.func.jacrev(lambda q: staged(q, k[0], v[0])[0])(q[0, :, :, :2])
    exact = torch.func.jacrev(lambda q: torch_staged(q, k[0], v[0])[0])(q[0, :, :, :2])
    assert (jacobian - exact).abs().max() < 1e-5
    masked = torch.func.vmap(lambda s, m: attention_softmax(s, m), in_dims=(0, None))(q, k[0, :, :, :1])
    assert (masked[1] - torch_softmax(q[1], k[0, :, :, :1])).abs().max() < 1e-6
    dropped = torch.func.vmap(lambda s: attention_softmax(s, dropout_p=0.5), randomness="different")(q)
    assert not torch.equal(dropped[0] == 0, dropped[1] == 0)
    with pytest.raises((NotImplementedError, RuntimeError)):  # never a silent zero
        torch.func.jvp(lambda q: staged(q, k[0], v[0])[0], (q[0],), (q[1],))


def test_autocast_follows_its_context():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    for dtype in (BF16, F16):
        with torch.autocast(DEVICE.type, dtype):
            out, probs = staged(q, k, v)
            scores = attention_scores(q, k)
            values = attention_values(probs, v)
        assert {out.dtype, probs.dtype, scores.dtype, values.dtype} == {dtype}
        grad = torch.autograd.grad(out.float().sum(), q)[0]
        assert grad.dtype == F32 and grad.isfinite().all()
        assert staged(q, k, v)[0].dtype == F32


def test_flop_counter_and_dispatch_modes_see_the_operators():
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        staged(X, X, X)
    for name in ("scores", "softmax", "values"):
        assert f"triton_attention.{name}.default" in seen


def test_repeatable_bitwise():
    q, k, v = randn(2, 4, 100, 32, dtype=F16), randn(2, 2, 90, 32, dtype=F16), randn(2, 2, 90, 32, dtype=F16)
    first = outputs_and_grads(staged, (q, k, v), {}, [torch.ones(2, 4, 100, 32, device=DEVICE)])
    for _ in range(2 if INTERPRETED else 50):
        again = outputs_and_grads(staged, (q, k, v), {}, [torch.ones(2, 4, 100, 32, device=DEVICE)])
        assert all(torch.equal(again[name], first[name]) for name in first)


# ---- the layer


def pair(*args, ours=None, **kwargs):
    """Our layer and torch's with the same parameters, randomised biases included."""
    kwargs = {"device": DEVICE, **kwargs}
    mine, theirs = TritonMultiheadAttention(*args, **kwargs, **(ours or {})), nn.MultiheadAttention(*args, **kwargs)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    mine.load_state_dict(theirs.state_dict())
    return mine, theirs


def layer_call(rng, E, H, kdim, vdim, batch_first, dtype):
    """A random call: (query, key, value, keyword arguments)."""
    B, L, S = (int(torch.randint(1, high, (), generator=rng)) for high in (4, 24, 24))
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=rng))]  # noqa: E731
    batched, kind = pick(True, True, False), pick("self", "shared", "separate")
    if kdim != E or vdim != E:
        kind = "separate"
    S = L if kind == "self" else S
    def sequence(n, d):
        shape = (n, d) if not batched else (B, n, d) if batch_first else (n, B, d)
        return torch.randn(shape, generator=rng, dtype=F32).to(DEVICE, dtype)
    query = sequence(L, E)
    key = query if kind == "self" else sequence(S, kdim)
    value = key if kind != "separate" else sequence(S, vdim)
    kwargs = {"need_weights": pick(True, False), "average_attn_weights": pick(True, False)}
    rows = (B if batched else 1) * H
    mask_shape = pick(None, (L, S), (rows, L, S))
    def mask(shape):
        keep = torch.rand(shape, generator=rng) < 0.7
        keep[..., 0] = True  # torch gives NaN for rows without a key; ours are tested elsewhere
        if pick(True, False):
            return (~keep).to(DEVICE)
        return torch.randn(shape, generator=rng).masked_fill(~keep, -INF).to(DEVICE, dtype)
    if mask_shape is not None:
        kwargs["attn_mask"] = mask(mask_shape)
        kwargs["is_causal"] = kwargs["need_weights"] and pick(True, False)
    if pick(True, False):
        kwargs["key_padding_mask"] = mask((B, S) if batched else (S,))
    return query, key, value, kwargs


@pytest.mark.parametrize("seed", range(40))
def test_layer_against_torch(seed):
    """A random configuration and call: outputs, weights, gradients of inputs and parameters."""
    rng = torch.Generator().manual_seed(seed)
    pick = lambda *options: options[int(torch.randint(len(options), (), generator=rng))]  # noqa: E731
    E, H = pick((8, 1), (12, 3), (32, 4), (40, 5))
    dtype, batch_first = pick(F32, F32, F64), pick(True, False)
    kdim, vdim = pick((None, None), (None, None), (E, 7), (6, 10))
    options = {"bias": pick(True, False), "add_bias_kv": pick(True, False), "add_zero_attn": pick(True, False)}
    mine, theirs = pair(E, H, kdim=kdim, vdim=vdim, batch_first=batch_first, dtype=dtype, **options)
    query, key, value, kwargs = layer_call(rng, E, H, kdim or E, vdim or E, batch_first, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates masks of two types
        query.requires_grad_()
        outs = [layer(query, key, value, **kwargs) for layer in (mine, theirs)]
        exact_layer = copy.deepcopy(theirs).double()
        double_kwargs = {k: double(v) for k, v in kwargs.items()}
        tensors = {id(t): double(t) for t in (query, key, value)}
        exact = exact_layer(*(tensors[id(t)] for t in (query, key, value)), **double_kwargs)
    assert (outs[0][1] is None) == (outs[1][1] is None) == (not kwargs["need_weights"])
    cotangent = torch.randn(exact[0].shape, dtype=F64, device=DEVICE)
    right = [*exact[:1 + kwargs["need_weights"]], *torch.autograd.grad(
        (exact[0] * cotangent).sum(), [tensors[id(query)], *exact_layer.parameters()]
    )]
    results = [
        [*o[: 1 + kwargs["need_weights"]],
         *torch.autograd.grad((o[0] * cotangent.to(dtype)).sum(), [query, *layer.parameters()])]
        for o, layer in zip(outs, (mine, theirs), strict=True)
    ]

    def worst(results):  # over all results of the call: of a gradient of eight numbers, the largest error is chance
        assert [r.shape for r in results] == [e.shape for e in right]
        pairs = zip(results, right, strict=True)
        return max((r.double() - e).abs().max() / e.abs().max().clamp(min=1e-3) for r, e in pairs)

    ours, lower = worst(results[0]), worst(results[1])
    assert ours <= 2 * lower + (32 if dtype == F64 else 1) * torch.finfo(dtype).eps, f"{ours:.2e}, torch {lower:.2e}"


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_layer_in_half_precision(dtype):
    mine, theirs = pair(32, 4, batch_first=True, dtype=dtype)
    x = torch.randn(2, 30, 32, device=DEVICE, dtype=dtype)
    exact = copy.deepcopy(theirs).double()(x.double(), x.double(), x.double())
    for ours, lower, right in zip(mine(x, x, x), theirs(x, x, x), exact, strict=True):
        assert_close(ours, lower, right)


def test_layer_state_dict_both_ways_and_copies():
    for options in ({}, {"kdim": 6, "vdim": 7}, {"add_bias_kv": True, "bias": False}):
        mine, theirs = pair(32, 4, **options)
        theirs.load_state_dict(mine.state_dict(), strict=True)
        assert list(mine.state_dict()) == list(theirs.state_dict())
    mine, theirs = pair(32, 4)
    x = torch.randn(5, 2, 32, device=DEVICE)
    buffer = io.BytesIO()
    torch.save(mine, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine)), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x, x, x)[0], mine(x, x, x)[0]) and len(other._forward_pre_hooks) == 1
    theirs.__class__ = TritonMultiheadAttention  # an existing module, converted in place
    assert (theirs(x, x, x)[0] - mine(x, x, x)[0]).abs().max() < 1e-6


@pytest.mark.parametrize("train", [False, True])
def test_transformer_layers_call_it(train):
    """nn.TransformerEncoder and Decoder with our self_attn, in eval also on NestedTensors, give torch's results."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE), 2)
    decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(32, 4, 64, 0.0, batch_first=True, device=DEVICE), 2)
    mine_encoder, mine_decoder = copy.deepcopy(encoder), copy.deepcopy(decoder)
    calls = []
    for stack in (mine_encoder, mine_decoder):
        for layer in stack.layers:
            for name in ("self_attn", "multihead_attn"):
                if hasattr(layer, name):
                    ours = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
                    ours.load_state_dict(getattr(layer, name).state_dict())
                    ours.register_forward_hook(lambda *_: calls.append(1))
                    setattr(layer, name, ours)
    for stack in (encoder, decoder, mine_encoder, mine_decoder):
        stack.train(train)
    x, memory = torch.randn(3, 10, 32, device=DEVICE), torch.randn(3, 7, 32, device=DEVICE)
    padding = torch.zeros(3, 10, dtype=torch.bool, device=DEVICE)
    padding[1, 6:] = padding[2, 3:] = True
    causal = nn.Transformer.generate_square_subsequent_mask(10, device=DEVICE)
    with torch.set_grad_enabled(train), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for kwargs in ({}, {"src_key_padding_mask": padding}, {"mask": causal, "is_causal": True}):
            ours, theirs = mine_encoder(x, **kwargs), encoder(x, **kwargs)
            keep = ~padding if "src_key_padding_mask" in kwargs else slice(None)
            assert (ours[keep] - theirs[keep]).abs().max() < 1e-5
        kwargs = {"tgt_mask": causal, "tgt_is_causal": True, "memory_key_padding_mask": padding[:, :7]}
        assert (mine_decoder(x, memory, **kwargs) - decoder(x, memory, **kwargs)).abs().max() < 1e-5
    assert len(calls) == 3 * 2 + 4


def test_layer_takes_nested_tensors():
    mine, _ = pair(32, 4, batch_first=True)
    parts = [torch.randn(n, 32, device=DEVICE) for n in (5, 2, 7)]
    for layout in (torch.strided, torch.jagged):
        x = torch.nested.nested_tensor(parts, layout=layout)
        out, _ = mine(x, x, x, need_weights=False)
        assert out.is_nested and out.layout == layout
        for got, part in zip(out.unbind(), parts, strict=True):
            assert (got - mine(part, part, part)[0]).abs().max() < 1e-5


def test_layer_rows_that_see_nothing():
    """torch: NaN with weights, the bias without; ours: the bias in both, and finite gradients."""
    mine, _ = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE, requires_grad=True)
    padding = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    padding[1] = True
    for need_weights in (True, False):
        out, weights = mine(x, x, x, key_padding_mask=padding, need_weights=need_weights)
        assert (out[1] - mine.out_proj.bias).abs().max() == 0 and out.isfinite().all()
        assert torch.autograd.grad(out.sum(), x)[0].isfinite().all()
        assert weights is None or (weights[1] == 0).all()


def test_layer_ignores_garbage_in_padding():
    mine, _ = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    padding = torch.zeros(2, 6, dtype=torch.bool, device=DEVICE)
    padding[:, 4:] = True
    clean = mine(x, x, x, key_padding_mask=padding)[0]
    x[:, 4:] = NAN
    assert (mine(x, x, x, key_padding_mask=padding)[0][:, :4] - clean[:, :4]).abs().max() < 1e-6


def test_layer_mask_wins_over_the_causal_hint():
    mine, theirs = pair(32, 4, batch_first=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    mask = torch.rand(6, 6, device=DEVICE) > 0.7
    mask.fill_diagonal_(False)
    exact, _ = theirs(x, x, x, attn_mask=mask, need_weights=True)
    for need_weights in (True, False):
        out, _ = mine(x, x, x, attn_mask=mask, is_causal=True, need_weights=need_weights)
        assert (out - exact).abs().max() < 1e-5


def test_layer_dropout():
    mine, _ = pair(32, 4, dropout=0.5, batch_first=True)
    x = torch.randn(2, 16, 32, device=DEVICE)
    torch.manual_seed(1)
    out, weights = mine(x, x, x, average_attn_weights=False)
    torch.manual_seed(1)
    again, _ = mine(x, x, x, average_attn_weights=False)
    assert torch.equal(out, again) and 0.3 < (weights == 0).float().mean() < 0.7
    mine.eval()
    _, weights = mine(x, x, x)
    assert (weights.sum(-1) - 1).abs().max() < 1e-5


def test_layer_grouped_query():
    """num_kv_heads: the same as a layer whose k and v rows are repeated for each head of a group."""
    for kwargs in ({}, {"kdim": 10, "vdim": 6}, {"add_bias_kv": True}):
        mine = TritonMultiheadAttention(32, 4, num_kv_heads=2, device=DEVICE, **kwargs)
        full = nn.MultiheadAttention(32, 4, device=DEVICE, **kwargs)
        repeat = lambda w: w.unflatten(0, (2, 8)).repeat_interleave(2, 0).flatten(0, 1)  # noqa: E731
        state = {k: v.detach().clone() for k, v in mine.state_dict().items()}
        for name in ("in_proj_weight", "in_proj_bias"):
            if name in state:
                q, k, v = state[name].split([32, 16, 16])
                state[name] = torch.cat([q, repeat(k), repeat(v)])
        for name in ("k_proj_weight", "v_proj_weight"):
            if name in state:
                state[name] = repeat(state[name])
        for name in ("bias_k", "bias_v"):
            if name in state:
                state[name] = repeat(state[name][0, 0])[None, None]
        full.load_state_dict(state)
        query = torch.randn(5, 2, 32, device=DEVICE)
        key = torch.randn(7, 2, kwargs.get("kdim", 32), device=DEVICE)
        value = torch.randn(7, 2, kwargs.get("vdim", 32), device=DEVICE) if kwargs.get("vdim") else key
        for ours, theirs in zip(mine(query, key, value), full(query, key, value), strict=True):
            assert (ours - theirs).abs().max() < 1e-5


def test_layer_autocast():
    mine, theirs = pair(32, 4, batch_first=True, add_bias_kv=True)
    x = torch.randn(2, 6, 32, device=DEVICE)
    mask = torch.zeros(6, 6, device=DEVICE)
    with torch.autocast(DEVICE.type, BF16):
        out, weights = mine(x, x, x, attn_mask=mask)
    assert out.dtype == weights.dtype == BF16
    assert (out - theirs(x, x, x)[0]).abs().max() < 0.1


def test_layer_out_proj_is_a_module():
    mine, _ = pair(32, 4)
    seen = []
    mine.out_proj.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(5, 2, 32, device=DEVICE)
    mine(x, x, x)
    assert seen
    mine.out_proj = nn.Sequential(mine.out_proj)  # a wrapper without a weight of its own
    assert mine(x, x, x)[0].shape == x.shape


B3, Q3 = T(5, 2, 8), T(3, 2, 8)
LAYER_REFUSED = [
    ({}, (T(8), T(8), T(8)), {}),
    ({}, (T(1, 5, 2, 8),) * 3, {}),
    ({}, (Q3, T(5, 8), T(5, 8)), {}),
    ({}, (T(3, 8), B3, B3), {}),
    ({}, (T(3, 2, 6), B3, B3), {}),
    ({}, (Q3, T(5, 2, 6), T(5, 2, 6)), {}),
    ({}, (Q3, B3, T(4, 2, 8)), {}),
    ({}, (Q3, T(5, 4, 8), T(5, 4, 8)), {}),
    ({"kdim": 6, "vdim": 7}, (Q3, T(5, 2, 6), T(4, 2, 7)), {}),
    ({"kdim": 6, "vdim": 7}, (Q3, T(5, 2, 8), T(5, 2, 7)), {}),
    ({}, (Q3.long(),) * 3, {}),
    ({}, (Q3.half(),) * 3, {}),
    ({}, (Q3, B3.half(), B3.half()), {}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 4)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(2, 3, 5)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(2, 2, 3, 5)}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).long()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).double()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(3, 5).half()}),
    ({}, (Q3, B3, B3), {"attn_mask": T(5)}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(2, 4).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(3, 5).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(5).bool()}),
    ({}, (Q3, B3, B3), {"key_padding_mask": T(2, 5).long()}),
    ({}, (Q3, B3, B3), {"is_causal": True}),
    ({}, (T(3, 8), T(5, 8), T(5, 8)), {"attn_mask": T(3, 3, 5)}),
    ({}, (T(3, 8), T(5, 8), T(5, 8)), {"key_padding_mask": T(2, 5).bool()}),
]


@pytest.mark.parametrize("options,args,kwargs", LAYER_REFUSED)
@pytest.mark.parametrize("need_weights", [True, False])
def test_layer_refuses_what_torch_refuses(options, args, kwargs, need_weights):
    mine, theirs = pair(8, 2, **options)
    with pytest.raises((AssertionError, RuntimeError, ValueError)) as torch_error:
        theirs(*args, **kwargs, need_weights=need_weights)
    with pytest.raises(torch_error.type) as our_error:
        mine(*args, **kwargs, need_weights=need_weights)
    assert len(str(our_error.value)) > 20


def test_layer_refuses_bad_options():
    for error, args, kwargs in (
        (AssertionError, (10, 3), {}), (ValueError, (0, 1), {}), (ValueError, (8, 0), {}),
        (ValueError, (8, 2), {"dropout": 1.5}), (ValueError, (8, 2), {"dropout": -0.1}),
        (ValueError, (8, 4), {"num_kv_heads": 3}), (ValueError, (8, 4), {"num_kv_heads": 0}),
        (ValueError, (8, 4), {"num_kv_heads": 4.0}),
    ):
        with pytest.raises(error):
            TritonMultiheadAttention(*args, **kwargs)
    mine, _ = pair(8, 2)
    for args in (([1.0], Q3, Q3), (Q3, None, None)):
        with pytest.raises(TypeError, match="must be a torch.Tensor"):
            mine(*args)
    with pytest.raises(TypeError, match="attn_mask must be a torch.Tensor"):
        mine(Q3, Q3, Q3, attn_mask=[True])


def test_layer_empty():
    mine, theirs = pair(8, 2)
    for query, key in ((T(0, 2, 8), B3), (T(3, 0, 8), T(5, 0, 8)), (Q3, T(0, 2, 8)), (T(0, 2, 8), T(0, 2, 8))):
        for ours, exact in zip(mine(query, key, key), theirs(query, key, key), strict=True):
            assert ours.shape == exact.shape and (ours - exact).abs().sum() < 1e-5
    mask = T(4, 0, 5)
    assert mine(T(0, 2, 8), B3, B3, attn_mask=mask)[0].shape == theirs(T(0, 2, 8), B3, B3, attn_mask=mask)[0].shape


def test_layer_mixes_mask_dtypes_as_torch_does():
    mine, theirs = pair(8, 2)
    x, padding = torch.randn(5, 2, 8, device=DEVICE), T(2, 5).bool()
    padding[1, 3:] = True
    half = torch.randn(5, 5, device=DEVICE).half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        both = (layer(x, x, x, padding, attn_mask=half) for layer in (mine, theirs))
        assert all((ours - exact).abs().max() < 1e-5 for ours, exact in zip(*both, strict=True))


# ---- other processes: imports, offline compilation


def run_python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env={**os.environ, **env}, timeout=900
    )


@pytest.mark.skipif(not INTERPRETED, reason="about machines without a GPU")
@pytest.mark.parametrize("first", ["import triton.language", "import torch._inductor.config, torch._dynamo", "pass"])
def test_interpreter_whatever_was_imported_first(first):
    code = f"{first}\nimport torch\nfrom triton_attention_softmax import attention_softmax\n"
    code += "print(attention_softmax(torch.zeros(1, 1, 2, 4))[0, 0, 0])"
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env=env, timeout=300)
    assert "0.2500, 0.2500" in run.stdout, run.stderr


@pytest.mark.skipif(not INTERPRETED, reason="on a machine without a GPU")
def test_cpu_tensors_in_a_compiling_process_are_refused():
    code = "import torch\nfrom triton_attention_scores import attention_scores\nx = torch.zeros(1, 1, 2, 4)\n"
    code += "attention_scores(x, x)"
    run = run_python(code, TRITON_INTERPRET="0")
    assert "ValueError: q is on the CPU" in run.stderr and "TRITON_INTERPRET=1" in run.stderr


# ---- the benchmarks, with a clock that tests can read


class FakeWatch:
    """Every call takes a millisecond; `interrupt` is the number of the timing that Ctrl-C ends."""

    def __init__(self, interrupt=None):
        self.timed, self.interrupt = [], interrupt

    def heat(self):
        pass

    def ceilings(self):
        return {"copy_gbps": 1000.0, "matmul_tflops": 100.0}

    def time(self, call):
        self.timed.append(call)
        if len(self.timed) == self.interrupt:
            raise KeyboardInterrupt
        return 1.0, 0.9, 1.1


def doubled(name, **makes):
    """A Case: 2 x, by the providers."""
    x = torch.arange(1.0, 9.0)
    build = lambda: benchmarking.Comparison(makes, lambda t: 2 * x.to(t), lambda r: r, bytes=1e9, flops=1e9)  # noqa: E731
    return benchmarking.Case(name, "case", list(makes), build)


def benchmark(cases, folder, watch, *options):
    """Run the cases; (exit code, rows of the JSON as {(name, provider): row})."""
    args, code = benchmarking.parser("").parse_args(["--out", str(folder), *options]), 0
    try:
        benchmarking.run("test", cases, args, watch)
    except SystemExit as end:
        code = end.code
    paths = list(folder.glob("*/test.json"))
    saved = json.loads(paths[0].read_text())["rows"] if paths else []
    return code, {(row["name"], row["provider"]): row for row in saved}


def twice():
    return lambda: torch.arange(2.0, 18.0, 2.0)


def test_benchmark_never_times_what_is_wrong(tmp_path, capsys):
    watch = FakeWatch()

    def missing():
        import no_such_package  # noqa: F401

    def too_large():
        raise MemoryError("needs 9 GiB, 1 are free")

    def stale():  # right at first, and what was in memory ever after
        out = torch.arange(2.0, 18.0, 2.0)
        return lambda: out

    wrong = lambda: lambda: torch.arange(3.0, 19.0, 2.0)  # noqa: E731
    case = doubled("a", right=twice, wrong=wrong, missing=missing, too_large=too_large, stale=stale, torch=twice)
    code, saved = benchmark([case, doubled("b", nobody=missing)], tmp_path, watch)
    notes = {provider: row["note"] for (_, provider), row in saved.items()}
    assert notes.pop("nobody").startswith("not installed")
    assert code == 0 and notes["right"] == notes["torch"] == "" and notes["wrong"] == notes["stale"] == "WRONG"
    assert notes["missing"].startswith("not installed") and notes["too_large"].startswith("out of memory: needs 9 GiB")
    assert {provider for (_, provider), row in saved.items() if row["ms"]} == {"right", "torch"}
    assert len(watch.timed) == 2 * benchmarking.ROUNDS
    assert saved["a", "right"]["of_roofline"] == 1.0 and "WRONG" in capsys.readouterr().out


def test_benchmark_survives_ctrl_c_and_resumes(tmp_path, capsys):
    cases = lambda: [doubled(name, one=twice, two=twice) for name in "ab"]  # noqa: E731
    points = 2 * benchmarking.ROUNDS
    code, saved = benchmark(cases(), tmp_path, FakeWatch(interrupt=points))  # in the last turn of the first case
    assert code == 130 and len(saved) == 1 and "--resume goes on" in capsys.readouterr().out
    watch = FakeWatch()
    code, saved = benchmark(cases(), tmp_path, watch, "--resume")
    assert code == 0 and len(saved) == 4 and len(watch.timed) == 3 * benchmarking.ROUNDS
    watch = FakeWatch()
    assert benchmark(cases(), tmp_path, watch, "--resume")[1].keys() == saved.keys() and not watch.timed
    assert len(benchmark(cases()[:1], tmp_path, FakeWatch())[1]) == 2  # without --resume it starts anew


def test_benchmark_without_a_gpu_saves_nothing(tmp_path):
    assert benchmark([doubled("a", torch=twice)], tmp_path, None) == (0, {}) and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", ("attention", "seq_lengths", "block_sizes", "heatmap"))
def test_benchmark_help_is_quick(script):
    code = f"import runpy, sys\nsys.argv = ['benchmark_{script}.py', '--help']\n"
    code += "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
    code += "finally: assert not {'torch', 'triton', 'matplotlib'} & set(sys.modules)"
    start = time.monotonic()
    run = run_python(code)
    assert run.returncode == 0 and "--resume" in run.stdout, run.stderr
    assert time.monotonic() - start < 2


def test_benchmark_figures_need_the_json_alone(tmp_path):
    info = {"gpu": "GPU", "torch": "", "triton": "", "commit": "", "copy_gbps": 4e3, "matmul_tflops": 700.0}
    folder = tmp_path / "GPU"
    folder.mkdir()
    rows = [
        dataclasses.asdict(benchmark_results.Row(
            name, f"bfloat16 B4 H16 S{S} D64", provider, ms=S / 1e3, gbps=1e3, tflops=100.0, of_roofline=0.5,
            intensity=100.0, peak_mib=float(S), about={"S": S, "D": 64, "dtype": "bfloat16", "causal": False},
        ))
        for name in ("attention", "attention backward") for S in (512, 1024) for provider in ("triton staged", "torch")
    ]
    rows.append({**rows[0], "case": "bfloat16 B4 H16 S2048 D64", "ms": None, "note": "out of memory", "about": {
        **rows[0]["about"], "S": 2048}})
    for script in ("benchmark_attention", "benchmark_seq_lengths"):
        (folder / f"{script}.json").write_text(json.dumps({**info, "rows": rows}))
        benchmark_figures.redraw(tmp_path, script)
    drawn = {path.name for path in folder.glob("*.png")}
    assert drawn == {f"benchmark_{name}.{mode}.png" for name in ("attention", "roofline", "seq_lengths")
                     for mode in ("light", "dark")}
    tiles = [
        {"name": "scores", "case": "c", "provider": f"16x{n}", "ms": ms, "note": note,
         "about": {"BLOCK_M": 16, "BLOCK_N": n, "chosen": n == 16}}
        for n, ms, note in ((16, 1.0, ""), (32, None, "WRONG"), (64, None, "ValueError: the tile does not fit"))
    ]
    (folder / "tiles.json").write_text(json.dumps({**info, "rows": tiles}))
    assert benchmark_figures.redraw_heatmap(folder / "tiles.json", tmp_path / "heatmap.png")
    assert not benchmark_figures.redraw_heatmap(folder / "none.json", tmp_path / "none.png")


def test_benchmark_saves_the_winning_tile(tmp_path):
    path = tmp_path / "tuned.py"
    shutil.copy(HERE / "triton_attention_tuned.py", path)
    before = runpy.run_path(str(path))
    tile = before["Tile"](32, 256, 64, 4, 5, SPAN=4)

    def saved(*key):
        benchmark_tuning.save(path, key, tile, "0.12 on a test")
        return runpy.run_path(str(path))["TILES"]

    table = saved("scores", "sm_90", 16, 64, False)  # the row for causal or not is the one that served
    assert table["scores", "sm_90", 16, 64, None] == tile and len(table) == len(before["TILES"])
    table = saved("scores", "sm_90", 16, 64, True)
    order = [key[4] for key in table if key[:4] == ("scores", "sm_90", 16, 64)]
    assert order == [None, True]  # the later of two rows holds
    table = saved("values", "sm_90", 16, 64, True)
    assert table["values", "sm_90", 16, 64, True] == tile and len(table) == len(before["TILES"]) + 1
    table = saved("scores", "sm_120", 32, 128, False)
    assert table["scores", "sm_120", 32, 128, None] == tile and len(table) == len(before["TILES"]) + 2
    assert path.read_text().count("# 0.12 on a test") == 4


def test_readme_shows_the_committed_results():
    assert readme() == (HERE / "README.md").read_text(), "run python3 benchmarking.py"


@pytest.mark.skipif(not INTERPRETED, reason="once, where CI runs")
def test_every_kernel_compiles_for_every_gpu():
    """No spills, and shared memory within the limit of each GPU; the table is compile_kernels.py's."""
    run = subprocess.run([sys.executable, "compile_kernels.py"], capture_output=True, text=True, cwd=HERE, timeout=900)
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert all(f"{name} " in run.stdout for name in ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"))


# ---- what only a GPU shows


@GPU
def test_gpu_refuses_what_does_not_fit():
    big = T(1, 1, 512, 256)
    with pytest.raises(ValueError, match="does not fit"):
        attention_values(T(1, 1, 512, 512), T(1, 1, 512, 256), block_m=512, block_n=512)
    with pytest.raises(ValueError, match="does not fit this GPU: it needs .* shared memory"):
        attention_values(T(1, 1, 512, 512), T(1, 1, 512, 256), block_m=256, block_n=256)
    with pytest.raises(ValueError, match="q is on the CPU"):
        attention_scores(big.cpu(), big.cpu())
    with pytest.raises(ValueError, match="k must be on the device"):
        attention_scores(big, big.cpu())


@GPU
def test_gpu_many_heads_and_large_tensors():
    q = torch.randn(70000, 1, 1, 16, device=DEVICE, dtype=F16)
    assert (attention_scores(q, q)[:, 0, 0, 0] - (q.double() ** 2).sum(-1)[:, 0, 0] / 4).abs().max() < 0.05
    out, probs = attention_staged(q, q, q)
    assert torch.equal(out, q) and (probs == 1).all()
    del probs
    n = 36000  # 2 * n * n > 2^31 elements
    q, k, v = (torch.randn(1, 2, n, 64, device=DEVICE, dtype=BF16) for _ in range(3))
    out, probs = attention_staged(q, k, v)
    rows = slice(n - 8, n)
    exact = torch_staged(q[:, 1:, rows].double(), k[:, 1:].double(), v[:, 1:].double())
    assert (out[:, 1:, rows] - exact[0]).abs().max() < 2e-3 and (probs[:, 1:, rows] - exact[1]).abs().max() < 1e-4


@pytest.mark.skipif(hopper("triton_attention_scores_hopper") is None, reason="needs a Hopper GPU")
@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_gpu_scores_hopper(dtype):
    kernels = hopper("triton_attention_scores_hopper")
    shapes = [(1, 1, 1, 1, 8, 8), (2, 4, 2, 300, 328, 64), (1, 6, 2, 65, 1000, 40), (1, 2, 2, 1100, 520, 128)]
    for B, H, Hk, M, N, D in shapes:
        q = torch.randn(B, M, H, D, device=DEVICE, dtype=dtype).transpose(1, 2)
        k = torch.randn(B, Hk, N + 1, D + 8, device=DEVICE, dtype=dtype)[:, :, 1:, :D]
        for scale in (0.3, -2.0, 0.0):
            compare(kernels.scores_hopper, torch_scores, q, k, scale)
    q, k = (torch.randn(2, 8, 2048, 64, device=DEVICE, dtype=dtype) for _ in range(2))
    assert kernels.applies(q, k)
    assert not any(kernels.applies(*pair) for pair in ((q, k[:, :, :-1]), (q[..., 1:], k[..., 1:]), (q.mT, k.mT)))
    assert torch.equal(attention_scores(q, k), attention_scores(q, k, block_m=128))


@GPU
def test_gpu_cuda_graph():
    q, k, v = (torch.randn(1, 2, 100, 32, device=DEVICE) for _ in range(3))
    attention_staged(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = attention_staged(q, k, v)
    q.normal_()
    graph.replay()
    assert (out - attention_staged(q, k, v)[0]).abs().max() == 0


@GPU
def test_gpu_averaged_weights_cost_no_second_copy():
    layer = TritonMultiheadAttention(256, 4, batch_first=True, device=DEVICE, dtype=BF16).eval()
    x = torch.randn(4, 2048, 256, device=DEVICE, dtype=BF16)
    with torch.no_grad():
        layer(x, x, x)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        layer(x, x, x)
        peak = torch.cuda.max_memory_allocated() - before
    probs = 4 * 4 * 2048 * 2048 * 2
    assert peak < 2.4 * probs  # the scores while the probabilities are written, then the probabilities alone


if __name__ == "__main__":
    print(describe_device())
    workers = ["-n", str(min(os.cpu_count() or 1, 12))]  # each a process: the interpreter has one thread
    raise SystemExit(pytest.main([__file__, "-q", *workers, "--durations=5", *sys.argv[1:]]))
