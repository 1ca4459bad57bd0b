"""PyTorch around the functions: gradcheck, opcheck, torch.compile, torch.func, autocast, modes, repeatability."""

import functools
import itertools
from contextlib import nullcontext

import numpy
import pytest
import torch
import torch._dynamo.testing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from tests.reference import (
    ATTENTION, BF16, DEVICE, F16, F32, F64, INF, INTERPRETED, LAYOUTS, T, compare, fused, outputs_and_grads, randn,
    run_python, staged, torch_fused, torch_softmax, torch_staged,
)
from triton_attention.dropout import dropout_op
from triton_attention.fused_backward import fused_backward_op
from triton_attention.operators import must_dispatch
from triton_attention.softmax_backward import mask_gradient_op, softmax_backward_op
from triton_attention_backward import dscores_op
from triton_attention_fused import attention_fused, fused_op
from triton_attention_layer import TritonMultiheadAttention, attention_staged
from triton_attention_scores import attention_scores, scores_op
from triton_attention_softmax import attention_softmax, softmax_op
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


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("layout", (*LAYOUTS, "packed"))
def test_fakes_have_the_strides_of_the_launchers(layout, dtype):
    """A compiled program makes views of what the fake promises."""
    class Compare(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            outs = func(*args, **(kwargs or {}))
            if "triton_attention" in str(func):
                names.append(str(func))
                # of a dimension of size 1 a traced program may have another stride
                strides = lambda t: [s if t.shape[i] > 1 else 3 for i, s in enumerate(t.stride())]  # noqa: E731
                others = tree_map_only(torch.Tensor, lambda t: t.as_strided(t.shape, strides(t)), args)
                with FakeTensorMode() as mode:
                    fakes = func(*tree_map_only(torch.Tensor, mode.from_tensor, others), **(kwargs or {}))
                for out, fake in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (outs, fakes)), strict=True):
                    assert (out.shape, out.stride(), out.dtype) == (fake.shape, fake.stride(), fake.dtype), func
            return outs

    names = []
    for heads, N, ours in itertools.product((1, 2), (1, 11), (staged, fused)):
        q, k, v = (randn(2, h, n, 8, dtype=dtype, layout=layout) for h, n in ((2, 9), (heads, N), (heads, N)))
        with Compare():
            out = ours(q, k, v)[0]
            torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(set(names)) >= 6, names


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
        (softmax_op, (s, mask, 9, None, None, False)), (softmax_backward_op, (s, s, 9, False)),
        (dropout_op, (s, seed, 0.5, 9, False)),  # all is visible: what is not written cannot be compared
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
        cases += [
            (fused_op, (*inputs, *options, 16, None)), (fused_backward_op, (q, None, *saved, *options)),
            (fused_backward_op, (q, None, *saved, *options, None, [1, 4, 5, 7])),
        ]
    for op, args in cases:
        checks = ("test_schema", "test_faketensor", "test_aot_dispatch_static")
        torch.library.opcheck(op.overload, args, test_utils=checks)


def test_operators_may_be_defined_again():
    """importlib.reload of a notebook; in a process of its own, as the old ones are gone."""
    code = """
import importlib, torch, triton_attention_fused, triton_attention.fused_backward
from triton_attention.device import DEVICE
importlib.reload(triton_attention.fused_backward)
importlib.reload(triton_attention_fused)
q = torch.randn(1, 1, 5, 16, device=DEVICE, requires_grad=True)
triton_attention_fused.attention_fused(q, q, q).sum().backward()
print(bool(q.grad.isfinite().all()))
"""
    result = run_python(code)
    assert result.stdout.strip() == "True", result.stderr


BACKEND = "aot_eager" if INTERPRETED else "inductor"


@pytest.mark.parametrize("order", ["heads outside", "rows outside"])
def test_compile_with_a_number_of_keys_that_depends_on_data(order):
    """Keys chosen by a mask: forward and backward have to know no more of their number than that it is one."""
    if order == "rows outside" and BACKEND == "inductor" and torch.__version__ < "2.13":
        pytest.skip("the Inductor of PyTorch 2.11 wants to know whether a transposed gather is channels-last")
    q, x = randn(1, 2, 6, 16), randn(1, 2, 40, 16) if order == "heads outside" else randn(1, 40, 2, 16)
    chosen = torch.rand(40, device=DEVICE) > 0.5

    def attend(q, x):
        k = x[:, :, chosen.nonzero().squeeze(1)] if order == "heads outside" else (
            x[:, chosen.nonzero().squeeze(1)].transpose(1, 2)
        )
        return attention_fused(q, k, k)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        torch._dynamo.reset()
        compiled = torch.compile(attend, backend=BACKEND, fullgraph=True)
        found = torch.autograd.grad(compiled(q, x).sum(), (q, x))
    for ours, exact in zip(found, torch.autograd.grad(attend(q, x).sum(), (q, x)), strict=True):
        assert torch.allclose(ours, exact, atol=1e-6)


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
        for mask in masks:
            compare(lambda *a, f=compiled, m=mask: f(*a, m), lambda *a, f=theirs, m=mask: f(*a, m), q, k, v)
    layer = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
    x, padding = torch.randn(2, 20, 32, device=DEVICE), torch.arange(20, device=DEVICE).expand(2, 20) > 14
    compiled = torch.compile(layer, **options)
    for need_weights in (True, False):
        kwargs = {"key_padding_mask": padding, "need_weights": need_weights}
        assert (compiled(x, x, x, **kwargs)[0] - layer(x, x, x, **kwargs)[0]).abs().max() < 1e-5
    torch._dynamo.reset()


def test_compiled_layer_with_two_masks():
    """attn_mask beside key_padding_mask, bool and floating, forward and backward, in one graph; and under vmap."""
    layer = TritonMultiheadAttention(32, 4, batch_first=True, device=DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    x = torch.randn(2, 20, 32, device=DEVICE, requires_grad=True)
    padding, future = torch.arange(20, device=DEVICE).expand(2, 20) > 14, torch.ones(20, 20, device=DEVICE).triu(1) > 0
    additive = lambda m: torch.zeros(m.shape, device=DEVICE).masked_fill(m, -INF)  # noqa: E731
    for pad, attn in ((padding, future), (additive(padding), additive(future))):
        call = lambda f, x, pad, attn=attn: f(x, x, x, pad, need_weights=False, attn_mask=attn)[0]  # noqa: E731
        ours, eager = (call(f, x, pad) for f in (compiled, layer))
        assert (ours - eager).abs().max() < 1e-5
        a, b = (torch.autograd.grad(o.square().sum(), x)[0] for o in (ours, eager))
        assert (a - b).abs().max() < 1e-4
        each = torch.func.vmap(lambda x, p, call=call: call(layer, x[None], p[None])[0])(x, pad)
        assert (each - eager).abs().max() < 1e-5


@pytest.mark.parametrize("name", ("llama", "bert"))
def test_hugging_face_models_compile_once(name):
    """Padding on the left, or the right, and lengths that change: one graph, our kernels, the answers of SDPA."""
    transformers = pytest.importorskip("transformers")

    def attend(module, q, k, v, mask, scaling=None, dropout=0.0, **_):
        return attention_fused(q, k, v, mask, dropout, False, scaling, True).transpose(1, 2), None

    transformers.AttentionInterface.register("triton", attend)
    transformers.AttentionMaskInterface.register("triton", transformers.masking_utils.sdpa_mask)
    sizes = {"vocab_size": 99, "hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    models = []
    for kind in ("triton", "sdpa"):
        torch.manual_seed(0)
        options = sizes | {"num_attention_heads": 4, "attn_implementation": kind}
        if name == "llama":
            model = transformers.LlamaModel(transformers.LlamaConfig(**options, num_key_value_heads=2, use_cache=False))
        else:
            model = transformers.BertModel(transformers.BertConfig(**options))
        models.append(model.to(DEVICE).eval())
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(models[0], dynamic=True, backend="eager" if INTERPRETED else "inductor")
    for length in (24, 40, 33):
        ids = torch.randint(1, 99, (2, length), device=DEVICE)
        place = torch.arange(length, device=DEVICE)
        padded = torch.stack([place >= 0, place >= 7 if name == "llama" else place < length - 7])
        calls = [f(ids, attention_mask=padded.long()).last_hidden_state[padded] for f in (compiled, models[1])]
        assert (calls[0] - calls[1]).abs().max() < 1e-4
        grads = [
            torch.autograd.grad(call.sin().sum(), model.get_input_embeddings().weight)[0]
            for call, model in zip(calls, models, strict=True)
        ]
        assert (grads[0] - grads[1]).abs().max() < 1e-3 * grads[1].abs().max()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    if not INTERPRETED:
        with torch.profiler.profile() as profile:
            compiled(ids, attention_mask=padded.long()).last_hidden_state.sum().backward()
            torch.cuda.synchronize()
        kernels = {event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA}
        assert {"_fwd_kernel", "_dq_kernel", "_dkdv_kernel"} <= kernels, kernels
        assert not any(word in kernel for kernel in kernels for word in ("flash", "fmha", "sdpa")), kernels
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", ["full", "padding", "column"])
@pytest.mark.parametrize("name", ATTENTION)
def test_compiled_lengths_share_a_graph(name, shape):
    """The first length has a graph, the second one for every length."""
    attend, graphs = ATTENTION[name][0], torch._dynamo.testing.CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(attend, fullgraph=True, backend=graphs)
    for M in (20, 17, 32, 48):
        mask = torch.rand({"full": (M, M), "padding": (2, 1, 1, M), "column": (M, 1)}[shape], device=DEVICE) > 0.3
        q = torch.randn(2, 4, M, 16, device=DEVICE, requires_grad=True)
        ours, eager = compiled(q, q, q, mask)[0], attend(q, q, q, mask)[0]
        assert (ours - eager).abs().max() < 1e-5
        a, b = (torch.autograd.grad(o.square().sum(), q)[0] for o in (ours, eager))
        assert (a - b).abs().max() < 1e-4
    assert graphs.frame_count == 2
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


# ---- recorders and transforms of PyTorch


def sdpa(q, k, v):
    return torch_fused(q, k, v)[0]


@pytest.mark.parametrize("backend", ["eager", BACKEND])
@pytest.mark.parametrize("name", ["staged", "fused"])
def test_compiled_torch_func(name, backend):
    """Of one tensor, where a gradient was lost in silence, and of three; mapped; of the gradient itself."""
    ours, grad, vmap = ATTENTION[name][0], torch.func.grad, torch.func.vmap
    tensors = torch.randn(3, 1, 2, 9, 8, device=DEVICE)

    def losses(f):
        loss, of_one = (lambda *a: f(*a).square().sum()), (lambda x: f(x, x, x).square().sum())
        yield grad(of_one), tensors[:1]
        yield grad(loss, argnums=(0, 1, 2)), tensors
        yield vmap(grad(loss, argnums=(0, 1, 2))), [torch.stack([t, 2 * t]) for t in tensors]
        if name == "staged":
            yield grad(lambda x: grad(of_one)(x).square().sum()), tensors[:1]

    for (f, args), (exact, _) in zip(losses(lambda *a: ours(*a)[0]), losses(sdpa), strict=True):
        grads, expected = (torch.utils._pytree.tree_leaves(g(*args)) for g in
                           (torch.compile(f, fullgraph=True, backend=backend), exact))
        for a, b in zip(grads, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    torch._dynamo.reset()


@pytest.mark.parametrize("budget", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", ["staged", "fused"])
def test_compiled_dropout_is_drawn_once(name, checkpointed, budget):
    """dV = P^T dO of the P that made the output, which is P where V is the identity."""
    attend = {"staged": lambda *a: attention_staged(*a, dropout_p=0.5)[0],
              "fused": lambda *a: attention_fused(*a, dropout_p=0.5)}[name]

    def twice(q, k, v):
        if checkpointed:
            return torch.cat([checkpoint(attend, q.sin(), k, v, use_reentrant=False) for _ in range(2)], 2)
        return torch.cat([attend(q, k, v), attend(q, k, v)], 2)

    q, k = (torch.randn(1, 2, 20, 16, device=DEVICE, requires_grad=True) for _ in range(2))
    v = torch.eye(20, device=DEVICE).repeat(1, 2, 1, 1).requires_grad_()
    with torch._functorch.config.patch(activation_memory_budget=budget):
        compiled, outs = torch.compile(twice, fullgraph=True, backend=BACKEND), []
        for seed in (0, 1, 0):
            torch.manual_seed(seed)
            outs.append(compiled(q, k, v))
        for out in outs[:2]:
            do = torch.randn_like(out)
            dv, = torch.autograd.grad(out, v, do)
            assert (dv - out.detach().mT @ do).abs().max() < 1e-5
            assert not torch.equal(*out.chunk(2, 2))  # two draws
    assert not torch.equal(outs[0], outs[1])
    assert budget < 1 and not INTERPRETED or torch.equal(outs[0], outs[2])
    torch._dynamo.reset()


def test_dropout_under_vmap_and_compile():
    x, compiled = torch.randn(3, 1, 1, 6, 8, device=DEVICE), functools.partial(torch.compile, backend=BACKEND)
    draw = lambda x: attention_fused(x, x, x, dropout_p=0.5)  # noqa: E731
    for randomness in ("same", "different"):
        mapped = compiled(torch.func.vmap(draw, randomness=randomness))(x[:1].expand_as(x))
        assert torch.equal(mapped[0], mapped[1]) == (randomness == "same")
    torch._dynamo.reset()


class Holder(torch.nn.Module):
    """A model with a layer in it, called with weights and without."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.linear = layer, torch.nn.Linear(16, 16, device=DEVICE)

    def forward(self, x):
        y = self.linear(x)
        out, weights = self.layer(y, y, y)
        return self.linear(out + self.layer(x, y, y, need_weights=False)[0]), weights


def holders():
    """(ours, PyTorch's with the same parameters, an input)."""
    models = [Holder(layer(16, 2, batch_first=True, device=DEVICE))
              for layer in (TritonMultiheadAttention, torch.nn.MultiheadAttention)]
    models[1].load_state_dict(models[0].state_dict())
    return *models, torch.randn(2, 7, 16, device=DEVICE)


def gradients(model, x):
    out, weights = model(x)
    (out.square().sum() + weights.square().sum()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("record", [
    lambda model, x: torch.export.export(model, (x,), strict=True).module(),
    lambda model, x: torch.export.export(model, (x,), strict=False).module(),
    lambda model, x: torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC,
                                                                       1: torch.export.Dim.DYNAMIC},)).module(),
    lambda model, x: torch.jit.trace(model, (x,)), lambda model, x: torch.fx.symbolic_trace(model),
], ids=("export", "export, not strict", "export, dynamic", "jit.trace", "fx"))
def test_recorded_models_are_right_and_train(record):
    ours, theirs, x = holders()
    recorded = record(ours, x)
    for out, exact in zip(recorded(x), theirs(x), strict=True):
        assert (out - exact).abs().max() < 1e-5
    grads, exact = gradients(recorded, x), gradients(theirs, x)
    assert all((grads[name] - grad).abs().max() < 1e-4 for name, grad in exact.items())


@pytest.mark.parametrize("kind", ["export", "jit"])
def test_recorded_models_run_in_another_process(kind, tmp_path):
    """It imports our module, which brings the operators."""
    ours, _, x = holders()
    path, io = str(tmp_path / "model.pt2"), str(tmp_path / "io.pt")
    if kind == "export":
        torch.export.save(torch.export.export(ours.eval(), (x,)), path)
    else:
        torch.jit.save(torch.jit.trace(ours, (x,)), path)
    torch.save((x, ours(x)[0]), io)
    load = "torch.export.load(path).module()" if kind == "export" else "torch.jit.load(path)"
    run = run_python(f"import torch, triton_attention_layer\npath = {path!r}\nx, y = torch.load({io!r})\n"
                     f"print((({load})(x)[0] - y).abs().max().item() < 1e-6)")
    assert run.stdout.split() == ["True"], run.stderr


def test_exported_gradients_of_every_operator():
    """Masks, sinks, dropout, 16 bits: the operators' own derivatives against those of the functions."""
    class Call(torch.nn.Module):
        def __init__(self, f):
            super().__init__()
            self.f = f

        def forward(self, *args):
            return self.f(*args)

    q, k, v = (randn(1, 2, 9, 8) for _ in range(3))
    bias, sinks = randn(1, 1, 1, 9), torch.randn(2, device=DEVICE, requires_grad=True)
    cases = [
        (lambda *a: attention_fused(*a[:4], sinks=a[4], is_causal=True, return_lse=True), (q, k, v, bias, sinks)),
        (lambda *a: attention_staged(*a, is_causal=True), (q, k, v, bias)),
        (lambda *a: attention_staged(*a), [t.half().detach().requires_grad_() for t in (q, k, v)]),
        (lambda *a: attention_staged(*a, dropout_p=0.3), (q, k, v)),
        (lambda *a: attention_fused(*a, dropout_p=0.3), (q, k, v)),
    ]
    for f, args in cases:
        recorded, results = torch.export.export(Call(f), tuple(args), strict=False).module(), []
        for g in (f, recorded):
            torch.manual_seed(0)
            outs = g(*args)
            outs = outs if isinstance(outs, tuple) else (outs,)
            results.append(torch.autograd.grad(sum(o.float().square().sum() for o in outs), args))
        for a, b in zip(*results, strict=True):
            tolerance = 5e-3 if a.dtype == F16 else 1e-4
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    recorded = torch.export.export(Call(fused), (q, k, v), strict=False).module()
    grad, = torch.autograd.grad(recorded(q, k, v)[0].sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="attention_fused has no second derivative"):
        grad.sum().backward()


def test_script_says_what_to_use():
    with pytest.raises(NotImplementedError, match="use torch.jit.trace, torch.export or torch.compile"):
        torch.jit.script(holders()[0])


def test_whole_numbers_and_flags_of_every_type():
    q = torch.randn(1, 2, 20, 8, device=DEVICE)
    sizes = (numpy.int64(3), numpy.int32(0))
    ours = attention_fused(q, q, q, is_causal=numpy.bool_(True), window_size=sizes, block_m=numpy.int64(16))
    assert torch.equal(ours, attention_fused(q, q, q, is_causal=True, window_size=(3, 0), block_m=16))
    half = lambda q: attention_fused(q, q, q, window_size=(q.shape[2] // 2, 0))  # noqa: E731
    compiled = torch.compile(half, fullgraph=True, dynamic=True, backend=BACKEND)
    assert (compiled(q) - half(q)).abs().max() < 1e-5
    for wrong in ({"is_causal": 1}, {"is_causal": numpy.int64(1)}, {"window_size": (1.0, 0)}, {"block_m": 16.0},
                  {"window_size": (numpy.bool_(True), 0)}, {"block_m": True}):
        with pytest.raises(TypeError):
            attention_fused(q, q, q, **wrong)
    torch._dynamo.reset()


# ---- who has to see the operators, though a call is eager


class Logging(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Functions(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def doors(x):
    """name -> (context, what x becomes in it)."""
    yield "dispatch mode", Logging(), lambda: x
    yield "function mode", Functions(), lambda: x
    yield "flop counter", FlopCounterMode(display=False), lambda: x
    yield "fake", FakeTensorMode(allow_non_fake_inputs=True), lambda: torch.empty(2, device=DEVICE)
    yield "forward mode", forward_ad.dual_level(), lambda: forward_ad.make_dual(x, x)
    yield "meta", nullcontext(), lambda: x.to("meta")
    yield "subclass", nullcontext(), lambda: x.as_subclass(Subclass)
    yield "zero tensor", nullcontext(), lambda: torch._efficientzerotensor(x.shape, device=DEVICE)
    yield "conjugate", nullcontext(), lambda: x.to(torch.complex64).conj()
    yield "negative", nullcontext(), lambda: torch.view_as_complex(torch.randn(5, 2, device=DEVICE)).conj().imag
    yield "functional", nullcontext(), lambda: torch._to_functional_tensor(x)
    yield "sparse", nullcontext(), lambda: x.to_sparse()
    yield "nested", nullcontext(), lambda: torch.nested.nested_tensor([x])


def test_who_has_to_see_the_operators():
    x = torch.randn(2, 3, device=DEVICE)
    for name, context, become in doors(x):
        with context:
            assert must_dispatch((None, 1.0, become())), name
    seen = []
    for transform in (torch.func.vmap, torch.func.functionalize, torch._vmap_internals._vmap):
        transform(lambda t: seen.append(must_dispatch((t,))) or t)(x)
    torch.func.grad(lambda t: seen.append(must_dispatch((t,))) or t.sum())(x)
    torch.jit.trace(lambda t: seen.append(must_dispatch((t,))) or 2 * t, (x,), check_trace=False)
    assert seen and all(seen)
    for plain in (x, torch.nn.Parameter(x), x.mT, torch.nn.Parameter(x).detach()):
        with torch.autograd.graph.save_on_cpu(), torch.device(DEVICE):
            assert not must_dispatch((plain,))
    with torch.inference_mode():
        assert not must_dispatch((x, torch.ones(2, device=DEVICE), True))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ATTENTION)
def test_batched_gradients(name):
    """By tensors of PyTorch's older vmap."""
    ours, theirs = ATTENTION[name]
    q, k, v = (randn(1, 2, 5, 4) for _ in range(3))
    cotangents = torch.randn(3, 1, 2, 5, 4, device=DEVICE)
    grads, exact = (torch.autograd.grad(f(q, k, v)[0], (q, k, v), cotangents, is_grads_batched=True)
                    for f in (ours, theirs))
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(grads, exact, strict=True))
    jacobian, exact = (torch.autograd.functional.jacobian(lambda q, f=f: f(q, k, v)[0], q, vectorize=True)
                       for f in (ours, theirs))
    assert (jacobian - exact).abs().max() < 1e-5


def tangents(function, args, which):
    """(outputs, their tangents) of torch.func.jvp by the arguments `which` is True of, each with a random tangent."""
    torch.manual_seed(5)
    directions = tuple(torch.randn_like(a) for a in args)
    chosen = tuple(a for a, w in zip(args, which, strict=True) if w)

    def call(*some):
        some = iter(some)
        out = function(*(next(some) if w else a for a, w in zip(args, which, strict=True)))
        return out if isinstance(out, tuple) else (out,)

    return torch.func.jvp(call, chosen, tuple(d for d, w in zip(directions, which, strict=True) if w))


@pytest.mark.filterwarnings("ignore:forward mode through attention_fused")
@pytest.mark.parametrize("name", ATTENTION)
def test_forward_mode(name):
    """jvp by each argument alone and by all, jacfwd, and dual numbers, against PyTorch's operations in float64."""
    ours, theirs = ATTENTION[name]
    q, k, v = (randn(1, h, n, d, dtype=F64, grad=False) for h, n, d in ((2, 5, 4), (1, 7, 4), (1, 7, 3)))
    bias = randn(1, 2, 1, 7, dtype=F64, grad=False)
    bias[..., 3] = -INF
    for which in ((True, True, True, True), *(tuple(i == j for i in range(4)) for j in range(4))):
        for causal in (False, True):
            both = (
                tangents(lambda *a, f=f, c=causal: f(*a, is_causal=c), (q, k, v, bias), which) for f in (ours, theirs)
            )
            for mine, exact in zip(*both, strict=True):
                assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, exact, strict=True))
    jacobian, exact = (torch.func.jacfwd(lambda q, f=f: f(q, k, v)[0])(q) for f in (ours, theirs))
    assert torch.allclose(jacobian, exact, atol=1e-12)
    for context in (torch.enable_grad, torch.no_grad):
        with context(), forward_ad.dual_level():
            dual, exact = (f(forward_ad.make_dual(q, q), k, v)[0] for f in (ours, theirs))
            assert torch.allclose(*(forward_ad.unpack_dual(t).tangent for t in (dual, exact)), atol=1e-12)


def test_forward_mode_of_the_rest():
    q, k, v = (randn(1, h, n, d, dtype=F64, grad=False) for h, n, d in ((2, 5, 4), (1, 7, 4), (1, 7, 3)))
    options = {"window_size": (2, 1), "softcap": 1.5}
    args, all_of_them = (q, k, v, randn(1, 1, 1, 2, dtype=F64, grad=False).view(2)), (True,) * 4
    with pytest.warns(UserWarning, match="forward mode through attention_fused stores scores of M x N"):
        both = [
            tangents(lambda q, k, v, s, f=f: f(q, k, v, sinks=s, **options), args, all_of_them)
            for f in (fused, torch_fused)
        ]
    for mine, exact in zip(*both, strict=True):
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(mine, exact, strict=True))

    def without_weights(q, k, v):
        return attention_staged(q, k, v, is_causal=True, enable_gqa=True, need_weights=False)[0]

    both = (tangents(f, (q, k, v), (True,) * 3) for f in (
        without_weights, lambda q, k, v: torch_staged(q, k, v, is_causal=True)[0]
    ))
    assert all(torch.allclose(a[0], b[0], atol=1e-12) for a, b in zip(*both, strict=True))
    hessian, exact = (  # forward over reverse
        torch.func.hessian(lambda q, f=f: f(q, k, v)[0].sin().sum())(q) for f in (staged, torch_staged)
    )
    assert torch.allclose(hessian, exact, atol=1e-12)


@pytest.mark.filterwarnings("ignore:forward mode through attention_fused")
@pytest.mark.parametrize("ours", (attention_fused, lambda *args: attention_staged(*args)[0]))
def test_forward_mode_with_dropout(ours):
    """The weights that the call dropped: the tangent is a quotient of differences of calls with the same seed."""
    q, k, v, dq = (randn(1, 2, 5, 4, dtype=F64, grad=False) for _ in range(4))

    def call(q):
        torch.manual_seed(2)
        return ours(q, k, v, None, 0.5)

    _, tangent = torch.func.jvp(call, (q,), (dq,))
    assert torch.allclose(tangent, (call(q + 1e-6 * dq) - call(q - 1e-6 * dq)) / 2e-6, atol=1e-7)


def test_unusual_tensors_and_modes_give_the_same():
    x = torch.randn(1, 2, 6, 8, device=DEVICE)
    zero = torch._efficientzerotensor(x.shape, device=DEVICE)
    for ours in (staged, fused):
        expected = ours(x, x, x)[0]
        for context in (Logging(), Functions(), torch.device(DEVICE), torch.inference_mode()):
            with context:
                assert torch.equal(ours(x, x, x)[0], expected)
        assert torch.equal(ours(x, x, zero)[0], torch.zeros_like(x))
        assert torch.equal(ours(x.as_subclass(Subclass), x, x)[0], expected)
