"""What the tests share: inputs in every layout, the reference (PyTorch, never our own code), the comparison.

A result is right if its error against float64 is at most twice that of PyTorch in the same dtype, plus one rounding
step. (A result in float64 may be 32 steps off: so many has the reference of its own.)
"""

import contextlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triton_attention import operators, replay
from triton_attention.device import DEVICE, INTERPRETED
from triton_attention_fused import attention_fused
from triton_attention_layer import attention_staged
from triton_attention_scores import attention_scores
from triton_attention_softmax import attention_softmax
from triton_attention_values import attention_values

HERE = Path(__file__).resolve().parent.parent  # the root of the repository
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
    elif layout == "sliced":  # rows begin where their elements may, not at 16 bytes
        x = torch.randn(*shape[:3], shape[3] + 3, dtype=dtype, device=DEVICE)[..., 1:-2]
    elif layout == "packed":  # the middle one of Q, K and V that one projection left next to each other
        x = torch.randn(shape[0], shape[2], 3, shape[1], shape[3], dtype=dtype, device=DEVICE)[:, :, 1].transpose(1, 2)
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


def torch_logsumexp(s, dim):
    """torch.logsumexp, whose gradient comes from its rounded value and is wrong beside a huge number."""
    if s.shape[dim] == 0:
        return s.logsumexp(dim)
    top = s.amax(dim, keepdim=True).detach()
    return (s - top).exp().sum(dim).log() + top.squeeze(dim)


def torch_values(p, v, is_causal=False):
    p = p.tril() if is_causal else p
    return p.to(v.dtype) @ heads_of(v, p.shape[1])


def torch_staged(q, k, v, mask=None, is_causal=False, scale=None, keep=None):
    """(O, P); keep is a dropout mask with its factor."""
    probs = torch_softmax(torch_scores(q, k, scale), mask, is_causal)
    probs = probs if keep is None else probs * keep
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
    lse = torch_logsumexp(s, -1).masked_fill(nothing, -INF)
    return torch_values(probs if keep is None else probs * keep, v), lse


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


def errors(ours, lower, exact, what=""):
    """(our largest error, torch's in the same dtype, one rounding step); NaN and inf must be where exact has them."""
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return 0.0, 0.0, 0.0
    ours64, lower64, exact = ours.detach().double(), lower.detach().double(), exact.detach()
    finite = exact.isfinite()
    assert torch.equal(ours64.isfinite(), finite), f"{what}: {(ours64.isfinite() != finite).sum()} misplaced NaN or inf"
    assert torch.equal(ours64[~finite].nan_to_num(), exact[~finite].nan_to_num()), f"{what}: other NaN or inf"
    if not finite.any():
        return 0.0, 0.0, 0.0
    error, lower_error = ((t - exact)[finite].abs().max().item() for t in (ours64, lower64))
    step = torch.finfo(ours.dtype).eps * exact[finite].abs().max().item()
    return error, lower_error, 32 * step if ours.dtype == F64 else step


def assert_close(ours, lower, exact, what=""):
    """|ours - exact| <= 2 |torch in the same dtype - exact| + one rounding step; NaN and inf where exact has them."""
    error, lower_error, step = errors(ours, lower, exact, what)
    allowed = 2 * lower_error + step
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


def T(*shape, dtype=F32):
    """Zeros."""
    return torch.zeros(shape, dtype=dtype, device=DEVICE)


@contextlib.contextmanager
def hopper_kernels(choice):
    """Inside, on a Hopper GPU, its kernels run "always" (wherever they can, small cases too), "never", or "auto"."""
    with pytest.MonkeyPatch.context() as patch:
        replay._records.clear()  # of launches of the other kernels
        if choice == "never":
            patch.setattr(operators, "_import", lambda module: None)
        if choice == "always":
            for name in ("scores", "forward", "backward"):
                kernels = operators.hopper_kernels(name, DEVICE)
                for limit in ("MIN_WORK", "MIN_WAVES"):
                    if hasattr(kernels, limit):
                        patch.setattr(kernels, limit, 0)
        yield
        replay._records.clear()


def run_python(code, **env):
    """A Python process of its own: (exit code, output, errors)."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HERE, env={**os.environ, **env}, timeout=900
    )
