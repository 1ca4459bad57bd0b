"""PyTorch around the functions: gradcheck, opcheck, torch.compile, torch.func, autocast, modes, repeatability."""

import functools

import pytest
import torch

from testing import (
    ATTENTION, BF16, DEVICE, F16, F32, F64, INF, INTERPRETED, T, compare, fused, outputs_and_grads, randn, staged,
    torch_softmax, torch_staged,
)
from triton_attention_backward import dscores_op
from triton_attention_dropout import dropout_op
from triton_attention_fused import attention_fused, fused_op
from triton_attention_fused_backward import fused_backward_op
from triton_attention_fused_bias import fused_bias_gradient_op
from triton_attention_layer import TritonMultiheadAttention
from triton_attention_scores import attention_scores, scores_op
from triton_attention_softmax import attention_softmax, mask_gradient_op, softmax_backward_op, softmax_op
from triton_attention_values import attention_values, values_op


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
    sinks = randn(2, dtype=F64)
    for kwargs in ({"is_causal": True}, {"window_size": (1, 1), "softcap": 1.5, "sinks": sinks, "scale": -0.7}):
        assert torch.autograd.gradcheck(lambda *args, kw=kwargs: fused(*args, **kw), (q, k, v, bias), fast_mode=True)
    with pytest.raises(RuntimeError, match="no second derivative: use attention_staged"):
        grad = torch.autograd.grad(fused(q, k, v)[0].sum(), q, create_graph=True)[0]
        grad.sum().backward()


def test_gradients_of_one_output_alone():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    for index in (0, 1):
        compare(lambda *a, i=index: staged(*a)[i], lambda *a, i=index: torch_staged(*a)[i], q, k, v.detach())
    compare(lambda q: staged(q, k.detach(), v.detach())[0],
            lambda q: torch_staged(q, k.detach().to(q.dtype), v.detach().to(q.dtype))[0], q)


@pytest.mark.skipif(not INTERPRETED and DEVICE.type != "cuda", reason="CUDA or the interpreter")
def test_opcheck():
    q, k, s, seed = T(2, 4, 5, 8), T(2, 2, 7, 8), T(2, 4, 5, 7), torch.zeros(1, dtype=torch.int64, device=DEVICE)
    mask = torch.ones(1, 1, 5, 7, dtype=torch.bool, device=DEVICE)
    cases = [
        (scores_op, (q, k, 0.5, None, None, None, None)), (scores_op, (q, k, 0.5, 0, -INF, 16, 16)),
        (softmax_op, (s, None, None, None, None)), (softmax_op, (s, mask, 0, None, None)),
        (softmax_backward_op, (s, s, None)), (mask_gradient_op, (s, [1, 4, 1, 7], F32)),
        (dropout_op, (s, seed, 0.5)), (values_op, (s, k, None, 4, False, 1.0, F32, None, None)),
        (values_op, (s, q, 0, 2, True, 1.0, F64, None, None)),
        (dscores_op, (q.half(), q, k.half(), s.half(), None)),
    ]
    for dtype in (F32, F16, BF16):
        q, k, bias = q.to(dtype), k.to(dtype), s.to(dtype)
        options = (0.5, 0.0, 0.0, None, 0)
        inputs = (q, k, k, bias, None, seed)
        outputs = fused_op(*inputs, *options, None, None)
        saved = (q, k, k, bias, None, seed, *outputs)
        record = fused_backward_op(q, None, *saved, *options)[3]
        cases += [
            (fused_op, (*inputs, *options, 16, None)), (fused_backward_op, (q, None, *saved, *options)),
            (fused_bias_gradient_op, (q, *saved[:4], seed, record, [1, 4, 5, 7], F32, *options)),
        ]
    for op, args in cases:
        torch.library.opcheck(op.op, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"))


BACKEND = "aot_eager" if INTERPRETED else "inductor"


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    q, k, v = (randn(2, 2, 40, 16) for _ in range(3))
    bias = randn(1, 1, 40, 40)
    options = {"fullgraph": True, "dynamic": dynamic, "backend": BACKEND}
    for ours, theirs in list(ATTENTION.values())[: 2 if dynamic else 3]:
        compiled = torch.compile(lambda q, k, v, m, f=ours: f(q, k, v, m, is_causal=True), **options)
        compare(compiled, lambda *a, f=theirs: f(*a, is_causal=True), q, k, v, bias)
        x, compiled = q.detach(), torch.compile(lambda x, f=ours: f(x, x, x)[0], **options)
        for need_grad in (False, True):  # one tensor as all three arguments
            x.requires_grad_(need_grad)
            assert (compiled(x) - ours(x, x, x)[0]).abs().max() < 1e-5
    layer = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE).eval()
    x = torch.randn(2, 20, 32, device=DEVICE, requires_grad=True)
    compiled = torch.compile(layer, **options)
    for need_weights in (True, False):
        ours, eager = compiled(x, x, x, need_weights=need_weights), layer(x, x, x, need_weights=need_weights)
        assert (ours[0] - eager[0]).abs().max() < 1e-5
        grad, eager_grad = (torch.autograd.grad(o[0].square().sum(), x)[0] for o in (ours, eager))
        assert (grad - eager_grad).abs().max() < 1e-4
    torch._dynamo.reset()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_with_masks(dynamic):
    """Bool, as padding and as a full mask, in the functions and through the layer, forward and backward."""
    q, k, v = (randn(2, 2, 40, 16) for _ in range(3))
    masks = [torch.rand(shape, device=DEVICE) > 0.3 for shape in ((2, 1, 1, 40), (40, 40))]
    options = {"fullgraph": True, "dynamic": dynamic, "backend": BACKEND}
    for ours, theirs in list(ATTENTION.values())[:2]:
        compiled = torch.compile(ours, **options)
        for mask in masks[: 1 if dynamic else 2]:
            compare(lambda *a, f=compiled, m=mask: f(*a, m), lambda *a, f=theirs, m=mask: f(*a, m), q, k, v)
    layer = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
    x, padding = torch.randn(2, 20, 32, device=DEVICE), torch.arange(20, device=DEVICE).expand(2, 20) > 14
    compiled = torch.compile(layer, **options)
    for need_weights in (True, False):
        kwargs = {"key_padding_mask": padding, "need_weights": need_weights}
        assert (compiled(x, x, x, **kwargs)[0] - layer(x, x, x, **kwargs)[0]).abs().max() < 1e-5
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ATTENTION)
def test_torch_func(name):
    ours, theirs = ATTENTION[name]
    q, k, v = (torch.randn(3, 1, 2, 9, 8, device=DEVICE) for _ in range(3))
    bias, hidden = torch.randn(9, 9, device=DEVICE), torch.rand(3, 1, 1, 9, 9, device=DEVICE) > 0.9

    def loss(f, q, k, v, m):
        return sum(out.square().sum() for out in f(q, k, v, m, is_causal=True))

    for mask, dim in ((None, None), (bias, None), (~hidden, 0)):
        grads, exact = (
            torch.func.vmap(torch.func.grad(functools.partial(loss, f), argnums=(0, 1, 2)), in_dims=(0, 0, 0, dim))
            (q, k, v, mask) for f in (ours, theirs)
        )
        assert all((a - b).abs().max() < 1e-4 for a, b in zip(grads, exact, strict=True))
    shared = torch.func.vmap(lambda q: ours(q, k[0], v[0])[0], in_dims=0)(q)
    assert all((shared[i] - ours(q[i], k[0], v[0])[0]).abs().max() < 1e-6 for i in range(3))
    jacobian = torch.func.jacrev(lambda q: ours(q, k[0], v[0])[0])(q[0, :, :, :2])
    exact = torch.func.jacrev(lambda q: theirs(q, k[0], v[0])[0])(q[0, :, :, :2])
    assert (jacobian - exact).abs().max() < 1e-5
    for context in (torch.enable_grad, torch.no_grad):  # vjp's function is called after vjp has returned
        causal = [lambda *qkv, f=f: f(*qkv, is_causal=True)[0] for f in (ours, theirs)]
        pulled = [torch.func.vjp(f, q[0], k[0], v[0]) for f in causal]
        with context():
            grads, exact = (pull(torch.ones_like(o)) for o, pull in pulled)
        assert all((a - b).abs().max() < 1e-5 for a, b in zip(grads, exact, strict=True))
    with pytest.raises((NotImplementedError, RuntimeError)):  # never a silent zero
        torch.func.jvp(lambda q: ours(q, k[0], v[0])[0], (q[0],), (q[1],))


def test_vmap_around_the_rest():
    q, k = (torch.randn(3, 1, 2, 9, 8, device=DEVICE) for _ in range(2))
    layer = TritonMultiheadAttention(8, 2, device=DEVICE).eval()
    with torch.no_grad():
        mapped = torch.func.vmap(lambda x: layer(x, x, x)[1])(q[:, 0])
    assert (mapped[1] - layer(q[1, 0], q[1, 0], q[1, 0])[1]).abs().max() < 1e-6
    masked = torch.func.vmap(lambda s, m: attention_softmax(s, m), in_dims=(0, None))(q, k[0, :, :, :1])
    assert (masked[1] - torch_softmax(q[1], k[0, :, :, :1])).abs().max() < 1e-6
    dropped = torch.func.vmap(lambda s: attention_softmax(s, dropout_p=0.5), randomness="different")(q)
    assert not torch.equal(dropped[0] == 0, dropped[1] == 0)
    sinks = torch.randn(3, 2, device=DEVICE)
    for i, mapped in enumerate(torch.func.vmap(lambda q, s: attention_fused(q, q, q, sinks=s))(q, sinks)):
        assert (mapped - attention_fused(q[i], q[i], q[i], sinks=sinks[i])).abs().max() < 1e-6


def test_autocast_follows_its_context():
    q, k, v = (randn(1, 2, 20, 16) for _ in range(3))
    for dtype in (BF16, F16):
        with torch.autocast(DEVICE.type, dtype):
            out, probs = staged(q, k, v)
            scores = attention_scores(q, k)
            values = attention_values(probs, v)
            once, lse = fused(q, k, v)
        assert {out.dtype, probs.dtype, scores.dtype, values.dtype, once.dtype} == {dtype} and lse.dtype == F32
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

    x = T(2, 4, 5, 8)
    with Recorder():
        staged(x, x, x)
        fused(x, x, x)
    for name in ("scores", "softmax", "values", "fused"):
        assert f"triton_attention.{name}.default" in seen


@pytest.mark.parametrize("ours", (staged, fused), ids=("staged", "fused"))
def test_repeatable_bitwise(ours):
    q, k, v = randn(2, 4, 100, 32, dtype=F16), randn(2, 2, 90, 32, dtype=F16), randn(2, 2, 90, 32, dtype=F16)
    first = outputs_and_grads(ours, (q, k, v), {}, [torch.ones(2, 4, 100, 32, device=DEVICE)])
    for _ in range(2 if INTERPRETED else 200):
        again = outputs_and_grads(ours, (q, k, v), {}, [torch.ones(2, 4, 100, 32, device=DEVICE)])
        assert all(torch.equal(again[name], first[name]) for name in first)
